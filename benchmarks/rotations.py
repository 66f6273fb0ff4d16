"""What rotates: the backends of this package, its peers and plain copies, and their inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch
from copies import Copies
from measure import Ceiling, require_time_to_compile
from parameters import Geometry
from ropes import (
    DEVICE,
    EXACT,
    FAST,
    FLOAT32,
    backend_missing,
    normal,
    not_importable,
    plain_rope,
    rope,
    transformers_rotary,
)

from longrope_kernels import apply_rotary
from longrope_kernels.backends import choose as backends
from longrope_kernels.backends import native

EAGER, COMPILED = "transformers eager", "transformers torch.compile"
XFORMERS = "xformers rope_padded, plain RoPE"
PACKAGES = {  # of the peers that need a GPU: the module that rotates
    "liger": "liger_kernel.ops.rope",
    "flash-attn": "flash_attn.layers.rotary",
    "flashinfer": "flashinfer.rope",
    XFORMERS: "xformers.ops",
}
HUGE = "clone in huge pages"  # as "native" asks for them, on a CPU
COPIES = ("clone", HUGE, "copy_")
# Eager comes first: other rows are told against it.
IN_PLACE = tuple(name for name in backends.BACKENDS if name != "reference")
VARIANTS = {
    "forward": (EAGER, COMPILED, "flash-attn", "flashinfer", *backends.BACKENDS, "clone", HUGE),
    "in place": ("liger", "flash-attn", "flashinfer", *IN_PLACE, "copy_"),
    "backward": (EAGER, COMPILED, "liger", "flash-attn", *backends.BACKENDS, "clone"),
    # The rotation of q, and of k into a cache of rotated keys, with v beside it.
    "cache write": (EAGER, XFORMERS, *IN_PLACE, "copy_"),
}
PEERS = (EAGER, COMPILED, *PACKAGES)
CHECKED = 1024  # tokens in a piece that is held against float64, of at most three pieces
Tensors = tuple[torch.Tensor, ...]


@lru_cache(maxsize=1)
def make_copies(tokens: int, dtype: torch.dtype, geometry: Geometry) -> Copies[Inputs]:
    """The inputs of all rows of one size, which follow one another."""
    heads = geometry.q_heads + geometry.k_heads
    nbytes = tokens * heads * geometry.dim * dtype.itemsize
    return Copies(lambda: Inputs(tokens, dtype, geometry), nbytes)


class Inputs:
    """q (1, tokens, heads, dim), k, v, their gradients, and what is right of the results."""

    def __init__(self, tokens: int, dtype: torch.dtype, geometry: Geometry) -> None:
        self.tokens, self.dtype, self.geometry = tokens, dtype, geometry
        self.q, self.k = self._normal(geometry.q_heads, 0), self._normal(geometry.k_heads, 1)
        self.positions = torch.arange(tokens, device=DEVICE)
        self.lengths = torch.full((1,), tokens, device=DEVICE)
        last = max(tokens - CHECKED, 0)
        pieces = [
            torch.arange(begin, min(begin + CHECKED, tokens)) for begin in (0, last // 2, last)
        ]
        self.checked = torch.cat(pieces).unique().to(DEVICE)

    def _normal(self, heads: int, seed: int) -> torch.Tensor:
        return normal(1, self.tokens, heads, self.geometry.dim, dtype=self.dtype, seed=seed)

    @cached_property
    def v(self) -> torch.Tensor:
        return self._normal(self.geometry.k_heads, 2)

    @cached_property
    def grads(self) -> Tensors:
        """Of q and k."""
        return self._normal(self.geometry.q_heads, 3), self._normal(self.geometry.k_heads, 4)

    @cached_property
    def into(self) -> Tensors:
        """Where the ceilings of all rows copy q, k and v to."""
        return tuple(torch.zeros_like(x) for x in (self.q, self.k, self.k))

    @cached_property
    def scratch(self) -> Tensors:
        """q and k for those who rotate in place, further and further; the norms stay."""
        return self.q.clone(), self.k.clone()

    @cached_property
    def leaves(self) -> Tensors:
        """q and k whose gradients are asked for; the result does not depend on their values."""
        return self.q.clone().requires_grad_(), self.k.clone().requires_grad_()

    @cached_property
    def grads_scratch(self) -> Tensors:
        """Liger writes into its gradients."""
        return tuple(x.clone() for x in self.grads)

    @cached_property
    def caches(self) -> Tensors:
        """Of keys and of values."""
        return torch.zeros_like(self.k), torch.zeros_like(self.k)

    def traffic(self, kind: str) -> int:
        """Bytes: q and k read once and written once, for a cache v too."""
        return 2 * (self.q.nbytes + self.k.nbytes * (2 if kind == "cache write" else 1))

    def rotated(self, name: str) -> list[torch.Tensor]:
        """q and k rotated in float64, of the tokens that are checked."""
        return self._rotated64((self.q, self.k), self.positions, name)

    def rotated_back(self, name: str) -> list[torch.Tensor]:
        """The gradients of q and k in float64: rotated the other way."""
        return self._rotated64(self.grads, -self.positions, name)

    def _rotated64(self, pair: Tensors, positions: torch.Tensor, name: str) -> list[torch.Tensor]:
        q, k = (x[:, self.checked].double() for x in pair)
        turn = (plain_rope if name == XFORMERS else rope)(self.geometry.rotated)
        of_call = (positions[self.checked], turn)
        return list(apply_rotary(q, k, *of_call, lengths=self.lengths, backend="reference"))

    @lru_cache(maxsize=2)  # noqa: B019  of one object at a time
    def table(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' (cos, sin), each (1, tokens, rotated). Peers get it for free."""
        return transformers_rotary(self.geometry).table(self.positions[None], dtype)


