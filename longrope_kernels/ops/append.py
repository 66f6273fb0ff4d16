"""`append` and its op: check, choose a backend, and write new keys and values into a cache."""

from __future__ import annotations

import torch

from ..backends import choose, reference
from ..calls import arguments, autocast, caches, schema, values
from ..calls.kinds import by_kind
from ..calls.memory import check_apart, clearly_apart, device_type
from ..calls.records import AppendCall, Keys
from ..torch_private import unwatched
from . import library


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor | None = None,
    *,
    block_table: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Write new keys and values into a cache, in place and by one launch.

    By ``cache_lens``, as `decode` reads them: token t of ``new`` goes to slot
    ``cache_lens - new + t`` of its sequence, and nowhere where that is negative. Or by
    ``slot_mapping``, whatever rows the tokens belong to, as vLLM's ``reshape_and_cache`` has it.
    No other slot changes. Keys stay as they are; `decode` rotates them as it reads.

    Args:
        k: (batch, new, kv_heads, dim); with ``slot_mapping`` also (tokens, kv_heads, dim). Of the
            dtype of the caches: float32, bfloat16, float16, and float64 in the reference backend;
            any of them for float8 caches. A unit last stride, any others.
        v: like k.
        k_cache: (batch, capacity, kv_heads, dim), or in blocks (blocks, block_size, kv_heads, dim).
            A unit last stride, any others. float8_e4m3fn takes numbers divided by the scale,
            clamped to 448 and rounded to nearest even.
        v_cache: like k_cache.
        cache_lens: (batch,) int32 or int64, how many keys each sequence has, the new ones included.
        block_table: (batch, max_blocks) int32, where slots lie by ``cache_lens``: see `decode`.
        slot_mapping: (tokens,) or (batch, new) int32 or int64, in place of ``cache_lens``: address
            a is slot ``a % n`` of row or block ``a // n``, for rows of n slots. A token with a
            negative address is dropped. No two tokens may have one address.
        k_scale: (kv_heads,) float32, for float8 caches; 1 by default.
        v_scale: like k_scale, of the values.
        backend: one that `apply_rotary` knows, or None for the first that can serve, in its order.

    Under autocast k and v take the dtype of the caches.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected; nothing has
            been written. Values of tensors on a device are checked only under
            ``LONGROPE_CHECK=1``.
        RuntimeError: the named backend is not available.
    """
    given = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    for name, x in given.items():
        arguments.check_tensor(name, x)
    if (cache_lens is None) == (slot_mapping is None):
        got = "neither" if cache_lens is None else "both"
        raise ValueError(f"cache_lens: expected it, or slot_mapping in its place, got {got}")
    if slot_mapping is not None and block_table is not None:
        raise ValueError("block_table: expected with cache_lens only, got it with slot_mapping")
    k, v = autocast_new(k, v, k_cache)
    layout: arguments.Layout = "bshd" if cache_lens is not None or k.dim() != 3 else "thd"
    name = _check_kind(
        *(k, v, k_cache, v_cache, cache_lens, block_table, slot_mapping, k_scale, v_scale),
        *(layout, backend),
    )
    cache = Keys(
        k_cache, v_cache, lens=cache_lens, block_table=block_table, k_scale=k_scale, v_scale=v_scale
    )
    direct = _direct(k, v, cache)
    call = made(("k", "v"), k, v, cache, slot_mapping, direct, layout)
    values.check_append(call)
    write_checked(call, name, direct)


@by_kind
def _check_kind(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    layout: arguments.Layout,
    backend: str | None,
) -> str:
    """All tensors of a call but their values, and where they lie; returns the chosen backend."""
    arguments.check_heads("k", k, layout, 0)
    of_k = arguments.as_bshd(k, layout)
    caches.check_caches("k", of_k, k_cache, v_cache, block_table, by_row=slot_mapping is None)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            caches.check_scale(name, scale, k_cache, "k")
    batch = of_k.shape[0]
    if cache_lens is not None:
        arguments.check_per_sequence("cache_lens", cache_lens, batch, k)
    return check_new("k", "v", k, v, k_cache, slot_mapping, batch, layout, backend)


def autocast_new(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values as autocast hands them on.

    Not for a float8 cache, which takes any dtype: they would be rounded twice.
    """
    if k_cache.dtype == caches.FLOAT8 or k.dtype == v.dtype == k_cache.dtype:
        return k, v
    return autocast.like_cache(k, k_cache), autocast.like_cache(v, k_cache)


