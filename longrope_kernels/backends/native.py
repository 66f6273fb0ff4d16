"""The compiled CPU backend (csrc/cpu): hands addresses, sizes and strides to the extension."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..calls.records import DecodeCall, RotaryCall
from ..rope.tables import Tables

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Below this many elements a second thread costs more than it saves (as in ATen).
_GRAIN = 32768
# From here on fresh memory is worth asking for huge pages.
_HUGE = 4 << 20


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("longrope_kernels._native"), ""
    except ImportError as error:
        return None, str(error)


_native, _import_error = _load()


def missing() -> str | None:
    """Why the extension cannot run, or None."""
    if _native is not None:
        return None
    return (
        f"its extension is not built ({_import_error}); install the package where there is a C++ "
        "compiler (pip install . or pip install -e .)"
    )


def instruction_sets() -> list[str]:
    """What this processor runs of what was built ("avx512", "avx2", "baseline"), best first."""
    assert _native is not None
    return list(_native.instruction_sets())


def rotary(
    call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor, instruction_set: str = ""
) -> None:
    """Rotate q and k into q_out and k_out, which may be they; see csrc/cpu/rotary.h."""
    assert _native is not None
    q, k, positions, tables, selection, conjugate = call
    batch, seq, _, dim = q.shape
    elements = q.numel() + k.numel()
    if elements == 0:
        return
    if elements >= _GRAIN:
        for x, out in ((q, q_out), (k, k_out)):
            if out is not x:
                ask_for_huge_pages(out)
    _native.rotary(
        _heads(q, q_out),
        _heads(k, k_out),
        _TYPES[q.dtype],
        (batch, seq, dim, tables.pairs),
        positions.data_ptr(),
        positions.dtype == torch.int64,
        positions.stride(),
        tables.sets,
        _addresses(tables),
        _numbers(selection.lengths),
        _numbers(selection.sets),
        _numbers(selection.borders) if selection.chooses else [],
        tables.interleaved,
        conjugate,
        1 if elements < _GRAIN else torch.get_num_threads(),
        instruction_set,
    )


def decode(
    call: DecodeCall, out: torch.Tensor, lse: torch.Tensor, instruction_set: str = ""
) -> None:
    """Attend to the cache, into out and lse; see csrc/cpu/decode.h.

    The caches have the dtype of q, float32, bfloat16 or float16; there are no scales.
    """
    assert _native is not None
    q, cache, tables, selection, scores = call
    assert cache.k_scale is None
    assert cache.v_scale is None
    if q.numel() == 0:
        return
    batch, queries, heads, dim = q.shape
    lens = _numbers(cache.lens)
    elements = sum(lens) * cache.heads * dim
    _native.decode(
        _TYPES[q.dtype],
        (batch, queries, heads, cache.heads, dim, tables.pairs),
        (q.data_ptr(), q.stride()[:3]),
        (out.data_ptr(), out.stride()[:3]),
        lse.data_ptr(),
        (cache.k.data_ptr(), cache.k.stride()[:3]),
        (cache.v.data_ptr(), cache.v.stride()[:3]),
        _matrix(cache.block_table),
        cache.k.shape[1],
        lens,
        _numbers(cache.start),
        _matrix(cache.positions),
        cache.positions is not None and cache.positions.dtype == torch.int64,
        tables.sets,
        _addresses(tables),
        _numbers(selection.lengths),
        _numbers(selection.sets),
        tables.interleaved,
        scores.scale,
        scores.window,
        scores.cap,
        1 if elements < _GRAIN else torch.get_num_threads(),
        instruction_set,
    )


def ask_for_huge_pages(x: torch.Tensor) -> None:
    """Before anything touches x, fresh memory on the host; where that is worth it."""
    size = x.numel() * x.element_size()
    if _native is not None and size >= _HUGE:
        _native.advise_huge_pages(x.data_ptr(), size)


def _numbers(x: torch.Tensor | None) -> list[int]:
    """What a tensor holds for each sequence or query, as the extension takes it; [] for None."""
    if x is None:
        return []
    return (x if x.dim() == 1 else x.flatten()).tolist()


def _addresses(tables: Tables) -> tuple[int, ...]:
    return (
        tables.steps.data_ptr(),
        tables.n_hat.data_ptr(),
        tables.attention_factor.data_ptr(),
        tables.max_length.data_ptr(),
    )


def _heads(x: torch.Tensor, out: torch.Tensor) -> tuple[object, ...]:
    return x.data_ptr(), out.data_ptr(), x.shape[2], x.stride()[:3], out.stride()[:3]


def _matrix(x: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0)) if x is None else (x.data_ptr(), x.stride())
