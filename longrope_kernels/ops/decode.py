"""`decode` and its op: check, choose a backend, and attend to a cache of unrotated keys."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..backends import choose, reference
from ..calls import arguments, autocast, caches, schema, values
from ..calls.kinds import by_kind
from ..calls.memory import device_type
from ..calls.records import FEW_QUERIES, DecodeCall, Keys, Scores
from ..rope.value import Rope
from ..torch_private import unwatched
from . import library
from .append import autocast_new, check_new, made, write_checked
from .factors import resolve


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None = None,
    *,
    block_table: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    base: float | None = None,
    interleaved: bool = False,
    attention_factor: float | None = None,
    return_lse: bool = False,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new queries, one or a whole prompt, to a cache whose keys lie unrotated.

    Keys are rotated as they are read, so the factor set of a sequence may change from one step to
    the next, and each sequence of a batch has its own. The keys of this call are in the cache
    already, or come as ``k_new`` and are written there first: query t of q_len has slot
    ``s = cache_lens - q_len + t`` and sees the keys at slots ``j <= s``. Key j stands at position
    ``j - kv_start``, or ``key_positions[j]``; a query stands where the key of its slot does.

    Args:
        q: (batch, q_len, heads, dim), any q_len from 1 on: a token, drafts, a chunk of a prompt;
            float32, bfloat16 or float16, and float64 in the reference backend. A unit last stride,
            any others.
        k_cache: (batch, capacity, kv_heads, dim); with ``block_table`` (blocks, block_size,
            kv_heads, dim). Of the dtype of q, or float8_e4m3fn. heads is a multiple of kv_heads.
        v_cache: like k_cache.
        cache_lens: (batch,) int32 or int64, how many keys each sequence has, those of this call
            included. A query at a negative slot sees nothing.
        factors: (P,), one for each pair of dimensions, or a `Rope`, which holds what ``n_hat``,
            ``base``, ``interleaved`` and ``attention_factor`` would say.
        n_hat: tokens below this position keep the original embedding; 0 for no threshold.
        block_table: (batch, max_blocks) int32: slot j of a sequence lies in row
            ``j % block_size`` of block ``block_table[sequence, j // block_size]``. Entries past
            the length of a sequence are not read.
        lengths: int32 or int64, what chooses factor sets: (batch, q_len), one for each query, or
            (batch,), one for all queries of a sequence, as the chunks of one prompt need it: its
            full length. By default each query has its own, ``cache_lens - kv_start - (q_len - 1 -
            t)``, so that drafts verified together give what they give step by step.
        sets: (batch,) int32, the factor set of all queries of a sequence; wins over ``lengths``.
        kv_start: (batch,) int32 or int64; keys at slots below it are hidden (left padding).
        key_positions: (batch, slots) int32 or int64, the position of the key at each slot, to
            renumber cached tokens (attention sinks, rolled windows); at least ``cache_lens`` slots.
        softmax_scale: multiplies the scores; dim**-0.5 by default.
        window: a query sees keys with ``s - j < window``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: (heads,), any floating dtype: a logit of each head of q that joins the sum of its
            softmax and has no value.
        k_scale: (kv_heads,) float32, multiplies the keys of a float8 cache; 1 by default.
        v_scale: like k_scale, of the values.
        base: ``b`` in ``theta_i = b**(-2i / R)``, ``R = 2P``; 10000 by default.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
        attention_factor: multiplies the rotated dimensions of q and k; 1 by default.
        return_lse: also return the log-sum-exp of the scores, and of the sink, base e.
        k_new: (batch, new, kv_heads, dim), unrotated, of the dtype of the caches, any beside
            float8: written into the cache as by `append`, key t to slot ``cache_lens - new + t``.
            One launch writes keys and values, before those that attend.
        v_new: like k_new.
        slot_mapping: (batch, new) int32 or int64, where new keys go in place of that, as in
            `append`: for rows with fewer new keys than others, whose first ones are -1.
        backend: "reference", "native" (CPU; float32, bfloat16 and float16), "triton" or "cuda"
            (CUDA; bfloat16 and float16, and float8 caches; "cuda" up to 16 queries a sequence), or
            None for the first that can serve, in the order that `longrope info` prints. A named
            backend runs or raises.

    Returns:
        The attention output, of the shape and dtype of q; with ``return_lse`` also the log-sum-exp,
        (batch, heads, q_len) float32 (float64 for float64). A query that sees no key gets 0, and
        -inf or its sink.

    Under autocast q takes the dtype of the caches, which are not cast unless their dtypes differ,
    and beside float8 caches that of autocast.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected. Values of
            tensors on a device (block ids among them) are checked only under ``LONGROPE_CHECK=1``.
        RuntimeError: the named backend is not available.
    """
    arguments.check_flag("return_lse", return_lse)
    arguments.check_tensor("q", q)
    arguments.check_tensor("k_cache", k_cache)
    arguments.check_tensor("v_cache", v_cache)
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        if k_new is None:  # which must not be written into copies
            k_cache, v_cache = autocast.alike(k_cache, v_cache)
        q = autocast.like_cache(q, k_cache)
    if k_new is None and v_new is None and slot_mapping is None:
        direct = unwatched(q, k_cache, v_cache)
    else:
        k_new = arguments.check_tensor("k_new", k_new)
        v_new = arguments.check_tensor("v_new", v_new)
        k_new, v_new = autocast_new(k_new, v_new, k_cache)
        direct = unwatched(q, k_cache, v_cache, k_new, v_new)
    rest = {} if sinks is None else {"sinks": arguments.check_tensor("sinks", sinks)}
    for scale, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if given is not None:
            rest[scale] = arguments.check_tensor(scale, given)
    direct = direct and unwatched(*rest.values())
    tables = resolve(factors, n_hat, base, interleaved, attention_factor, q)
    scores, count, name, writer = _check_kind(
        *(q, k_cache, v_cache, cache_lens, block_table, lengths, sets, kv_start, key_positions),
        *(sinks, k_scale, v_scale, k_new, v_new, slot_mapping, tables.steps),
        *(softmax_scale, window, softcap, backend),
    )
    if not direct:
        caches.check_no_gradients("decode", q=q, k_cache=k_cache, v_cache=v_cache, **rest)
    selection = arguments.select(count, lengths, sets)
    keys = Keys(
        *(k_cache, v_cache, key_positions, kv_start, None),
        *(cache_lens, block_table, k_scale, v_scale),
    )
    call = DecodeCall(q, keys, tables, selection, scores, sinks)
    values.check_decode(call)
    if writer is not None:
        assert k_new is not None
        assert v_new is not None
        new = made(("k_new", "v_new"), k_new, v_new, keys, slot_mapping, direct, q=q)
        values.check_append(new, lens_too=False)
        write_checked(new, writer, direct)  # all was checked before anything is written
    if name == "reference":
        with autocast.off(q):
            out, lse = reference.decode(call)
    elif direct:
        out, lse = _start(call, name)
    else:
        out, lse = _decode(*schema.flatten(call), name)
    return (out, lse) if return_lse else out


