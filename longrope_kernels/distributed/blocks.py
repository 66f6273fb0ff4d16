"""Attention of a block of rotated queries to a block of rotated keys: (out, lse), and back.

Blocks lie anywhere in the sequence, so masks go by the slots of the whole. The backward of a block
takes the log-sum-exp over all keys, not that of the block: each block then gives its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..backends import choose
from ..backends.reference import dtype_of_sums
from ..calls.masks import sequence_of_token
from ..calls.records import AttentionCall, Keys, Scores, Selection
from ..rope.tables import no_pairs
from ..torch_private import flash_attention_on_cpu, flash_attention_on_cpu_backward
from .shards import Spans

BACKENDS = ("reference", "composed", "triton")
_ROWS = 512  # queries whose scores of all keys of a block lie in memory at once, in the reference


class Hidden(NamedTuple):
    """Who sees whom and how it is scored, of the whole sequence."""

    scores: Scores
    tokens: int
    start: torch.Tensor | None = None  # (sequences,), as of `attention`
    borders: torch.Tensor | None = None  # (sequences + 1,)

    @property
    def plain(self) -> bool:
        """Whether slots alone say which keys are seen, and scores are products."""
        return self.start is None and self.borders is None and not self.scores.cap


class Pair(NamedTuple):
    """A stretch of queries and one of keys, at least one of which is seen."""

    queries: slice  # among those of this rank
    keys: slice  # among those of the block
    first_query: int  # the slot of the first one; where all is seen, stretches may be joined
    first_key: int
    sees: str  # "all", "causal" (the stretches are one), or "some"


class Parts(NamedTuple):
    """What a `Pair` has of both blocks."""

    q: torch.Tensor  # (B, Sq, Hq, D), rotated
    k: torch.Tensor  # (B, Sk, Hk, D), rotated
    v: torch.Tensor


def pairs_of(queries: Spans, keys: Spans, scores: Scores) -> Iterator[Pair]:
    """The pairs of stretches that see anything."""
    at_query = 0
    for a, b in queries:
        at_key = 0
        for c, d in keys:
            sees = _sees((a, b), (c, d), scores)
            if sees is not None:
                yield Pair(
                    slice(at_query, at_query + b - a), slice(at_key, at_key + d - c), a, c, sees
                )
            at_key += d - c
        at_query += b - a


def joined(pairs: Iterable[Pair]) -> list[Pair]:
    """As few pairs: those that see all and lie side by side are one, whatever their slots."""
    found: list[Pair] = []
    for pair in pairs:
        if found and found[-1].sees == pair.sees == "all":
            last = found[-1]
            if last.queries == pair.queries and last.keys.stop == pair.keys.start:
                found[-1] = last._replace(keys=slice(last.keys.start, pair.keys.stop))
                continue
        found.append(pair)
    merged: list[Pair] = []
    for pair in found:
        last = next(
            (x for x in merged if x.keys == pair.keys and x.queries.stop == pair.queries.start),
            pair,
        )
        if last is not pair and last.sees == pair.sees == "all":
            whole = last._replace(queries=slice(last.queries.start, pair.queries.stop))
            merged[merged.index(last)] = whole
        else:
            merged.append(pair)
    return merged


def _sees(queries: tuple[int, int], keys: tuple[int, int], scores: Scores) -> str | None:
    (a, b), (c, d) = queries, keys
    least, most = a - (d - 1), (b - 1) - c  # how far before a query its keys stand
    window = scores.window or most - least + 2**31
    nearest = -1 if scores.causal else max(0, least, -most)
    if scores.causal:
        if most < 0 or least >= window:
            return None
        if least >= 0 and most < window:
            return "all"
        return "causal" if queries == keys and most < window else "some"
    if nearest >= window:
        return None
    return "all" if max(-least, most) < window else "some"


def choose_backend(backend: str | None, q: torch.Tensor, hidden: Hidden, trains: bool) -> str:
    """Who attends; stretches that a window cuts are the reference's.

    Raises:
        ValueError: an unknown name, or one that does not serve this call.
        RuntimeError: the named backend is not there.
    """
    on_cpu, dim = q.device.type == "cpu", q.shape[-1]
    if backend is None:
        if q.dtype == torch.float64 or (on_cpu and not hidden.plain):
            return "reference"
        if on_cpu:
            return "composed"
        served = q.dtype in choose.FUSED_DTYPES and dim in choose.FUSED_HEAD_DIMS
        served = served and q.device.type == "cuda"
        lacks = choose.missing_products("triton", choose.capability_now(q))
        return "triton" if served and lacks is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "reference":
        return backend
    if hidden.scores.window:
        raise ValueError(
            f"backend: {backend!r} serves no window here; expected 'reference' or None"
        )
    if backend == "composed":
        if not on_cpu:
            raise ValueError(f"backend: 'composed' serves tensors on cpu here, got {q.device}")
        if not hidden.plain or q.dtype == torch.float64:
            raise ValueError(
                "backend: 'composed' serves neither softcap, kv_start, cu_seqlens nor float64 "
                "here; expected 'reference' or None"
            )
        return backend
    of_all = backend, q.device.type, q.dtype, dim, "scored", trains
    return choose.choose_attention(*of_all, choose.capability_now(q))


def attend(
    backend: str, parts: Parts, pair: Pair, hidden: Hidden
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Sq, Hq, D) and lse (B, Hq, Sq), base e; 0 and -inf where a query sees no key."""
    if pair.sees == "some" or backend == "reference":
        return _attend(parts, pair, hidden)
    if backend == "composed":
        q, k, v = (x.transpose(1, 2) for x in parts)
        causal = pair.sees == "causal"
        out, lse = flash_attention_on_cpu(q, k, v, causal, hidden.scores.scale)
        return out.transpose(1, 2), lse
    call, q = _call(parts, pair, hidden), parts.q
    out = torch.empty_like(q)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    choose.part(backend, "attention").forward(call, out, lse, "registers")  # of no pairs
    return out, lse