def check_new(
    k_name: str,
    v_name: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    slot_mapping: torch.Tensor | None,
    batch: int,
    layout: arguments.Layout,
    backend: str | None,
) -> str:
    """New keys and values, so called, go with a cache which was checked; returns who writes."""
    new = (k_name, k), (v_name, v)
    for name, x in new:
        arguments.check_heads(name, x, layout, 0)
    _, _, kv_heads, dim = k_cache.shape
    dtype, device = k_cache.dtype, k_cache.device
    shape = k.shape
    expected = (shape[0], kv_heads, dim) if layout == "thd" else (batch, shape[1], kv_heads, dim)
    for name, x in new:
        if x.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected}, as k_cache has heads, got {tuple(x.shape)}"
            )
        if dtype not in (x.dtype, caches.FLOAT8):
            raise TypeError(f"{name}: expected the dtype of k_cache, {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected the device of k_cache, {device}, got {x.device}")
    if slot_mapping is not None:
        arguments.check_index("slot_mapping", slot_mapping, k)
        if slot_mapping.shape != shape[:-2]:
            raise ValueError(
                f"slot_mapping: expected shape {tuple(shape[:-2])}, one for each new token, got "
                f"{tuple(slot_mapping.shape)}"
            )
    return _choose(backend, k, v)


def made(
    names: tuple[str, str],
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Keys,
    slot_mapping: torch.Tensor | None,
    direct: bool,
    layout: arguments.Layout = "bshd",
    **beside: torch.Tensor,
) -> AppendCall:
    """The call of new keys and values, called ``names``, once they and the cache were checked.

    direct: whether all of these are `unwatched`. beside: what is read after they are written.
    """
    if not (direct and clearly_apart((cache.k, cache.v), (k, v, *beside.values()))):
        of_cache = {"k_cache": cache.k, "v_cache": cache.v}
        new = dict(zip(names, (k, v), strict=True))
        caches.check_no_gradients("append", **of_cache, **new)
        check_apart(of_cache, new | beside)
    if layout == "thd":
        if slot_mapping is not None:
            slot_mapping = slot_mapping.unsqueeze(0)
        k, v = arguments.as_bshd(k, layout), arguments.as_bshd(v, layout)
    return AppendCall(*alike(k, v), cache, slot_mapping)


def alike(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of one dtype, as kernels take them; only for a float8 cache they may differ."""
    return (k, v) if k.dtype == v.dtype else (k.float(), v.float())


def choose_append(backend: str | None, call: AppendCall) -> str:
    """The backend that writes what a call has."""
    return _choose(backend, call.k, call.v)


def _choose(backend: str | None, k: torch.Tensor, v: torch.Tensor) -> str:
    """It is traffic of memory as the rotation is, and served alike."""
    return choose.choose_rotary(backend, device_type(k), k.dtype == v.dtype == torch.float64)


def _direct(k: torch.Tensor, v: torch.Tensor, cache: Keys) -> bool:
    """Whether all tensors of a call are `unwatched`."""
    if cache.k_scale is cache.v_scale is None:
        return unwatched(k, v, cache.k, cache.v)
    scales = [scale for scale in (cache.k_scale, cache.v_scale) if scale is not None]
    return unwatched(k, v, cache.k, cache.v, *scales)


def write(call: AppendCall, backend: str) -> None:
    """Append by a chosen backend, once all but values was checked."""
    values.check_append(call)
    write_checked(call, backend, _direct(call.k, call.v, call.cache))


def write_checked(call: AppendCall, backend: str, direct: bool) -> None:
    """Append by a chosen backend, once all was checked; direct: all of it is `unwatched`."""
    k, _, cache, _ = call
    if backend == "reference":
        with torch.no_grad(), autocast.off(k):
            reference.append(call)
    elif direct:
        _start(call, backend)
        torch.autograd.graph.increment_version((cache.k, cache.v))
    else:
        _append(*schema.flatten(call), backend)


# -------------------------------------------------------------------------------------------- op


def _run(call: AppendCall, backend: str) -> None:
    values.check_append(call)
    _start(call, backend)


def _start(call: AppendCall, backend: str) -> None:
    if call.k.numel() and not call.cache.empty:
        choose.part(backend, "append").append(call)


_append = library.define(
    "append", AppendCall, "()", _run, lambda *_: None, mutable=("cache_k", "cache_v")
)
library.without_derivatives(_append)
