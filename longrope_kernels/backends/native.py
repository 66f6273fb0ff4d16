"""The compiled CPU backend (csrc/cpu): hands the addresses of a call to the extension."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..calls import addresses
from ..calls.records import AppendCall, DecodeCall, RotaryCall

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
    q, k = call.q, call.k
    elements = q.numel() + k.numel()
    if elements == 0:
        return
    threads = 1
    if elements >= _GRAIN:
        threads = torch.get_num_threads()
        for x, out in ((q, q_out), (k, k_out)):
            if out is not x:
                ask_for_huge_pages(out)
    _native.rotary(addresses.rotary(call, q_out, k_out), threads, instruction_set)


def decode(
    call: DecodeCall, out: torch.Tensor, lse: torch.Tensor, instruction_set: str = ""
) -> None:
    """Attend to the cache, into out and lse; see csrc/cpu/decode.h.

    The caches have the dtype of q, float32, bfloat16 or float16; there are no scales.
    """
    assert _native is not None
    q, cache = call.q, call.keys
    assert cache.lens is not None
    assert cache.k_scale is None
    assert cache.v_scale is None
    if q.numel() == 0:
        return
    _, _, heads, dim = cache.k.shape
    elements = sum(cache.lens.tolist()) * heads * dim
    threads = 1 if elements < _GRAIN else torch.get_num_threads()
    _native.decode(addresses.decode(call, out, lse), threads, instruction_set)


def append(call: AppendCall) -> None:
    """Write keys and values into the cache; see csrc/cpu/append.h."""
    assert _native is not None
    threads = 1 if 2 * call.k.numel() < _GRAIN else torch.get_num_threads()
    _native.append(addresses.append(call), threads)


def ask_for_huge_pages(x: torch.Tensor) -> None:
    """Before anything touches x, fresh memory on the host; where that is worth it."""
    size = x.numel() * x.element_size()
    if _native is not None and size >= _HUGE:
        _native.advise_huge_pages(x.data_ptr(), size)
