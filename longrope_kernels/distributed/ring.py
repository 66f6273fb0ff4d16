"""Ring attention: k and v go round the ranks while each attends to the block it has.

In step t rank r has the keys of rank ``r - t``. It sends them on before it computes, so that the
next block comes meanwhile. In the backward the gradients of a block go round one step behind it,
and from the last rank that adds to them home.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..backends.reference import dtype_of_sums
from ..calls.records import Scores
from . import blocks
from .blocks import Gradients, Hidden, Parts
from .ranks import Line, Work, finish, start
from .shards import Spans, count


class Plan(NamedTuple):
    """What the ranks of a ring know of one another."""

    line: Line
    spans: tuple[Spans, ...]  # the slots of each rank
    hidden: Hidden
    backend: str

    def owner(self, step: int, rank: int | None = None) -> int:
        """Whose keys a rank (by default this one) has in a step."""
        return ((self.line.rank if rank is None else rank) - step) % self.line.size

    def pairs(self, step: int, rank: int | None = None) -> list[blocks.Pair]:
        """What a rank computes in a step."""
        own = self.spans[self.line.rank if rank is None else rank]
        keys = self.spans[self.owner(step, rank)]
        by_slots = self.hidden.start is not None or self.hidden.borders is not None
        return _pairs(own, keys, self.hidden.scores, by_slots)

    @property
    def steps(self) -> int:
        """Up to the last in which any rank sees anything; blocks go no further."""
        size = self.line.size
        busy = [t for t in range(size) if any(self.pairs(t, r) for r in range(size))]
        return max(busy, default=0) + 1

    def like(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """Memory for a tensor like x, which is of this rank's tokens, of those of a step."""
        return x.new_empty((x.shape[0], count(self.spans[self.owner(step)]), *x.shape[2:]))

    def pass_on(
        self, sent: list[torch.Tensor], received: list[torch.Tensor], by: int = 1
    ) -> list[Work]:
        """Begin to send to the rank that stands ``by`` further, and to receive from behind."""
        to, source = self.owner(-by), self.owner(by)
        return start(self.line, [(to, x) for x in sent], [(source, x) for x in received])


@lru_cache(maxsize=1024)
def _pairs(queries: Spans, keys: Spans, scores: Scores, by_slots: bool) -> list[blocks.Pair]:
    pairs = blocks.pairs_of(queries, keys, scores)
    return list(pairs) if by_slots else blocks.joined(pairs)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rotated q (B, S, Hq, D) to the rotated k and v of all ranks: out and lse."""
    return _Ring.apply(q, k, v, plan)  # type: ignore[no-any-return,no-untyped-call]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _forward(q, k.contiguous(), v.contiguous(), plan)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        given = Gradients(d_out, d_lse, out, lse)
        return *_backward(q, k.contiguous(), v.contiguous(), given, ctx.plan), None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = dtype_of_sums(q)
    out = torch.empty_like(q, dtype=compute, memory_format=torch.contiguous_format)
    lse = out.new_empty((q.shape[0], q.shape[2], q.shape[1]))
    begun = 0  # how many queries have seen their first keys; all have after step 0
    steps = plan.steps
    block = [k, v]
    for step in range(steps):
        coming, works = [], []
        if step + 1 < steps:
            coming = [plan.like(x, step + 1) for x in (k, v)]
            works = plan.pass_on(block, coming)
        for pair in plan.pairs(step):
            # No name for these parts: it would hold the block until the next step has another.
            found = blocks.attend(plan.backend, _parts(q, block, pair), pair, plan.hidden)
            own = out[:, pair.queries], lse[..., pair.queries]
            if pair.queries.start >= begun:
                begun = pair.queries.stop
                for x, new in zip(own, found, strict=True):
                    x.copy_(new)
            else:
                _merge(*own, *found)
        finish(plan.line, works)
        block = coming
    return out.to(q.dtype), lse


def _parts(q: torch.Tensor, block: list[torch.Tensor], pair: blocks.Pair) -> Parts:
    return Parts(q[:, pair.queries], *(x[:, pair.keys] for x in block))


def _merge(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor
) -> None:
    """Add the attention to more keys, in place: softmax over both."""
    share = torch.sigmoid(torch.nan_to_num(new_lse - lse))  # NaN where neither sees a key
    out.lerp_(new_out.to(out.dtype), share.transpose(1, 2)[..., None])
    torch.logaddexp(lse, new_lse, out=lse)


def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: Gradients, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    compute = given.lse.dtype
    dq = torch.zeros_like(q, dtype=compute)
    steps, block = plan.steps, [k, v]
    sums: list[torch.Tensor] = []  # of the block of this step, from the ranks before
    of_sums: list[Work] = []
    sent: list[torch.Tensor] = []
    for step in range(steps):
        coming, works = [], []
        if step + 1 < steps:
            coming = [plan.like(x, step + 1) for x in (k, v)]
            works = plan.pass_on(block, coming)
        own = [torch.zeros_like(x, dtype=compute) for x in block]
        for pair in plan.pairs(step):
            remembered = given.of(pair.queries)
            found = blocks.attend_backward(
                plan.backend, _parts(q, block, pair), pair, plan.hidden, remembered
            )
            dq[:, pair.queries] += found[0]
            for x, part in zip(own, found[1:], strict=True):
                x[:, pair.keys] += part
        finish(plan.line, of_sums)
        if step > 0:
            for x in own:
                x += sums.pop(0)
        sent, of_sums = own, []
        if step + 1 < steps:
            sums = [plan.like(x, step + 1).to(compute) for x in (k, v)]
            of_sums = plan.pass_on(sent, sums)
        finish(plan.line, works)
        block = coming
    if steps > 1:
        home = [torch.empty_like(x, dtype=compute) for x in (k, v)]
        finish(plan.line, plan.pass_on(sent, home, plan.line.size - (steps - 1)))
        sent = home
    dk, dv = (x.to(k.dtype) for x in sent)
    return dq.to(q.dtype), dk, dv
