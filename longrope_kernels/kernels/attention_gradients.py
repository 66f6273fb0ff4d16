"""The kernels of the backward pass of attention; their launches are in attention_backward.py.

Short names: see rotation.py; a ``d`` before one is its gradient.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2E,
    cap_scores,
    first_key_of,
    keys_of_queries,
    queries_of_keys,
    sequence_of_tile,
    set_of_sequence,
    span,
    tile_of_program,
    visible,
    wide,
)
from .pieces import (
    add_dots,
    dot_rows,
    load_pieces,
    rotate_pieces,
    scale_pieces,
    store_pieces,
    token_rows,
    zero_pieces,
)
from .rotation import narrow

# Sizes that change from call to call must not compile a kernel each.
_SIZES = [
    *("scale", "cap", "softmax_scale", "window"),
    *("queries", "keys", "heads", "groups", "sequences", "search_step", "tiles", "section"),
]


@triton.jit(do_not_specialize=["queries", "heads", "tiles"])
def delta_kernel(
    d_out,
    d_lse,
    out,
    lse,
    delta,
    queries,
    heads,
    tiles,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = the sum of d_out * out over the dimensions, minus d_lse; 0 where no key was seen.

    d_out, out: (pointer, batch stride, token stride, head stride). d_lse: (pointer or None, batch
    stride, head stride, token stride). lse, delta: (pointer, batch stride, head stride).
    Grid: (tiles * heads * batch,).
    """
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_m = wide(tl.program_id(0) % tiles * BLOCK_M) + tl.arange(0, BLOCK_M)
    in_q = o_m < queries

    rows = out[0] + i_b * out[1] + i_h * out[3] + (o_m * out[2])[:, None]
    b_out = load_pieces(rows, in_q[:, None], 0, DIM, False)
    rows = d_out[0] + i_b * d_out[1] + i_h * d_out[3] + (o_m * d_out[2])[:, None]
    b_d_out = load_pieces(rows, in_q[:, None], 0, DIM, False)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(len(b_out)):
        total += tl.sum(b_out[i].to(tl.float32) * b_d_out[i].to(tl.float32), 1)
    if d_lse[0] is not None:
        p_d_lse = d_lse[0] + i_b * d_lse[1] + i_h * d_lse[2] + o_m * d_lse[3]
        total -= tl.load(p_d_lse, mask=in_q, other=0.0)
    b_lse = tl.load(lse[0] + i_b * lse[1] + i_h * lse[2] + o_m, mask=in_q, other=0.0)
    total = tl.where(b_lse == float("-inf"), 0.0, total)
    tl.store(delta[0] + i_b * delta[1] + i_h * delta[2] + o_m, total, mask=in_q)


