"""Checks of what index tensors hold, where reading them does not wait for a device."""

from __future__ import annotations

import os
from collections import Counter

import torch

from ..rope.factor_set import as_factors
from ..rope.tables import Tables
from ..torch_private import is_plain
from .records import AppendCall, AttentionCall, DecodeCall, Keys, RotaryCall, Selection

# So many numbers are read faster one by one than reduced by torch.
_FEW = 64


def check_rotary(call: RotaryCall) -> None:
    """Check what a rotation reads from index tensors, where reading is free."""
    if readable(call.positions):
        _check_32_bits("positions", call.positions)
        _check_selection(call.tables, call.selection, call.positions.shape[1])


def check_attention(call: AttentionCall) -> None:
    """Check what attention reads from index tensors, where reading is free."""
    if not readable(call.positions):
        return
    _check_32_bits("positions", call.positions)
    _check_selection(call.tables, call.selection, call.positions.shape[1])
    keys = call.keys
    if keys.positions is not None and keys.positions is not call.positions:
        _check_32_bits("key_positions", keys.positions)
    if keys.borders is not None and keys.borders is not call.selection.borders:
        check_borders("cu_seqlens_k", keys.borders, keys.k.shape[1])
    if keys.start is not None:
        check_start(keys.start)


def check_decode(call: DecodeCall) -> None:
    """Check what `decode` reads from index tensors, where reading is free."""
    keys = call.keys
    lens, key_positions = keys.lens, keys.positions
    assert lens is not None
    if not readable(lens):
        return
    slots = keys.capacity
    if key_positions is not None:
        held = torch.arange(key_positions.shape[1], device=key_positions.device)
        unused = held >= lens[:, None]
        _check_32_bits("key_positions", key_positions.masked_fill(unused, 0))
        slots = min(slots, key_positions.shape[1])
    _check_lens(lens, slots)
    _check_selection(call.tables, call.selection, 0)
    if keys.start is not None:
        check_start(keys.start)
    _check_blocks(keys)


def check_spread(
    tables: Tables,
    selection: Selection,
    lens: torch.Tensor,
    key_slots: torch.Tensor,
    total_lens: torch.Tensor,
) -> None:
    """Check what `distributed.decode` reads from its index tensors, where reading is free."""
    if not readable(lens):
        return
    _check_selection(tables, selection, 0)
    _check_lens(lens, key_slots.shape[1])
    held = torch.arange(key_slots.shape[1], device=lens.device) < lens[:, None]
    before = torch.nn.functional.pad(key_slots[:, :-1], (1, 0), value=-1)
    bad = (held & ((key_slots <= before) | (key_slots >= total_lens[:, None]))).nonzero()
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"key_slots: expected ascending slots from 0 to {int(total_lens[i]) - 1} (the slots of "
            f"sequence {i}), got {int(key_slots[i, j])} for key {j}"
        )


def check_append(call: AppendCall, lens_too: bool = True) -> None:
    """Check where the tokens of `append` go, where reading that is free.

    lens_too: whether the lengths of the cache have not been checked.
    """
    cache, mapping = call.cache, call.slot_mapping
    where = cache.lens if mapping is None else mapping
    assert where is not None
    if not call.k.numel() or not readable(where):
        return
    if mapping is None:
        if lens_too:
            _check_lens(where, cache.capacity)
        if cache.block_table is None or cache.empty:
            return
        _check_blocks(cache, call.k.shape[1])
    addresses = [a for a in call.addresses().flatten().tolist() if a >= 0]
    slots = cache.k.shape[0] * cache.k.shape[1]
    name = "block_table" if mapping is None else "slot_mapping"
    if max(addresses, default=-1) >= slots:
        raise ValueError(
            f"{name}: expected addresses below {slots} (the slots there are), or negative ones for "
            f"tokens that are dropped, got {max(addresses)}"
        )
    if len(set(addresses)) < len(addresses):
        twice = Counter(addresses).most_common(1)[0][0]
        raise ValueError(
            f"{name}: expected a slot for each new token, got two tokens for slot "
            f"{twice % cache.k.shape[1]} of {'block' if mapping is None else 'row'} "
            f"{twice // cache.k.shape[1]}"
        )


def _check_lens(lens: torch.Tensor, slots: int) -> None:
    for i, length in enumerate(lens.tolist()):
        if not 0 <= length <= slots:
            raise ValueError(
                f"cache_lens: expected from 0 to {slots} (the slots there are), got {length} for "
                f"sequence {i}"
            )


def _check_blocks(keys: Keys, last: int = 2**31) -> None:
    """The blocks of the ``last`` slots of each sequence are some."""
    lens, block_table = keys.lens, keys.block_table
    if lens is None or block_table is None:
        return
    blocks, block_size = keys.k.shape[:2]
    first = torch.arange(block_table.shape[1], device=block_table.device) * block_size
    used = (first < lens[:, None]) & (first + block_size > lens[:, None] - last)
    bad = (used & ((block_table < 0) | (block_table >= blocks))).nonzero()
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"block_table: expected block ids from 0 to {blocks - 1}, got "
            f"{int(block_table[i, j])} for block {j} of sequence {i}"
        )


def _check_selection(tables: Tables, selection: Selection, tokens: int) -> None:
    lengths, sets, borders = selection
    if lengths is not None and is_plain(lengths):
        held = (lengths if lengths.dim() == 1 else lengths.flatten()).tolist()
        if held and (least := min(held)) < 0:
            raise ValueError(f"lengths: expected token counts from 0, got {least}")
    if sets is not None:
        check_sets("sets", tables.sets, sets)
    if borders is not None:
        check_borders("cu_seqlens", borders, tokens)


def check_sets(name: str, count: int, sets: torch.Tensor) -> None:
    """Check indices of factor sets, where reading is free."""
    if not sets.numel() or not readable(sets):
        return
    low, high = (int(bound) for bound in sets.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected indices from 0 to {count - 1}, got {low} to {high}")


def _check_32_bits(name: str, positions: torch.Tensor) -> None:
    count = positions.numel()
    if positions.dtype != torch.int64 or not count:
        return
    if count == 1:
        low = high = int(positions.item())
    elif count <= _FEW:
        held = [n for row in positions.tolist() for n in row]
        low, high = min(held), max(held)
    else:
        low, high = (int(bound) for bound in positions.aminmax())
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"{name}: expected values from -2**31 to 2**31 - 1, got {low} to {high}")


def check_start(kv_start: torch.Tensor) -> None:
    """Check first visible slots, where reading is free."""
    if not readable(kv_start):
        return
    if (least := min(kv_start.tolist(), default=0)) < 0:
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
    """Check raw factors as `FactorSet` does, where reading is free."""
    if readable(factors):
        as_factors("factors", factors)


def readable(x: torch.Tensor) -> bool:
    """Whether values may be read: on the host, or on a device under ``LONGROPE_CHECK=1``.

    Never while a graph is traced, and never those of a fake or meta tensor, which has none.
    """
    if torch.compiler.is_compiling() or not is_plain(x) or x.is_meta:
        return False
    return x.is_cpu or os.environ.get("LONGROPE_CHECK") == "1"
