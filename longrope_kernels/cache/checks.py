"""Checks of what a cache is given: new keys and values, and the scales of a float8 one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..calls import arguments, values
from ..calls.caches import FLOAT8
from ..ops.append import autocast_new


def check_new(
    k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, names: tuple[str, str] = ("k", "v")
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v, new tokens of one layer, as autocast hands them on; pool: (slots, heads, dim)."""
    for name, x in zip(names, (k, v), strict=True):
        arguments.check_tensor(name, x)
    k, v = autocast_new(k, v, pool)
    heads = tuple(pool.shape[1:])
    served = arguments.FLOAT_DTYPES if pool.dtype == FLOAT8 else (pool.dtype,)
    for name, x in zip(names, (k, v), strict=True):
        if x.dim() not in (3, 4) or tuple(x.shape[-2:]) != heads:
            raise ValueError(
                f"{name}: expected shape (rows, q_len, {heads[0]}, {heads[1]}) or "
                f"(tokens, {heads[0]}, {heads[1]}), got {tuple(x.shape)}"
            )
        if x.dtype not in served:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in served)
            raise TypeError(f"{name}: expected {known}, got {x.dtype}")
        if x.device != pool.device:
            raise ValueError(
                f"{name}: expected the device of the cache, {pool.device}, got {x.device}"
            )
    if v.shape != k.shape:
        raise ValueError(
            f"{names[1]}: expected the shape of {names[0]}, {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    return k, v


def check_tokens(
    k: torch.Tensor, rows: Sequence[int], counts: Sequence[int], name: str = "k"
) -> None:
    """k has the tokens that were announced."""
    if k.dim() == 3 and k.shape[0] != sum(counts):
        raise ValueError(
            f"{name}: expected {sum(counts)} tokens, the sum of counts, got shape {tuple(k.shape)}"
        )
    if k.dim() == 4 and tuple(k.shape[:2]) != (len(rows), max(counts, default=0)):
        raise ValueError(
            f"{name}: expected {len(rows)} rows of {max(counts, default=0)} tokens, the largest of "
            f"counts, got shape {tuple(k.shape)}"
        )


def check_scale(
    name: str,
    scale: torch.Tensor | None,
    layers: int,
    kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | None:
    """A scale for each layer and KV head, (layers, kv_heads), on the device."""
    if scale is None:
        return None
    arguments.check_tensor(name, scale)
    if dtype != FLOAT8:
        raise ValueError(f"{name}: expected with dtype float8_e4m3fn only, got {dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {scale.dtype}")
    shape = (layers, kv_heads)
    if tuple(scale.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"{name}: expected shape ({kv_heads},) or {shape}, got {tuple(scale.shape)}"
        )
    if values.readable(scale) and not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"{name}: expected finite numbers above 0, got {scale.tolist()}")
    with torch.inference_mode(False):
        return scale.detach().expand(shape).to(device, copy=True)
