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

import torch

from ..calls import arguments, values
from ..calls.masks import sequence_of_token
from ..ops.attention import attention
from ..ops.decode import decode
from ..ops.rotary import apply_rotary as _apply_rotary
from ..rope.value import Rope

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]


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
        backend: as in `apply_rotary`.

    Returns:
        Like x.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check_rope(rope)
    layout: arguments.Layout = "bshd" if cu_seqlens is None else "thd"
    arguments.check_heads("x", arguments.check_tensor("x", x), layout, rope.rotary_dim)
    if cu_seqlens is None:
        counts = torch.full((x.shape[0],), x.shape[1], device=x.device)
    else:
        _check_borders("cu_seqlens", cu_seqlens, x)
        counts = cu_seqlens.diff()
    if isinstance(seqlen_offsets, torch.Tensor):
        arguments.check_per_sequence("seqlen_offsets", seqlen_offsets, len(counts), x)
    else:
        _check_count("seqlen_offsets", seqlen_offsets)
    first = torch.zeros_like(counts) + seqlen_offsets
    if cu_seqlens is None:
        positions = first[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        positions = _places(cu_seqlens, x.shape[0], first)
    if lengths is None and sets is None:
        lengths = first + counts
    out, _ = _apply_rotary(
        x,
        None,
        positions,
        rope,
        layout=layout,
        lengths=lengths,
        sets=sets,
        cu_seqlens=cu_seqlens,
        inplace=inplace,
        backend=backend,
    )
    return out


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
        key_positions: of the keys, likewise.
        lengths: (batch,), what chooses the factor set; seqlen_k by default.
        sets: (batch,) int32, the factor sets themselves.
        return_softmax_lse: also return the log-sum-exp of the scores.
        backend: as in `attention`.

    Returns:
        Like q; with ``return_softmax_lse`` also (batch, heads, seqlen_q) float32.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check_rope(rope)
    for name, x in (("q", q), ("k", k)):
        arguments.check_heads(name, arguments.check_tensor(name, x), "bshd", rope.rotary_dim)
    causal, window = _window(causal, window_size)
    if positions is None and key_positions is None:
        places = torch.arange(k.shape[1], device=k.device)
        positions = places
        if q.shape[1] != k.shape[1]:
            positions = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=k.device)
            key_positions = places
        if lengths is None and sets is None and len(rope.sets) > 1:
            lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    elif positions is None:
        raise ValueError("positions: expected them beside key_positions, got None")
    return attention(
        q,
        k,
        v,
        positions,
        rope,
        causal=causal,
        softmax_scale=softmax_scale,
        window=window,
        softcap=_softcap(softcap),
        key_positions=key_positions,
        lengths=lengths,
        sets=sets,
        return_lse=return_softmax_lse,
        backend=backend,
    )


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
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        positions: (total_q,); places in the sequences by default.
        key_positions: (total_k,), likewise.
        lengths: (batch,), what chooses the factor set; the keys of each sequence by default.
        sets: (batch,) int32, the factor sets themselves.
        return_softmax_lse: also return the log-sum-exp of the scores.
        backend: as in `attention`.

    Returns:
        Like q; with ``return_softmax_lse`` also (heads, total_q) float32.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check_rope(rope)
    for name, x in (("q", q), ("k", k)):
        arguments.check_heads(name, arguments.check_tensor(name, x), "thd", rope.rotary_dim)
    _check_borders("cu_seqlens_q", cu_seqlens_q, q)
    _check_borders("cu_seqlens_k", cu_seqlens_k, k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: expected {len(cu_seqlens_q) - 1} sequences as in cu_seqlens_q, got "
            f"shape {tuple(cu_seqlens_k.shape)}"
        )
    causal, window = _window(causal, window_size)
    if positions is None and key_positions is None:
        counts = cu_seqlens_k.diff()
        positions = _places(cu_seqlens_q, q.shape[0], counts - cu_seqlens_q.diff())
        if cu_seqlens_k is not cu_seqlens_q:
            key_positions = _places(cu_seqlens_k, k.shape[0], torch.zeros_like(counts))
        if lengths is None and sets is None:
            lengths = counts
    elif positions is None:
        raise ValueError("positions: expected them beside key_positions, got None")
    return attention(
        q,
        k,
        v,
        positions,
        rope,
        causal=causal,
        softmax_scale=softmax_scale,
        window=window,
        softcap=_softcap(softcap),
        cu_seqlens=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        key_positions=key_positions,
        lengths=lengths,
        sets=sets,
        layout="thd",
        return_lse=return_softmax_lse,
        backend=backend,
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

    Each sequence takes the factor set of its length now, for all its keys, so crossing into the
    next set needs no new prefill (policy "switch" of `KVCache`); ``sets`` holds it to one.

    Args:
        q: (batch, seqlen_q, heads, dim), seqlen_q from 1 to 16, unrotated; its last query stands
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
        block_table: (batch, max_blocks) int32, as in `decode`. New keys are written into its
            blocks; sequences must not share one that is written.
        softmax_scale: dim**-0.5 by default.
        causal: False only for one query, for which it says nothing.
        window_size: (left, any): a query sees ``left`` keys before its own; -1 is all of them.
        softcap: of the scores; 0 for none.
        lengths: (batch,), what chooses the factor set; keys in the cache, without left padding and
            with those of this call, by default.
        sets: (batch,) int32, the factor sets themselves.
        return_softmax_lse: also return the log-sum-exp of the scores.
        backend: as in `decode`.

    Returns:
        Like q; with ``return_softmax_lse`` also (batch, heads, seqlen_q) float32.

    Raises:
        ValueError, TypeError: naming the argument; a check that comes with `decode` comes after
            k and v were written. Whether new keys fit is checked on the host, and on a device
            under ``LONGROPE_CHECK=1`` alone.
    """
    _check_rope(rope)
    arguments.check_heads("q", arguments.check_tensor("q", q), "bshd", rope.rotary_dim)
    if not causal and q.shape[1] > 1:
        raise ValueError(
            f"causal: expected True for more than one query, got {causal!r} for {q.shape[1]}"
        )
    _, window = _window(True, window_size)
    if isinstance(cache_seqlens, torch.Tensor):
        arguments.check_per_sequence("cache_seqlens", cache_seqlens, q.shape[0], q)
    else:
        _check_count("cache_seqlens", cache_seqlens)
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither, got one of them")
    if k is not None and v is not None:
        slots = _new_slots(k, v, q, k_cache, v_cache, cache_seqlens, block_table)
        with torch.no_grad():
            k_cache.index_put_(slots, k)
            v_cache.index_put_(slots, v)
        cache_seqlens = cache_seqlens + k.shape[1]
    return decode(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        rope,
        block_table=block_table,
        lengths=lengths,
        sets=sets,
        kv_start=cache_leftpad,
        softmax_scale=softmax_scale,
        window=window,
        softcap=_softcap(softcap),
        return_lse=return_softmax_lse,
        backend=backend,
    )


# ----------------------------------------------------------------------------------------- places


def _places(cu_seqlens: torch.Tensor, tokens: int, first: torch.Tensor) -> torch.Tensor:
    """Positions of packed tokens (tokens,), where sequence i begins at ``first[i]``."""
    sequence = sequence_of_token(cu_seqlens, tokens)
    index = torch.arange(tokens, device=cu_seqlens.device)
    return index + (first - cu_seqlens[:-1])[sequence]


def _new_slots(
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where new tokens go in the first two dimensions of the cache: two (batch, seqlen_new)."""
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        arguments.check_tensor(f"{name}_cache", cache)
        arguments.check_heads(name, arguments.check_tensor(name, x), "bshd", 0)
        expected = (q.shape[0], k.shape[1], *cache.shape[2:])
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        if x.dtype != cache.dtype:
            raise TypeError(
                f"{name}: expected the dtype of {name}_cache, {cache.dtype}, got {x.dtype}"
            )
        if x.device != cache.device or x.device != q.device:
            raise ValueError(f"{name}: expected the device of q and the cache, got {x.device}")
    size, width = k_cache.shape[1], 1
    if block_table is not None:
        arguments.check_index("block_table", block_table, q)
        if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
            raise ValueError(
                f"block_table: expected shape ({q.shape[0]}, max_blocks), "
                f"got {tuple(block_table.shape)}"
            )
        width = block_table.shape[1]
    if values.readable(cache_seqlens):
        for i, length in enumerate(cache_seqlens.tolist()):
            if not 0 <= length <= width * size - k.shape[1]:
                raise ValueError(
                    f"cache_seqlens: expected from 0 to {width * size - k.shape[1]} (the slots "
                    f"there are less {k.shape[1]} new keys), got {length} for sequence {i}"
                )
    new = cache_seqlens[:, None].long() + torch.arange(k.shape[1], device=k.device)
    rows = torch.arange(q.shape[0], device=k.device)[:, None].expand_as(new)
    if block_table is None:
        return rows, new
    return block_table.long()[rows, new // size], new % size


# -------------------------------------------------------------------------------------- arguments


def _window(causal: bool, window_size: tuple[int, int]) -> tuple[bool, int | None]:
    """``causal`` and ``window`` of `attention`, which counts a query's own place."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {causal!r}")
    try:
        left, right = (int(side) for side in window_size)
    except (TypeError, ValueError):
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}") from None
    if causal:
        right = 0
    if right == 0:
        return True, None if left < 0 else left + 1
    if left < 0 and right < 0:
        return False, None
    if left == right:
        return False, left + 1
    raise ValueError(
        "window_size: expected (-1, -1), (left, 0), (both, both), or causal=True; got "
        f"{tuple(window_size)}"
    )


def _softcap(softcap: float) -> float | None:
    return None if softcap == 0 else softcap


def _check_rope(rope: object) -> None:
    if not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number of tokens or a tensor, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0 tokens, got {value}")


def _check_borders(name: str, cu_seqlens: torch.Tensor, x: torch.Tensor) -> None:
    arguments.check_borders(name, cu_seqlens, x, "thd")
    values.check_borders(name, cu_seqlens, x.shape[0])
