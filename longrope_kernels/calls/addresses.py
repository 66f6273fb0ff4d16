"""Calls as the compiled extensions take them: tuples of addresses, strides and numbers.

A function for each record, which csrc/from_python.h reads by the order of the fields here. Strides
and shapes go as they are: the extensions take what they need of them.
"""

from __future__ import annotations

from typing import Any

import torch

from ..rope.tables import Tables
from .records import AppendCall, AttentionCall, DecodeCall, Keys, RotaryCall, Selection

Record = tuple[Any, ...]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_NO_INTEGERS: Record = (0, (), False)
_NO_SCALES: Record = (0, ())


def rotary(call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor) -> Record:
    """RotaryCall."""
    q, k, positions, of_rope, chosen, conjugate = call
    shape = q.shape
    q_rows, k_rows = token_rows(q), token_rows(k)
    return (
        TYPES[q.dtype],
        shape,
        (q_rows, q_rows if q_out is q else token_rows(q_out), shape[2]),
        (k_rows, k_rows if k_out is k else token_rows(k_out), k.shape[2]),
        integers(positions),
        tables(of_rope),
        selection(chosen, shape[0]),
        conjugate,
    )


def attention(call: AttentionCall, out: torch.Tensor, lse: torch.Tensor) -> Record:
    """AttentionCall."""
    q, positions, of_keys, of_rope, chosen, scores = call
    shape = q.shape
    return (
        TYPES[q.dtype],
        shape,
        of_keys.heads,
        token_rows(q),
        token_rows(out),
        lse.data_ptr(),
        lse.stride(),
        integers(positions),
        keys(of_keys),
        tables(of_rope),
        selection(chosen, shape[0]),
        scores,
    )


def append(call: AppendCall) -> Record:
    """AppendCall."""
    k, v, cache, slot_mapping = call
    return (
        TYPES[k.dtype],
        k.shape,
        cache.k.dtype == torch.float8_e4m3fn,
        token_rows(k),
        token_rows(v),
        keys(cache),
        integers(slot_mapping),
    )


def decode(call: DecodeCall, out: torch.Tensor, lse: torch.Tensor) -> Record:
    """DecodeCall."""
    q, cache, of_rope, chosen, scores = call
    shape = q.shape
    return (
        TYPES[q.dtype],
        shape,
        cache.heads,
        token_rows(q),
        token_rows(out),
        lse.data_ptr(),
        cache.k.dtype == torch.float8_e4m3fn,
        keys(cache),
        tables(of_rope),
        selection(chosen, shape[0]),
        scores,
    )


def tables(of_rope: Tables) -> Record:
    """Tables."""
    steps, n_hat, attention_factor, max_length, _, interleaved = of_rope
    sets, _, pairs = steps.shape
    return (
        steps.data_ptr(),
        n_hat.data_ptr(),
        attention_factor.data_ptr(),
        max_length.data_ptr(),
        interleaved,
        sets,
        pairs,
    )


def selection(chosen: Selection, batch: int) -> Record:
    """Selection."""
    lengths, sets, borders = chosen
    return integers(lengths), integers(sets), integers(borders), chosen.sequences(batch)


def keys(of: Keys) -> Record:
    """Keys."""
    k, v, positions, start, borders, lens, block_table, k_scale, v_scale = of
    return (
        token_rows(k),
        token_rows(v),
        integers(positions),
        integers(start),
        integers(borders),
        integers(lens),
        integers(block_table),
        _scales(k_scale),
        _scales(v_scale),
        k.shape[1],
    )


def token_rows(x: torch.Tensor) -> Record:
    """TokenRows."""
    return x.data_ptr(), x.stride()


def integers(x: torch.Tensor | None) -> Record:
    """Integers."""
    return _NO_INTEGERS if x is None else (x.data_ptr(), x.stride(), x.dtype == torch.int64)


def _scales(x: torch.Tensor | None) -> Record:
    return _NO_SCALES if x is None else (x.data_ptr(), x.stride())
