"""The compiled CPU backend (csrc/cpu): hands addresses, sizes and strides to the extension."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..calls import Rotation

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
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
    conjugate: bool,
    instruction_set: str = "",
) -> None:
    """Rotate q and k (B, S, heads, D) into q_out and k_out; see csrc/cpu/rotary.h."""
    assert _native is not None
    batch, seq, _, dim = q.shape
    steps = rotation.steps
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
        (batch, seq, dim, steps.shape[2]),
        positions.data_ptr(),
        positions.dtype == torch.int64,
        positions.stride(),
        steps.shape[0],
        addresses_of(rotation),
        indices(rotation.lengths),
        indices(rotation.sets),
        indices(cu_seqlens),
        rotation.interleaved,
        conjugate,
        1 if elements < _GRAIN else torch.get_num_threads(),
        instruction_set,
    )


def ask_for_huge_pages(x: torch.Tensor) -> None:
    """Before anything touches x, fresh memory on the host; where that is worth it."""
    size = x.numel() * x.element_size()
    if _native is not None and size >= _HUGE:
        _native.advise_huge_pages(x.data_ptr(), size)


def indices(x: torch.Tensor | None) -> list[int]:
    """What a tensor holds for each sequence, as the extension takes it; empty if there is none."""
    return [] if x is None else x.tolist()


def addresses_of(rotation: Rotation) -> tuple[int, ...]:
    """Those of the tables, as the extension takes them."""
    steps, n_hat, attention_factor, max_length = rotation[:4]
    return steps.data_ptr(), n_hat.data_ptr(), attention_factor.data_ptr(), max_length.data_ptr()


def _heads(x: torch.Tensor, out: torch.Tensor) -> tuple[object, ...]:
    return x.data_ptr(), out.data_ptr(), x.shape[2], x.stride()[:3], out.stride()[:3]
