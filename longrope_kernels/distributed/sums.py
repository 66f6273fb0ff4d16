"""Sums over ranks that training can go through."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .ranks import Ranks, answered


def whole_sum(part: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum of what each rank has, on all of them.

    Its gradients are for ranks that average those of parameters, as DDP and FSDP do: the mean of
    the ranks' is that of the sum.
    """
    return _Sum.apply(part, ranks)  # type: ignore[no-any-return,no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.size = ranks.size
        total = part.clone()
        for line in (ranks.heads, ranks.ring):
            if line.size > 1:
                answered(line, partial(dist.all_reduce, total, group=line.group))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.size, None
