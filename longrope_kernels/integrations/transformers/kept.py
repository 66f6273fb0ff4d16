"""Whether the keys of a cache lie where they are taken to lie.

A cache of unrotated keys keeps no positions: that of each follows from the next token's, one less
for each slot between them. Who drops keys from a cache (to compress it), skips positions in a
prompt, or behind it, would get another model's answer, silently. So a cache is told, as an
attribute, how far its keys' positions lie over their slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...calls.values import readable
from .masks import can_wait, of_tokens, read_slots
from .sequences import last_positions

_KEPT = "longrope_positions"


class _Kept(NamedTuple):
    """What a forward leaves at a cache."""

    slots: int | None  # that are filled, and dropped by windows; None: the host does not know
    shifts: torch.Tensor | set[int]  # of rows, by how much keys' positions lie over their slots
    skips: torch.Tensor | None  # () bool, whether a prompt skipped positions; None: it did not


def check_kept(
    cache: Any, positions: torch.Tensor, mask: torch.Tensor | None, batch: int, queries: int
) -> None:
    """Compare where a forward goes on with where the last one ended.

    Positions on a device are read where the cache has another length than the last forward left
    it, and where a prompt may have skipped some, once: other steps wait for nothing.

    Args:
        cache: before this forward writes to it.
        positions: (1 or batch, queries), of the new tokens.
        mask: of `masks.slots_of_mask`.
        batch: rows.
        queries: tokens of each.

    Raises:
        ValueError: the new tokens are not those behind the keys.
    """
    if not can_wait():
        return
    length = cache.get_seq_length()
    slots = int(length) if not isinstance(length, torch.Tensor) or readable(length) else None
    end = None if slots is None else slots + queries
    kept: _Kept | None = getattr(cache, _KEPT, None)
    if kept is None or slots == 0:
        is_prompt = not slots and queries > 1
        skips = of_tokens(positions.diff() > 1, mask, queries).any() if is_prompt else None
        setattr(cache, _KEPT, _Kept(end, _shifts(positions, mask, batch, end), skips))
        return
    if kept.skips is not None and bool(kept.skips):
        raise _not_behind("a prompt that skipped some")
    shifts = kept.shifts
    if readable(positions) or slots != kept.slots:
        if isinstance(shifts, torch.Tensor):
            shifts = set(shifts.tolist())
        # Rows may have changed their order, as beams do.
        now = _shifts(positions, mask, batch, end).tolist()
        if mask is not None:
            of_rows = read_slots(mask)
            before = of_rows.filled - queries
            begins, waits = of_rows.start >= before, of_rows.end <= before
            shifts = shifts.union(x for x, new in zip(now, begins.tolist(), strict=True) if new)
            now = [x for x, padding in zip(now, waits.tolist(), strict=True) if not padding]
        if not shifts.issuperset(now):
            raise _not_behind(f"positions from {int(positions.min())}, behind {slots} keys")
    setattr(cache, _KEPT, _Kept(end, shifts, None))


def _not_behind(got: str) -> ValueError:
    return ValueError(
        "position_ids: expected each one more than the one before behind keys of a cache, which "
        f"keeps no positions, got {got}; where keys are dropped or positions skipped, "
        "enable(model, cache='rotated')"
    )


def _shifts(
    positions: torch.Tensor, mask: torch.Tensor | None, batch: int, end: int | None
) -> torch.Tensor:
    """(batch,), by the last token of each row; end: of the new slots, where there is no padding."""
    if mask is None:
        assert end is not None  # a mask is made where a cache's count is on a device
        return positions[:, -1].expand(batch) + 1 - end
    slots = read_slots(mask)
    last = last_positions(positions, slots.filled - slots.end, batch)
    return last - slots.padding_in(last) + 1 - slots.end
