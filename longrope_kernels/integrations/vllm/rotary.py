"""The rotary module of a served model: exact, each token under the set of its request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...ops.rotary import apply_rotary
from ...rope.value import Rope


def check_head(rope: Rope, head_dim: int) -> None:
    """Refuse heads that are smaller than what the rope rotates."""
    if rope.rotary_dim > head_dim:
        raise ValueError(
            f"rope: expected at most {head_dim} rotated dimensions, those of a head, got "
            f"{rope.rotary_dim}"
        )


class TokenRotary(nn.Module):
    """Stands where vLLM's rotary module does; one for all layers of a model.

    Before each step the runner says which set each token takes (`choose`). The buffer stays where
    it is in memory, so that a captured graph reads what the step wrote.

    Args:
        rope: with its factor sets.
        head_dim: D of the heads.
        most: tokens of a step.
    """

    token_sets: torch.Tensor

    def __init__(self, rope: Rope, head_dim: int, most: int) -> None:
        super().__init__()
        check_head(rope, head_dim)
        self.rope, self.head_dim = rope, head_dim
        sets = torch.zeros(most, dtype=torch.int32)
        self.register_buffer("token_sets", sets, persistent=False)
        rope.to(sets.device)  # its tables now, not during a traced or captured forward

    def choose(self, lengths: Sequence[tuple[int, int]], counts: Sequence[int]) -> None:
        """Before a step: `Policies.lengths` of its requests, in their order, and their tokens."""
        sets = [self.rope.set_index(most) for _, most in lengths]
        tokens = torch.tensor(sets, dtype=torch.int32, device="cpu").repeat_interleave(
            torch.tensor(counts, device="cpu")
        )
        self.token_sets[: len(tokens)].copy_(tokens)

    def forward(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query and key, in place unless traced, where a graph wants new tensors.

        Args:
            positions: (tokens,) int32 or int64.
            query: (tokens, heads * D).
            key: (tokens, kv_heads * D).
        """
        n = positions.shape[0]
        q, k = (x.view(n, 1, -1, self.head_dim) for x in (query, key))
        q_out, k_out = apply_rotary(
            q,
            k,
            positions[:, None],
            self.rope,
            sets=self.token_sets[:n],
            inplace=not torch.compiler.is_compiling(),
        )
        assert k_out is not None
        return q_out.view(n, -1), k_out.view(n, -1)

    def extra_repr(self) -> str:
        sets = [(s.max_length, s.n_hat) for s in self.rope.sets]
        return f"rotary_dim={self.rope.rotary_dim}, sets(max_length, n_hat)={sets}"