class Gradients(NamedTuple):
    """Of the output, and what the backward remembers, of the queries of a `Pair`."""

    d_out: torch.Tensor  # (B, Sq, Hq, D)
    d_lse: torch.Tensor | None  # (B, Hq, Sq)
    out: torch.Tensor  # over all keys
    lse: torch.Tensor  # over all keys

    def of(self, queries: slice) -> Gradients:
        """Those of some queries."""
        d_lse = None if self.d_lse is None else self.d_lse[..., queries]
        d_out, out = self.d_out[:, queries], self.out[:, queries]
        return Gradients(d_out, d_lse, out, self.lse[..., queries])


def attend_backward(
    backend: str, parts: Parts, pair: Pair, hidden: Hidden, given: Gradients
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What this pair adds to dq, dk and dv."""
    if pair.sees == "some" or backend == "reference":
        return _attend_backward(parts, pair, hidden, given)
    if backend == "composed":
        if given.d_lse is not None:  # torch's op has no such gradient
            return _attend_backward(parts, pair, hidden, given)
        d_out, q, k, v, out = (x.transpose(1, 2) for x in (given.d_out, *parts, given.out))
        causal, scale = pair.sees == "causal", hidden.scores.scale
        found = flash_attention_on_cpu_backward(d_out, q, k, v, out, given.lse, causal, scale)
        dq, dk, dv = (x.transpose(1, 2) for x in found)
        return dq, dk, dv
    dq, dk, dv = (torch.empty_like(x) for x in parts)
    part = choose.part(backend, "attention")
    d_lse = None if given.d_lse is None else given.d_lse.contiguous()
    out, lse = given.out.contiguous(), given.lse.contiguous()
    part.backward(_call(parts, pair, hidden), given.d_out, d_lse, out, lse, dq, dk, dv)
    return dq, dk, dv


def _call(parts: Parts, pair: Pair, hidden: Hidden) -> AttentionCall:
    """The call of a pair that sees all or is causal; its q and k need no rotation."""
    q, k, v = parts
    borders = borders_k = None
    start = hidden.start
    if hidden.borders is not None:
        borders = _clipped(hidden.borders, pair.first_query, q.shape[1])
        borders_k = _clipped(hidden.borders, pair.first_key, k.shape[1])
        if start is not None:  # the first slot of a sequence may lie before the stretch
            start = start - (pair.first_key - hidden.borders[:-1]).clamp(min=0)
    elif start is not None:
        start = start - pair.first_key
    scores = hidden.scores._replace(causal=pair.sees == "causal")
    start = None if start is None else start.clamp(min=0)
    at_q, at_k = (q.new_zeros(x.shape[:2], dtype=torch.int32) for x in (q, k))
    keys = Keys(k, v, at_k, start, borders_k)
    return AttentionCall(q, at_q, keys, no_pairs(q.device), Selection(borders=borders), scores)


def _clipped(borders: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return (borders - first).clamp(0, count)


# ----------------------------------------------------------------------------------- reference


def _attend(parts: Parts, pair: Pair, hidden: Hidden) -> tuple[torch.Tensor, torch.Tensor]:
    found = [_attend_rows(parts, pair, hidden, rows) for rows in _rows(parts.q)]
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], -1)


def _attend_rows(
    parts: Parts, pair: Pair, hidden: Hidden, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _grouped(parts, rows)
    scores, _ = _scores(q, k, pair, hidden, rows)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - finite(lse)[..., None]) @ v
    return _ungrouped(out), lse.flatten(1, 2)


def _attend_backward(
    parts: Parts, pair: Pair, hidden: Hidden, given: Gradients
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dqs: list[torch.Tensor] = []
    dk, dv = (x.new_zeros(x.transpose(1, 2).shape, dtype=dtype_of_sums(x)) for x in parts[1:])
    for rows in _rows(parts.q):
        q, k, v = _grouped(parts, rows)
        d_out, out = (_of_groups(x[:, rows], k.shape[1], q.dtype) for x in (given.d_out, given.out))
        delta = (d_out * out).sum(-1)
        lse = given.lse[..., rows].unflatten(1, q.shape[1:3]).to(q.dtype)
        if given.d_lse is not None:
            delta = delta - given.d_lse[..., rows].unflatten(1, q.shape[1:3])
        scores, slope = _scores(q, k, pair, hidden, rows)
        p = torch.exp(scores - finite(lse)[..., None])
        ds = p * (d_out @ v.mT - delta[..., None]) * slope * hidden.scores.scale
        dqs.append(_ungrouped(ds @ k))
        dk = dk + (ds.mT @ q).sum(2)
        dv = dv + (p.mT @ d_out).sum(2)
    return torch.cat(dqs, 1), dk.transpose(1, 2), dv.transpose(1, 2)


def _rows(q: torch.Tensor) -> list[slice]:
    return [slice(i, min(i + _ROWS, q.shape[1])) for i in range(0, q.shape[1], _ROWS)]


def _grouped(parts: Parts, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, Hk, G, rows, D), k and v (B, Hk, 1, Sk, D), in the dtype of the sums."""
    compute = dtype_of_sums(parts.q)
    q = _of_groups(parts.q[:, rows], parts.k.shape[2], compute)
    k, v = (x.transpose(1, 2)[:, :, None].to(compute) for x in (parts.k, parts.v))
    return q, k, v


def _of_groups(x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, S, Hq, D) as (B, Hk, G, S, D)."""
    grouped: torch.Tensor = x.transpose(1, 2).unflatten(1, (kv_heads, -1))
    return grouped.to(dtype)


def _ungrouped(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1, 2).transpose(1, 2)


def _scores(
    q: torch.Tensor, k: torch.Tensor, pair: Pair, hidden: Hidden, rows: slice
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Scores, -inf where a key is hidden, and the slope of the softcap."""
    scores = q @ k.mT * hidden.scores.scale
    slope: torch.Tensor | float = 1.0
    if cap := hidden.scores.cap:
        bent = torch.tanh(scores / cap)
        scores, slope = cap * bent, 1 - bent**2
    seen = _visible(pair, hidden, rows, q.device)
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)), slope


