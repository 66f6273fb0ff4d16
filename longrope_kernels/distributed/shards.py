"""Which tokens a rank has, and how it gets them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist

from ..calls.arguments import check_tensor
from ..rope.factor_set import is_int
from .ranks import Group, Line, Ranks, agree, answered, ranks_of, telling

Order = Literal["balanced", "contiguous"]
Spans: TypeAlias = tuple[tuple[int, int], ...]  # ascending (start, stop) of slots


def spans_of(tokens: int, part: int, parts: int, order: Order) -> Spans:
    """The slots of one part of a sequence, as few ascending spans, none of them empty.

    "balanced" cuts the sequence into twice as many pieces as there are parts and gives part r the
    pieces r and ``2 * parts - 1 - r``: of causal attention all have the same work. "contiguous"
    gives it the r-th piece of as many as there are parts.
    """
    pieces, own = (parts, [part]) if order == "contiguous" else (2 * parts, [part])
    if order == "balanced":
        own.append(pieces - 1 - part)
    cuts = [(i * tokens // pieces, (i + 1) * tokens // pieces) for i in own]
    if len(cuts) == 2 and cuts[0][1] == cuts[1][0]:
        cuts = [(cuts[0][0], cuts[1][1])]
    return tuple((start, stop) for start, stop in cuts if start < stop)


def count(spans: Spans) -> int:
    """How many slots there are."""
    return sum(stop - start for start, stop in spans)


def check_order(order: str) -> None:
    if order not in ("balanced", "contiguous"):
        raise ValueError(f"order: expected 'balanced' or 'contiguous', got {order!r}")


def whole_length(tokens: int | None, local: int, ranks: Ranks, order: Order) -> int:
    """``tokens``, or as many on each rank as on this one; checked against those it has."""
    if tokens is None:
        tokens = local * ranks.size
    elif not is_int(tokens):
        raise TypeError(f"tokens: expected a whole number or None, got {tokens!r}")
    elif tokens < 0:
        raise ValueError(f"tokens: expected at least 0, got {tokens}")
    expected = count(spans_of(tokens, ranks.rank, ranks.size, order))
    if local != expected:
        raise ValueError(
            f"tokens: a sequence of {tokens} tokens has {expected} on rank {ranks.rank} of "
            f"{ranks.size} ({order}), got {local}"
        )
    return tokens


def shard(
    x: torch.Tensor, group: Group = None, dim: int = 1, *, order: Order = "balanced"
) -> torch.Tensor:
    """This rank's part of a tensor that all ranks have whole.

    Tokens, positions, labels: whatever has a place for each token is cut alike. Gradients flow to
    the own part. Packed sequences are cut as the one row that they lie in; their ``cu_seqlens``
    stay those of the whole.

    Args:
        x: any tensor.
        group: a process group, a `DeviceMesh` of one or two dimensions (ring and heads, see
            `attention`), or None for all processes.
        dim: where its tokens are.
        order: "balanced": rank r of W has the pieces r and ``2W - 1 - r`` of 2W, which gives all
            the same work in causal attention; "contiguous": the r-th piece of W. Of a length that
            the pieces do not divide some have one token more.

    Returns:
        A copy, (..., tokens of this rank, ...).

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: torch.distributed is not initialised.
    """
    check_tensor("x", x)
    check_order(order)
    dim = _axis(x, dim)
    ranks = ranks_of(group)
    spans = spans_of(x.shape[dim], ranks.rank, ranks.size, order)
    parts = [x.narrow(dim, start, stop - start) for start, stop in spans]
    return torch.cat(parts or [x.narrow(dim, 0, 0)], dim)


def unshard(
    x: torch.Tensor,
    group: Group = None,
    dim: int = 1,
    *,
    tokens: int | None = None,
    order: Order = "balanced",
) -> torch.Tensor:
    """The inverse of `shard`: the whole tensor on each rank. No gradient flows through it.

    Args:
        x: this rank's part; without grad.
        group: as in `shard`.
        dim: as in `shard`.
        tokens: the length of the whole; by default as many on each rank as on this one.
        order: as in `shard`.

    Raises:
        ValueError, TypeError: naming the argument, also where it is not the same on all ranks.
        RuntimeError: torch.distributed is not initialised, or a rank did not answer.
    """
    ranks = ranks_of(group)
    with telling(ranks, x):
        check_tensor("x", x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: expected one without grad, which unshard has not; pass x.detach()")
        check_order(order)
        dim = _axis(x, dim)
        tokens = whole_length(tokens, x.shape[dim], ranks, order)
    rest = (*x.shape[:dim], *x.shape[dim + 1 :])
    fields = {"tokens": tokens, "order": order, "dim": dim, "x": (*rest, str(x.dtype))}
    agree(ranks, fields, x.device)
    parts = [spans_of(tokens, i, ranks.size, order) for i in range(ranks.size)]
    most = max(map(count, parts))
    x = x.movedim(dim, 0)
    padded = x.new_zeros((most, *x.shape[1:]))
    padded[: x.shape[0]] = x
    padded = gathered(ranks.ring, gathered(ranks.heads, padded[None]))
    whole = x.new_empty((tokens, *x.shape[1:]))
    for spans, part in zip(parts, padded, strict=True):
        at = 0
        for start, stop in spans:
            whole[start:stop] = part[at : at + stop - start]
            at += stop - start
    return whole.movedim(0, dim)


def gathered(line: Line, x: torch.Tensor) -> torch.Tensor:
    """Those of all ranks of the line, along the first dimension."""
    if line.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(line.size)]
    answered(line, lambda: dist.all_gather(parts, x.contiguous(), group=line.group))
    return torch.cat(parts)


def _axis(x: torch.Tensor, dim: int) -> int:
    if not is_int(dim):
        raise TypeError(f"dim: expected a whole number, got {dim!r}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected one of the {x.dim()} dimensions of x, got {dim}")
    return dim % x.dim()
