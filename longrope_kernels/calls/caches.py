"""What `append` and `decode` do with the caches that they are given: shapes, dtypes, devices."""

from __future__ import annotations

import torch

from ..torch_private import requires_grad
from . import arguments

FLOAT8 = torch.float8_e4m3fn


def check_caches(
    of: str,
    x: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    by_row: bool = True,
) -> None:
    """The caches go with x (batch, tokens, heads, dim), called ``of``, and with one another.

    by_row: a dense cache has a row for each of x.
    """
    shape = x.shape
    dim, dtype, device = shape[3], x.dtype, x.device
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        sizes = cache.shape
        if len(sizes) != 4 or sizes[3] != dim:
            axes = "batch, capacity" if block_table is None else "blocks, block_size"
            raise ValueError(
                f"{name}: expected shape ({axes}, kv_heads, {dim}), got {tuple(sizes)}"
            )
        if cache.dtype not in (dtype, FLOAT8):
            raise TypeError(
                f"{name}: expected the dtype of {of}, {dtype}, or float8_e4m3fn, got {cache.dtype}"
            )
        if cache.device != device:
            raise ValueError(f"{name}: expected the device of {of}, {device}, got {cache.device}")
        if cache.stride()[3] != 1 and dim > 1:
            raise ValueError(
                f"{name}: expected a unit stride in the last dimension, got strides "
                f"{cache.stride()}"
            )
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"v_cache: expected the shape of k_cache, {tuple(k_cache.shape)}, "
            f"got {tuple(v_cache.shape)}"
        )
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(
            f"v_cache: expected the dtype of k_cache, {k_cache.dtype}, got {v_cache.dtype}"
        )
    if block_table is None:
        if by_row and k_cache.shape[0] != shape[0]:
            raise ValueError(
                f"k_cache: expected batch {shape[0]} as in {of}, or a block_table, "
                f"got shape {tuple(k_cache.shape)}"
            )
        return
    arguments.check_index("block_table", block_table, x)
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table: expected int32, got {block_table.dtype}")
    if block_table.dim() != 2 or block_table.shape[0] != shape[0]:
        raise ValueError(
            f"block_table: expected shape ({shape[0]}, max_blocks), got {tuple(block_table.shape)}"
        )


def check_scale(name: str, scale: torch.Tensor, k_cache: torch.Tensor, of: str) -> None:
    """A factor for each KV head of a float8 cache, which lies where ``of`` does."""
    arguments.check_tensor(name, scale)
    if k_cache.dtype != FLOAT8:
        raise ValueError(f"{name}: expected with float8_e4m3fn caches only, got {k_cache.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {scale.dtype}")
    if scale.device != k_cache.device:
        raise ValueError(
            f"{name}: expected the device of {of}, {k_cache.device}, got {scale.device}"
        )
    if tuple(scale.shape) != (k_cache.shape[2],):
        raise ValueError(
            f"{name}: expected shape ({k_cache.shape[2]},), one for each KV head, "
            f"got {tuple(scale.shape)}"
        )


def check_no_gradients(does: str, **given: torch.Tensor) -> None:
    """``does``, the function, hands no gradient on to what it is given, by name."""
    arguments.check_no_tangents(does, **given)
    if not torch.is_grad_enabled():
        return
    for name, x in given.items():
        if requires_grad(x):
            raise ValueError(
                f"{name}: {does} has no gradient, got a tensor that requires grad; expected "
                "torch.no_grad(), or longrope_kernels.attention"
            )