def missing(name: str) -> str | None:
    """Why an implementation cannot be timed here, or None."""
    if name in backends.BACKENDS:
        return backend_missing(name)
    if name == HUGE:
        return backend_missing("native") if DEVICE.type == "cpu" else "needs a CPU"
    if name in COPIES:
        return None
    reason = not_importable(PACKAGES.get(name, "transformers"))
    return reason or ("needs a GPU" if name in PACKAGES and DEVICE.type != "cuda" else None)


def serves(name: str, kind: str, geometry: Geometry) -> bool:
    """Whether it rotates a part of a head, where the geometry has one."""
    whole = geometry.rotated == geometry.dim
    return whole or name not in ("liger", XFORMERS)


def angles(name: str) -> int:
    """Roundings of its angles, for `allowed_error`."""
    if name in backends.BACKENDS:
        return EXACT
    return FAST if name == XFORMERS else FLOAT32


def rotation(name: str, inputs: Inputs, inplace: bool) -> Callable[..., Tensors]:
    """The function of q and k, (1, tokens, heads, dim) each, to time."""
    if name in backends.BACKENDS:
        return lambda q, k: apply_rotary(  # type: ignore[return-value]
            q,
            k,
            inputs.positions,
            rope(inputs.geometry.rotated),
            lengths=inputs.lengths,
            inplace=inplace,
            backend=name,
        )
    if name == "flashinfer":
        return _flashinfer(inputs, inplace)
    cos, sin = inputs.table(inputs.dtype)
    if name == "flash-attn":
        rotate = importlib.import_module(PACKAGES[name]).apply_rotary_emb
        # It takes the table without the second half, which repeats the first.
        cos, sin = (x[0, :, : inputs.geometry.rotated // 2].contiguous() for x in (cos, sin))
        return lambda q, k: tuple(rotate(x, cos, sin, inplace=inplace) for x in (q, k))
    if name == "liger":  # always in place
        rotate = importlib.import_module(PACKAGES[name]).LigerRopeFunction.apply
    elif name == EAGER:
        rotate = transformers_rotary(inputs.geometry).apply
    else:
        require_time_to_compile()
        rotate = _compiled_transformers(inputs.geometry)

    def heads_first(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        q_out, k_out, *_ = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return heads_first


def cache_write(name: str, inputs: Inputs) -> Callable[..., Tensors]:
    """The function of q, k and v to time: q rotated, and the caches of rotated keys and values.

    Only xformers has both in one kernel. The others rotate and then copy.
    """
    cache_k, cache_v = inputs.caches
    if name == XFORMERS:
        return _xformers(inputs)
    rotate = rotation(name, inputs, False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        q, k = rotate(q, k)
        return q, cache_k.copy_(k), cache_v.copy_(v)

    return run


def _xformers(inputs: Inputs) -> Callable[..., Tensors]:
    """One sequence, whose keys fill the cache: `rope_padded` takes positions from the mask."""
    from xformers.ops import rope_padded
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask

    cache_k, cache_v = inputs.caches
    tokens = inputs.tokens
    mask = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[tokens], kv_padding=tokens, kv_seqlen=[tokens], device=DEVICE
    )

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        out = rope_padded(q, k, v, cache_k, cache_v, mask, theta=10000.0, adjacents=False)
        return out, cache_k, cache_v

    return run


def _flashinfer(inputs: Inputs, inplace: bool) -> Callable[..., Tensors]:
    """By a float32 table as it wants it: the cosines of a token before its sines."""
    module = importlib.import_module(PACKAGES["flashinfer"])
    pairs, dim = inputs.geometry.rotated // 2, inputs.geometry.dim
    table = torch.cat([x[0, :, :pairs] for x in inputs.table(torch.float32)], -1)

    def run(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        flat = [x[0].flatten(1) for x in (q, k)]
        if inplace:
            module.apply_rope_with_cos_sin_cache_inplace(inputs.positions, *flat, dim, table)
            return q, k
        out = module.apply_rope_with_cos_sin_cache(inputs.positions, *flat, dim, table)
        return tuple(x.view_as(y) for x, y in zip(out, (q, k), strict=True))

    return run


def copy(name: str, kind: str, inputs: Inputs) -> Ceiling:
    """A copy of what is rotated: by "clone" or `HUGE` into fresh memory, by "copy_" in place."""
    given = [inputs.q, inputs.k, *([inputs.v] if kind == "cache write" else [])]
    if name == "clone":
        return Ceiling(name, lambda: [x.clone() for x in given], inputs.traffic(kind))
    if name == HUGE:
        return Ceiling(name, lambda: [_in_huge_pages(x) for x in given], inputs.traffic(kind))
    into = inputs.into[: len(given)]
    return Ceiling(
        name,
        lambda: [a.copy_(b) for a, b in zip(into, given, strict=True)],
        inputs.traffic(kind),
    )


def _in_huge_pages(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    native.ask_for_huge_pages(y)
    return y.copy_(x)


@lru_cache(maxsize=1)
def _compiled_transformers(geometry: Geometry) -> Any:
    return torch.compile(transformers_rotary(geometry).apply, dynamic=False)
