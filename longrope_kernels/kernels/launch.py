"""A launch of a Triton kernel as a value, and tensors as kernels take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..calls.records import Keys


class Launch(NamedTuple):
    """One call: ``kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)``."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, int]
    warps: int
    stages: int


def tensor_args(x: torch.Tensor) -> tuple[Any, ...]:
    """(pointer, batch stride, token stride, head stride) of a (B, S, H, D) tensor."""
    return (x, *x.stride()[:3])


def as_bytes(cache: Keys) -> Keys:
    """A float8 cache as kernels take it: as bytes, and so are no others."""
    if cache.k.dtype != torch.float8_e4m3fn:
        return cache
    return cache._replace(k=cache.k.view(torch.uint8), v=cache.v.view(torch.uint8))


def matrix_args(x: torch.Tensor | None) -> tuple[Any, ...]:
    """(pointer, row stride, stride) of a matrix that may be absent."""
    return (None, 0, 0) if x is None else (x, *x.stride())


def vector_args(x: torch.Tensor | None) -> tuple[Any, ...]:
    """(pointer, stride) of a vector that may be absent."""
    return (None, 0) if x is None else (x, x.stride(0))
