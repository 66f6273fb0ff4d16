"""Checks of what index tensors hold, where reading them does not wait for a device."""

from __future__ import annotations

import os

import torch

from .calls import CacheTensors, Rotation


def check_values(
    positions: torch.Tensor, rotation: Rotation, cu_seqlens: torch.Tensor | None
) -> None:
    """Check what lies on the host, and on a device under ``LONGROPE_CHECK=1``.

    Args:
        positions: (B, S).
        rotation: what chooses factor sets.
        cu_seqlens: as in `apply_rotary`, or None.
    """
    if not readable(positions):
        return
    _check_32_bits("positions", positions)
    check_selection(rotation)
    if cu_seqlens is not None:
        check_borders("cu_seqlens", cu_seqlens, positions.shape[1])


def check_cache(cache: CacheTensors, rotation: Rotation) -> None:
    """Check what `decode` reads from index tensors, where reading is free.

    Args:
        cache: its tensors.
        rotation: what chooses factor sets.
    """
    lens, block_table, key_positions = cache.lens, cache.block_table, cache.key_positions
    if not readable(lens):
        return
    slots = cache.capacity
    if key_positions is not None:
        held = torch.arange(key_positions.shape[1], device=key_positions.device)
        unused = held >= lens[:, None]
        _check_32_bits("key_positions", key_positions.masked_fill(unused, 0))
        slots = min(slots, key_positions.shape[1])
    for i, length in enumerate(lens.tolist()):
        if not 0 <= length <= slots:
            raise ValueError(
                f"cache_lens: expected from 0 to {slots} (the slots there are), got {length} for "
                f"sequence {i}"
            )
    check_selection(rotation)
    if cache.kv_start is not None:
        check_kv_start(cache.kv_start)
    if block_table is not None:
        blocks, block_size = cache.k.shape[:2]
        first = torch.arange(block_table.shape[1], device=block_table.device) * block_size
        used = first < lens[:, None]
        bad = (used & ((block_table < 0) | (block_table >= blocks))).nonzero()
        if len(bad):
            i, j = bad[0].tolist()
            raise ValueError(
                f"block_table: expected block ids from 0 to {blocks - 1}, got "
                f"{int(block_table[i, j])} for block {j} of sequence {i}"
            )


def check_selection(rotation: Rotation) -> None:
    """Check what chooses factor sets, on the host."""
    lengths, sets = rotation.lengths, rotation.sets
    if lengths is not None and (least := min(lengths.flatten().tolist(), default=0)) < 0:
        raise ValueError(f"lengths: expected token counts from 0, got {least}")
    if sets is not None:
        check_sets("sets", rotation.n_hat.shape[0], sets)


def check_sets(name: str, count: int, sets: torch.Tensor) -> None:
    """Check indices of factor sets, where reading is free."""
    if not sets.numel() or not readable(sets):
        return
    low, high = (int(bound) for bound in sets.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected indices from 0 to {count - 1}, got {low} to {high}")


def check_positions(name: str, positions: torch.Tensor) -> None:
    """Check that positions fit 32 bits, where reading is free."""
    if readable(positions):
        _check_32_bits(name, positions)


def _check_32_bits(name: str, positions: torch.Tensor) -> None:
    if positions.dtype != torch.int64 or not positions.numel():
        return
    low, high = (int(bound) for bound in positions.aminmax())
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"{name}: expected values from -2**31 to 2**31 - 1, got {low} to {high}")


def check_kv_start(kv_start: torch.Tensor) -> None:
    """Check that slots are not negative, where reading is free."""
    if readable(kv_start) and (least := min(kv_start.tolist(), default=0)) < 0:
        raise ValueError(f"kv_start: expected slots from 0, got {least}")


def check_borders(name: str, cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Check that packed sequences ascend from 0 to ``tokens``, where reading is free."""
    if not readable(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(
            f"{name}: expected ascending values from 0 to {tokens} (the token count), got {shown}"
        )


def check_factors(factors: torch.Tensor) -> None:
    """Check that raw factors are finite and above 0, where reading is free."""
    if readable(factors) and not bool((factors.isfinite() & (factors > 0)).all()):
        raise ValueError(f"factors: expected finite numbers above 0, got {factors.tolist()}")


def readable(x: torch.Tensor) -> bool:
    """Whether values may be read: on the host, or on a device under ``LONGROPE_CHECK=1``.

    Never while a graph is traced, and never those of a fake tensor, which has none.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return x.device.type == "cpu" or os.environ.get("LONGROPE_CHECK") == "1"
