"""The compiled CPU backend (csrc/cpu): hands the record of a call to the extension."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..calls.records import AppendCall, AttentionCall, DecodeCall, RotaryCall


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
    """What this processor runs of what was built ("avx512_bf16", ..., "baseline"), best first."""
    assert _native is not None
    return list(_native.instruction_sets())


def maker() -> str | None:
    """ "AMD", or None of any other processor."""
    assert _native is not None
    return "AMD" if _native.is_amd() else None


def rotary(
    call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor, instruction_set: str = ""
) -> None:
    """Rotate q and k into q_out and k_out, which may be they; see csrc/cpu/rotary.h."""
    assert _native is not None
    _native.rotary(call, q_out, k_out, torch.get_num_threads(), instruction_set)


def decode(
    call: DecodeCall, out: torch.Tensor, lse: torch.Tensor, instruction_set: str = ""
) -> None:
    """Attend to the cache, into out and lse; see csrc/cpu/decode.h.

    The caches have the dtype of q, float32, bfloat16 or float16; there are no scales.
    """
    assert _native is not None
    assert call.keys.lens is not None
    assert call.keys.k_scale is None
    assert call.keys.v_scale is None
    if call.sinks is not None:
        call = call._replace(sinks=call.sinks.float())
    _native.decode(call, out, lse, torch.get_num_threads(), instruction_set)


def forward(
    call: AttentionCall, out: torch.Tensor, lse: torch.Tensor, k_rotation: str | None
) -> None:
    """Attend where each query stands at its own key: decoding in which all keys are new."""
    q, keys = call.q, call.keys
    lens = torch.full(q.shape[:1], q.shape[1], dtype=torch.int32, device=q.device)
    keys = keys._replace(lens=lens)
    decode(DecodeCall(q, keys, call.tables, call.selection, call.scores, call.sinks), out, lse)


def append(call: AppendCall) -> None:
    """Write keys and values into the cache; see csrc/cpu/append.h."""
    assert _native is not None
    _native.append(call, torch.get_num_threads())


def ask_for_huge_pages(x: torch.Tensor) -> None:
    """Before anything touches x, fresh memory on the host; where that is worth it."""
    if _native is not None:
        _native.ask_for_huge_pages(x)
