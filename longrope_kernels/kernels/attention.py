"""FlashAttention over q and k that come unrotated: the forward pass.

q is rotated in registers, once for each tile of queries. k is rotated before, into a scratch, by
the standalone rotation ("prepass"), or in registers in the loop ("registers"). The second repeats
the work for every tile of queries, and in float32 sends k through registers on its way to the
matrix unit, so it pays only where few queries share a key.

Short names: see rotation.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..calls.records import AttentionCall
from .attention_tiles import (
    LN2,
    UNEVEN,
    Config,
    cap_scores,
    first_key_of,
    grid_of,
    keys_of_queries,
    mask_args,
    nearest,
    rope_args,
    score_args,
    sequence_of_tile,
    set_of_sequence,
    sizes_of,
    span,
    start_of_rows,
    tile_of_program,
    visible,
    wide,
)
from .launch import Launch, matrix_args, tensor_args
from .pieces import (
    JOINED,
    add_dots,
    dot_rows,
    load_pieces,
    narrow_pieces,
    rotate_pieces,
    scale_pieces,
    store_pieces,
    token_rows,
    zero_pieces,
)
from .rotation import narrow

# Queries that read a key, at which rotating it in a pre-pass is worth the traffic of the scratch.
PREPASS_QUERIES = 400


# ----------------------------------------------------------------------------------------- launch

# By architecture and head_dim: for "prepass" with half pairing and no mask but the causal one, for
# any other "prepass", and for "registers": the largest tiles that compile without spills and, on
# 9.0, without a wait after each matrix instruction (tests/test_codegen_attention.py). Not timed on
# a GPU yet. 0 is the interpreter: small tiles, so that small tests see several.
_SMALL = Config(32, 32, 4, 1)
CONFIGS = {
    0: {256: (_SMALL._replace(joined=True), _SMALL, _SMALL)},
    90: {
        64: (Config(128, 128, 8, 3, True), Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
        96: (Config(128, 128, 8, 3, True), Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
        128: (Config(128, 128, 8, 3, True), Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
        256: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 16, 8, 2)),
        UNEVEN: (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(128, 16, 8, 2)),
    },
    80: {
        64: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
        96: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
        128: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 4, 2)),
        256: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
        UNEVEN: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    },
}
# What benchmarks/tune.py tries beside them.
CANDIDATES = tuple(
    Config(block_m, block_n, warps, stages, True)
    for block_m in (64, 128)
    for block_n in (16, 32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
)


@lru_cache(maxsize=256)
def choose_config(
    arch: int,
    dim: int,
    in_registers: bool,
    interleaved: bool = False,
    packed: bool = False,
    window: bool = False,
    padded: bool = False,
) -> Config:
    """The tiles for a device of compute capability ``arch`` (90 for 9.0)."""
    of_dim: tuple[Config, ...] = nearest(CONFIGS, arch, dim)
    config = of_dim[2 if in_registers else int(interleaved or packed or window or padded)]
    # Smaller tiles of k where the compiler would spill some registers.
    many = (interleaved and 64 < dim <= 96) or (padded and dim > 128)
    if (packed and window) if in_registers else many:
        if config.block_n > 16:
            return config._replace(block_n=config.block_n // 2)
        return config._replace(block_m=config.block_m // 2)
    return config


def choose_rotation(queries: int, sequences: int, groups: int) -> str:
    """Where k is rotated: "registers" if few queries read each key, else "prepass"."""
    few = queries * groups < PREPASS_QUERIES * max(sequences, 1)
    return "registers" if few else "prepass"


def plan(
    call: AttentionCall,
    out: torch.Tensor,
    lse: torch.Tensor,
    rotated: bool,
    arch: int,
    config: Config | None = None,
) -> Launch:
    """The launch of the forward pass, for tensors that are not empty.

    out is like q, lse (B, Hq, Sq) float32. rotated: k is already. arch: the compute capability, 90
    for 9.0. config: instead of that of the table. Nothing is allocated, no tensor is read.
    """
    q, positions, keys, tables, selection, scores, sinks = call
    sizes = sizes_of(call)
    dim = q.shape[3]
    if config is None:
        masks = sizes.packed, scores.window > 0, keys.start is not None
        config = choose_config(arch, dim, not rotated, tables.interleaved, *masks)
    of_kv_head = 2 * sizes.keys * dim * q.element_size()
    programs, tiles, section = grid_of(
        sizes.queries, sizes.heads, sizes, config.block_m, of_kv_head, sizes.groups
    )
    constants = {
        "DIM": dim,
        "PAIRS": tables.pairs,
        "SETS": tables.sets,
        "PAIRING": int(tables.interleaved) + (JOINED.value if rotated and config.joined else 0),
        "ADJACENT": keys.k.stride(1) == dim,
        "CAUSAL": scores.causal,
        "WINDOW": scores.window > 0,
        "SOFTCAP": scores.cap > 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    args = (
        tensor_args(q),
        tensor_args(keys.k),
        tensor_args(keys.v),
        tensor_args(out),
        (lse, *lse.stride()[:2]),
        matrix_args(positions),
        matrix_args(None if rotated else keys.positions),
        *rope_args(tables, selection),
        *mask_args(call),
        sinks,
        *score_args(scores),
        min(scores.window, sizes.queries + sizes.keys),
        *sizes.args(),
        tiles,
        section,
    )
    return Launch(attention_kernel, (programs,), args, constants, config.warps, config.stages)


# ----------------------------------------------------------------------------------------- kernel


@triton.jit
def _load_k(
    k,
    key_positions,
    rope,
    j0,
    exist,
    i_set,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rotated keys j0 to j0 + BLOCK_N; key_positions: (pointer or None, stride)."""
    o_n = tl.arange(0, BLOCK_N)
    rows = k[0] + wide(j0) * k[1] + (o_n * k[1])[:, None]
    pieces = load_pieces(rows, exist, PAIRS, DIM, PAIRING)
    if key_positions[0] is not None:
        p_n = key_positions[0] + wide(j0) * key_positions[1] + o_n * key_positions[1]
        if exist is None:
            n = tl.load(p_n).to(tl.int64)
        else:
            n = tl.load(p_n[:, None], mask=exist, other=0).to(tl.int64).reshape((BLOCK_N,))
        original, a = token_rows(n, i_set, rope[1], rope[2])
        p_steps = rope[0] + i_set * 2 * PAIRS
        turned = rotate_pieces(pieces, n, original, a, p_steps, PAIRS, PAIRING, False)
        pieces = narrow_pieces(turned, k[0].dtype.element_ty)
    return pieces


