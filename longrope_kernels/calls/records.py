"""What a call hands down from the public function to the kernels: one record for each function.

A record is a named tuple of tensors, numbers and other records. The schema of an op, its flat
arguments and the records that a backend gets are all made from these fields (schema.py), so that a
new argument is a field here, its check, and what the backends do with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..rope.tables import Tables
from . import masks

# Queries of a sequence in a step of decoding, drafts that are verified together. More: a prompt.
FEW_QUERIES = 16


class Selection(NamedTuple):
    """Which factor set each sequence takes: of lengths, or sets; without either, the first.

    In `DecodeCall` lengths may be of queries, (B, q_len), and without either each query takes the
    set of the tokens up to it.
    """

    lengths: torch.Tensor | None = None  # (sequences,) int32 or int64, each chooses a set
    sets: torch.Tensor | None = None  # (sequences,) int32, the sets themselves; they win
    borders: torch.Tensor | None = None  # (sequences + 1,), where packed sequences begin; B = 1

    def sequences(self, batch: int) -> int:
        """How many sequences there are in ``batch`` rows."""
        return batch if self.borders is None else self.borders.shape[0] - 1


class Scores(NamedTuple):
    """How queries score keys, and which they see; 0 is none everywhere."""

    causal: bool
    scale: float  # multiplies the scores
    window: int = 0  # how many slots back a query sees
    cap: float = 0.0  # scores become cap * tanh(score / cap)


class Keys(NamedTuple):
    """Keys and values, all unrotated, on the device of q; indices are int32 or int64.

    Of a call: (B, Sk, Hk, D), of the dtype of q. Of a cache: (B, slots, Hk, D), or with a block
    table (blocks, block_size, Hk, D), of the dtype of q or float8_e4m3fn. A unit last stride, any
    others. By a block table, slot j of a sequence is row ``j % block_size`` of block
    ``block_table[sequence, j // block_size]``.
    """

    k: torch.Tensor
    v: torch.Tensor  # like k
    positions: torch.Tensor | None = None  # (B, slots); None, of a cache alone: slot - start
    start: torch.Tensor | None = None  # (sequences,); keys at slots below it are hidden
    borders: torch.Tensor | None = None  # (sequences + 1,), where packed sequences begin; B = 1
    lens: torch.Tensor | None = None  # (B,), how many keys each sequence has, of a cache
    block_table: torch.Tensor | None = None  # (B, max_blocks) int32
    k_scale: torch.Tensor | None = None  # (Hk,) float32, multiplies a float8 cache
    v_scale: torch.Tensor | None = None  # (Hk,) float32

    @property
    def heads(self) -> int:
        """Hk."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """The slots of a sequence."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return self.k.shape[1] * blocks

    @property
    def empty(self) -> bool:
        """Whether no slot could hold a key."""
        return self.k.numel() == 0 or (
            self.block_table is not None and self.block_table.numel() == 0
        )


class RotaryCall(NamedTuple):
    """Rotate q and k."""

    q: torch.Tensor  # (B, S, Hq, D), a unit last stride, any others
    k: torch.Tensor  # (B, S, Hk, D); Hk may be 0, and so may Hq
    positions: torch.Tensor  # (B, S) int32 or int64, any strides
    tables: Tables
    selection: Selection
    conjugate: bool = False  # negate the sine: the gradient


class AttentionCall(NamedTuple):
    """Attend to keys that come with the queries."""

    q: torch.Tensor  # (B, Sq, Hq, D), unrotated, Hq a multiple of Hk; a unit last stride
    positions: torch.Tensor  # (B, Sq) int32 or int64, any strides
    keys: Keys
    tables: Tables
    selection: Selection
    scores: Scores
    sinks: torch.Tensor | None = None  # (Hq,) of any floating dtype, logits without a value

    @property
    def groups(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[2] // max(self.keys.heads, 1)

    def visible(self) -> torch.Tensor:
        """Which keys each query sees: (B, Sq, Sk) bool."""
        (batch, queries), keys = self.q.shape[:2], self.keys
        return masks.visible(
            (batch, queries, keys.k.shape[1]),
            self.scores.causal,
            self.scores.window,
            keys.start,
            self.selection.borders,
            keys.borders,
            keys.lens,
            self.q.device,
        )


class AppendCall(NamedTuple):
    """Write new keys and values into a cache, where its lengths or a mapping say."""

    k: torch.Tensor  # (B, S, Hk, D), of the dtype of the cache, or any beside float8; a unit
    v: torch.Tensor  # last stride, any others
    cache: Keys  # ``k`` and ``v`` are written; without ``slot_mapping`` by ``lens``
    slot_mapping: torch.Tensor | None = None  # (B, S) int32 or int64

    def addresses(self) -> torch.Tensor:
        """Where each token goes among all slots of the cache: (B, S) int64, negative: nowhere.

        Address a is slot ``a % n`` of row (or block) ``a // n``, of n slots. By lengths token t
        goes to slot ``lens - S + t`` of its sequence.
        """
        if self.slot_mapping is not None:
            return self.slot_mapping.long()
        (batch, tokens), (lens, table) = self.k.shape[:2], (self.cache.lens, self.cache.block_table)
        assert lens is not None
        size = self.cache.k.shape[1]
        slot = lens[:, None].long() - tokens + torch.arange(tokens, device=lens.device)
        if table is None:
            address = torch.arange(batch, device=lens.device)[:, None] * size + slot
        else:
            address = table.long().gather(1, slot.clamp(min=0) // size) * size + slot % size
        return torch.where(slot < 0, -1, address)


class DecodeCall(NamedTuple):
    """Attend to a cache, whose newest keys are those of the queries."""

    q: torch.Tensor  # (B, q_len, Hq, D), unrotated, Hq a multiple of Hk; a unit last stride
    keys: Keys  # with ``lens``
    tables: Tables
    selection: Selection
    scores: Scores
    sinks: torch.Tensor | None = None  # (Hq,) of any floating dtype, logits without a value