@triton.jit
def _load_lse(p, exist):
    """The log-sum-exp of rows in units of log 2. Rows without keys, or without tokens, get inf, so
    that their weights are 0.
    """
    lse = tl.load(p, mask=exist, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _d_scores(p, z, dp, cap, SOFTCAP: tl.constexpr):
    """The gradient of the scores before the cap, but for the factor softmax_scale.

    dp: the gradient of the weights, less delta.
    """
    ds = p * dp
    if SOFTCAP:
        tanh = z / cap
        ds = ds * (1.0 - tanh * tanh)
    return ds


@triton.jit(do_not_specialize=_SIZES)
def dk_dv_kernel(
    d_out,
    q,
    k,
    v,
    lse,
    p_delta,
    dk,
    dv,
    key_positions,
    rope,
    lengths,
    sets,
    cu,
    cu_k,
    kv_start,
    scale,
    cap,
    softmax_scale,
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
    INTERLEAVED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_K: tl.constexpr,
    OF_V: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one head, over the queries of all heads that share it.

    d_out, q, k, v, dk, dv: (pointer, batch stride, token stride, head stride), q and k rotated.
    lse: (pointer, batch stride, head stride) of (B, heads, queries) float32, p_delta of the same
    strides. The others are those of `attention_kernel`, ``tiles`` and ``section`` of keys.
    """
    heads_k = heads // groups
    i_tile, i_bh = tile_of_program(tiles, section, tl.num_programs(0) // tiles)
    # Keys at the front are seen by most queries.
    i_tile = tiles - 1 - i_tile
    i_sequence = i_bh // heads_k
    i_b = (i_bh // heads_k).to(tl.int64)
    i_hk = (i_bh % heads_k).to(tl.int64)
    if cu[0] is not None:
        i_sequence, i_tile = sequence_of_tile(i_tile, cu_k, sequences, search_step, BLOCK_N)
    begin_q, queries = span(i_sequence, cu, queries)
    begin_k, keys = span(i_sequence, cu_k, keys)

    n0 = i_tile * BLOCK_N
    j = n0 + tl.arange(0, BLOCK_N)
    in_k = j < keys
    row_k = begin_k + j
    rows = k[0] + i_b * k[1] + i_hk * k[3] + (row_k * k[2])[:, None]
    b_k = load_pieces(rows, in_k[:, None], PAIRS, DIM, INTERLEAVED)
    rows = v[0] + i_b * v[1] + i_hk * v[3] + (row_k * v[2])[:, None]
    b_v = load_pieces(rows, in_k[:, None], 0, DIM, False)

    first_key = first_key_of(i_sequence, kv_start, keys)
    low, all_low, all_high, high = queries_of_keys(
        n0, queries, keys, first_key, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )

    # One loop over all heads and tiles of queries, so that the loads of the next head begin before
    # the last tile of this one is done.
    b_dk = zero_pieces(BLOCK_N, PAIRS, DIM, INTERLEAVED)
    b_dv = zero_pieces(BLOCK_N, 0, DIM, False)
    dtype: tl.constexpr = q[0].dtype.element_ty
    o_m = tl.arange(0, BLOCK_M)
    tiles_q = tl.cdiv(high - low, BLOCK_M)
    i_h = i_hk * groups
    m0 = low
    for _ in range(0, groups * tiles_q):
        in_q = m0 + o_m < queries
        row = begin_q + m0
        rows_q = q[0] + i_b * q[1] + i_h * q[3] + row * q[2] + (o_m * q[2])[:, None]
        b_q = load_pieces(rows_q, in_q[:, None], PAIRS, DIM, INTERLEAVED)
        p_d_out = d_out[0] + i_b * d_out[1] + i_h * d_out[3] + row * d_out[2]
        b_d_out = load_pieces(p_d_out + (o_m * d_out[2])[:, None], in_q[:, None], 0, DIM, False)
        o_row = i_b * lse[1] + i_h * lse[2] + row + o_m
        z = cap_scores(dot_rows(b_k, b_q, None), scale, cap, SOFTCAP)
        # Here and for delta: no earlier than needed, as each takes a register for two columns.
        b_lse = _load_lse(lse[0] + o_row, in_q)
        p = tl.exp2(z - b_lse[None, :])
        if (m0 < all_low) | (m0 + BLOCK_M > all_high):
            slot = (m0 + o_m + keys - queries)[None, :]
            seen = visible(slot, j[:, None], keys, first_key, window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
        if OF_V:
            b_dv = add_dots(b_dv, narrow(p, dtype), b_d_out)
        if OF_K:
            minus_delta = -tl.load(p_delta + o_row, mask=in_q, other=0.0)
            base = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) + minus_delta[None, :]
            ds = _d_scores(p, z, dot_rows(b_v, b_d_out, base), cap, SOFTCAP)
            b_dk = add_dots(b_dk, narrow(ds, dtype), b_q)
        m0 += BLOCK_M
        next_head = m0 >= high
        m0 = tl.where(next_head, low, m0)
        i_h += next_head.to(tl.int64)

    if OF_V:
        rows = dv[0] + i_b * dv[1] + i_hk * dv[3] + (row_k * dv[2])[:, None]
        store_pieces(rows, in_k[:, None], b_dv, 0, DIM, False)
    if OF_K:
        i_set = set_of_sequence(i_sequence, lengths, sets, rope[3], SETS)
        p_n = key_positions[0] + i_b * key_positions[1] + row_k * key_positions[2]
        n = tl.load(p_n, mask=in_k, other=0).to(tl.int64)
        original, a = token_rows(n, i_set, rope[1], rope[2])
        p_steps = rope[0] + i_set * 2 * PAIRS
        b_dk = scale_pieces(b_dk, softmax_scale)
        b_dk = rotate_pieces(b_dk, n, original, a, p_steps, PAIRS, INTERLEAVED, True)
        rows = dk[0] + i_b * dk[1] + i_hk * dk[3] + (row_k * dk[2])[:, None]
        store_pieces(rows, in_k[:, None], b_dk, PAIRS, DIM, INTERLEAVED)


@triton.jit
def _add_keys(
    dq,
    q,
    d_out,
    lse,
    delta,
    k,
    v,
    slot,
    begin,
    end,
    keys,
    first_key,
    window,
    scale,
    cap,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add what the keys from begin to end give to dq of queries at ``slot`` (BLOCK_M,).

    k, v: (pointer, token stride) of one head.
    """
    o_n = tl.arange(0, BLOCK_N)
    for j0 in range(begin, end, BLOCK_N):
        exist = None
        if MASKED:
            exist = (j0 + o_n < keys)[:, None]
        rows = k[0] + wide(j0) * k[1] + (o_n * k[1])[:, None]
        b_k = load_pieces(rows, exist, PAIRS, DIM, INTERLEAVED)
        rows = v[0] + wide(j0) * v[1] + (o_n * v[1])[:, None]
        b_v = load_pieces(rows, exist, 0, DIM, False)
        z = cap_scores(dot_rows(q, b_k, None), scale, cap, SOFTCAP)
        p = tl.exp2(z - lse[:, None])
        if MASKED:
            j = (j0 + o_n)[None, :]
            seen = visible(slot[:, None], j, keys, first_key, window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
        ds = _d_scores(p, z, dot_rows(d_out, b_v, None) - delta[:, None], cap, SOFTCAP)
        dq = add_dots(dq, narrow(ds, k[0].dtype.element_ty), b_k)
    return dq


@triton.jit(do_not_specialize=_SIZES)
def dq_kernel(
    d_out,
    q,
    k,
    v,
    lse,
    p_delta,
    dq,
    positions,
    rope,
    lengths,
    sets,
    cu,
    cu_k,
    kv_start,
    scale,
    cap,
    softmax_scale,
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
    INTERLEAVED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of BLOCK_M queries of one head; the arguments as in `dk_dv_kernel`, tiles of queries."""
    i_tile, i_bh = tile_of_program(tiles, section, tl.num_programs(0) // tiles)
    i_sequence = i_bh // heads
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    i_hk = i_h // groups
    if cu[0] is not None:
        i_sequence, i_tile = sequence_of_tile(i_tile, cu, sequences, search_step, BLOCK_M)
    begin_q, queries = span(i_sequence, cu, queries)
    begin_k, keys = span(i_sequence, cu_k, keys)

    m0 = i_tile * BLOCK_M
    o_m = m0 + tl.arange(0, BLOCK_M)
    in_q = o_m < queries
    row_q = begin_q + o_m
    rows = q[0] + i_b * q[1] + i_h * q[3] + (row_q * q[2])[:, None]
    b_q = load_pieces(rows, in_q[:, None], PAIRS, DIM, INTERLEAVED)
    rows = d_out[0] + i_b * d_out[1] + i_h * d_out[3] + (row_q * d_out[2])[:, None]
    b_d_out = load_pieces(rows, in_q[:, None], 0, DIM, False)
    o_row = i_b * lse[1] + i_h * lse[2] + row_q
    b_lse = _load_lse(lse[0] + o_row, in_q)
    b_delta = tl.load(p_delta + o_row, mask=in_q, other=0.0)

    first_key = first_key_of(i_sequence, kv_start, keys)
    low, all_low, all_high, high = keys_of_queries(
        m0, queries, keys, first_key, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    of_head_k = (k[0] + i_b * k[1] + begin_k * k[2] + i_hk * k[3], k[2])
    of_head_v = (v[0] + i_b * v[1] + begin_k * v[2] + i_hk * v[3], v[2])
    slot = o_m + keys - queries
    b_dq = zero_pieces(BLOCK_M, PAIRS, DIM, INTERLEAVED)
    if WINDOW or kv_start[0] is not None:
        b_dq = _add_keys(
            b_dq,
            b_q,
            b_d_out,
            b_lse,
            b_delta,
            of_head_k,
            of_head_v,
            slot,
            low,
            all_low,
            keys,
            first_key,
            window,
            scale,
            cap,
            DIM,
            PAIRS,
            INTERLEAVED,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            True,
            BLOCK_N,
        )
    b_dq = _add_keys(
        b_dq,
        b_q,
        b_d_out,
        b_lse,
        b_delta,
        of_head_k,
        of_head_v,
        slot,
        all_low,
        all_high,
        keys,
        first_key,
        window,
        scale,
        cap,
        DIM,
        PAIRS,
        INTERLEAVED,
        CAUSAL,
        WINDOW,
        SOFTCAP,
        False,
        BLOCK_N,
    )
    b_dq = _add_keys(
        b_dq,
        b_q,
        b_d_out,
        b_lse,
        b_delta,
        of_head_k,
        of_head_v,
        slot,
        all_high,
        high,
        keys,
        first_key,
        window,
        scale,
        cap,
        DIM,
        PAIRS,
        INTERLEAVED,
        CAUSAL,
        WINDOW,
        SOFTCAP,
        True,
        BLOCK_N,
    )

    i_set = set_of_sequence(i_sequence, lengths, sets, rope[3], SETS)
    p_n = positions[0] + i_b * positions[1] + row_q * positions[2]
    n = tl.load(p_n, mask=in_q, other=0).to(tl.int64)
    original, a = token_rows(n, i_set, rope[1], rope[2])
    p_steps = rope[0] + i_set * 2 * PAIRS
    b_dq = scale_pieces(b_dq, softmax_scale)
    b_dq = rotate_pieces(b_dq, n, original, a, p_steps, PAIRS, INTERLEAVED, True)
    rows = dq[0] + i_b * dq[1] + i_h * dq[3] + (row_q * dq[2])[:, None]
    store_pieces(rows, in_q[:, None], b_dq, PAIRS, DIM, INTERLEAVED)