@triton.jit
def _attend(
    state,
    begin,
    end,
    q,
    of_keys,
    rope,
    i_set,
    mask,
    scores,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRING: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the keys from begin to end. Without MASKED all queries see all of them.

    state: plain pieces (BLOCK_M, D), and two (BLOCK_M,), the largest score (in units of log 2) and
    the sum of the weights relative to it. of_keys: (pointer, token stride) of k and of v, (pointer
    or None, stride) of their positions. mask: the slots of the queries, the number of keys, the
    first that is seen, the window. scores: scale and cap.
    """
    acc, top, total = state
    k, v, key_positions = of_keys
    slot, keys, first_key, window = mask
    scale, cap = scores
    o_n = tl.arange(0, BLOCK_N)
    for j0 in range(begin, end, BLOCK_N):
        exist = None
        if MASKED:
            exist = (j0 + o_n < keys)[:, None]
        b_k = _load_k(k, key_positions, rope, j0, exist, i_set, DIM, PAIRS, PAIRING, BLOCK_N)
        s = dot_rows(q, b_k, None)
        if MASKED or SOFTCAP:
            s = cap_scores(s, scale, cap, SOFTCAP)
            if MASKED:
                j = (j0 + o_n)[None, :]
                seen = visible(slot[:, None], j, keys, first_key, window, CAUSAL, WINDOW)
                s = tl.where(seen, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            base = new_top
            if MASKED:
                # A row that has seen nothing yet must not subtract infinities.
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
        else:
            # One multiply-add for each score, as the scale is not negative.
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            base = new_top
            p = tl.exp2(s * scale - base[:, None])
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(p, 1)
        rows = v[0] + wide(j0) * v[1] + (o_n * v[1])[:, None]
        b_v = load_pieces(rows, exist, 0, DIM, False)
        p = narrow(p, v[0].dtype.element_ty)
        acc = add_dots(scale_pieces(acc, alpha[:, None]), p, b_v)
        top = new_top
    return acc, top, total


# Sizes that change from call to call must not compile a kernel each.
@triton.jit(
    do_not_specialize=[
        "scale",
        "cap",
        "window",
        "queries",
        "keys",
        "heads",
        "groups",
        "sequences",
        "search_step",
        "tiles",
        "section",
    ]
)
def attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    positions,
    key_positions,
    rope,
    lengths,
    sets,
    cu,
    cu_k,
    kv_start,
    sinks,
    scale,
    cap,
    window,
    queries,
    keys,
    heads,
    groups,
    sequences,
    search_step,
    tiles,
    section,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    SETS: tl.constexpr,
    PAIRING: tl.constexpr,
    ADJACENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of BLOCK_M queries of one head to all keys they see.

    q, out: (pointer, batch stride, token stride, head stride) of (B, queries, heads, DIM), k, v of
    (B, keys, heads / groups, DIM), all of one 16-bit dtype with a last stride of 1. lse: (pointer,
    batch stride, head stride) of (B, heads, queries) float32. positions, key_positions: (pointer,
    batch stride, token stride) of (B, queries) and (B, keys), int32 or int64; key_positions
    (None, 0, 0): k is rotated. rope: steps (SETS, 2, PAIRS), n_hat, attention_factor, max_length.
    lengths, sets, kv_start: (pointer or None, stride) of (sequences,); cu, cu_k: of
    (sequences + 1,). sinks: (heads,), or None. scale, cap: see `cap_scores`. search_step: the
    largest power of two below ``sequences``. tiles, section: see `tile_of_program`. ADJACENT: the
    token stride of k is DIM.
    """
    i_tile, i_bh = tile_of_program(tiles, section, tl.num_programs(0) // tiles)
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_sequence = i_b
    if cu[0] is not None:
        i_sequence, i_tile = sequence_of_tile(i_tile, cu, sequences, search_step, BLOCK_M)
    begin_q, queries = span(i_sequence, cu, queries)
    begin_k, keys = span(i_sequence, cu_k, keys)
    i_set = set_of_sequence(i_sequence, lengths, sets, rope[3], SETS)

    i_b = i_b.to(tl.int64)
    i_h = i_h.to(tl.int64)
    i_hk = i_h // groups
    m0 = i_tile * BLOCK_M
    o_m = m0 + tl.arange(0, BLOCK_M)
    in_q = o_m < queries
    row_q = begin_q + o_m

    p_n = positions[0] + i_b * positions[1] + row_q * positions[2]
    n = tl.load(p_n, mask=in_q, other=0).to(tl.int64)
    original, a = token_rows(n, i_set, rope[1], rope[2])
    rows = q[0] + i_b * q[1] + i_h * q[3] + (row_q * q[2])[:, None]
    b_q = load_pieces(rows, in_q[:, None], PAIRS, DIM, PAIRING)
    p_steps = rope[0] + i_set * 2 * PAIRS
    b_q = rotate_pieces(b_q, n, original, a, p_steps, PAIRS, PAIRING, False)
    b_q = narrow_pieces(b_q, q[0].dtype.element_ty)

    shift = keys - queries
    first_key = first_key_of(i_sequence, kv_start, keys)
    low, all_low, all_high, high = keys_of_queries(
        m0, queries, keys, first_key, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )

    # A stride that the compiler knows leaves it one address for the rows of a thread.
    k_of_head = (k[0] + i_b * k[1] + begin_k * k[2] + i_hk * k[3], DIM if ADJACENT else k[2])
    v_of_head = (v[0] + i_b * v[1] + begin_k * v[2] + i_hk * v[3], v[2])
    n_k = (None, 0)
    if key_positions[0] is not None:
        p_n = key_positions[0] + i_b * key_positions[1] + begin_k * key_positions[2]
        n_k = (p_n, key_positions[2])
    of_keys = (k_of_head, v_of_head, n_k)
    mask = (o_m + shift, keys, first_key, window)
    scores = (scale, cap)
    top, total = start_of_rows(i_h, sinks, True, BLOCK_M)
    state = (zero_pieces(BLOCK_M, 0, DIM, False), top, total)
    if WINDOW or kv_start[0] is not None:
        state = _attend(
            *(state, low, all_low, b_q, of_keys, rope, i_set, mask, scores),
            *(DIM, PAIRS, PAIRING, CAUSAL, WINDOW, SOFTCAP, True, BLOCK_N),
        )
    state = _attend(
        *(state, all_low, all_high, b_q, of_keys, rope, i_set, mask, scores),
        *(DIM, PAIRS, PAIRING, CAUSAL, WINDOW, SOFTCAP, False, BLOCK_N),
    )
    acc, top, total = _attend(
        *(state, all_high, high, b_q, of_keys, rope, i_set, mask, scores),
        *(DIM, PAIRS, PAIRING, CAUSAL, WINDOW, SOFTCAP, True, BLOCK_N),
    )

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = scale_pieces(acc, (1.0 / total)[:, None])
    rows = out[0] + i_b * out[1] + i_h * out[3] + (row_q * out[2])[:, None]
    store_pieces(rows, in_q[:, None], acc, 0, DIM, False)
    p_lse = lse[0] + i_b * lse[1] + i_h * lse[2] + row_q
    tl.store(p_lse, (top + tl.log2(total)) * LN2, mask=in_q)
