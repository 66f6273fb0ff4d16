"""The factor sets of the queries of a sequence, which may differ where they lie across a boundary.

of_sets: lengths (pointer or None, row stride, stride) of (batch, queries), the stride 0 where a
sequence has one length; sets (pointer or None, stride) of (batch,), which win; max_length (SETS,).
Without either a query takes the set of the tokens up to it. Usually all queries of a tile agree.
What is launched follows from shapes alone: programs for every set, of which those end at once that
have no query. Short names: see rotation.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..calls.records import FEW_QUERIES, Selection
from ..rope.tables import Tables
from .launch import vector_args
from .rotation import clamp_set, set_of_length

# Queries that a tile has at most, a bit for each: all of a sequence, or as many as it has rows.
_FEW = tl.constexpr(FEW_QUERIES)
_MANY = tl.constexpr(64)


def several_sets(tables: Tables, selection: Selection, queries: int) -> bool:
    """Whether the queries of a sequence may differ; it follows from shapes alone."""
    of_sequences = selection.sets is not None or (
        selection.lengths is not None and selection.lengths.dim() == 1
    )
    return tables.sets > 1 and queries > 1 and not of_sequences


def selection_args(selection: Selection) -> tuple[Any, ...]:
    """The lengths and sets of the kernel."""
    lengths = selection.lengths
    of_lengths: tuple[Any, ...] = (None, 0, 0)
    if lengths is not None:
        of_lengths = (lengths, lengths.stride(0), lengths.stride(1) if lengths.dim() == 2 else 0)
    return of_lengths, vector_args(selection.sets)


@triton.jit
def set_of_query(i_b, i_t, tokens, of_sets, SETS: tl.constexpr):
    """The set of query i_t, any shape; tokens: how many there are up to it."""
    lengths, sets, p_max_length = of_sets
    i_set = 0
    if sets[0] is not None:
        i_set = clamp_set(tl.load(sets[0] + i_b * sets[1]), SETS)
    elif lengths[0] is not None:
        length = tl.load(lengths[0] + i_b * lengths[1] + i_t * lengths[2])
        i_set = set_of_length(length, p_max_length, SETS)
    else:
        i_set = set_of_length(tokens, p_max_length, SETS)
    return i_set


@triton.jit
def queries_of_set(i_set, i_b, t0, t1, tokens, of_sets, SETS: tl.constexpr, MANY: tl.constexpr):
    """Which of queries t0 to t1 take this set: bit t - t0; tokens: how many up to query 0.

    int32, with MANY int64.
    """
    o_t = tl.arange(0, _MANY if MANY else _FEW)
    i_t = tl.minimum(t0 + o_t, t1)
    takes = set_of_query(i_b, i_t, tokens + i_t, of_sets, SETS) == i_set
    return tl.sum(takes.to(tl.int64 if MANY else tl.int32) << o_t, 0)
