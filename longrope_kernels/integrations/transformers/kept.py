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
    shifts: torch.Tensor  # (n,) of rows, by how much their keys' positions lie over their slots
    skips: torch.Tensor | None  # () bool, whether a prompt skipped positions; None: it is known


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
        skips = None if slots else of_tokens(positions.diff() > 1, mask, queries).any()
        shifts = _of_rows(positions, mask, batch, queries, end).shift
        setattr(cache, _KEPT, _Kept(end, shifts, skips))
        return
    _expect(kept.skips is None or not bool(kept.skips), "a prompt that skipped some")
    shifts = kept.shifts.to(positions.device)
    if readable(positions) or slots != kept.slots:
        rows = _of_rows(positions, mask, batch, queries, end)
        # Rows may have changed their order, as beams do.
        goes_on = torch.isin(rows.shift, shifts) | rows.begins | rows.waits
        _expect(bool(goes_on.all()), f"positions from {int(positions.min())}, behind {slots} keys")
        if bool(rows.begins.any()):
            shifts = torch.cat([shifts, rows.shift[rows.begins]])
    setattr(cache, _KEPT, _Kept(end, shifts, None))


def _expect(holds: bool, got: str) -> None:
    if not holds:
        raise ValueError(
            "position_ids: expected each one more than the one before behind keys of a cache, "
            f"which keeps no positions, got {got}; where keys are dropped or positions skipped, "
            "enable(model, cache='rotated')"
        )


class _Rows(NamedTuple):
    """Of a forward, each (batch,)."""

    shift: torch.Tensor  # of positions over slots, by the last token
    begins: torch.Tensor  # whether there was but padding before
    waits: torch.Tensor  # whether there is but padding now


def _of_rows(
    positions: torch.Tensor, mask: torch.Tensor | None, batch: int, queries: int, end: int | None
) -> _Rows:
    """end: of the new tokens' slots, where there is no padding."""
    if mask is None:
        assert end is not None  # a mask is made where a cache's count is on a device
        shift = positions[:, -1].expand(batch) + 1 - end
        none = torch.zeros_like(shift, dtype=torch.bool)
        return _Rows(shift, none, none)
    slots = read_slots(mask)
    last, before = (
        last_positions(positions, slots.filled - slots.end, batch),
        slots.filled - queries,
    )
    shift = last - slots.padding_in(last) + 1 - slots.end
    return _Rows(shift, slots.start >= before, slots.end <= before)
