"""Decoding: a few queries of each sequence against a cache of unrotated keys, split-KV.

A program takes the queries of all heads that share a KV head, so that each key is loaded and
rotated once for them, and a part of the keys (decode_splits.py). Those of a prompt, more than a
tile has rows for, are many programs, each with all keys that its own queries see. The kernel is in
decode_kernel.py; here are its tiles, its splits and its launch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..calls.records import FEW_QUERIES, DecodeCall
from .attention_tiles import UNEVEN, nearest, score_args
from .decode_float8 import CONVERT, SHIFT
from .decode_kernel import decode_kernel
from .decode_sets import selection_args, several_sets
from .launch import Launch, as_bytes, matrix_args, tensor_args, vector_args
from .pieces import NARROW
from .splits import Splits, choose_splits

# Keys that are worth a program.
_LEAST_KEYS = 128


class Config(NamedTuple):
    """Rows of a tile at most and keys, warps, stages, and programs of a multiprocessor at once."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int


# By architecture and head_dim, for up to 16 rows and for more: tiles that compile without spills
# (tests/test_codegen_decode.py). Not timed on a GPU yet. 0 is the interpreter: small tiles, so that
# small tests see several.
CONFIGS = {
    0: {256: (Config(16, 16, 4, 1, 1), Config(16, 16, 4, 1, 1))},
    90: {
        64: (Config(16, 64, 4, 3, 2), Config(64, 64, 8, 3, 1)),
        128: (Config(16, 64, 4, 3, 2), Config(64, 64, 8, 3, 1)),
        256: (Config(16, 64, 8, 3, 1), Config(32, 32, 8, 3, 1)),
        UNEVEN: (Config(16, 32, 8, 3, 1), Config(32, 32, 8, 3, 1)),
    },
    80: {
        64: (Config(16, 64, 4, 3, 2), Config(64, 64, 8, 3, 1)),
        96: (Config(16, 32, 4, 3, 2), Config(16, 32, 4, 3, 2)),
        128: (Config(16, 32, 4, 3, 2), Config(32, 64, 8, 3, 1)),
        256: (Config(16, 32, 8, 3, 1), Config(32, 32, 8, 3, 1)),
        UNEVEN: (Config(16, 32, 8, 3, 1), Config(32, 32, 8, 3, 1)),
    },
}
# What benchmarks/tune.py tries beside them.
CANDIDATES = tuple(
    Config(block_m, block_n, warps, stages, programs)
    for block_m in (16, 64)
    for block_n in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
    for programs in (1, 2)
)


@lru_cache(maxsize=256)
def choose_config(arch: int, dim: int, rows: int) -> Config:
    """The tiles for a device of compute capability ``arch`` (90 for 9.0).

    rows: queries of the heads that share a KV head, of one sequence.
    """
    of_dim: tuple[Config, Config] = nearest(CONFIGS, arch, dim)
    return of_dim[int(rows > 16)]


def config_of(call: DecodeCall, arch: int) -> Config:
    """The tiles of a call."""
    rows, dim = _rows_of_kv_head(call), call.q.shape[3]
    # Of a prompt those of more rows would spill there.
    return choose_config(arch, dim, 16 if _many(call) and dim > 128 else rows)


def splits_of(
    call: DecodeCall, arch: int, multiprocessors: int, config: Config | None = None
) -> Splits:
    """How to split the keys of a call; ``most`` sizes the scratch of `plan`."""
    if config is None:
        config = config_of(call, arch)
    batch, keys = call.q.shape[0], call.keys
    units = batch * keys.heads * _row_blocks(call, config)[1]
    places = multiprocessors * config.programs
    if _many(call) and 2 * units > places:
        return Splits(1, 1, 1)
    # In the interpreter a tile is worth a program.
    least_tiles = 1 if arch == 0 else max(1, _LEAST_KEYS // config.block_n)
    return choose_splits(units, batch, keys.capacity, config.block_n, places, least_tiles)


def counters_of(call: DecodeCall, config: Config) -> int:
    """How many counters `plan` takes."""
    sets = call.tables.sets if several_sets(call.tables, call.selection, call.q.shape[1]) else 1
    return call.q.shape[0] * call.keys.heads * _row_blocks(call, config)[1] * sets


def _many(call: DecodeCall) -> bool:
    """Whether each tile of a sequence has keys of its own, those that its queries see."""
    return call.q.shape[1] > FEW_QUERIES


def _rows_of_kv_head(call: DecodeCall) -> int:
    return call.q.shape[1] * (call.q.shape[2] // call.keys.heads)


def _row_blocks(call: DecodeCall, config: Config) -> tuple[int, int]:
    """Rows of a tile, and how many such tiles the queries of a KV head and sequence make."""
    rows = _rows_of_kv_head(call)
    block_m = min(max(16, 1 << (rows - 1).bit_length()), config.block_m)
    return block_m, -(-rows // block_m)


def plan(
    call: DecodeCall,
    out: torch.Tensor,
    lse: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    arch: int,
    splits: Splits,
    config: Config | None = None,
) -> Launch:
    """The launch of a call, for tensors that are not empty.

    out is like q, lse (B, Hq, q_len) float32, contiguous. scratch: float32 (splits.most, batch,
    heads, q_len, dim) and (splits.most, batch, heads, q_len), and int32 zeros, `counters_of` or
    more, which are zeros again afterwards; None where ``most`` is 1. arch: the compute capability,
    90 for 9.0. splits: of `splits_of`. config: instead of that of the table. Nothing is allocated,
    no tensor is read.
    """
    q, cache, tables, selection, scores, sinks = call
    batch, queries, heads, dim = q.shape
    k, v = as_bytes(cache)[:2]
    several = several_sets(tables, selection, queries)
    if config is None:
        config = config_of(call, arch)
    block_m, row_blocks = _row_blocks(call, config)
    float8 = 0
    if k.dtype == torch.uint8:
        float8 = CONVERT.value if arch >= 89 else SHIFT.value
    of_sequences = (vector_args(cache.lens), vector_args(cache.start))
    partial_out, partial_lse, counters = scratch or (None, None, None)
    window = scores.window
    constants = {
        "DIM": dim,
        "PAIRS": tables.pairs,
        "SETS": tables.sets,
        "PAIRING": int(tables.interleaved) + (NARROW.value if float8 else 0),
        "WINDOW": window > 0,
        "SOFTCAP": scores.cap > 0,
        "ONE_QUERY": queries == 1,
        "SEVERAL_SETS": several,
        "MANY": _many(call),
        "BLOCK_SIZE": 0 if cache.block_table is None else k.shape[1],
        "FLOAT8": float8,
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
    }
    args = (
        tensor_args(q),
        tensor_args(k),
        tensor_args(v),
        tensor_args(out),
        lse,
        partial_out,
        partial_lse,
        counters,
        *of_sequences,
        matrix_args(cache.block_table),
        matrix_args(cache.positions),
        vector_args(cache.k_scale),
        vector_args(cache.v_scale),
        sinks,
        tables[:4],
        *selection_args(selection),
        *score_args(scores),
        window,
        *(queries, cache.heads, heads // cache.heads, batch, row_blocks),
        *splits,
    )
    programs = splits.most * batch * cache.heads * row_blocks
    grid = (programs * (tables.sets if several else 1),)
    return Launch(decode_kernel, grid, args, constants, config.warps, config.stages)
