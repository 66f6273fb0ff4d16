"""How far each method is from the formula in float64, by position."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ops.rotary import apply_rotary
from ..rope.value import Rope
from .methods import Method

_LOW_DTYPES = (torch.float32, torch.bfloat16)


def errors_at(
    last: int, q: torch.Tensor, k: torch.Tensor, rope: Rope, methods: list[Method]
) -> list[dict[str, Any]]:
    """The errors of every method for a sequence that ends at position ``last``.

    Args:
        last: position of the last token; the sequence's length, ``last + 1``, chooses the set.
        q, k: (1, seq, heads, dim) float32, unrotated.
        rope: of the model.
        methods: what to compare.

    Returns:
        One row a method, then one named "rounding" (the float64 result rounded to the dtype), of
        ``angle_error`` (largest over tokens and pairs, in rad; None for rounding) and of
        ``float32_error`` and ``bfloat16_error`` (of the rotated q and k: norm of the difference
        over norm of the truth).
    """
    seq = q.shape[1]
    positions = torch.arange(last - seq + 1, last + 1, device=q.device)[None]
    rows: list[dict[str, Any]] = [
        {"position": last, "method": m.name, "angle_error": _angle_error(m, positions, rope, q)}
        for m in methods
    ]
    rows.append({"position": last, "method": "rounding", "angle_error": None})
    for dtype in _LOW_DTYPES:
        low = q.to(dtype), k.to(dtype)
        truth = _rotate64(low, positions, rope)
        key = str(dtype).removeprefix("torch.") + "_error"
        for method, row in zip(methods, rows, strict=False):
            row[key] = _relative_error(method.rotate(*low, positions), truth)
        rows[-1][key] = _relative_error(tuple(x.to(dtype) for x in truth), truth)
    return rows


def _rotate64(
    pair: tuple[torch.Tensor, ...], positions: torch.Tensor, rope: Rope
) -> tuple[torch.Tensor, ...]:
    q, k = (x.double() for x in pair)
    lengths = positions.max(dim=1).values + 1
    out = apply_rotary(q, k, positions, rope, lengths=lengths, backend="reference")
    return tuple(x for x in out if x is not None)


def _relative_error(actual: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> float:
    difference = sum(
        float((a.double() - t).square().sum()) for a, t in zip(actual, truth, strict=True)
    )
    return math.sqrt(difference / sum(float(t.square().sum()) for t in truth))


def _angle_error(method: Method, positions: torch.Tensor, rope: Rope, like: torch.Tensor) -> float:
    """Each pair rotates (1, 0) to a (cos, sin), which tells the angle whatever the method does."""
    unit = like.new_zeros((1, positions.shape[1], 1, like.shape[-1]))
    unit[..., : rope.pairs] = 1.0
    angles = []
    for x, _ in (method.rotate(unit, unit, positions), _rotate64((unit, unit), positions, rope)):
        x = x.double()
        angles.append(torch.atan2(x[..., rope.pairs : rope.rotary_dim], x[..., : rope.pairs]))
    turns = (angles[0] - angles[1]) / (2 * math.pi)
    return float((turns - turns.round()).abs().max()) * 2 * math.pi