class _Known(NamedTuple):
    scores: Scores
    sets: int  # factor sets that there are
    backend: str
    writer: str | None  # the backend that writes new keys and values, if there are any


@by_kind
def _check_kind(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    steps: torch.Tensor,
    softmax_scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: str | None,
) -> _Known:
    """All of a call but the values of its tensors, and what follows; steps: of the tables."""
    arguments.check_heads("q", q, "bshd", 2 * steps.shape[2])
    batch, queries, heads, _ = q.shape
    if queries < 1:
        raise ValueError("q: expected at least 1 token a sequence, got 0")
    caches.check_caches("q", q, k_cache, v_cache, block_table)
    arguments.check_groups("k_cache", heads, k_cache.shape[2])
    if sinks is not None:
        arguments.check_sinks(sinks, heads, q)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            caches.check_scale(name, scale, k_cache, "q")
    arguments.check_per_sequence("cache_lens", cache_lens, batch, q)
    if kv_start is not None:
        arguments.check_per_sequence("kv_start", kv_start, batch, q)
    if key_positions is not None:
        _check_key_positions(key_positions, batch, q)
    if lengths is not None:
        arguments.check_index("lengths", lengths, q)
        if tuple(lengths.shape) not in ((batch,), (batch, queries)):
            raise ValueError(
                f"lengths: expected shape ({batch},), one for each sequence, or "
                f"({batch}, {queries}), one for each query, got {tuple(lengths.shape)}"
            )
    if sets is not None:
        arguments.check_selection(steps.shape[0], q, batch, "bshd", None, sets, None)
    dim = operator.index(q.shape[3])  # a constant, also where a graph is traced with dynamic sizes
    scores = arguments.check_scores(True, softmax_scale, window, softcap, dim)
    of_all = backend, device_type(q), q.dtype, k_cache.dtype, dim
    rest = sinks is not None, choose.capability_now(q)
    if queries > FEW_QUERIES:  # a branch, which a traced graph takes; no number for the choice
        name = choose.choose_decode(*of_all, True, *rest)
    else:
        name = choose.choose_decode(*of_all, False, *rest)
    writer = None
    if k_new is not None and v_new is not None:
        of_new = "k_new", "v_new", k_new, v_new, k_cache, slot_mapping, batch
        writer = check_new(*of_new, "bshd", backend)
    return _Known(scores, steps.shape[0], name, writer)


def _check_key_positions(key_positions: torch.Tensor, batch: int, q: torch.Tensor) -> None:
    arguments.check_index("key_positions", key_positions, q)
    if key_positions.dim() != 2 or key_positions.shape[0] != batch:
        raise ValueError(
            f"key_positions: expected shape ({batch}, slots), got {tuple(key_positions.shape)}"
        )


# -------------------------------------------------------------------------------------------- op


def _fake(call: DecodeCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = call.q.shape
    lse = call.q.new_empty((batch, heads, queries), dtype=torch.float32)
    return library.made_like(call.q), lse


def _run(call: DecodeCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    values.check_decode(call)
    return _start(call, backend)


def _start(call: DecodeCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _fake(call, backend)
    choose.part(backend, "decode").decode(call, out, lse)
    return out, lse


_decode = library.define("decode", DecodeCall, "(Tensor out, Tensor lse)", _run, _fake)
library.without_derivatives(_decode)
