"""Checks of what index tensors hold, where reading them does not wait for a device."""

from __future__ import annotations

import os

import torch


def check_values(
    positions: torch.Tensor,
    count: int,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Check what lies on the host, and on a device under ``LONGROPE_CHECK=1``.

    Args:
        positions: (B, S).
        count: the number of factor sets.
        lengths, sets, cu_seqlens: as in `apply_rotary`, or None.
    """
    if positions.device.type != "cpu" and os.environ.get("LONGROPE_CHECK") != "1":
        return
    if positions.dtype == torch.int64 and positions.numel():
        low, high = (int(bound) for bound in positions.aminmax())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(
                f"positions: expected values from -2**31 to 2**31 - 1, got {low} to {high}"
            )
    if lengths is not None and lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths: expected token counts from 0, got {int(lengths.min())}")
    if sets is not None and sets.numel():
        low, high = (int(bound) for bound in sets.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"sets: expected indices from 0 to {count - 1}, got {low} to {high}")
    if cu_seqlens is not None:
        tokens, bounds = positions.shape[1], cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
            raise ValueError(
                f"cu_seqlens: expected ascending values from 0 to {tokens} (the token count), "
                f"got {bounds if len(bounds) <= 8 else [*bounds[:4], '...', *bounds[-3:]]}"
            )
