"""Which backend serves a call, and the calls into them. Backends never import one another."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .. import values

BACKENDS = ("reference", "native", "triton")
ATTENTION_BACKENDS = ("reference", "composed", "triton")

# Fastest first, by device type; the reference serves every device and is the only one in float64.
ROTARY_CHOICE: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "reference"),
    "cpu": ("native", "reference"),
}

# By device type and by what a call asks for; the reference serves the rest, and float64.
#   plain: causal or not, at most. torch's SDPA has its fastest kernels for these.
#   masked: also a window, left padding or packed sequences, for which SDPA takes a mask in memory.
#   scored: also softcap or the log-sum-exp, which SDPA has not.
ATTENTION_CHOICE: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "plain": ("composed",),
        "masked": ("triton", "composed"),
        "scored": ("triton", "reference"),
    },
    "cpu": {"plain": ("composed",), "masked": ("composed",), "scored": ("reference",)},
}
FUSED_DTYPES = (torch.bfloat16, torch.float16)
FUSED_HEAD_DIMS = range(16, 257)

# Device types each compiled backend serves.
_DEVICES = {"native": ("cpu",), "triton": ("cuda",)}


@cache
def missing(name: str) -> str | None:
    """Why the backend cannot run in this process and how to get it, or None where it can."""
    return None if name == "reference" else _module(name).missing()


def choose_rotary(backend: str | None, device: str, is_float64: bool) -> str:
    """The backend for a rotation: the named one, or the first of `ROTARY_CHOICE` that can serve.

    Args:
        backend: a name, or None to choose.
        device: the type of the device the tensors are on ("cpu", "cuda", ...).
        is_float64: whether q and k are float64.

    Raises:
        ValueError: an unknown name, or one that does not serve this device or dtype.
        RuntimeError: the named backend is not there; the message says how to get it.
    """
    if backend is None:
        if is_float64:
            return "reference"
        candidates = ROTARY_CHOICE.get(device, ("reference",))
        return next(name for name in candidates if missing(name) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "reference":
        return backend
    if is_float64:
        raise ValueError(
            f"backend: {backend!r} does not serve float64; expected 'reference' or another dtype"
        )
    return _named(backend, device)


def _named(backend: str, device: str) -> str:
    """The backend, if it is there and serves tensors on ``device``."""
    reason = missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend: {backend!r} is not available: {reason}")
    if device not in _DEVICES[backend] and not _interprets(backend, device):
        raise ValueError(
            f"backend: {backend!r} serves tensors on {_DEVICES[backend][0]}, got {device}"
            + ("; TRITON_INTERPRET=1 runs it on cpu, slowly" if backend == "triton" else "")
        )
    return backend


def choose_attention(
    backend: str | None, device: str, dtype: torch.dtype, head_dim: int, asks: str
) -> str:
    """The backend for attention: the named one, or the first of `ATTENTION_CHOICE` that can serve.

    Args:
        backend: a name, or None to choose.
        device: the type of the device the tensors are on.
        dtype: of q, k and v.
        head_dim: of q, k and v.
        asks: "plain", "masked" or "scored", the columns of the table.

    Raises:
        ValueError: an unknown name, or one that does not serve this call.
        RuntimeError: the named backend is not there; the message says how to get it.
    """
    if backend is None:
        if dtype == torch.float64:
            return "reference"
        names = ATTENTION_CHOICE.get(device, ATTENTION_CHOICE["cpu"])[asks]
        fits = dtype in FUSED_DTYPES and head_dim in FUSED_HEAD_DIMS
        served = (n for n in names if n != "triton" or (fits and missing(n) is None))
        return next(served, "reference")
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(ATTENTION_BACKENDS)} or None, got {backend!r}"
        )
    if backend == "composed" and dtype == torch.float64:
        raise ValueError("backend: 'composed' does not serve float64; expected 'reference'")
    if backend == "composed" and asks == "scored":
        raise ValueError(
            "backend: 'composed' serves neither softcap nor return_lse; expected 'reference' or "
            "'triton'"
        )
    if backend != "triton":
        return backend
    _named(backend, device)
    if dtype not in FUSED_DTYPES:
        raise ValueError(
            f"backend: 'triton' serves bfloat16 and float16, got {dtype}; expected 'composed' or "
            "'reference'"
        )
    if head_dim not in FUSED_HEAD_DIMS:
        raise ValueError(
            f"backend: 'triton' serves a head_dim from 16 to 256, got {head_dim}; expected "
            "'composed' or 'reference'"
        )
    return backend


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo (a second).
choose_rotary._dynamo_marked_constant = True  # type: ignore[attr-defined]
choose_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    positions: torch.Tensor,
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
    conjugate: bool,
    backend: str,
) -> None:
    """Rotate q and k into q_out and k_out (which may be q and k), after checking the values."""
    values.check_values(positions, n_hat.shape[0], lengths, sets, cu_seqlens)
    _module(backend).rotary(
        q,
        k,
        q_out,
        k_out,
        positions,
        steps,
        n_hat,
        attention_factor,
        max_length,
        lengths,
        sets,
        cu_seqlens,
        interleaved,
        conjugate,
    )


def run_attention(*arguments: Any) -> None:
    """`triton_attention.forward`, after checking the values; the last argument is the backend."""
    _check_attention_values(*arguments[5:-1])
    _module(f"{arguments[-1]}_attention").forward(*arguments[:-1])


def run_attention_backward(*arguments: Any) -> None:
    """`triton_attention.backward`; the last argument is the backend."""
    _module(f"{arguments[-1]}_attention").backward(*arguments[:-1])


def _check_attention_values(
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *_: Any,
) -> None:
    values.check_values(positions, n_hat.shape[0], lengths, sets, cu_seqlens)
    values.check_positions("key_positions", key_positions)


def _interprets(backend: str, device: str) -> bool:
    return backend == "triton" and device == "cpu" and bool(_module("triton").interpreting())


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def table() -> list[dict[str, Any]]:
    """One row a backend: name, devices, and why it is missing (None where it is not)."""
    return [
        {"name": n, "devices": _DEVICES.get(n, ("any",)), "missing": missing(n)} for n in BACKENDS
    ]
