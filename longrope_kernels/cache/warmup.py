"""`warmup`: compile and load what a model will need, before it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..calls import arguments
from ..calls.caches import FLOAT8
from ..ops.attention import attention
from ..ops.rotary import apply_rotary
from ..rope.value import Rope, check_device
from .base import Cache
from .dense import KVCache
from .paged import PagedKVCache
from .rows import Policy, Rows, check_count


def warmup(
    rope: Rope,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    batch: int = 1,
    tokens: int | Sequence[int] = 1,
    prompts: int | Sequence[int] = (),
    capacity: int | None = None,
    block_size: int | None = None,
    cache_dtype: torch.dtype | None = None,
    policy: Policy = "switch",
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    backend: str | None = None,
) -> None:
    """Make the calls that a model will make, once, on tensors of zeros.

    The first call of a kind compiles Triton's kernels, some seconds each, and loads them, which
    cannot be done while a CUDA graph is captured. After this, calls of these sizes find all they
    need, in a graph too, where decoding launches others. Kernels differ by dtypes, by the number of
    new tokens, by whether 16 divides sizes, and by what a call asks for, not by lengths.

    Args:
        rope: the model's; its tables are made on the device.
        heads: of q.
        kv_heads: of k and v; a divisor of heads.
        head_dim: of q, k and v, at least the rope's ``rotary_dim``.
        dtype: of q, k and v.
        device: where the model is.
        batch: how many sequences a call has.
        tokens: new tokens of a sequence in a step, for `apply_rotary` and, with ``capacity``, for
            `decode`, which appends them; several where steps differ, as chunks of prompts do.
        prompts: lengths of prompts, for `apply_rotary` and `attention`; several where they differ.
        capacity: how many tokens a sequence may have in the cache; None: there is no cache. A
            dense one is made as `KVCache` makes it, for one layer, and freed.
        block_size: of a paged cache, as in `PagedKVCache`, of which a few blocks are made; None:
            a dense one.
        cache_dtype: of the cache: dtype by default, or float8_e4m3fn, with and without scales.
        policy: of the cache, for a rope of several sets: under "switch" `lengths` choose sets in
            all calls, else `sets` say them.
        window: of `attention` and `decode`.
        softcap: of `attention` and `decode`.
        sinks: whether these have some, of dtype.
        backend: of all calls; None for the one that each takes by itself.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
        RuntimeError: a CUDA graph is being captured, or the named backend is not available.
    """
    rows = Rows(rope, batch, 1, policy)  # checks them
    check_count("heads", heads, 1)
    check_count("kv_heads", kv_heads, 1)
    arguments.check_groups("kv_heads", heads, kv_heads)
    check_count("head_dim", head_dim, rope.rotary_dim)
    if dtype not in arguments.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype!r}")
    if cache_dtype not in (None, dtype, FLOAT8):
        raise TypeError(f"cache_dtype: expected {dtype}, float8_e4m3fn or None, got {cache_dtype}")
    if capacity is None and (block_size, cache_dtype) != (None, None):
        raise ValueError("capacity: expected beside block_size and cache_dtype, got None")
    if not isinstance(sinks, bool):
        raise TypeError(f"sinks: expected True or False, got {type(sinks).__name__}")
    most = 2**31 - 1 if capacity is None else check_count("capacity", capacity, 1)
    steps = _counts("tokens", tokens, most)
    if capacity is not None and not steps:
        raise ValueError(f"tokens: expected at least one number beside capacity, got {tokens!r}")
    lengths = _counts("prompts", prompts, 2**31 - 1)
    arguments.check_scores(True, None, window, softcap, head_dim)
    device = check_device(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: a CUDA graph is being captured; expected a call before that")

    caches: list[Cache] = []
    if capacity is not None:
        scale = torch.ones(kv_heads, device=device)
        for scales in ({}, {"k_scale": scale, "v_scale": scale}):
            if scales and cache_dtype != FLOAT8:
                continue
            named: dict[str, Any] = {"dtype": cache_dtype or dtype, "device": device, **scales}
            if block_size is None:
                cache: Cache = KVCache(
                    rope, batch, capacity, kv_heads, head_dim, policy=policy, **named
                )
            else:
                blocks = batch * -(-max(steps) // check_count("block_size", block_size, 1))
                sizes = (rope, batch, blocks, block_size, kv_heads, head_dim)
                cache = PagedKVCache(*sizes, max_length=capacity, policy=policy, **named)
            caches.append(cache)

    # Those of a cache are a view, whose address 16 need not divide.
    sets = caches[0].sets if caches else torch.zeros(batch, dtype=torch.int32, device=device)

    def zeros(seq: int, count: int) -> torch.Tensor:
        return torch.zeros((batch, seq, count, head_dim), dtype=dtype, device=device)

    scored: dict[str, Any] = {"window": window, "softcap": softcap, "backend": backend}
    if sinks:
        scored["sinks"] = torch.zeros(heads, dtype=dtype, device=device)
    with torch.no_grad():
        for seq in (*steps, *lengths):
            q, k = zeros(seq, heads), zeros(seq, kv_heads)
            of_prompt = torch.full((batch,), seq, device=device)
            chosen = {"sets": sets} if rows.keeps_sets else {"lengths": of_prompt}
            at = torch.arange(seq, device=device)
            for positions in (at, at.repeat(batch, 1)):
                for inplace in (False, True):
                    named = {**chosen, "inplace": inplace, "backend": backend}
                    apply_rotary(q, k, positions, rope, **named)
                if seq in lengths:
                    attention(q, k, k, positions, rope, **chosen, **scored)
        for cache in caches:
            for seq in steps:
                cache.reset()
                cache.extend(seq)
                k, v = zeros(seq, kv_heads), zeros(seq, kv_heads)
                cache.decode(zeros(seq, heads), k_new=k, v_new=v, **scored)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _counts(name: str, given: int | Sequence[int], most: int) -> tuple[int, ...]:
    """One number or several, each checked."""
    listed = (given,) if isinstance(given, int) else given
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise TypeError(f"{name}: expected a number of tokens or several, got {given!r}")
    return tuple(check_count(name, count, 1, most) for count in listed)
