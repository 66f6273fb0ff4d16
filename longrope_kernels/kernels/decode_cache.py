"""Where the slots of a cache lie: dense, or in blocks that a table names.

BLOCK_SIZE: slots of a block, any number; 0 for a dense cache. BLOCK_N: slots of a tile, which
begins at a multiple of it. Short names: see rotation.py.
"""

import triton
import triton.language as tl

from .attention_tiles import wide


@triton.jit
def block_ids(table, i_b, j0, low, high, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The blocks in which the slots from j0 on lie: one, or one for each slot; int32.

    Only slots from low to high count: the other entries of the table may hold anything.
    """
    ids = 0
    if BLOCK_SIZE > 0:
        p_ids = table[0] + i_b * table[1]
        if BLOCK_SIZE % BLOCK_N == 0:
            j = tl.maximum(tl.minimum(tl.maximum(j0, low), high - 1), 0)
            ids = tl.load(p_ids + j // BLOCK_SIZE * table[2])
        else:
            block, _slot = _block_and_slot(j0, BLOCK_SIZE, BLOCK_N)
            j = j0 + tl.arange(0, BLOCK_N)
            ids = tl.load(p_ids + block * table[2], mask=(j >= low) & (j < high), other=0)
    return ids


@triton.jit
def _block_and_slot(j0, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where in the table and in its block each slot from j0 on lies; j0: a multiple of BLOCK_N."""
    o_n = tl.arange(0, BLOCK_N)
    if BLOCK_N % BLOCK_SIZE == 0:
        # Most of it is the same for all tiles.
        block = j0 // BLOCK_SIZE + o_n // BLOCK_SIZE
        slot = o_n % BLOCK_SIZE
    else:
        block = (j0 + o_n) // BLOCK_SIZE
        slot = (j0 + o_n) % BLOCK_SIZE
    return block, slot


@triton.jit
def slot_rows(cache, ids, j0, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers (BLOCK_N, 1) to the slots from j0 on; cache: (pointer, block stride, slot stride).

    Offsets are 64 bits wide: a cache may have more than 2**31 elements.
    """
    o_n = tl.arange(0, BLOCK_N)
    if BLOCK_SIZE == 0:
        rows = cache[0] + wide(j0) * cache[2] + o_n.to(tl.int64) * cache[2]
    elif BLOCK_SIZE % BLOCK_N == 0:
        rows = cache[0] + wide(ids) * cache[1] + wide(j0 % BLOCK_SIZE) * cache[2]
        rows += o_n.to(tl.int64) * cache[2]
    else:
        _block, slot = _block_and_slot(j0, BLOCK_SIZE, BLOCK_N)
        rows = cache[0] + ids.to(tl.int64) * cache[1] + slot.to(tl.int64) * cache[2]
    return rows[:, None]
