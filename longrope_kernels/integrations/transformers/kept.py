"""Whether the keys of a cache lie where they are taken to lie.

A cache of unrotated keys keeps no positions: that of each follows from the next token's, one less
for each slot between them. Who drops keys from a cache (to compress it), skips positions in a
prompt, or behind it, would get another model's answer, silently. So a cache is told, as an
attribute, where its rows begin: by the last token and the number of those before it, each forward
must say the same. Padding has no say: rows may be aligned anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from ...calls.values import readable
from .masks import can_wait, of_tokens, read_slots
from .sequences import last_positions

_KEPT = "longrope_positions"


class _Kept(NamedTuple):
    """What a forward leaves at a cache."""

    slots: int | None  # that are filled, and dropped by windows; None: the host does not know
    begins: torch.Tensor | set[int]  # positions of the first tokens of rows
    skips: torch.Tensor | None  # () bool, whether the last token says otherwise; None: it does not


def check_kept(
    cache: Any, positions: torch.Tensor, mask: torch.Tensor | None, batch: int, queries: int
) -> None:
    """Compare where a forward goes on with where the last one ended.

    Positions on a device are read where the cache has another length than the last forward left
    it, and what a prompt has skipped once: other steps wait for nothing.

    Args:
        cache: before this forward writes to it.
        positions: (1 or batch, queries), of the new tokens.
        mask: of `masks.slots_of_mask`.
        batch: rows.
        queries: tokens of each.

    Raises:
        ValueError: keys were dropped; the new tokens are not those behind the keys.
    """
    if not can_wait():
        return
    _check_counts(cache.layers)
    length = cache.get_seq_length()
    slots = int(length) if not isinstance(length, torch.Tensor) or readable(length) else None
    end = None if slots is None else slots + queries
    kept: _Kept | None = getattr(cache, _KEPT, None)
    if kept is None or slots == 0:
        rows = _rows(positions, mask, batch, queries, end)
        first = rows.by_last if slots else rows.by_first
        skips = None if slots or queries == 1 else ((first != rows.by_last) & ~rows.waits).any()
        setattr(cache, _KEPT, _Kept(end, first, skips))
        return
    begins = kept.begins
    if readable(positions) or slots != kept.slots:
        known = set(begins.tolist()) if isinstance(begins, torch.Tensor) else begins
        # Rows may have changed their order, as beams do; those that are padding so far, and those
        # that are padding now, say nothing.
        if mask is None:
            now = [at + 1 - slots - queries for at in positions[:, -1].tolist()]
        else:
            rows = _rows(positions, mask, batch, queries, end)
            known = known.union(rows.by_first[rows.starts].tolist())
            now = rows.by_last[~rows.waits & ~rows.starts].tolist()
        if not known.issuperset(now):
            raise _not_behind(f"positions from {int(positions.min())}, behind {slots} keys")
        begins = known
    elif kept.skips is not None and bool(kept.skips):
        raise _not_behind("a prompt that skipped some")
    setattr(cache, _KEPT, _Kept(end, begins, None))


def _not_behind(got: str) -> ValueError:
    return ValueError(
        "position_ids: expected each one more than the one before behind keys of a cache, which "
        f"keeps no positions, got {got}; where keys are dropped or positions skipped, "
        "enable(model, cache='rotated')"
    )


def _check_counts(layers: Any) -> None:
    """All layers that grow hold the keys of as many tokens, or of their windows."""
    seen = None
    for layer in layers:
        tokens = layer.get_seq_length() if isinstance(layer, DynamicLayer) else 0
        if not tokens:
            continue
        held = layer.keys.shape[-2]
        seen = tokens if seen is None else seen
        expected = min(seen, layer.sliding_window - 1) if layer.is_sliding else seen
        if tokens != seen or held < expected:
            raise ValueError(
                f"past_key_values: expected {expected} keys of {seen} tokens in each layer, got "
                f"{held}; where keys are dropped, enable(model, cache='rotated')"
            )


class _Rows(NamedTuple):
    """Of a forward, each (batch,)."""

    by_first: torch.Tensor  # the position of a row's first token, where it is one of the new ones
    by_last: torch.Tensor  # and by the last one, if none were skipped
    starts: torch.Tensor  # whether there was but padding before
    waits: torch.Tensor  # whether there is but padding now


def _rows(
    positions: torch.Tensor, mask: torch.Tensor | None, batch: int, queries: int, end: int | None
) -> _Rows:
    """end: of the new tokens' slots, where there is no padding."""
    positions = positions.expand(batch, -1)
    restarts = of_tokens(positions.diff() < 1, mask, queries).any(1)
    if mask is None:
        assert end is not None  # a mask is made where a cache's count is on a device
        by_last = positions[:, -1] + 1 - end
        none = torch.zeros_like(restarts)
        return _Rows(torch.where(restarts, by_last, positions[:, 0]), by_last, none, none)
    slots = read_slots(mask)
    before = slots.filled - queries
    last = last_positions(positions, slots.filled - slots.end, batch)
    padding = slots.padding_in(last)
    by_last = last - padding + 1 - (slots.end - slots.start)
    at = (slots.start - before).clamp(0, queries - 1)
    first = positions.gather(1, at[:, None])[:, 0] - padding
    # What goes on behind packed sequences goes on with the last of them.
    by_first = torch.where(restarts, by_last, first)
    return _Rows(by_first, by_last, slots.start >= before, slots.end <= before)
