"""`decode` over ranks that each have some of the keys: attend to them, exchange (out, lse), merge.

A local cache knows nothing of the tokens of other ranks: its query would stand where its last key
does. So the query is turned ahead by what it stands further, and the backend turns it the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import reference
from ..calls import arguments, caches, values
from ..calls.records import FEW_QUERIES, Selection
from ..ops.decode import decode as decode_locally
from ..ops.factors import resolve
from ..rope.tables import Tables
from ..rope.value import Rope
from .blocks import finite
from .fields import shown
from .ranks import Group, agree, ranks_of, telling
from .shards import gathered


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None = None,
    *,
    key_slots: torch.Tensor,
    total_lens: torch.Tensor,
    group: Group = None,
    block_table: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    attention_factor: float = 1.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`longrope_kernels.decode` over caches that each have some keys of each sequence.

    All ranks have the same queries, attend to their own keys, and get the same output; one exchange
    of (out, lse) merges. A cache is read once for each query of a sequence.

    Args:
        q: (batch, q_len, heads, dim), q_len from 1 to 16; the same on all ranks. Query t has slot
            ``total_lens - q_len + t`` of its sequence.
        k_cache: of this rank, as of `longrope_kernels.decode`; `SpreadCache` keeps it.
        v_cache: like k_cache.
        cache_lens: (batch,) int32 or int64, how many keys of each sequence are here.
        factors: as of `longrope_kernels.decode`.
        n_hat: likewise.
        key_slots: (batch, slots) int32 or int64, which slot of its sequence each key here has, in
            ascending order; at least ``cache_lens`` of them, and not read beyond.
        total_lens: (batch,) int32 or int64, how many keys each sequence has on all ranks, those of
            the queries included; the same on all ranks.
        group: a process group, a `DeviceMesh` of one or two dimensions, or None for all processes.
        block_table: of this rank.
        lengths: as of `longrope_kernels.decode`; by default each query has the length up to it.
        sets: (batch,) int32, the factor set of each sequence; wins over ``lengths``.
        kv_start: (batch,); keys at slots of the sequence below it are hidden. The key at slot j
            stands at position ``j - kv_start``.
        softmax_scale: multiplies the scores; dim**-0.5 by default.
        window: a query sees keys with ``s - j < window``, by the slots of the sequence.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        k_scale: as of `longrope_kernels.decode`.
        v_scale: likewise.
        base: likewise.
        interleaved: likewise.
        attention_factor: likewise.
        return_lse: also return the log-sum-exp of the scores, base e.
        backend: as of `longrope_kernels.decode`.

    Returns:
        The attention output, of the shape and dtype of q; with ``return_lse`` also the log-sum-exp,
        (batch, heads, q_len) float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, also where it is not the same on all ranks.
        RuntimeError: torch.distributed is not initialised, a rank did not answer, or the named
            backend is not available.
    """
    ranks = ranks_of(group)
    with telling(ranks, q):
        arguments.check_flag("return_lse", return_lse)
        arguments.check_tensor("q", q)
        tables = resolve(factors, n_hat, base, interleaved, attention_factor, q)
        arguments.check_heads("q", q, "bshd", 2 * tables.pairs)
        batch, queries = q.shape[:2]
        if not 1 <= queries <= FEW_QUERIES:
            raise ValueError(
                f"q: expected from 1 to {FEW_QUERIES} tokens a sequence, got {queries}"
            )
        caches.check_no_gradients("decode", q=q)
        caches.check_caches("q", q, k_cache, v_cache, block_table)
        arguments.check_scores(True, softmax_scale, window, softcap, q.shape[3])
        for name, x in (("cache_lens", cache_lens), ("total_lens", total_lens)):
            arguments.check_per_sequence(name, x, batch, q)
        arguments.check_index("key_slots", key_slots, q)
        if key_slots.dim() != 2 or key_slots.shape[0] != batch:
            raise ValueError(
                f"key_slots: expected shape ({batch}, slots), got {tuple(key_slots.shape)}"
            )
        if kv_start is not None:
            arguments.check_per_sequence("kv_start", kv_start, batch, q)
            values.check_start(kv_start)
        if sets is not None:
            arguments.check_selection(tables.sets, q, batch, "bshd", None, sets, None)
        if lengths is not None:
            arguments.check_index("lengths", lengths, q)
            if tuple(lengths.shape) not in ((batch,), (batch, queries)):
                raise ValueError(
                    f"lengths: expected shape ({batch},) or ({batch}, {queries}), got "
                    f"{tuple(lengths.shape)}"
                )
        chosen_by = Selection(lengths, sets)
        values.check_spread(tables, chosen_by, cache_lens, key_slots, total_lens)

    fields: dict[str, Any] = {"q": tuple(q.shape), "dtype": str(q.dtype), "device": q.device.type}
    fields |= {"factors": shown(factors), "n_hat": n_hat, "base": base, "interleaved": interleaved}
    fields |= {"attention_factor": attention_factor, "kv_heads": k_cache.shape[2]}
    fields |= {"total_lens": shown(total_lens), "kv_start": shown(kv_start)}
    fields |= {"lengths": shown(lengths), "sets": shown(sets), "softmax_scale": softmax_scale}
    fields |= {"window": window, "softcap": softcap, "backend": backend}
    agree(ranks, fields, q.device)

    first = torch.zeros_like(total_lens) if kv_start is None else kv_start
    slot = total_lens[:, None].long() - queries + torch.arange(queries, device=q.device)
    tokens = (slot + 1 - first[:, None]).clamp(min=0)
    chosen = reference.query_sets(tables, Selection(lengths, sets), tokens).expand(batch, queries)
    newest = cache_lens[:, None].long() - 1 - torch.arange(queries, device=q.device)
    there, newest = newest >= 0, _at(key_slots, newest)
    rest: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap}
    rest |= {"k_scale": k_scale, "v_scale": v_scale, "block_table": block_table}
    rest |= {"backend": backend, "return_lse": True}
    rest |= {"key_positions": key_slots if kv_start is None else key_slots - first[:, None]}
    if not isinstance(factors, Rope):
        rest |= {"n_hat": n_hat, "base": base, "interleaved": interleaved}
        rest |= {"attention_factor": attention_factor}
    held = torch.arange(key_slots.shape[1], device=q.device) < cache_lens[:, None]
    found = []
    for t in range(queries):
        at = slot[:, t : t + 1]
        here = cache_lens.long() - (there & (newest > at)).sum(1)
        if window is not None or kv_start is not None:
            least = first[:, None] if window is None else (at - window + 1).maximum(first[:, None])
            rest["kv_start"] = (held & (key_slots < least)).sum(1)
        rest["sets"] = chosen[:, t].int() if tables.sets > 1 else None
        behind = _at(rest["key_positions"], here[:, None] - 1)
        ahead = _turned(q[:, t : t + 1], at - first[:, None], behind, tables, chosen[:, t])
        found.append(decode_locally(ahead, k_cache, v_cache, here, factors, **rest))
    out, lse = (torch.cat(x, d) for x, d in zip(zip(*found, strict=True), (1, 2), strict=True))
    own = torch.cat((out.to(lse.dtype), lse.transpose(1, 2)[..., None]), -1)[None]
    out, lse = _merged(gathered(ranks.ring, gathered(ranks.heads, own)))
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, slots) at an index (B, n), int64; anything where it is negative or there is no slot."""
    padded = x if x.shape[1] else x.new_zeros((x.shape[0], 1))
    return padded.gather(1, index.clamp(0, padded.shape[1] - 1)).long()


def _turned(
    q: torch.Tensor,
    position: torch.Tensor,
    behind: torch.Tensor,
    tables: Tables,
    sets: torch.Tensor,
) -> torch.Tensor:
    """q (B, 1, H, D) so that the rotation of position ``behind`` (B, 1) makes it that of its own.

    The attention factor may differ as well, where one of the two is below n_hat.
    """
    pinned = Selection(sets=sets)
    cos, sin = reference.cos_sin(tables, pinned, position)
    cos_b, sin_b = reference.cos_sin(tables, pinned, behind)
    square = cos_b**2 + sin_b**2
    compute = reference.dtype_of_sums(q)
    c = ((cos * cos_b + sin * sin_b) / square).to(compute)
    s = ((sin * cos_b - cos * sin_b) / square).to(compute)
    return reference.rotate(q, c, s, tables.interleaved)


def _merged(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, S, H, D) and lse (B, H, S) of (ranks, B, S, H, D + 1), lse last, in any order."""
    out, lse = parts[..., :-1], parts[..., -1]
    total = lse.logsumexp(0)
    weights = torch.exp(lse - finite(total))
    return (out * weights[..., None]).sum(0), total.transpose(1, 2)
