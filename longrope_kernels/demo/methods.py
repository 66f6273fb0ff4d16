"""The ways to rotate that the demo compares, under one signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ..backends import choose as backends
from ..ops.rotary import apply_rotary
from ..rope.value import Rope
from .peers import TransformersRotary

Pair = tuple[torch.Tensor, torch.Tensor]


class Method(NamedTuple):
    """``rotate(q, k, positions)`` with q, k (1, seq, heads, dim) and positions (1, seq)."""

    name: str
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]


def usable_backends(device: torch.device) -> list[str]:
    """The backends that are ready and made for this device (Triton's interpreter is not)."""
    return [
        row["name"]
        for row in backends.table()
        if row["missing"] is None and {"any", device.type} & set(row["devices"])
    ]


def methods(
    rope: Rope, transformers_rotary: TransformersRotary, device: torch.device
) -> list[Method]:
    """transformers, then each backend that runs here."""
    return [
        Method("transformers", partial(_by_transformers, transformers_rotary)),
        *(Method(name, partial(_by_backend, rope, name)) for name in usable_backends(device)),
    ]


def _by_transformers(
    rotary: TransformersRotary, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
) -> Pair:
    table = rotary.table(positions, q.dtype)
    q_out, k_out = rotary.apply(q.transpose(1, 2), k.transpose(1, 2), *table)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _by_backend(
    rope: Rope, backend: str, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
) -> Pair:
    lengths = positions.max(dim=1).values + 1
    q_out, k_out = apply_rotary(q, k, positions, rope, lengths=lengths, backend=backend)
    assert k_out is not None
    return q_out, k_out
