"""`attention` over ranks: check, agree, rotate where tokens are made, exchange, attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..calls import arguments, autocast, values
from ..ops.rotary import apply_rotary
from ..rope.value import Rope
from . import blocks, heads, ring
from .fields import shown
from .ranks import ALONE, Group, Ranks, agree, ranks_of, telling
from .schedule import choose_schedule
from .shards import Order, Spans, check_order, spans_of, whole_length


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None = None,
    *,
    group: Group = None,
    tokens: int | None = None,
    order: Order = "balanced",
    schedule: str = "auto",
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    attention_factor: float = 1.0,
    layout: arguments.Layout = "bshd",
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`longrope_kernels.attention` of a sequence whose tokens are spread over ranks by `shard`.

    Each rank has some tokens of each sequence and gets their output; masks go by slots of the
    whole sequence. All ranks call it, with the same arguments but for the tensors of their tokens,
    in the backward too. k is rotated once, where its token is.

    Args:
        q: (batch, tokens of this rank, heads, dim), or as ``layout`` says; unrotated.
        k: as q, with kv_heads.
        v: like k.
        positions: of the tokens of this rank, (tokens,) or (batch, tokens); cut by `shard`.
        factors: as of `longrope_kernels.attention`.
        n_hat: likewise.
        group: a process group; a `DeviceMesh` of one dimension, or of two, (ring, heads): heads are
            exchanged within the second, sequences of the lines go round the first; None for all
            processes.
        tokens: how many the whole sequence has; by default as many on each rank as on this one.
        order: as of `shard`.
        schedule: "ring", "ulysses" (an exchange of heads for tokens; the ranks divide kv_heads), or
            "auto", as `choose_schedule` says. A mesh of two dimensions needs "auto".
        causal: a query sees keys with ``j <= s``.
        softmax_scale: multiplies the scores; dim**-0.5 by default.
        window: a query sees keys with ``s - j < window`` (not causal: ``|s - j| < window``). Ranks
            out of its reach get no keys, which order "contiguous" makes most of.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        cu_seqlens: (sequences + 1,), where packed sequences begin in the whole row; layout "thd".
        kv_start: (batch,) or (sequences,); keys at slots of the whole below it are hidden.
        lengths: (batch,) or (sequences,), the total length of each whole sequence, which chooses
            its factor set; the same on all ranks.
        sets: the factor set of each sequence, int32; wins over ``lengths``.
        base: as of `longrope_kernels.attention`.
        interleaved: likewise.
        attention_factor: likewise.
        layout: "bshd", "bhsd" or "thd".
        return_lse: also return the log-sum-exp of the scores, base e.
        backend: of the blocks: "reference" (PyTorch), "composed" (torch's own on a CPU; no softcap,
            window, padding or packed sequences), "triton" (no window), or None for the fastest that
            can serve.

    Returns:
        The attention output of the tokens of this rank, of the shape and dtype of q; with
        ``return_lse`` also the log-sum-exp, (batch, heads, tokens) or (heads, tokens), float32
        (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, also where it is not the same on all ranks.
            Values of tensors on a device are compared only under ``LONGROPE_CHECK=1``.
        RuntimeError: torch.distributed is not initialised, a rank did not answer within the
            timeout of its group, or the named backend is not available.
    """
    ranks = ranks_of(group)
    with telling(ranks, q):
        for name, flag in (("causal", causal), ("return_lse", return_lse)):
            arguments.check_flag(name, flag)
        for name, x in (("q", q), ("k", k), ("v", v)):
            arguments.check_tensor(name, x)
        if autocast.dtype_of(q) or not q.dtype == k.dtype == v.dtype:
            q, k, v = map(autocast.cast, (q, k, v))
        check_order(order)
        for name, x in (("q", q), ("k", k), ("v", v)):
            arguments.check_heads(name, x, layout, 0)
        arguments.check_like("k", k, "q", q, layout)
        arguments.check_like("v", v, "k", k, layout, free=())
        (batch, local, q_heads, dim), kv_heads = (
            arguments.as_bshd(q, layout).shape,
            arguments.as_bshd(k, layout).shape[2],
        )
        arguments.check_groups("k", q_heads, kv_heads)
        scores = arguments.check_scores(causal, softmax_scale, window, softcap, dim)
        tokens = whole_length(tokens, local, ranks, order)
        sequences = batch
        if cu_seqlens is not None:
            sequences = arguments.check_borders("cu_seqlens", cu_seqlens, q, layout)
            values.check_borders("cu_seqlens", cu_seqlens, tokens)
        if kv_start is not None:
            arguments.check_per_sequence("kv_start", kv_start, sequences, q)
            values.check_start(kv_start)
        ranks = _scheduled(ranks, schedule, q_heads, kv_heads)
        hidden = blocks.Hidden(scores, tokens, kv_start, cu_seqlens)
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        name = blocks.choose_backend(backend, q, hidden, trains)

        parts = tuple(spans_of(tokens, i, ranks.size, order) for i in range(ranks.size))
        borders = cu_seqlens if cu_seqlens is None else _own_borders(cu_seqlens, parts[ranks.rank])
        rotation: dict[str, Any] = {"base": base, "interleaved": interleaved, "layout": layout}
        rotation |= {"lengths": lengths, "sets": sets, "attention_factor": attention_factor}
        q, k = _rotated(q, k, positions, factors, n_hat, {**rotation, "cu_seqlens": borders})

    fields: dict[str, Any] = {"tokens": tokens, "order": order, "schedule": schedule}
    fields |= {"batch": batch, "heads": q_heads, "kv_heads": kv_heads, "dim": dim}
    fields |= {"dtype": str(q.dtype), "device": q.device.type, "layout": layout}
    fields |= {"factors": shown(factors), "n_hat": n_hat, "base": base}
    fields |= {"interleaved": interleaved, "attention_factor": attention_factor, **scores._asdict()}
    fields |= {"cu_seqlens": shown(cu_seqlens), "kv_start": shown(kv_start)}
    fields |= {"lengths": shown(lengths), "sets": shown(sets)}
    fields |= {"backend": backend, "requires_grad": trains}
    agree(ranks, fields, q.device)
    with autocast.off(q):
        q4, k4, v4 = (arguments.as_bshd(x, layout) for x in (q, k, v))
        out, lse = _attend(q4, k4, v4, ranks, parts, hidden, name)
    out = arguments.from_bshd(out, layout)
    if not return_lse:
        return out
    return out, lse.squeeze(0) if layout == "thd" else lse


