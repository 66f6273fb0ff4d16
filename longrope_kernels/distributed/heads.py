"""Ulysses: each rank gives some heads of its tokens for all tokens of some heads, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from .ranks import Line, answered
from .shards import Spans, count

Move: TypeAlias = Callable[[torch.Tensor, Line, tuple[Spans, ...]], torch.Tensor]


def to_tokens(x: torch.Tensor, line: Line, spans: tuple[Spans, ...]) -> torch.Tensor:
    """(B, own tokens, H, D) to (B, tokens of all ranks, H / ranks, D), in the order of slots."""
    if line.size == 1:
        return x
    return _Exchanged.apply(x, _to_tokens, _to_heads, line, spans)  # type: ignore[no-any-return,no-untyped-call]


def to_heads(x: torch.Tensor, line: Line, spans: tuple[Spans, ...]) -> torch.Tensor:
    """The inverse of `to_tokens`."""
    if line.size == 1:
        return x
    return _Exchanged.apply(x, _to_heads, _to_tokens, line, spans)  # type: ignore[no-any-return,no-untyped-call]


class _Exchanged(torch.autograd.Function):
    """One of the two exchanges, whose gradient is the other one's."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, there: Move, back: Move, line: Line, spans: tuple[Spans, ...]
    ) -> torch.Tensor:
        ctx.rest = back, there, line, spans
        return there(x, line, spans)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        grad = _Exchanged.apply(grad, *ctx.rest)  # type: ignore[no-untyped-call]
        return grad, None, None, None, None


def _to_tokens(x: torch.Tensor, line: Line, spans: tuple[Spans, ...]) -> torch.Tensor:
    batch, own, heads, dim = x.shape
    # (ranks, own tokens, B, heads of a rank, D): what each rank gets lies together
    sent = x.view(batch, own, line.size, heads // line.size, dim).permute(2, 1, 0, 3, 4)
    counts = [count(of_rank) for of_rank in spans]
    shape = (sum(counts), batch, heads // line.size, dim)
    came = _exchange(line, sent.flatten(0, 1), shape, [own] * line.size, counts)
    return came.index_select(0, _order(spans, x.device)).transpose(0, 1)


def _to_heads(x: torch.Tensor, line: Line, spans: tuple[Spans, ...]) -> torch.Tensor:
    batch, _, heads, dim = x.shape
    sent = x.new_empty((x.shape[1], batch, heads, dim))
    sent[_order(spans, x.device)] = x.transpose(0, 1)
    counts = [count(of_rank) for of_rank in spans]
    own = counts[line.rank]
    shape = (own * line.size, batch, heads, dim)
    came = _exchange(line, sent, shape, counts, [own] * line.size)
    return came.view(line.size, own, batch, heads, dim).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _exchange(
    line: Line,
    sent: torch.Tensor,
    shape: tuple[int, ...],
    sends: list[int],
    receives: list[int],
) -> torch.Tensor:
    came = sent.new_empty(shape)
    rows = sent.contiguous()
    answered(
        line,
        lambda: dist.all_to_all_single(came, rows, receives, sends, group=line.group),
    )
    return came


def _order(spans: tuple[Spans, ...], device: torch.device) -> torch.Tensor:
    """Where the tokens of ascending slots stand among those of one rank after another."""
    slots = [torch.arange(*span) for of_rank in spans for span in of_rank]
    return torch.cat(slots or [torch.arange(0)]).argsort().to(device)
