"""What stands where the rotary module does in mode "unrotated": it lets queries and keys pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...rope.value import Rope
from .rotary import check_head


class Unrotated(nn.Module):
    """One for all layers of a model; their attention (`backend`) rotates, as it reads the cache.

    Before each step the runner says what length chooses the set of each request's queries
    (`choose`): the tokens up to the query, but no fewer than ``least`` and no more than ``most``.
    The buffers stay where they are in memory.

    Args:
        rope: with its factor sets.
        head_dim: D of the heads.
        requests: the most of a step.
    """

    least: torch.Tensor
    most: torch.Tensor

    def __init__(self, rope: Rope, head_dim: int, requests: int) -> None:
        super().__init__()
        check_head(rope, head_dim)
        self.rope = rope
        for name in ("least", "most"):
            self.register_buffer(name, torch.zeros(requests, dtype=torch.int64), persistent=False)
        rope.to(self.least.device)  # its tables now, not during a captured forward

    def choose(self, lengths: Sequence[tuple[int, int]], counts: Sequence[int]) -> None:
        """Before a step: `Policies.lengths` of its requests, in their order, and their tokens."""
        for buffer, values in zip((self.least, self.most), zip(*lengths, strict=True), strict=True):
            buffer[: len(values)].copy_(torch.tensor(values, device="cpu"))

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key as they are."""
        return query, key
