"""FlashAttention forward for compute capability 9.0: persistent programs whose tiles come by TMA.

One program for each multiprocessor takes tiles of queries, the longest first, and back and forth
from round to round, so that all end at about the same time. q is rotated in registers, k before, in
the pre-pass of attention.py. The tensor memory accelerator copies tiles of q, k and v to shared
memory by descriptors that the kernel makes itself; rows past the end are zeros.

Two forms. In the plain one eight warps do everything, and the keys are split into those that all
queries of the tile see and those that need a mask. The specialised one has a producer that copies
and two groups of four warps, each with 64 of the 128 rows, whose softmax runs under the products of
the other. Triton 3.6 makes it from one loop over the keys, so every tile is masked where any is.
What it asks for besides, found by reading what it made (tests/test_codegen_attention.py):

- four warps, and no branch with an else. A second loop over keys ends in a failed assertion.
- q through a descriptor, as a load by pointers whose value reaches a product ends in another. Such
  a descriptor must have two dimensions: rows of the second group are counted on the first one, and
  with (batch, head, row, column) both groups would get wrong rows.
- nothing but elementwise steps from q to the product: interleaved pairs, which must be taken apart,
  have the plain form.

What the compiler makes of it, for the half pairing and 128 x 128 tiles: no spills, 168 registers a
thread at the start, of which the producer gives up some so that consumers have 232, and for each
tile of 64 rows and 128 keys these instructions of a warp (HGMMA among them):

    head_dim   shared memory   masked loop   loop without a mask   attention.py, without a mask
       64         164,512        635 (12)          437 (12)                 456 (12)
       96         172,712        716 (22)          517 (22)                 516 (22)
      128         229,784        678 (16)          472 (16)                 522 (16)

Not run and not timed on a GPU yet, and therefore asked for by name:
`backends.triton_attention.sm90_form` says how.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..calls.records import Scoring
from .attention_tiles import (
    LN2,
    Launch,
    grid_of,
    keys_of_queries,
    rotation_args,
    score_args,
    set_of_sequence,
    sizes_of,
    tensor_args,
    tile_at,
)
from .descriptors import describe, described_args, load_described, reachable, row_of_head
from .pieces import (
    _list_pieces,
    add_dots,
    dot_rows,
    narrow_pieces,
    rotate_pieces,
    scale_pieces,
    store_pieces,
    token_rows,
    zero_pieces,
)
from .rotation import _INTERPRETED, narrow

ARCH = 90
# What other versions make of the specialised form nobody has read yet.
SPECIALIZES = triton.__version__.startswith("3.6.")


# ----------------------------------------------------------------------------------------- launch


class PersistentConfig(NamedTuple):
    """Rows of q and of k in a tile, warps, stages of the loop, and the form.

    specialize: the warps are those of one of the three groups; ``stages`` tiles of k, v and q each.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    specialize: bool


# By head_dim, specialised and, for interleaved pairs, plain: the largest tiles that compile without
# spills (tests/test_codegen_attention.py). Not timed on a GPU yet.
CONFIGS = {
    64: (PersistentConfig(128, 128, 4, 3, True), PersistentConfig(128, 128, 8, 3, False)),
    96: (PersistentConfig(128, 128, 4, 2, True), PersistentConfig(128, 64, 8, 3, False)),
    128: (PersistentConfig(128, 128, 4, 2, True), PersistentConfig(128, 128, 8, 2, False)),
}
# Of the interpreter: small tiles, so that small tests see several.
INTERPRETED = PersistentConfig(32, 32, 4, 1, False)


def choose_config(arch: int, dim: int, specialize: bool) -> PersistentConfig:
    """The tiles for a head_dim in one of the forms."""
    if arch == 0:
        return INTERPRETED
    return CONFIGS[min(d for d in CONFIGS if d >= dim)][int(not specialize)]


