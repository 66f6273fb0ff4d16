"""What attends: this package, its kernel without the rotation, and its peers; inputs and truth."""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from attention_peers import (
    COMPILED,
    EAGER,
    K_ALONE,
    OF_CHUNKS,
    PADDED,
    SDPA,
    STOCK,
    Attention,
    flashinfer_fused,
    sdpa,
    sdpa_refuses,
    stock,
)
from copies import Copies
from parameters import COMPILED_PROMPTS, Geometry, Prompt, of_dim
from ropes import (
    DEVICE,
    DTYPE,
    EXACT,
    FAST,
    FLOAT32,
    normal,
    not_importable,
    plain_rope,
    rope,
    transformers_rotary,
)
from without_rotation import attend_without_rotation

from longrope_kernels import apply_rotary, attention
from longrope_kernels.backends import choose as backends

# Ours: the arguments of `attention`.
OURS = {
    "triton prepass": {"backend": "triton", "k_rotation": "prepass"},
    "triton registers": {"backend": "triton", "k_rotation": "registers"},
    **{name: {"backend": name} for name in backends.ATTENTION_BACKENDS if name != "triton"},
}
NO_ROTATION = "triton, no rotation"
FLASHINFER = "FlashInfer, ROPE_LLAMA"  # plain RoPE, no backward
NAMES = (EAGER, COMPILED, *STOCK, FLASHINFER, *OURS, NO_ROTATION, *SDPA)
PEERS = (EAGER, COMPILED, *STOCK, FLASHINFER, *SDPA, *backends.FLASH_BACKENDS)
# Tokens, of those whose scores lie in memory.
LONGEST = {"reference": 256, "SDPA math, no rotation": 2048}
LONGEST_MASK = 8192  # of those whose mask does

Chunks = dict[tuple[int, int], torch.Tensor]


