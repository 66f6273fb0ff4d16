"""Which keys a query sees: by slots, the places of tokens in their sequences, never by positions.

Query i of Sq queries against Sk keys has slot ``i + Sk - Sq``, so that the last query stands at the
last key; key j has slot j. Causal is ``j <= s``, a window w ``s - j < w`` (not causal:
``|s - j| < w``), and ``kv_start`` hides the slots below it (left padding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Mask(NamedTuple):
    """What hides keys from queries, of a dense batch or of packed sequences (a batch of one).

    ``cu_seqlens`` and ``cu_seqlens_k`` (sequences + 1,) say where packed sequences of queries and
    keys begin, both or neither; ``kv_start`` is (sequences,) or None. ``cache_lens`` (batch,): only
    so many of the keys are there, and the last query stands at the last of them.
    """

    causal: bool
    window: int | None = None
    kv_start: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    cache_lens: torch.Tensor | None = None

    def sequences(self, batch: int) -> int:
        """How many sequences there are in ``batch`` rows."""
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def visible(self, batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """Which keys each query sees: (batch, queries, keys) bool."""
        slot, of_query = _slots(batch, queries, self.cu_seqlens, device)
        key, of_key = _slots(batch, keys, self.cu_seqlens_k, device)
        if self.cache_lens is not None:
            slot = slot + self.cache_lens[:, None] - queries
        elif self.cu_seqlens is None or self.cu_seqlens_k is None:
            slot = slot + keys - queries
        else:
            counts = self.cu_seqlens_k.diff() - self.cu_seqlens.diff()
            slot = slot + counts[of_query]
        distance = slot[:, :, None] - key[:, None, :]
        seen = of_query[:, :, None] == of_key[:, None, :]
        if self.causal:
            seen = seen & (distance >= 0)
        if self.window is not None:
            seen = seen & ((distance if self.causal else distance.abs()) < self.window)
        if self.cache_lens is not None:
            seen = seen & (key < self.cache_lens[:, None])[:, None, :]
        if self.kv_start is not None:
            seen = seen & (key >= self.kv_start[of_key])[:, None, :]
        return seen


def sequence_of_token(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The packed sequence of each of ``tokens`` tokens; those past the end belong to the last.

    cu_seqlens: (sequences + 1,) int32 or int64, ascending from 0. Returns (tokens,) int64.
    """
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    return sequence.clamp(max=cu_seqlens.shape[0] - 2)


def _slots(
    batch: int, tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each token in its sequence, and the sequence: two (batch, tokens) int64."""
    place = torch.arange(tokens, device=device).expand(batch, tokens)
    if cu_seqlens is None:
        return place, torch.arange(batch, device=device)[:, None].expand(batch, tokens)
    sequence = sequence_of_token(cu_seqlens, tokens).expand(batch, tokens)
    return place - cu_seqlens[sequence], sequence
