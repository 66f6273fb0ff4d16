"""Where the sequences of a forward lie, and how long each is: what all layers of it share.

Four cases: a prompt (all keys are queries), packed sequences (a prompt whose positions restart, or
whose borders the caller gives), a step of a few queries against a cache, and a chunk of many.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch

from ...calls.records import FEW_QUERIES
from ...calls.values import readable
from ...rope.value import Rope
from ...torch_private import expect
from .masks import can_wait, of_tokens, read_slots


class Call(NamedTuple):
    """What `attention` and `decode` are told; B rows of queries, N slots of the cache."""

    positions: torch.Tensor  # (1 or B, queries); of packed sequences (B * queries,)
    lengths: torch.Tensor | None = None  # (B,) or (sequences,), what chooses the set
    kv_start: torch.Tensor | None = None  # (B,)
    cu_seqlens: torch.Tensor | None = None  # (sequences + 1,), of packed ones
    filled: int | None = None  # slots of each row; None: not known to the host
    # Of queries against a cache alone:
    cache_lens: torch.Tensor | None = None  # (B,), the slots that are filled
    key_positions: torch.Tensor | None = None  # (B, N); None: j - kv_start
    query_lengths: torch.Tensor | None = None  # like lengths; of several queries (B, queries)


def call_of(
    chooses: bool,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    batch: int,
    keys: int,
    borders: torch.Tensor | None = None,
) -> Call:
    """Derive a `Call`. Tokens of a sequence stand side by side in its slots.

    chooses: whether lengths are wanted. positions: (1 or B, queries), of any values where there is
    padding. mask: of `masks.slots_of_mask`. keys: N. borders: (sequences + 1,), the caller's.
    """
    queries = positions.shape[1]
    start = filled = behind = None
    end: torch.Tensor | int = keys
    count: int | None = keys
    if mask is not None:
        slots = read_slots(mask)
        start = (slots.start - slots.dropped).clamp(min=0)
        end, filled = slots.end - slots.dropped, slots.filled - slots.dropped
        behind = filled - end
        count = _count(filled, queries, keys)
    if borders is not None:
        if count != queries:
            raise ValueError(
                f"cu_seq_lens_q: expected no keys in the cache, got {keys - queries} more slots "
                f"than the {queries} tokens; packed sequences are whole ones"
            )
        return _packed(chooses, positions, borders, batch)
    if count != queries:
        _check_behind_keys(positions, mask)
    elif (found := _restarts(positions, mask, batch)) is not None:
        return _packed(chooses, positions, found, batch)

    last = last_positions(positions, behind, batch)
    if mask is not None:
        padding = slots.padding_in(last)
        last, positions = last - padding, positions - padding[:, None]
    lengths = (last + 1).clamp(min=0) if chooses else None
    if count == queries:
        return Call(positions, lengths, start, filled=count)

    shift = last + 1 - end  # of keys' positions over their slots
    # A row that goes on after packed sequences goes on with the last of them.
    begin = (-shift).clamp(min=0) if start is None else torch.maximum(start, -shift)
    key_positions = None
    if not (readable(shift) and bool((shift == -begin).all())):
        key_positions = shift[:, None] + torch.arange(keys, device=positions.device)
    kv_start = None if readable(begin) and not bool(begin.any()) else begin
    cache_lens = filled
    if cache_lens is None:
        cache_lens = torch.full((batch,), keys, dtype=torch.int64, device=positions.device)
    query_lengths = lengths
    if lengths is not None and queries > 1:
        # Each as if it came alone, except in a prompt, which is of one set.
        each = (positions + 1).clamp(min=0).expand(batch, -1)
        is_prompt = (cache_lens == queries)[:, None]
        query_lengths = torch.where(is_prompt, lengths[:, None], each)
    return Call(positions, lengths, kv_start, None, count, cache_lens, key_positions, query_lengths)


def last_positions(
    positions: torch.Tensor, behind: torch.Tensor | None, batch: int
) -> torch.Tensor:
    """The position of the last real token of each sequence: (batch,) int64.

    positions: (1 or batch, queries). behind: (batch,), how many slots of padding follow it, which
    may be more than there are queries.
    """
    if behind is None:
        return positions[:, -1].expand(batch)
    query = positions.shape[1] - 1 - behind
    at = query.clamp(min=0)[:, None]
    return positions.expand(batch, -1).gather(1, at)[:, 0] + query.clamp(max=0)


def _count(filled: torch.Tensor, queries: int, keys: int) -> int | None:
    """How many slots are filled, where the host may know it."""
    if queries == keys:
        return keys
    if readable(filled) or (queries > FEW_QUERIES and can_wait()):
        return int(filled[0])  # on a device this waits for it, once in a long chunk
    return None


def _restarts(
    positions: torch.Tensor, mask: torch.Tensor | None, batch: int
) -> torch.Tensor | None:
    """Borders of packed sequences in a prompt, from positions that do not go up; None: no such.

    A graph can't look for them, and refuses them: whoever compiles gives ``cu_seq_lens_q``.
    Otherwise this waits for a device, once in a prompt, as transformers does.
    """
    queries = positions.shape[1]
    if queries == 1:
        return None
    step = positions.diff()
    if not can_wait():
        # Where it has no mask, transformers' own graph takes skipped positions for borders.
        _expect(~of_tokens(step < 1 if mask is not None else step != 1, mask, queries).any())
        return None
    restarts = step < 1
    if mask is None:
        if not bool(restarts.any()):
            return None
        edges = restarts.new_zeros((batch, queries - 1))
    else:
        slots = read_slots(mask, columns=True)
        # Where transformers looks for packed sequences, a skipped position is a border as well.
        restarts = of_tokens(restarts | ((step != 1) & (slots.packed == 1)), mask, queries)
        if not bool(restarts.any()):
            return None
        token = torch.arange(1, queries, device=positions.device)
        edges = (token == slots.start) | (token == slots.end)
    first = torch.nn.functional.pad(edges | restarts, (1, 0), value=True)
    begin = first.flatten().nonzero()[:, 0]
    return torch.nn.functional.pad(begin, (0, 1), value=first.numel())


def _check_behind_keys(positions: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Tokens behind keys of a cache go on one by one: where each key lies follows from the last."""
    queries = positions.shape[1]
    if queries == 1:
        return
    step = positions.diff()
    goes_on = ~of_tokens(step != 1, mask, queries).any()
    if not can_wait():
        _expect(goes_on)
    elif (readable(positions) or queries > FEW_QUERIES) and not bool(goes_on):
        raise ValueError(
            "position_ids: expected each one more than the one before behind keys of a cache, got "
            f"steps of {int(step.min())} to {int(step.max())}; packed sequences are whole ones"
        )