def _visible(pair: Pair, hidden: Hidden, rows: slice, device: torch.device) -> torch.Tensor | None:
    """Which keys of the pair each of its queries sees: (B or 1, 1, 1, rows, keys) bool."""
    (causal, _, window, _), start, borders = hidden.scores, hidden.start, hidden.borders
    first, count = pair.first_key, pair.keys.stop - pair.keys.start
    key = torch.arange(first, first + count, device=device)
    query = torch.arange(rows.start, rows.stop, device=device) + pair.first_query
    seen: torch.Tensor | None = None
    if pair.sees != "all":
        distance = query[:, None] - key
        seen = distance >= 0 if causal else distance >= -_beyond(window, hidden.tokens)
        if window:
            seen = seen & (distance < window)
    place = key[None]
    if borders is not None:
        of_token = sequence_of_token(borders, hidden.tokens)
        same = of_token[query][:, None] == of_token[key]
        seen = same if seen is None else seen & same
        place = place - borders[of_token[key]]
        start = None if start is None else start[of_token[key]]
    elif start is not None:
        start = start[:, None]
    if start is not None:
        there = (place >= start)[:, None]
        seen = there if seen is None else seen & there
    if seen is None:
        return None
    return (seen if seen.dim() == 3 else seen[None])[:, None, None]


def _beyond(window: int, tokens: int) -> int:
    """How many slots after its own a query sees where it is not causal."""
    return window - 1 if window else tokens


def finite(lse: torch.Tensor) -> torch.Tensor:
    """A stand-in where nothing is seen, so that weights become 0 there and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