class Shape(NamedTuple):
    """One call: q (1, tokens, heads, dim), k and v; without a geometry 32 and 8 heads.

    ``queries``: of these tokens the last, where q has not all of them.
    """

    tokens: int
    dim: int
    causal: bool
    geometry: Geometry | None = None
    queries: int = 0

    @classmethod
    def of(cls, prompt: Prompt, geometry: Geometry | None) -> Shape:
        return cls(prompt.tokens, prompt.dim, prompt.causal, geometry, prompt.queries)

    @property
    def rows(self) -> int:
        """Tokens of q."""
        return self.queries or self.tokens

    @property
    def heads(self) -> Geometry:
        return self.geometry or of_dim(self.dim)

    def __str__(self) -> str:
        of_model = self.geometry.suffix if self.geometry else ""
        mask = "causal" if self.causal else "full"
        chunk = f"last {self.queries} of " if self.queries else ""
        dtype = "" if DTYPE.itemsize == 2 else ", float32"
        return f"S = {chunk}{self.tokens}, d = {self.dim}, {mask}{dtype}{of_model}"

    def flops(self, direction: str) -> int:
        """Two products forward, five backward; half of each where the mask hides half."""
        heads = self.heads.q_heads
        pairs = self.rows * self.tokens - (self.rows**2 // 2 if self.causal else 0)
        forward = 4 * heads * self.dim * pairs
        return forward if direction == "forward" else 5 * forward // 2

    def traffic(self, direction: str) -> int:
        """Bytes: every input read once, every output written once."""
        q = DTYPE.itemsize * self.heads.q_heads * self.dim * self.rows
        kv = DTYPE.itemsize * self.heads.k_heads * self.dim * self.tokens
        return 2 * q + 2 * kv if direction == "forward" else 4 * q + 4 * kv


@lru_cache(maxsize=1)
def make_copies(shape: Shape) -> Copies[Inputs]:
    """The inputs of all rows of one shape, which follow one another."""
    heads = shape.heads.q_heads + 2 * shape.heads.k_heads
    return Copies(lambda: Inputs(shape), shape.tokens * heads * shape.dim * DTYPE.itemsize)


class Truth(NamedTuple):
    """Some rows of the result in float64, by where they begin and end, and their gradients.

    The gradients are those of these rows alone: dq there, dk and dv of all keys.
    """

    out: Chunks
    dq: Chunks
    dk: torch.Tensor
    dv: torch.Tensor


class Inputs:
    """Normal q, k, v and gradient of the output."""

    def __init__(self, shape: Shape) -> None:
        q_heads, k_heads = shape.heads.q_heads, shape.heads.k_heads

        def heads(count: int, seed: int, tokens: int = shape.tokens) -> torch.Tensor:
            return normal(1, tokens, count, shape.dim, dtype=DTYPE, seed=seed)

        self.shape = shape
        self.q, self.d_out = (heads(q_heads, seed, shape.rows) for seed in (0, 3))
        self.k, self.v = heads(k_heads, 1), heads(k_heads, 2)
        self.ahead = shape.tokens - shape.rows  # of the first query
        self.positions = torch.arange(shape.tokens, device=DEVICE)
        self.lengths = torch.full((1,), shape.tokens, device=DEVICE)
        # The first and the last KV head, and the query heads that read them.
        groups = q_heads // k_heads
        self.kv_heads = [0, k_heads - 1]
        self.q_heads = [h * groups + g for h in self.kv_heads for g in range(groups)]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """The rows that are checked: at the beginning, in the middle and at the end."""
        rows = self.shape.rows
        return [(begin, begin + 8) for begin in (0, rows // 2 - 3, rows - 8)]

    @cached_property
    def d_out_of_chunks(self) -> torch.Tensor:
        """The gradient with zeros where nothing is checked, so that dk and dv can be."""
        kept = torch.zeros_like(self.d_out)
        for a, b in self.chunks:
            kept[:, a:b, self.q_heads] = self.d_out[:, a:b, self.q_heads]
        return kept

    def truth(self, name: str) -> Truth:
        """What is right of an implementation: rotated as it rotates."""
        if name == K_ALONE:
            return self.turned_keys
        if name in SDPA or name == NO_ROTATION:
            return self.unturned
        return self.turned_plainly if name == FLASHINFER else self.turned

    @cached_property
    def turned(self) -> Truth:
        """With q and k rotated."""
        return self._truth(self.positions, rope(self.shape.heads.rotated))

    @cached_property
    def turned_plainly(self) -> Truth:
        """With q and k rotated by plain RoPE."""
        return self._truth(self.positions, plain_rope(self.shape.heads.rotated))

    @cached_property
    def unturned(self) -> Truth:
        """Without rotation: all tokens at position 0."""
        return self._truth(torch.zeros_like(self.positions), rope(self.shape.heads.rotated))

    @cached_property
    def turned_keys(self) -> Truth:
        """With k rotated and q not: its tokens at position 0."""
        zeros = torch.zeros_like(self.positions)
        return self._truth(self.positions, rope(self.shape.heads.rotated), zeros)

    def _truth(
        self, positions: torch.Tensor, turn: Any, of_queries: torch.Tensor | None = None
    ) -> Truth:
        of_queries = positions if of_queries is None else of_queries
        k, v = (x[:, :, self.kv_heads].double().requires_grad_() for x in (self.k, self.v))
        outs, dqs = {}, {}
        for a, b in self.chunks:
            # The rows as a chunk of a prompt: their last query stands at the last key it sees.
            keys = self.ahead + b if self.shape.causal else self.shape.tokens
            q = self.q[:, a:b, self.q_heads].double().requires_grad_()
            out = attention(
                q,
                k[:, :keys],
                v[:, :keys],
                of_queries[self.ahead + a : self.ahead + b],
                turn,
                key_positions=positions[:keys],
                lengths=self.lengths,
                causal=self.shape.causal,
                backend="reference",
            )
            out.backward(self.d_out[:, a:b, self.q_heads].double())
            outs[a, b], dqs[a, b] = out.detach(), q.grad
        return Truth(outs, dqs, k.grad, v.grad)

    @cached_property
    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' (cos, sin), each (1, tokens, rotated). It gets them for free."""
        return transformers_rotary(self.shape.heads).table(self.positions[None], DTYPE)


@cache
def missing(name: str) -> str | None:
    """Why an implementation cannot be timed here, or None."""
    if name in (EAGER, COMPILED):
        return not_importable("transformers")
    if name in STOCK:
        return not_importable("transformers") or backends.missing(STOCK[name])
    if name == FLASHINFER:
        return not_importable("flashinfer") or (None if DEVICE.type == "cuda" else "needs a GPU")
    if name in SDPA:
        return sdpa_refuses(name)
    backend = OURS.get(name, {"backend": "triton"})["backend"]
    if backend in ("reference", "composed"):
        return None
    device = "cpu" if backend == "native" else "cuda"
    if backends.missing(backend) is None and DEVICE.type != device:
        return f"serves {device} only"
    return backends.missing(backend)


def serves(name: str, shape: Shape, direction: str) -> bool:
    """Whether it has this call, and finds room for it."""
    if name == "native" and (shape.queries or not shape.causal or direction == "backward"):
        return False
    if shape.queries and name not in (*OURS, *OF_CHUNKS):
        return False
    if name == PADDED and not shape.queries:
        return False
    if name == K_ALONE and direction == "backward":
        return False
    if name == FLASHINFER and (direction == "backward" or shape.heads.rotated < shape.dim):
        return False
    prompt = Prompt(shape.tokens, shape.dim, shape.causal, shape.queries)
    if name == COMPILED and prompt not in COMPILED_PROMPTS:
        return False
    if name == "cuda" and direction == "backward" and shape.tokens > LONGEST_MASK:
        return False
    return shape.tokens <= LONGEST.get(name, shape.tokens)


def angles(name: str) -> int:
    """Roundings of its angles, for `ropes.allowed_error`."""
    if name == FLASHINFER:
        return FAST
    return FLOAT32 if name in (EAGER, COMPILED, *STOCK) else EXACT


def implementation(name: str, inputs: Inputs) -> Attention:
    """The function of q, k and v, (1, tokens, heads, dim) each, to time."""
    causal = inputs.shape.causal
    if name in OURS:
        return (
            lambda q, k, v: attention(  # type: ignore[return-value]
                q,
                k,
                v,
                inputs.positions[inputs.ahead :],
                rope(inputs.shape.heads.rotated),
                key_positions=inputs.positions if inputs.ahead else None,
                lengths=inputs.lengths,
                causal=causal,
                **OURS[name],
            )
        )
    if name == NO_ROTATION:
        return lambda q, k, v: attend_without_rotation(q, k, v, causal)
    if name == K_ALONE:
        rest = inputs.positions, rope(inputs.shape.heads.rotated)
        return lambda q, k, v: sdpa(
            name, q, apply_rotary(k, None, *rest, lengths=inputs.lengths)[0], v, causal
        )
    if name in SDPA:
        return lambda q, k, v: sdpa(name, q, k, v, causal)
    if name == FLASHINFER:
        return flashinfer_fused(causal)
    return stock(name, inputs.shape.heads, causal, *inputs.table)