def _expect(goes_on: torch.Tensor) -> None:
    expect(
        goes_on,
        "position_ids: expected each one more than the one before in a graph, which can't look "
        "for packed sequences; give their borders as cu_seq_lens_q and cu_seq_lens_k",
    )


def _packed(chooses: bool, positions: torch.Tensor, borders: torch.Tensor, batch: int) -> Call:
    """Sequences in rows that were laid one behind the other, padding being sequences too."""
    queries = positions.shape[1]
    of_tokens = positions.expand(batch, -1).reshape(-1)
    borders = borders.to(of_tokens.device)
    counts = borders.diff()
    begin = borders[:-1].long().clamp(max=of_tokens.shape[0] - 1)
    slot = begin % queries
    # As in `call_of`: positions that are slots go on through the borders.
    past = torch.where(of_tokens[begin] == slot, slot, 0)
    of_tokens = of_tokens - past.repeat_interleave(counts, output_size=of_tokens.shape[0])
    lengths = None
    if chooses:
        last = (borders[1:].long() - 1).clamp(min=0)
        lengths = (of_tokens[last] + 1).clamp(min=0)
    return Call(of_tokens, lengths, cu_seqlens=borders, filled=queries)


def in_a_row(x: torch.Tensor) -> torch.Tensor:
    """With a unit last stride, which heads that come from a convolution do not have."""
    return x if x.stride(-1) == 1 else x.contiguous()


# By the ids of positions, mask and borders, rows and slots, and whether lengths are wanted; with
# the tensors, which keep their ids so.
_Calls = dict[tuple[int, ...], tuple[Call, Any, Any, Any]]
_MOST = 8  # calls of a forward: layers may be of several kinds, and sit on several devices


class _Noted:
    """By which rope the layer that is running rotates, from its rotation to its attention, and its
    positions, (1 or batch, queries); and what its base model was told beside them."""

    def __init__(self) -> None:
        self.rope: Rope | None = None
        self.positions: torch.Tensor | None = None
        self.keywords: dict[str, Any] | None = None
        self.of_base: dict[str, Any] | None = None  # until its first layer attends


class _OfThread(threading.local):
    """Read alone: dynamo loses what it writes to a `threading.local` itself."""

    def __init__(self) -> None:
        self.noted = _Noted()


class Memory:
    """The `Call` of the forward that is going on, derived once for all layers of a kind.

    One for all models: a layer that is copied, or taken from another model, finds what the rotary
    module of its new one says. Threads may call models at once: each has its own notes. They share
    calls, which a backward pass in autograd's thread takes from the forward, and find by the
    tensors.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread()
        self.forget()

    def note(
        self,
        rope: Rope | None,
        positions: torch.Tensor | None,
        keywords: dict[str, Any] | None = None,
    ) -> None:
        """What the layer that is running rotates by, before it attends."""
        noted = self._of_thread.noted
        noted.rope, noted.positions, noted.keywords = rope, positions, keywords

    def take(self) -> tuple[Rope | None, torch.Tensor | None, dict[str, Any] | None]:
        """What the layer that attends now has noted; None each: it has not rotated."""
        noted = self._of_thread.noted
        found = noted.rope, noted.positions, noted.keywords
        noted.rope = noted.positions = noted.keywords = None
        return found

    def tell(self, keywords: dict[str, Any] | None) -> None:
        """What the base model that runs now was told, for its rotary modules; None: nothing."""
        self._of_thread.noted.of_base = keywords

    def told(self) -> dict[str, Any] | None:
        """What `tell` noted last."""
        return self._of_thread.noted.of_base

    def forget(self) -> None:
        """Begin a new forward: its positions may lie in the tensor of the last one.

        That may have ended between a rotation and its attention, by an exception.
        """
        self.note(None, None)
        self._calls: _Calls = {}

    def call(
        self,
        chooses: bool,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        batch: int,
        keys: int,
        borders: torch.Tensor | None = None,
    ) -> Call:
        """As `call_of`."""
        # A traced graph finds by itself what repeats, and must not leave its tensors here.
        if torch.compiler.is_compiling():
            return call_of(chooses, positions, mask, batch, keys, borders)
        calls = self._calls  # other threads may begin anew
        key = (id(positions), id(mask), id(borders), batch, keys, chooses)
        if key not in calls:
            if len(calls) >= _MOST:
                calls = self._calls = {}
            call = call_of(chooses, positions, mask, batch, keys, borders)
            calls[key] = call, positions, mask, borders
        return calls[key][0]


MEMORY = Memory()
