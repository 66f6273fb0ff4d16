"""flash-attn's functions with a `Rope` in place of cosines and sines, for models of one's own.

The tensors, and the names that mean the same, are flash-attn's; the work is done by `apply_rotary`,
`attention` and `decode`, and flash-attn need not be installed. What comes in is unrotated, a cache
of keys too. Tokens stand at their places in their sequences, from 0, as flash-attn's own rotation
counts them, and a sequence takes the factor set of its length: its number of keys. Where
``positions`` say otherwise, a `Rope` of several sets needs ``lengths`` or ``sets``.

No argument here means dropout, ALiBi, ``cache_batch_idx``, ``num_splits`` or ``deterministic``. The
log-sum-exp of a query that sees no key is minus infinity.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from ..calls import arguments, values
from ..calls.masks import sequence_of_token
from ..ops.attention import attention
from ..ops.decode import decode
from ..ops.rotary import apply_rotary
from ..rope.value import Rope

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _named(**ours: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Errors of what the function calls name the arguments as they are called here."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)  # no context manager, which would take some time of each call
        def named(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                text = re.sub(r"\w+", lambda word: ours.get(word[0], word[0]), str(error))
                raise type(error)(text) from None

        return named

    return decorate


@_named(q="x", positions="seqlen_offsets")
def apply_rotary_emb(
    x: torch.Tensor,
    rope: Rope,
    *,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Rotate x. Its first token stands at ``seqlen_offsets``.

    Args:
        x: (batch, seqlen, heads, dim), or packed (tokens, heads, dim) with ``cu_seqlens``.
        rope: says the pairing too, flash-attn's ``interleaved``.
        inplace: write into x and return it.
        seqlen_offsets: tokens before x, the same for all sequences or (batch,) int32 or int64.
        cu_seqlens: (batch + 1,) int32 or int64, where packed sequences begin.
        max_seqlen: not needed, and not read.
        lengths: (batch,), what chooses the factor set; ``seqlen_offsets`` plus the sequence's
            tokens in x by default. A prompt in chunks needs one set for all of them.
        sets: (batch,) int32, the factor sets themselves.
        backend: one that `apply_rotary` knows, or None for the fastest.

    Returns:
        Like x.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    layout: arguments.Layout = "bshd" if cu_seqlens is None else "thd"
    _check(rope, layout, x=x)
    counts, places, sequence = _sequences("cu_seqlens", cu_seqlens, x)
    if cu_seqlens is not None:  # `apply_rotary` reads them only where sequences choose their sets
        values.check_borders("cu_seqlens", cu_seqlens, x.shape[0])
    first = _per_sequence("seqlen_offsets", seqlen_offsets, len(counts), x)
    if lengths is None and sets is None:
        lengths = first + counts
    return apply_rotary(
        *(x, None, places + first[sequence], rope),
        layout=layout,
        lengths=lengths,
        sets=sets,
        cu_seqlens=cu_seqlens,
        inplace=inplace,
        backend=backend,
    )[0]


@_named(return_lse="return_softmax_lse")
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of unrotated q and k. The last query stands at the last key.

    Args:
        q: (batch, seqlen_q, heads, dim).
        k: (batch, seqlen_k, kv_heads, dim).
        v: like k.
        rope: of q and k.
        softmax_scale: dim**-0.5 by default.
        causal: a query sees no key after its own place.
        window_size: (left, right), how many keys beside its own place a query sees; -1 is all of
            them. Served are (-1, -1), (left, 0), any left with ``causal``, and (both, both).
        softcap: of the scores; 0 for none.
        positions: of the queries, (seqlen_q,) or (batch, seqlen_q); their places by default.
        key_positions: of the keys, (seqlen_k,) or (batch, seqlen_k); their places by default.
        lengths: (batch,), what chooses the factor set; seqlen_k by default.
        sets: (batch,) int32, the factor sets themselves.
        return_softmax_lse: also return the log-sum-exp of the scores.
        backend: one that `attention` knows, or None for the fastest.

    Returns:
        Like q; with ``return_softmax_lse`` also (batch, heads, seqlen_q) float32.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return _attend(
        *(q, k, v, rope, "bshd", None, None),
        *(positions, key_positions, lengths, sets),
        **_window(causal, window_size),
        softmax_scale=softmax_scale,
        softcap=softcap or None,
        return_lse=return_softmax_lse,
        backend=backend,
    )


@_named(cu_seqlens="cu_seqlens_q", return_lse="return_softmax_lse")
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention within packed sequences. The last query of each stands at its last key.

    Args:
        q: (total_q, heads, dim), unrotated.
        k: (total_k, kv_heads, dim), unrotated.
        v: like k.
        rope: of q and k.
        cu_seqlens_q: (batch + 1,) int32 or int64, where sequences begin in q, total_q last.
        cu_seqlens_k: the same for k and v. Pass the very same tensor where it is the same: q and k
            are then rotated together.
        max_seqlen_q: not needed, and not read.
        max_seqlen_k: not needed, and not read.
        softmax_scale: dim**-0.5 by default.
        causal: a query sees no key after its own place.
        window_size: the windows of `flash_attn_func`.
        softcap: of the scores; 0 for none.
        positions: (total_q,); places in the sequences by default.
        key_positions: (total_k,); places in the sequences by default.
        lengths: (batch,), what chooses the factor set; the keys of each sequence by default.
        sets: (batch,) int32, the factor sets themselves.
        return_softmax_lse: also return the log-sum-exp of the scores.
        backend: one that `attention` knows, or None for the fastest.

    Returns:
        Like q; with ``return_softmax_lse`` also (heads, total_q) float32.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return _attend(
        *(q, k, v, rope, "thd", cu_seqlens_q, cu_seqlens_k),
        *(positions, key_positions, lengths, sets),
        **_window(causal, window_size),
        softmax_scale=softmax_scale,
        softcap=softcap or None,
        return_lse=return_softmax_lse,
        backend=backend,
    )


@_named(
    cache_lens="cache_seqlens",
    kv_start="cache_leftpad",
    return_lse="return_softmax_lse",
    k_new="k",
    v_new="v",
)
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rope: Rope,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: int | torch.Tensor,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Append k and v to a cache of unrotated keys in place, and attend to it.

    Each query takes the factor set of the length up to it, for all its keys, so crossing into the
    next set needs no new prefill (policy "switch" of `KVCache`); ``sets`` holds it to one.

    Args:
        q: (batch, seqlen_q, heads, dim), unrotated; its last query stands
            at the last key, those of this call included.
        k_cache: (batch, capacity, kv_heads, dim); with ``block_table`` (blocks, block_size,
            kv_heads, dim).
        v_cache: like k_cache.
        rope: of q and the keys.
        k: (batch, seqlen_new, kv_heads, dim), unrotated; written behind the keys that are there.
        v: like k.
        cache_seqlens: keys in the cache **before** this call, the same for all sequences or
            (batch,) int32 or int64. (`decode`'s ``cache_lens`` counts those of the call too.)
        cache_leftpad: (batch,) int32 or int64, where the keys of a sequence begin in its slots.
            The first of them stands at position 0.
        block_table: (batch, max_blocks) int32, the blocks of each sequence in order. New keys are
            written into them; sequences must not share one that is written.
        softmax_scale: dim**-0.5 by default.
        causal: False only for one query, for which it says nothing.
        window_size: (left, any).
        softcap: of the scores; 0 for none.
        lengths: (batch,) or (batch, seqlen_q); by default the keys up to each query, without left
            padding.
        sets: (batch,) int32, the factor sets themselves.
        return_softmax_lse: also return the log-sum-exp of the scores.
        backend: one that `decode` knows, or None for the fastest.

    Returns:
        Like q; with ``return_softmax_lse`` also (batch, heads, seqlen_q) float32.

    Raises:
        ValueError, TypeError: naming the argument; nothing has been written. Whether new keys fit
            is checked on the host, and on a device under ``LONGROPE_CHECK=1`` alone.
    """
    _check(rope, "bshd", q=q)
    if not causal and q.shape[1] > 1:
        raise ValueError(
            f"causal: expected True for more than one query, got {causal!r} for {q.shape[1]}"
        )
    window = _window(True, window_size)["window"]
    cache_lens = _per_sequence("cache_seqlens", cache_seqlens, q.shape[0], q)
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither, got one of them")
    if k is not None:
        _check(rope, "bshd", k=k)
        _check_room(k.shape[1], k_cache, block_table, cache_lens)
        cache_lens = cache_lens + k.shape[1]
    return decode(
        *(q, k_cache, v_cache, cache_lens, rope),
        block_table=block_table,
        lengths=lengths,
        sets=sets,
        kv_start=cache_leftpad,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap or None,
        return_lse=return_softmax_lse,
        k_new=k,
        v_new=v,
        backend=backend,
    )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    layout: arguments.Layout,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    positions: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    **rest: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` with the last query of each sequence at its last key."""
    _check(rope, layout, q=q, k=k)
    if positions is None:
        if key_positions is not None:
            raise ValueError("positions: expected them beside key_positions, got None")
        queries, places, sequence = _sequences("cu_seqlens_q", cu_seqlens, q)
        counts, of_keys, _ = _sequences("cu_seqlens_k", cu_seqlens_k, k)
        if len(counts) != len(queries):
            raise ValueError(
                f"cu_seqlens_k: expected {len(queries)} sequences as in cu_seqlens_q, got "
                f"{len(counts)}"
            )
        positions = places + (counts - queries)[sequence]
        # Where q and k stand at the same places, they are rotated together.
        if q.shape[1] != k.shape[1] if layout == "bshd" else cu_seqlens_k is not cu_seqlens:
            key_positions = of_keys
        if lengths is None and sets is None:
            lengths = counts
    return attention(
        *(q, k, v, positions, rope),
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        key_positions=key_positions,
        lengths=lengths,
        sets=sets,
        layout=layout,
        **rest,
    )


# ----------------------------------------------------------------------------------------- places


def _sequences(
    name: str, cu_seqlens: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of each sequence of x; of each token its place in its sequence, and the sequence."""
    if x.dim() == 4:
        batch, tokens = x.shape[:2]
        place = torch.arange(tokens, device=x.device).expand(batch, tokens)
        counts = torch.full((batch,), tokens, device=x.device)
        return counts, place, torch.arange(batch, device=x.device)[:, None]
    cu_seqlens = arguments.check_tensor(name, cu_seqlens)
    arguments.check_borders(name, cu_seqlens, x, "thd")
    sequence = sequence_of_token(cu_seqlens, x.shape[0])
    place = torch.arange(x.shape[0], device=x.device) - cu_seqlens[sequence]
    return cu_seqlens.diff(), place, sequence


def _per_sequence(
    name: str, value: int | torch.Tensor, count: int, x: torch.Tensor
) -> torch.Tensor:
    """A number of tokens for all sequences, or one for each, as a tensor."""
    if isinstance(value, torch.Tensor):
        arguments.check_per_sequence(name, value, count, x)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number of tokens or a tensor, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0 tokens, got {value}")
    return torch.full((count,), value, device=x.device)


def _check_room(
    new: int, k_cache: torch.Tensor, block_table: torch.Tensor | None, cache_seqlens: torch.Tensor
) -> None:
    """New keys have room, in a cache whose shape `decode` checks."""
    if arguments.check_tensor("k_cache", k_cache).dim() != 4 or not values.readable(cache_seqlens):
        return
    slots = k_cache.shape[1]
    if block_table is not None:
        slots *= arguments.check_tensor("block_table", block_table).shape[1:].numel()
    for i, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= slots - new:
            raise ValueError(
                f"cache_seqlens: expected from 0 to {slots - new} (the slots there are less {new} "
                f"new keys), got {length} for sequence {i}"
            )


# -------------------------------------------------------------------------------------- arguments


def _window(causal: bool, window_size: tuple[int, int]) -> dict[str, Any]:
    """``causal`` and ``window`` of `attention`, which counts a query's own place."""
    try:
        left, right = (int(side) for side in window_size)
    except (TypeError, ValueError):
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}") from None
    if causal is False and right != 0 and left != right and (left >= 0 or right >= 0):
        raise ValueError(
            "window_size: expected (-1, -1), (left, 0), (both, both), or causal=True; got "
            f"{tuple(window_size)}"
        )
    causal = right == 0 if causal is False else causal
    return {"causal": causal, "window": None if left < 0 else left + 1}


def _check(rope: object, layout: arguments.Layout, **tensors: object) -> None:
    """What is read here; all else is checked where it is used."""
    if not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
    for name, x in tensors.items():
        arguments.check_heads(name, arguments.check_tensor(name, x), layout, rope.rotary_dim)
