"""The kernel of decoding; its launch is in decode.py.

Memory bounds a step: on an H200 a multiprocessor has about 25 cycles for the 512 bytes of a key and
a value of 128 dimensions in 16 bits, in which each of its four schedulers issues up to 25
instructions; reports/codegen/decode.md counts what a tile takes. Keys are rotated in the layout in
which they are loaded, where both dimensions of a pair are in one thread, and go to the matrix unit
through shared memory.

Short names: see rotation.py.
"""

import triton
import triton.language as tl

from .attention_tiles import LN2, cap_scores, start_of_rows, wide
from .decode_cache import block_ids, slot_rows
from .decode_float8 import half_pieces, pieces_as_16_bits
from .decode_sets import queries_of_set, set_of_query
from .decode_splits import combine_if_last, keys_of_sequence, split_keys, tiles_of_split
from .pieces import (
    WIDE,
    add_dots,
    dot_rows,
    load_pieces,
    load_steps,
    narrow_pieces,
    rotate_pieces,
    scale_pieces,
    store_pieces,
    token_rows,
    turn_pieces,
    zero_pieces,
)
from .rotation import narrow


@triton.jit
def _rotate_keys(
    pieces,
    j0,
    exist,
    positions,
    start,
    i_set,
    rope,
    steps,
    below,
    PAIRS: tl.constexpr,
    PAIRING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys from slot j0 on, turned to their positions; positions: (pointer or None, stride)."""
    j = j0 + tl.arange(0, BLOCK_N)
    if PAIRS > 0:
        if positions[0] is None:
            n = (j - start).to(tl.int64)
            pieces = turn_pieces(pieces, n, steps, None, None, None, PAIRING)
        else:
            n = j.to(tl.int64)
            n = tl.load(positions[0] + n * positions[1], mask=exist, other=0).to(tl.int64)
            original, a = token_rows(n, i_set, rope[1], rope[2])
            pieces = turn_pieces(pieces, n, steps, original, below, a, PAIRING)
    return pieces


# Sizes that change from call to call must not compile a kernel each.
@triton.jit(
    do_not_specialize=[
        "scale",
        "cap",
        "window",
        "queries",
        "kv_heads",
        "groups",
        "batch",
        "row_blocks",
        "even",
        "most",
        "least",
    ]
)
def decode_kernel(
    q,
    k,
    v,
    out,
    lse,
    partial_out,
    partial_lse,
    counters,
    cache_lens,
    kv_start,
    table,
    key_positions,
    k_scale,
    v_scale,
    sinks,
    rope,
    lengths,
    sets,
    scale,
    cap,
    window,
    queries,
    kv_heads,
    groups,
    batch,
    row_blocks,
    even,
    most,
    least,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    SETS: tl.constexpr,
    PAIRING: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    SEVERAL_SETS: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of BLOCK_M rows, queries of the heads of one KV head, to a split of the keys.

    Row r is query r // groups of head r % groups. Grid: (most * batch * kv_heads * row_blocks,),
    splits slowest, so that those that are not live come last. With SEVERAL_SETS the queries of a
    sequence may differ in their factor sets: then SETS times as many, each for the rows of one set,
    and those without a row end at once. With MANY, of more than `FEW_QUERIES`, the keys
    of a tile end with its last query and begin with the window of its first.

    q, out: (pointer, batch stride, token stride, head stride) of (batch, queries, heads, DIM). k,
    v: those of the caches, (batch, slots, kv_heads, DIM), with BLOCK_SIZE > 0 (blocks, BLOCK_SIZE,
    kv_heads, DIM); with FLOAT8 bytes. lse: (batch, heads, queries) float32. partial_out,
    partial_lse, counters: of `plan`, the lse in units of log 2; None: one split each. cache_lens,
    kv_start, sets: (pointer or None, stride) of (batch,); k_scale, v_scale of (kv_heads,). sinks:
    (heads,), or None. table, key_positions: (pointer or None, row stride, stride). lengths, sets:
    see decode_sets.py. rope: steps (SETS, 2, PAIRS), n_hat, attention_factor, max_length. scale,
    cap: see `cap_scores`. even, most, least: `Splits`.
    """
    units = batch * kv_heads * row_blocks
    i_program = tl.program_id(0)
    i_set = 0
    if SEVERAL_SETS:
        i_set = i_program // (units * most)
        i_program = i_program - i_set * (units * most)
    i_split = i_program // units
    i_unit = i_program % units
    i_b = (i_unit // (kv_heads * row_blocks)).to(tl.int64)
    i_hk = (i_unit // row_blocks % kv_heads).to(tl.int64)
    i_m = i_unit % row_blocks
    if MANY:
        i_m = row_blocks - 1 - i_m  # those with the most keys first
    m0 = i_m * BLOCK_M

    low, high, start = keys_of_sequence(i_b, cache_lens, kv_start, queries, window, WINDOW)
    of_sets = (lengths, sets, rope[3])
    tokens = high - start - queries + 1  # up to query 0
    last_t = (tl.minimum(m0 + BLOCK_M, queries * groups) - 1) // groups
    takers = tl.full((), -1, tl.int64 if MANY else tl.int32)
    if SEVERAL_SETS:
        of_tile = (i_b, m0 // groups, last_t, tokens)
        takers = queries_of_set(i_set, *of_tile, of_sets, SETS, MANY)
        if takers == 0:
            return
    splits = 1
    until = high  # seen by the last row
    if MANY:
        until = tl.maximum(high - queries + last_t + 1, 0)
        if WINDOW:
            low = tl.maximum(low, high - queries + m0 // groups - window + 1)
        low = tl.minimum(low, until)
    begin = low // BLOCK_N * BLOCK_N
    end = until
    if partial_out is not None:
        share = tiles_of_split(cache_lens, batch, even, least, queries, window, WINDOW, BLOCK_N)
        splits, first, keys = split_keys(low, until, share, most, BLOCK_N)
        begin = first + i_split * keys
        end = tl.minimum(begin + keys, until)
        if i_split >= splits:
            return

    if not SEVERAL_SETS:
        i_set = set_of_query(i_b, 0, tokens, of_sets, SETS)
    dtype: tl.constexpr = q[0].dtype.element_ty
    o_m = m0 + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    in_q = o_m < queries * groups
    i_t = o_m // groups
    i_h = i_hk * groups + o_m % groups
    slot = high - queries + i_t
    n_k = (None, 0)
    if key_positions[0] is None:
        n_q = wide(slot) - start
    else:
        n_k = (key_positions[0] + i_b * key_positions[1], key_positions[2])
        p_n = n_k[0] + wide(slot) * n_k[1]
        n_q = tl.load(p_n, mask=in_q & (slot >= 0), other=0).to(tl.int64)

    if k_scale[0] is not None:
        scale *= tl.load(k_scale[0] + i_hk * k_scale[1])
    of_k = (k[0] + i_hk * k[3], k[1], k[2])
    of_v = (v[0] + i_hk * v[3], v[1], v[2])
    if BLOCK_SIZE == 0:
        of_k = (of_k[0] + i_b * k[1], 0, k[2])
        of_v = (of_v[0] + i_b * v[1], 0, v[2])

    # Keys below n_hat, the first ones, take other steps and factor 1: they come first, alone. Keys
    # in any order take theirs one by one.
    border = 0
    if key_positions[0] is None and PAIRS > 0:
        border = start + tl.minimum(tl.load(rope[1] + i_set), high).to(tl.int32)
    acc = zero_pieces(BLOCK_M, WIDE, DIM, PAIRING)
    # Among the splits of a row the first has its sink.
    top, total = start_of_rows(i_h, sinks, i_split == 0, BLOCK_M)
    for part in range(tl.where(border > begin, 0, 1), 2):
        part_low = low
        part_high = tl.minimum(border, end)
        if part == 1:
            part_low = tl.maximum(border, low)
            part_high = end
        part_keys = tl.maximum(part_high - part_low, 0).to(tl.uint32)
        j_begin = tl.maximum(part_low // BLOCK_N * BLOCK_N, begin)

        p_steps = rope[0] + i_set * 2 * PAIRS
        steps = load_steps(p_steps + part * PAIRS, PAIRS, PAIRING)
        below = load_steps(p_steps, PAIRS, PAIRING)
        original, a = token_rows(n_q, i_set, rope[1], rope[2])
        if key_positions[0] is None and part == 1:
            # The factor of the keys, with the dimensions of q that are rotated.
            a *= tl.load(rope[2] + i_set).to(tl.float32)
        rows = q[0] + i_b * q[1] + (wide(i_t) * q[2] + i_h * q[3])[:, None]
        b_q = load_pieces(rows, in_q[:, None], PAIRS, DIM, PAIRING)
        b_q = rotate_pieces(b_q, n_q, original, a, p_steps, PAIRS, PAIRING, False)
        b_q = narrow_pieces(b_q, dtype)
        if FLOAT8:
            b_q = pieces_as_16_bits(b_q)

        ids = block_ids(table, i_b, j_begin, low, high, BLOCK_SIZE, BLOCK_N)
        for j0 in range(j_begin, part_high, BLOCK_N):
            j = j0 + o_n
            # One comparison: what lies before the first key wraps around.
            exist = (j - part_low).to(tl.uint32, bitcast=True) < part_keys
            rows_k = slot_rows(of_k, ids, j0, BLOCK_SIZE, BLOCK_N)
            rows_v = slot_rows(of_v, ids, j0, BLOCK_SIZE, BLOCK_N)
            # Those of the next tile, so that its keys need not wait for them.
            ids = block_ids(table, i_b, j0 + BLOCK_N, low, high, BLOCK_SIZE, BLOCK_N)
            b_k = load_pieces(rows_k, exist[:, None], PAIRS, DIM, PAIRING)
            b_v = load_pieces(rows_v, exist[:, None], WIDE, DIM, PAIRING)
            if FLOAT8:
                # Values first: the other way round Triton 3.7 and its ptxas spill some.
                b_v = pieces_as_16_bits(half_pieces(b_v, FLOAT8))
                b_k = half_pieces(b_k, FLOAT8)
            b_k = _rotate_keys(
                b_k,
                j0,
                exist,
                n_k,
                start,
                i_set,
                rope,
                steps,
                below,
                PAIRS,
                PAIRING,
                BLOCK_N,
            )
            b_k = narrow_pieces(b_k, dtype)
            if FLOAT8:
                b_k = pieces_as_16_bits(b_k)
            s = dot_rows(b_q, b_k, None)
            seen = exist[None, :]
            if not ONE_QUERY:
                seen = seen & (j[None, :] <= slot[:, None])
                if WINDOW:
                    seen = seen & (slot[:, None] - j[None, :] < window)
            s = tl.where(seen, cap_scores(s, scale, cap, SOFTCAP), float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            # A row that has seen nothing yet must not subtract infinities.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(top - base)
            total = total * alpha + tl.sum(p, 1)
            acc = add_dots(scale_pieces(acc, alpha[:, None]), narrow(p, b_v[0].dtype), b_v)
            top = new_top

    total_or_1 = tl.where(total == 0.0, 1.0, total)
    factor = 1.0 / total_or_1
    if v_scale[0] is not None:
        factor *= tl.load(v_scale[0] + i_hk * v_scale[1])
    acc = scale_pieces(acc, factor[:, None])
    top += tl.log2(total_or_1)
    if SEVERAL_SETS:
        last_bit: tl.constexpr = 63 if MANY else 31
        in_q = in_q & ((takers >> tl.minimum(i_t - m0 // groups, last_bit)) & 1 != 0)
    heads = kv_heads * groups
    offset = (i_b * heads + i_h) * queries + i_t
    if splits == 1:
        rows = out[0] + i_b * out[1] + (wide(i_t) * out[2] + i_h * out[3])[:, None]
        store_pieces(rows, in_q[:, None], acc, WIDE, DIM, PAIRING)
        tl.store(lse + offset, top * LN2, mask=in_q)
    if partial_out is not None and splits > 1:
        offset += wide(i_split) * batch * heads * queries
        store_pieces(partial_out + (offset * DIM)[:, None], in_q[:, None], acc, WIDE, DIM, PAIRING)
        tl.store(partial_lse + offset, top, mask=in_q)
        unit = i_unit
        if SEVERAL_SETS:
            unit += i_set * units
        m1 = tl.minimum(m0 + BLOCK_M, queries * groups)
        of_rows = (i_b, i_hk, m0, m1, takers, wide(batch) * heads * queries, splits)
        rest = (queries, heads, groups)
        place = (counters + unit, out, lse, partial_out, partial_lse)
        combine_if_last(*place, *of_rows, *rest, DIM, triton.next_power_of_2(DIM))