def serves(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scoring: Scoring,
    arch: int,
) -> bool:
    """Whether `plan` takes this call; attention.py takes all.

    The arguments are those of `plan`.

    Not served: packed sequences, ``kv_start``, ``softcap``, a scale of 0; dimensions that do not
    part into pieces of 16 or more (40 rotated pairs of a head of 80 in the half pairing); tensors
    that no descriptor reaches: addresses or strides that are no multiples of 16 bytes, strides of
    0, or a q whose batch stride is no multiple of its token stride.
    """
    rotation, mask, dim = scoring.rotation, scoring.mask, q.shape[3]
    if arch != ARCH or scoring.softcap > 0 or scoring.softmax_scale <= 0:
        return False
    if mask.cu_seqlens is not None or mask.kv_start is not None or dim > max(CONFIGS):
        return False
    of_q = _list_pieces(rotation.steps.shape[2], dim, rotation.interleaved)
    pieces = [*of_q, *_list_pieces(0, dim, False)]
    if any(split or start + width > limit for start, width, limit, split in pieces):
        return False
    return all(reachable(x) for x in (q, k, v)) and row_of_head(q) is not None


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scoring: Scoring,
    arch: int,
    multiprocessors: int,
    specialize: bool = SPECIALIZES,
    config: PersistentConfig | None = None,
) -> Launch:
    """The launch of the forward pass, for tensors that are not empty and that `serves` takes.

    q, k, v, out, lse, scoring: as in `backends.run_attention`; k is rotated. arch: 90, or 0 for
    the interpreter. multiprocessors: those of the device. specialize: the specialised form, where
    pairs need not be taken apart. config: instead of that of the table.
    Nothing is allocated, no tensor is read. At the launch Triton asks its allocator
    (`triton.set_allocator`) for the memory of the descriptors, below a kilobyte a program.
    """
    positions, rotation, mask = scoring.positions, scoring.rotation, scoring.mask
    sizes = sizes_of(q, k, mask)
    sets, _, pairs = rotation.steps.shape
    dim, window = q.shape[3], mask.window or 0
    if config is None:
        config = choose_config(arch, dim, specialize and not (rotation.interleaved and pairs > 0))
    of_kv_head = 2 * sizes.keys * dim * k.element_size()
    places, tiles, section = grid_of(
        sizes.queries, sizes.heads, sizes, config.block_m, of_kv_head, sizes.groups
    )
    constants = {
        "DIM": dim,
        "PAIRS": pairs,
        "SETS": sets,
        "INTERLEAVED": rotation.interleaved,
        "CAUSAL": mask.causal,
        "WINDOW": window > 0,
        "MASKED": mask.causal or window > 0 or sizes.keys % config.block_n > 0,
        "SPECIALIZE": config.specialize,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    place = row_of_head(q)
    assert place is not None
    args = (
        (q, q.stride(1) if q.shape[1] > 1 else dim),
        place,
        described_args(k),
        described_args(v),
        tensor_args(out),
        (lse, *lse.stride()[:2]),
        (positions, *positions.stride()),
        *rotation_args(rotation),
        score_args(scoring.softmax_scale, 0.0)[0],
        min(window, sizes.queries + sizes.keys),
        *sizes.args()[:5],
        tiles,
        section,
    )
    grid = (min(multiprocessors, places),)
    return Launch(attention_persistent_kernel, grid, args, constants, config.warps, config.stages)


# ----------------------------------------------------------------------------------------- kernel


@triton.jit
def place_of_turn(i_turn, programs, places):
    """The place in the order of tiles that a program takes: forth in even rounds, back in odd ones.

    i_turn: the program and its rounds before, i_program + i_round * programs.
    """
    i_round = i_turn // programs
    width = tl.minimum(programs, places - i_round * programs)
    i_place = i_turn % programs
    i_place = tl.where(i_round % 2 == 1, width - 1 - i_place, i_place)
    return i_round * programs + i_place


@triton.jit
def _load_positions(p, SPECIALIZE: tl.constexpr):
    """Positions at ``p``, int64. Warp specialisation would give a load to the producer and fail."""
    if SPECIALIZE and not _INTERPRETED:
        if p.dtype.element_ty == tl.int64:
            n = tl.inline_asm_elementwise(
                "ld.global.nc.b64 $0, [$1];", "=l,l", [p], dtype=tl.int64, is_pure=True, pack=1
            )
        else:
            n = tl.inline_asm_elementwise(
                "ld.global.nc.b32 $0, [$1];", "=r,l", [p], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        n = tl.load(p)
    return n.to(tl.int64)


@triton.constexpr_function
def _list_passes(window, masked, specialize):
    """(first border, last border, masked) of each loop over keys; borders: of `keys_of_queries`."""
    if specialize:
        return [(0, 3, masked)]
    return [(0, 1, True)] * window + [(1, 2, False), (2, 3, True)]


@triton.constexpr_function
def _count_passes(window, masked, specialize):
    return len(_list_passes(window, masked, specialize))


@triton.constexpr_function
def _pass(window, masked, specialize, index, field):
    return _list_passes(window, masked, specialize)[index][field]


@triton.jit
def _attend(
    acc,
    top,
    total,
    q,
    k,
    v,
    i_b,
    i_h,
    first,
    last,
    begin,
    end,
    scale,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the keys from begin to end. Without MASKED all queries see all of them.

    acc: plain pieces (BLOCK_M, D). top, total: (BLOCK_M,), the largest score (in units of log 2)
    and the sum of the weights relative to it. k, v: descriptors. first, last: (BLOCK_M,), the keys
    that a query sees, both included; without WINDOW the first one is 0.
    """
    o_n = tl.arange(0, BLOCK_N)[None, :]
    for j0 in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZE):
        b_k = load_described(k, (i_b, i_h, j0), PAIRS, DIM, INTERLEAVED, BLOCK_N)
        s = dot_rows(q, b_k, None)
        if MASKED:
            seen = o_n <= (last - j0)[:, None]
            if WINDOW:
                seen = seen & (o_n >= (first - j0)[:, None])
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        base = new_top
        if MASKED:
            # A row that has seen nothing yet must not subtract infinities.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        # One multiply-add for each score, as the scale is positive.
        p = tl.exp2(s * scale - base[:, None])
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(p, 1)
        b_v = load_described(v, (i_b, i_h, j0), 0, DIM, False, BLOCK_N)
        acc = add_dots(scale_pieces(acc, alpha[:, None]), narrow(p, DTYPE), b_v)
        top = new_top
    return acc, top, total


# Sizes that change from call to call must not compile a kernel each.
@triton.jit(
    do_not_specialize=[
        "place",
        "scale",
        "window",
        "queries",
        "keys",
        "heads",
        "groups",
        "batch",
        "tiles",
        "section",
    ]
)
def attention_persistent_kernel(
    q,
    place,
    k,
    v,
    out,
    lse,
    positions,
    rope,
    lengths,
    sets,
    scale,
    window,
    queries,
    keys,
    heads,
    groups,
    batch,
    tiles,
    section,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    SETS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of tiles of BLOCK_M queries of one head to all keys they see, tile after tile.

    q: (pointer, row stride) of a matrix, place: see `row_of_head`. out: (pointer, batch stride,
    token stride, head stride) of (batch, queries, heads, DIM), k, v of (batch, keys, heads /
    groups, DIM); k is rotated. All of one 16-bit dtype with a last stride of 1. lse: (pointer,
    batch stride, head stride) of (batch, heads, queries) float32. positions: (pointer, batch
    stride, token stride) of (batch, queries), int32 or int64. rope: steps (SETS, 2, PAIRS), n_hat,
    attention_factor, max_length. lengths, sets: (pointer or None, stride) of (batch,). scale: of
    scores, in units of log 2. MASKED: some query does not see some key of a tile it reads. tiles,
    section: see `tile_at`.
    """
    heads_k = heads // groups
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    rows = (batch - 1) * place[0] + (heads - 1) * place[1] + queries
    columns = (heads - 1) * place[2] + DIM
    shape_k = (batch, heads_k, keys, DIM)
    d_q = describe(q, (rows, columns), PAIRS, DIM, INTERLEAVED, BLOCK_M)
    d_k = describe(k, shape_k, PAIRS, DIM, INTERLEAVED, BLOCK_N)
    d_v = describe(v, shape_k, 0, DIM, False, BLOCK_N)

    programs = tl.num_programs(0)
    places = tiles * heads * batch
    for i_turn in tl.range(tl.program_id(0), places, programs):
        i_place = place_of_turn(i_turn, programs, places)
        i_tile, i_bh = tile_at(i_place, tiles, section, heads * batch)
        i_b = i_bh // heads
        i_h = i_bh % heads
        i_hk = i_h // groups
        i_set = set_of_sequence(i_b, lengths, sets, rope[3], SETS)
        m0 = i_tile * BLOCK_M
        o_m = m0 + tl.arange(0, BLOCK_M)
        in_q = o_m < queries

        p_n = positions[0] + i_b.to(tl.int64) * positions[1]
        p_n += tl.minimum(o_m, queries - 1).to(tl.int64) * positions[2]
        n = _load_positions(p_n, SPECIALIZE)
        original, a = token_rows(n, i_set, rope[1], rope[2])
        row = i_b * place[0] + i_h * place[1] + m0
        b_q = load_described(d_q, (row, i_h * place[2]), PAIRS, DIM, INTERLEAVED, BLOCK_M)
        p_steps = rope[0] + i_set * 2 * PAIRS
        b_q = rotate_pieces(b_q, n, original, a, p_steps, PAIRS, INTERLEAVED, False)
        b_q = narrow_pieces(b_q, DTYPE)

        borders = keys_of_queries(m0, queries, keys, 0, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
        slot = o_m + keys - queries
        first = slot - window + 1
        last = tl.zeros_like(slot) + keys - 1
        if CAUSAL:
            last = tl.minimum(last, slot)
        elif WINDOW:
            last = tl.minimum(last, slot + window - 1)

        acc = zero_pieces(BLOCK_M, 0, DIM, False)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(_count_passes(WINDOW, MASKED, SPECIALIZE)):
            acc, top, total = _attend(
                acc,
                top,
                total,
                b_q,
                d_k,
                d_v,
                i_b,
                i_hk,
                first,
                last,
                borders[_pass(WINDOW, MASKED, SPECIALIZE, i, 0)],
                borders[_pass(WINDOW, MASKED, SPECIALIZE, i, 1)],
                scale,
                DTYPE,
                DIM,
                PAIRS,
                INTERLEAVED,
                WINDOW,
                _pass(WINDOW, MASKED, SPECIALIZE, i, 2),
                SPECIALIZE,
                BLOCK_N,
            )

        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        acc = scale_pieces(acc, (1.0 / total)[:, None])
        p_out = out[0] + i_b.to(tl.int64) * out[1] + i_h.to(tl.int64) * out[3]
        p_out += (o_m.to(tl.int64) * out[2])[:, None]
        store_pieces(p_out, in_q[:, None], acc, 0, DIM, False)
        p_lse = lse[0] + i_b.to(tl.int64) * lse[1] + i_h.to(tl.int64) * lse[2] + o_m
        tl.store(p_lse, (top + tl.log2(total)) * LN2, mask=in_q)