def _scheduled(ranks: Ranks, schedule: str, q_heads: int, kv_heads: int) -> Ranks:
    """The ranks as the schedule has them: round a ring, or exchanging heads."""
    if ranks.heads.size > 1:
        if schedule != "auto":
            raise ValueError(
                f"schedule: expected 'auto' with a mesh of two dimensions, got {schedule!r}"
            )
        choose_schedule(q_heads, kv_heads, ranks.heads.size, "ulysses")
        return ranks
    chosen = choose_schedule(q_heads, kv_heads, ranks.size, schedule)
    return Ranks(ALONE, ranks.ring) if chosen.name == "ulysses" else ranks


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranks: Ranks,
    parts: tuple[Spans, ...],
    hidden: blocks.Hidden,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, S, Hq, D) and lse (B, Hq, S) of the tokens of this rank; q and k are rotated."""
    lines = [parts[i : i + ranks.heads.size] for i in range(0, len(parts), ranks.heads.size)]
    own = lines[ranks.ring.rank]
    q, k, v = (heads.to_tokens(x, ranks.heads, own) for x in (q, k, v))
    plan = ring.Plan(ranks.ring, tuple(map(_joined, lines)), hidden, backend)
    out, lse = ring.attend(q, k, v, plan)
    out = heads.to_heads(out, ranks.heads, own)
    lse = heads.to_heads(lse.transpose(1, 2)[..., None], ranks.heads, own)[..., 0]
    return out, lse.transpose(1, 2)


def _joined(parts: tuple[Spans, ...]) -> Spans:
    """The slots of some ranks, as few ascending spans."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(span for spans in parts for span in spans):
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return tuple(joined)


def _own_borders(cu_seqlens: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Where packed sequences begin among the tokens of this rank."""
    none = torch.zeros_like(cu_seqlens)
    return sum(((cu_seqlens - a).clamp(0, b - a) for a, b in spans), none)


def _rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None,
    rest: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    q, turned = apply_rotary(q, k, positions, factors, n_hat, **rest)
    assert turned is not None
    return q, turned
