"""FlashAttention over q and k that come unrotated: the backward pass.

q and k are rotated again into a scratch by the standalone rotation; nothing of it is kept from the
forward pass. One kernel takes a tile of keys and goes through the queries of all heads that share
it, for dk and dv; another takes a tile of queries and goes through the keys, for dq. Each sum has
one order, so that the gradients are the same in every run. dq and dk are the gradients of the
rotated vectors until the end, where they are rotated back in registers.

Short names: see rotation.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..calls.records import AttentionCall
from .attention_gradients import delta_kernel, dk_dv_kernel, dq_kernel
from .attention_tiles import (
    UNEVEN,
    Config,
    grid_of,
    mask_args,
    nearest,
    rope_args,
    score_args,
    sizes_of,
)
from .launch import Launch, matrix_args, tensor_args


class Configs(NamedTuple):
    """The tiles for dk, dv and dq; dv None: dk and dv in one kernel, which shares a product."""

    dk: Config
    dv: Config | None
    dq: Config


# By architecture and head_dim: the largest tiles that compile without spills
# (tests/test_codegen_attention.py). Not timed on a GPU yet. 0 is the interpreter: small tiles, so
# that small tests see several, and both ways.
_SMALL = Config(32, 32, 4, 1)
CONFIGS = {
    0: {64: Configs(_SMALL, None, _SMALL), 256: Configs(_SMALL, _SMALL, _SMALL)},
    90: {
        64: Configs(Config(64, 128, 8, 2), None, Config(128, 64, 8, 3)),
        96: Configs(Config(32, 128, 8, 2), None, Config(128, 64, 8, 2)),
        128: Configs(Config(64, 128, 8, 2), Config(64, 128, 8, 2), Config(128, 64, 8, 2)),
        256: Configs(Config(32, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
        UNEVEN: Configs(Config(16, 64, 8, 2), Config(32, 64, 8, 2), Config(64, 16, 8, 2)),
    },
    80: {
        64: Configs(Config(32, 128, 8, 2), Config(64, 128, 8, 2), Config(128, 64, 8, 2)),
        96: Configs(Config(32, 128, 8, 2), Config(32, 128, 8, 2), Config(128, 32, 8, 2)),
        128: Configs(Config(16, 128, 8, 2), Config(32, 128, 8, 2), Config(128, 32, 8, 2)),
        256: Configs(Config(32, 32, 8, 1), None, Config(32, 32, 4, 2)),
        UNEVEN: Configs(Config(16, 32, 8, 1), None, Config(32, 16, 8, 2)),
    },
}
# As 8.0, but for what spills there.
CONFIGS[120] = {**CONFIGS[80], 128: CONFIGS[80][128]._replace(dk=Config(16, 64, 4, 2))}
# What benchmarks/tune.py tries beside them.
CANDIDATES = tuple(
    Config(block_m, block_n, warps, stages)
    for block_m in (16, 32, 64, 128)
    for block_n in (32, 64, 128)
    for warps in (4, 8)
    for stages in (1, 2, 3)
)
_DELTA_TOKENS = 32


def choose_configs(
    arch: int,
    dim: int,
    softcap: float = 0.0,
    window: int = 0,
    packed: bool = False,
    interleaved: bool = False,
) -> Configs:
    """The tiles for a device of compute capability ``arch`` (90 for 9.0)."""
    configs: Configs = nearest(CONFIGS, arch, dim)
    dk, dv, dq = configs
    # Smaller tiles where the compiler would spill some registers. The slope of the cap needs the
    # scores again beside the weights.
    if softcap > 0:
        few = 64 < dim <= 96 or (dim > 64 and not 90 <= arch < 120)
        dk = dk._replace(block_m=min(dk.block_m, 16 if few else 32))
    if (packed and dim > 128) or (interleaved and dim <= 64 and dv is None):
        dk = dk._replace(block_m=max(16, dk.block_m // 2))
    if dim > 128 and (softcap > 0 or window > 0):
        dq = dq._replace(block_n=max(16, dq.block_n // 2))
    return Configs(dk, dv, dq)


def plan_delta(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
) -> Launch:
    """The launch that fills delta, (B, Hq, Sq) float32; the others as in `plan`."""
    batch, queries, heads, dim = out.shape
    tiles = -(-queries // _DELTA_TOKENS)
    args = (
        tensor_args(d_out),
        (None, 0, 0, 0) if d_lse is None else (d_lse, *d_lse.stride()),
        tensor_args(out),
        (lse, *lse.stride()[:2]),
        (delta, *delta.stride()[:2]),
        queries,
        heads,
        tiles,
    )
    constants = {"DIM": dim, "BLOCK_M": _DELTA_TOKENS}
    return Launch(delta_kernel, (tiles * heads * batch,), args, constants, 4, 1)


def plan(
    call: AttentionCall,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    arch: int,
    configs: Configs | None = None,
) -> list[Launch]:
    """The launches for dk and dv, one or two, and for dq, for tensors that are not empty.

    q and k of the call are rotated, delta (with the strides of lse) comes from `plan_delta`; the
    others are those of `backends.triton.attention.backward`. arch: the compute capability, 90 for
    9.0. configs: instead of those of the table. Nothing is allocated, no tensor is read.
    """
    q, positions, keys, tables, selection, scores, _ = call
    sizes = sizes_of(call)
    dim, window = q.shape[3], scores.window
    if configs is None:
        configs = choose_configs(arch, dim, scores.cap, window, sizes.packed, tables.interleaved)
    of_keys, of_values, of_queries = configs
    inputs = (
        tensor_args(d_out),
        tensor_args(q),
        tensor_args(keys.k),
        tensor_args(keys.v),
        (lse, *lse.stride()[:2]),
        delta,
    )
    rest = (
        *rope_args(tables, selection),
        *mask_args(call),
        *score_args(scores),
        scores.scale,
        min(window, sizes.queries + sizes.keys),
        *sizes.args(),
    )
    constants = {
        "DIM": dim,
        "PAIRS": tables.pairs,
        "SETS": tables.sets,
        "INTERLEAVED": tables.interleaved,
        "CAUSAL": scores.causal,
        "WINDOW": window > 0,
        "SOFTCAP": scores.cap > 0,
    }
    row = 2 * dim * q.element_size()
    kv_heads = sizes.heads // sizes.groups
    by_keys = (
        *(dk_dv_kernel, (tensor_args(dk), tensor_args(dv)), keys.positions, sizes.keys, kv_heads),
        *(sizes.queries * sizes.groups * row, 1),
    )
    by_queries = (
        *(dq_kernel, (tensor_args(dq),), positions, sizes.queries, sizes.heads),
        *(sizes.keys * row, sizes.groups),
    )
    fused = of_values is None
    wanted = [(by_keys, of_keys, of_keys.block_n, {"OF_K": True, "OF_V": fused})]
    if not fused:
        wanted.append((by_keys, of_values, of_values.block_n, {"OF_K": False, "OF_V": True}))
    wanted.append((by_queries, of_queries, of_queries.block_m, {}))
    launches = []
    for (kernel, outputs, n, tokens, heads, read, sharing), config, block, flags in wanted:
        programs, tiles, section = grid_of(tokens, heads, sizes, block, read, sharing)
        blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        launches.append(
            Launch(
                kernel,
                (programs,),
                (*inputs, *outputs, matrix_args(n), *rest, tiles, section),
                {**constants, **blocks, **flags},
                config.warps,
                config.stages,
            )
        )
    return launches
