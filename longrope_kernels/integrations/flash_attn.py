"""flash-attn's functions with a `Rope` in place of cosines and sines, for models of one's own.

The tensors, and the names that mean the same, are flash-attn's; the work is done by `apply_rotary`,
`attention` and `decode`, and flash-attn need not be installed. What comes in is unrotated, a cache
of keys too. Tokens stand at their places in their sequences, from 0, as flash-attn's own rotation
counts them, and a sequence takes the factor set of its length: its number of keys. Where
``positions`` say otherwise, a `Rope` of several sets needs ``lengths`` or ``sets``.

Alike in all of them:

- ``rope`` is of q and the keys, and says the pairing too, flash-attn's ``interleaved``.
- ``softmax_scale`` is dim**-0.5 by default, ``softcap`` 0 for none.
- ``window_size`` is (left, right): how many keys beside its own place a query sees, -1 for all of
  them. Served are (-1, -1), (left, 0), any left with ``causal``, and (both, both).
- ``lengths``, (batch,), choose factor sets, ``sets``, (batch,) int32, name them.
- ``return_softmax_lse`` also returns the log-sum-exp of the scores, float32, (batch, heads,
  seqlen_q) or of packed sequences (heads, total_q); minus infinity where a query sees no key.
- ``backend`` is one that the function of ours knows, or None for the fastest.
- Integers in tensors are int32 or int64, but ``sets`` and ``block_table``. ``max_seqlen`` is not
  needed, and not read.
- Errors are ValueError and TypeError, name the argument, and leave nothing written.

No argument here means dropout, ALiBi, ``cache_batch_idx``, ``num_splits`` or ``deterministic``.
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
from ..rope.factor_set import is_int
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
    """Rotate x.

    Args:
        x: (batch, seqlen, heads, dim), or packed (tokens, heads, dim) with ``cu_seqlens``.
        inplace: write into x and return it.
        seqlen_offsets: tokens before x, the same for all sequences or (batch,).
        cu_seqlens: (batch + 1,), where packed sequences begin, with the token count last.
        lengths: ``seqlen_offsets`` plus the sequence's tokens in x by default. A prompt in chunks
            needs one set for all of them.
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
        k: (batch, seqlen_k, kv_heads, dim), as v.
        causal: a query sees no key after its own place.
        positions: of the queries, (seqlen_q,) or (batch, seqlen_q); their places by default.
        key_positions: of the keys, (seqlen_k,) or (batch, seqlen_k); where ``positions`` are named,
            the same by default.
        lengths: seqlen_k by default.
    """
    return _attend(
        *(q, k, v, rope, "bshd", None, None),
        *(positions, key_positions, lengths, sets),
        **_scores(causal, window_size, softmax_scale, softcap, return_softmax_lse, backend),
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
        k: (total_k, kv_heads, dim), unrotated, as v.
        cu_seqlens_q: (batch + 1,), where sequences begin in q, with total_q last.
        cu_seqlens_k: the same for k and v. Pass the very same tensor where it is the same: q and k
            are then rotated together.
        causal: a query sees no key after its own place.
        positions: (total_q,); places in the sequences by default.
        key_positions: (total_k,); where ``positions`` are named, the same by default.
        lengths: the keys of each sequence by default.
    """
    return _attend(
        *(q, k, v, rope, "thd", cu_seqlens_q, cu_seqlens_k),
        *(positions, key_positions, lengths, sets),
        **_scores(causal, window_size, softmax_scale, softcap, return_softmax_lse, backend),
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

    The last query stands at the last key, those of this call included. Each query takes the factor
    set of the length up to it, for all its keys, so crossing into the next set needs no new prefill
    (policy "switch" of `KVCache`); ``sets`` holds it to one.

    Args:
        q: (batch, seqlen_q, heads, dim), unrotated.
        k_cache: (batch, capacity, kv_heads, dim); with ``block_table`` (blocks, block_size,
            kv_heads, dim). As v_cache.
        k: (batch, seqlen_new, kv_heads, dim), unrotated, as v; written behind the keys that are
            there. Whether they fit is checked on the host, and on a device under
            ``LONGROPE_CHECK=1`` alone.
        cache_seqlens: keys in the cache **before** this call, the same for all sequences or
            (batch,). (`decode`'s ``cache_lens`` counts those of the call too.)
        cache_leftpad: (batch,), where the keys of a sequence begin in its slots. The first of them
            stands at position 0.
        block_table: (batch, max_blocks) int32, the blocks of each sequence in order. Sequences must
            not share one that is written.
        causal: False only for one query, for which it says nothing.
        window_size: (left, any).
        lengths: also (batch, seqlen_q); by default the keys up to each query, without left padding.
    """
    _check(rope, "bshd", q=q)
    if not causal and q.shape[1] > 1:
        raise ValueError(
            f"causal: expected True for more than one query, got {causal!r} for {q.shape[1]}"
        )
    scores = _scores(True, window_size, softmax_scale, softcap, return_softmax_lse, backend)
    del scores["causal"]  # `decode` is
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
        k_new=k,
        v_new=v,
        **scores,
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
    if not is_int(value):
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
    most = slots - new
    for i, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= most:
            raise ValueError(
                f"cache_seqlens: expected from 0 to {most} (the slots there are less {new} new "
                f"keys), got {length} for sequence {i}"
            )


def _scores(
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    return_lse: bool,
    backend: str | None,
) -> dict[str, Any]:
    """The same for `attention`, whose window counts a query's own place."""
    try:
        left, right = (int(side) for side in window_size)
    except (TypeError, ValueError):
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}") from None
    if causal is False and right != 0 and left != right and (left >= 0 or right >= 0):
        raise ValueError(
            "window_size: expected (-1, -1), (left, 0), (both, both), or causal=True; got "
            f"{tuple(window_size)}"
        )
    return {
        "causal": right == 0 if causal is False else causal,
        "window": None if left < 0 else left + 1,
        "softmax_scale": softmax_scale,
        "softcap": softcap or None,
        "return_lse": return_lse,
        "backend": backend,
    }


def _check(rope: object, layout: arguments.Layout, **tensors: object) -> None:
    """What is read here; all else is checked where it is used."""
    if not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
    for name, x in tensors.items():
        arguments.check_heads(name, arguments.check_tensor(name, x), layout, rope.rotary_dim)
