"""What attends: this package, its kernel without the rotation, and its peers; inputs and truth."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ropes import DEVICE, K_HEADS, Q_HEADS, not_importable, rope, transformers_rotary
from torch.nn.attention import SDPBackend, sdpa_kernel
from without_rotation import attend_without_rotation

from longrope_kernels import attention, backends

DTYPE = torch.bfloat16
SDPA = {
    "SDPA flash, no rotation": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN, no rotation": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient, no rotation": SDPBackend.EFFICIENT_ATTENTION,
}
# Ours: the arguments of `attention`.
OURS = {
    "reference": {"backend": "reference"},
    "composed": {"backend": "composed"},
    "triton prepass": {"backend": "triton", "k_rotation": "prepass"},
    "triton registers": {"backend": "triton", "k_rotation": "registers"},
    **{name: {"backend": name} for name in backends.FLASH_BACKENDS},
}
EAGER = "transformers eager, SDPA"
NO_ROTATION = "triton, no rotation"
NAMES = (EAGER, *OURS, NO_ROTATION, *SDPA)
LONGEST_REFERENCE = 256  # it is no peer: its scores lie in memory, in float32

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Chunks = dict[tuple[int, int], torch.Tensor]


class Shape(NamedTuple):
    """One call: q (1, tokens, 32, dim), k and v with 8 heads."""

    tokens: int
    dim: int
    causal: bool

    def __str__(self) -> str:
        return f"S = {self.tokens}, d = {self.dim}, {'causal' if self.causal else 'full'}"

    def flops(self, direction: str) -> int:
        """Two products forward, five backward; half of each where the mask hides half."""
        forward = 4 * Q_HEADS * self.dim * self.tokens**2 // (2 if self.causal else 1)
        return forward if direction == "forward" else 5 * forward // 2

    def traffic(self, direction: str) -> int:
        """Bytes: every input read once, every output written once."""
        q, kv = (2 * heads * self.dim * self.tokens for heads in (Q_HEADS, K_HEADS))
        return 2 * q + 2 * kv if direction == "forward" else 4 * q + 4 * kv


@lru_cache(maxsize=1)
def make_inputs(shape: Shape) -> Inputs:
    """The inputs of all rows of one shape, which follow one another."""
    return Inputs(shape)


class Truth(NamedTuple):
    """Some rows of the result in float64, by where they begin and end, and their gradients.

    The gradients are those of these rows alone: dq there, dk and dv of all keys.
    """

    out: Chunks
    dq: Chunks
    dk: torch.Tensor
    dv: torch.Tensor


class Inputs:
    """Normal q, k, v and gradient of the output, bfloat16."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> torch.Tensor:
            x = torch.randn((1, shape.tokens, heads, shape.dim), generator=generator)
            return x.to(DEVICE, DTYPE)

        self.shape = shape
        self.q, self.k, self.v = normal(Q_HEADS), normal(K_HEADS), normal(K_HEADS)
        self.d_out = normal(Q_HEADS)
        self.positions = torch.arange(shape.tokens, device=DEVICE)
        self.lengths = torch.full((1,), shape.tokens, device=DEVICE)
        # The first and the last KV head, and the query heads that read them.
        groups = Q_HEADS // K_HEADS
        self.kv_heads = [0, K_HEADS - 1]
        self.q_heads = [h * groups + g for h in self.kv_heads for g in range(groups)]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """The rows that are checked: at the beginning, in the middle and at the end."""
        tokens = self.shape.tokens
        return [(begin, begin + 8) for begin in (0, tokens // 2 - 3, tokens - 8)]

    @cached_property
    def d_out_of_chunks(self) -> torch.Tensor:
        """The gradient with zeros where nothing is checked, so that dk and dv can be."""
        kept = torch.zeros_like(self.d_out)
        for a, b in self.chunks:
            kept[:, a:b, self.q_heads] = self.d_out[:, a:b, self.q_heads]
        return kept

    @cached_property
    def turned(self) -> Truth:
        """With q and k rotated."""
        return self._truth(self.positions)

    @cached_property
    def unturned(self) -> Truth:
        """Without rotation: all tokens at position 0."""
        return self._truth(torch.zeros_like(self.positions))

    def _truth(self, positions: torch.Tensor) -> Truth:
        k, v = (x[:, :, self.kv_heads].double().requires_grad_() for x in (self.k, self.v))
        outs, dqs = {}, {}
        for a, b in self.chunks:
            # The rows as a chunk of a prompt: their last query stands at the last key it sees.
            keys = b if self.shape.causal else self.shape.tokens
            q = self.q[:, a:b, self.q_heads].double().requires_grad_()
            out = attention(
                q,
                k[:, :keys],
                v[:, :keys],
                positions[a:b],
                rope(self.shape.dim),
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
        """transformers' (cos, sin), each (1, tokens, dim). It gets them for free."""
        return transformers_rotary(self.shape.dim).table(self.positions[None], DTYPE)


@cache
def missing(name: str) -> str | None:
    """Why an implementation cannot be timed here, or None."""
    if name == EAGER:
        return not_importable("transformers")
    if name in SDPA:
        return _sdpa_refuses(name)
    backend = OURS.get(name, {"backend": "triton"})["backend"]
    if backend in ("reference", "composed"):
        return None
    if backends.missing(backend) is None and DEVICE.type != "cuda":
        return "serves cuda only"
    return backends.missing(backend)


def rotates(name: str) -> bool:
    return name not in SDPA and name != NO_ROTATION


def exact_angles(name: str) -> bool:
    return name != EAGER


def implementation(name: str, inputs: Inputs) -> Attention:
    """The function of q, k and v, (1, tokens, heads, dim) each, to time."""
    causal = inputs.shape.causal
    if name in OURS:
        return lambda q, k, v: attention(  # type: ignore[return-value]
            q,
            k,
            v,
            inputs.positions,
            rope(inputs.shape.dim),
            lengths=inputs.lengths,
            causal=causal,
            **OURS[name],
        )
    if name == NO_ROTATION:
        return lambda q, k, v: attend_without_rotation(q, k, v, causal)
    if name in SDPA:
        return lambda q, k, v: _sdpa(name, q, k, v, causal)
    cos, sin = inputs.table
    rotate = transformers_rotary(inputs.shape.dim).apply

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = rotate(q, k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    return eager


def _sdpa(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    """torch's SDPA by one of its kernels; the efficient one wants a KV head for each query head."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if SDPA[name] == SDPBackend.EFFICIENT_ATTENTION:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    with sdpa_kernel(SDPA[name]):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


def _sdpa_refuses(name: str) -> str | None:
    if DEVICE.type != "cuda" and SDPA[name] != SDPBackend.FLASH_ATTENTION:
        return "needs a GPU"
    x: Any = torch.zeros(1, 64, K_HEADS, 64, device=DEVICE, dtype=DTYPE)
    try:
        _sdpa(name, x, x, x, True)
    except RuntimeError as error:
        return str(error)
    return None
