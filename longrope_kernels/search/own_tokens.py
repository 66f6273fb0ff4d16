"""Which of the scored tokens of a sequence are those of this rank, where ranks share it."""

from __future__ import annotations

import torch

from ..distributed import shard
from ..distributed.ranks import Group, ranks_of
from ..distributed.sums import whole_sum


class OwnTokens:
    """Of a sequence of which the last tokens are scored, each by the hidden state before it.

    Args:
        group: of the ranks.
        length: of the sequence, in tokens.
        last: how many are scored.
    """

    def __init__(self, group: Group, length: int, last: int) -> None:
        self._ranks, self._last = ranks_of(group), last
        slots = shard(torch.arange(length), group, 0)
        self._here = ((slots >= length - 1 - last) & (slots < length - 1)).nonzero()[:, 0]
        self._before = slots[self._here]  # the slot before each token
        self._place = self._before - (length - 1 - last)

    def of(self, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states that score them, and the tokens: (rows, own, dim) and (rows, own).

        Args:
            hidden: (rows, tokens of this rank, dim).
            tokens: (rows, length), all of them.
        """
        here, before = self._here.to(hidden.device), self._before.to(tokens.device)
        return hidden[:, here], tokens[:, before + 1]

    def of_all(self, found: torch.Tensor) -> torch.Tensor:
        """What each rank found, (rows, own), as (rows, last) on every rank, to the last bit."""
        whole = found.new_zeros((found.shape[0], self._last))
        whole[:, self._place.to(found.device)] = found
        return whole_sum(whole, self._ranks)
