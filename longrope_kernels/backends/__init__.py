"""Which backend serves a call, and the calls into them. Backends never import one another."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .. import values
from ..calls import CacheTensors, Rotation, Scoring

BACKENDS = ("reference", "native", "triton", "cuda")
# Our rotation before a library that has to be there; served where named, not measured faster yet.
FLASH_BACKENDS = ("flash-attn-2", "flash-attn-3", "flash-attn-4")
ATTENTION_BACKENDS = ("reference", "composed", "triton", "cuda", *FLASH_BACKENDS)

# Fastest first, by device type; the reference serves every device and is the only one in float64.
ROTARY_CHOICE: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "cuda", "reference"),
    "cpu": ("native", "reference"),
}

# By device type and by what a call asks for; the reference serves the rest, and float64.
#   plain: causal or not, at most. torch's SDPA has its fastest kernels for these.
#   masked: also a window, left padding or packed sequences, for which SDPA takes a mask in memory.
#   scored: also softcap or the log-sum-exp, which SDPA has not.
ATTENTION_CHOICE: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "plain": ("composed",),
        "masked": ("triton", "cuda", "composed"),
        "scored": ("triton", "cuda", "reference"),
    },
    "cpu": {"plain": ("composed",), "masked": ("composed",), "scored": ("reference",)},
}
# Over a cache of unrotated keys; the reference serves the rest.
DECODE_CHOICE: dict[str, tuple[str, ...]] = ROTARY_CHOICE
DECODE_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "native": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}
FUSED_DTYPES = (torch.bfloat16, torch.float16)
FUSED_HEAD_DIMS = range(16, 257)
CUDA_HEAD_DIMS = range(8, 129, 8)
# Of attention.
WITHOUT_GRADIENTS = ("cuda",)

# Device types each compiled backend serves.
_DEVICES = {
    "native": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
    **dict.fromkeys(FLASH_BACKENDS, ("cuda",)),
}
# How tests run them on CPU tensors.
_ON_CPU = {
    "triton": "; TRITON_INTERPRET=1 runs it on cpu, slowly",
    "cuda": "; LONGROPE_CUDA_EMULATE=1 runs it on cpu, slowly, where its emulator is built",
}


@cache
def missing(name: str) -> str | None:
    """Why the backend cannot run in this process and how to get it, or None where it can."""
    if name in ("reference", "composed"):
        return None
    if name in FLASH_BACKENDS:
        reason: str | None = _module("flash_attention").missing(name)
        return reason
    return _module(name).missing()  # type: ignore[no-any-return]


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
            + _ON_CPU.get(backend, "")
        )
    return backend


def choose_attention(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    asks: str,
    trains: bool = False,
) -> str:
    """The backend for attention: the named one, or the first of `ATTENTION_CHOICE` that can serve.

    Args:
        backend: a name, or None to choose.
        device: the type of the device the tensors are on.
        dtype: of q, k and v.
        head_dim: of q, k and v.
        asks: "plain", "masked" or "scored", the columns of the table.
        trains: whether gradients are wanted.

    Raises:
        ValueError: an unknown name, or one that does not serve this call.
        RuntimeError: the named backend is not there; the message says how to get it.
    """
    if backend is None:
        if dtype == torch.float64:
            return "reference"
        names = ATTENTION_CHOICE.get(device, ATTENTION_CHOICE["cpu"])[asks]
        for name in names:
            if name in ("reference", "composed"):
                return name
            if trains and name in WITHOUT_GRADIENTS:
                continue
            if dtype in FUSED_DTYPES and head_dim in _head_dims(name) and missing(name) is None:
                return name
        return "reference"
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(ATTENTION_BACKENDS)} or None, got {backend!r}"
        )
    if trains and backend in WITHOUT_GRADIENTS:
        raise ValueError(
            f"backend: {backend!r} makes no gradients of q, k and v; expected 'triton', 'composed',"
            " 'flash-attn-2', 'flash-attn-3' or 'flash-attn-4', or torch.no_grad()"
        )
    if backend == "composed" and dtype == torch.float64:
        raise ValueError("backend: 'composed' does not serve float64; expected 'reference'")
    if backend == "composed" and asks == "scored":
        raise ValueError(
            "backend: 'composed' serves neither softcap nor return_lse; expected 'reference' or "
            "'triton'"
        )
    if backend in ("reference", "composed"):
        return backend
    _named(backend, device)
    if dtype not in FUSED_DTYPES:
        raise ValueError(
            f"backend: {backend!r} serves bfloat16 and float16, got {dtype}; expected 'composed' "
            "or 'reference'"
        )
    head_dims = _head_dims(backend)
    if head_dim not in head_dims:
        steps = f" in steps of {head_dims.step}" if head_dims.step > 1 else ""
        raise ValueError(
            f"backend: {backend!r} serves a head_dim from {head_dims[0]} to {head_dims[-1]}{steps},"
            f" got {head_dim}; expected 'composed' or 'reference'"
        )
    return backend


def _head_dims(backend: str) -> range:
    """The head dims that the backend's attention serves."""
    if backend in FLASH_BACKENDS:
        head_dims: range = _module("flash_attention").LIBRARIES[backend].head_dims
        return head_dims
    return CUDA_HEAD_DIMS if backend == "cuda" else FUSED_HEAD_DIMS


def choose_decode(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
) -> str:
    """The backend for `decode`: the named one, or the first of `DECODE_CHOICE` that can serve.

    Args:
        backend: a name, or None to choose.
        device: the type of the device the tensors are on.
        dtype: of q.
        cache_dtype: of the caches: that of q, or float8_e4m3fn.
        head_dim: of q and the caches.

    Raises:
        ValueError: an unknown name, or one that does not serve this call.
        RuntimeError: the named backend is not there; the message says how to get it.
    """
    if backend is None:
        for name in DECODE_CHOICE.get(device, ()):
            if missing(name) is None and not _unserved(name, dtype, cache_dtype, head_dim):
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "reference":
        return backend
    _named(backend, device)
    unserved = _unserved(backend, dtype, cache_dtype, head_dim)
    if unserved:
        raise ValueError(f"backend: {backend!r} serves {unserved}; expected 'reference'")
    return backend


def _unserved(
    backend: str, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int
) -> str | None:
    """What the backend decodes and what came, where it does not serve the call."""
    if backend == "reference":
        return None
    if dtype not in DECODE_DTYPES[backend]:
        served = ", ".join(str(d).removeprefix("torch.") for d in DECODE_DTYPES[backend])
        return f"{served}, got {dtype}"
    if backend == "native" and cache_dtype != dtype:
        return f"caches of the dtype of q, got {cache_dtype}"
    if backend == "triton" and head_dim not in FUSED_HEAD_DIMS:
        return f"a head_dim from 16 to 256, got {head_dim}"
    if backend == "cuda" and head_dim > FUSED_HEAD_DIMS[-1]:
        return f"a head_dim up to {FUSED_HEAD_DIMS[-1]}, got {head_dim}"
    return None


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo (a second).
choose_rotary._dynamo_marked_constant = True  # type: ignore[attr-defined]
choose_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]
choose_decode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
    conjugate: bool,
    backend: str,
) -> None:
    """Rotate q and k into q_out and k_out (which may be q and k), after checking the values.

    Args:
        q, k: (B, S, Hq, D) and (B, S, Hk, D) with a unit last stride; Hq or Hk may be 0.
        q_out, k_out: of the same shapes.
        positions: (B, S) int32 or int64, any strides.
        rotation: how each sequence is rotated.
        cu_seqlens: (sequences + 1,) or None; with it B = 1 and S counts all tokens.
        conjugate: negate the sine: the gradient.
        backend: of `choose_rotary`, not the reference.
    """
    values.check_values(positions, rotation, cu_seqlens)
    _module(backend).rotary(q, k, q_out, k_out, positions, rotation, cu_seqlens, conjugate)


def run_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scoring: Scoring,
    k_rotation: str | None,
    backend: str,
) -> None:
    """Attend, with q and k rotated on the way, into out and lse, after checking the values.

    Args:
        q, out: (B, Sq, Hq, D) bfloat16 or float16, a unit last stride, any others.
        k, v: (B, Sk, Hk, D) of that dtype; Hq is a multiple of Hk.
        lse: (B, Hq, Sq) float32, a unit last stride: the log-sum-exp of the scores, base e; -inf
            where a query sees no key (and 0 in out).
        scoring: with a ``softmax_scale`` that is not negative.
        k_rotation: "prepass", "registers", or None for the backend's own rule.
        backend: of `choose_attention`, one whose rotation is fused.

    Raises:
        ValueError: naming the argument that the backend does not serve.
        RuntimeError: a launch that failed, with the kernel's name and parameters.
    """
    values.check_values(scoring.positions, scoring.rotation, scoring.mask.cu_seqlens)
    values.check_positions("key_positions", scoring.key_positions)
    _module(f"{backend}_attention").forward(q, k, v, out, lse, scoring, k_rotation)


def run_attention_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scoring: Scoring,
    backend: str,
) -> None:
    """The gradients of `run_attention`, into dq, dk and dv.

    Args:
        d_out: like out, of the dtype of q, any strides.
        d_lse: like lse, any strides, or None; ignored where a query sees no key.
        q, k, v, scoring, backend: as in `run_attention`.
        out, lse: what `run_attention` wrote.
        dq, dk, dv: like q, k and v, unit last stride.
    """
    tensors = (d_out, d_lse, q, k, v, out, lse, dq, dk, dv)
    _module(f"{backend}_attention").backward(*tensors, scoring)


def run_decode(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cache: CacheTensors,
    rotation: Rotation,
    softmax_scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> None:
    """Attend to the cache, with q and its keys rotated on the way, after checking the values.

    Args:
        q, out: (B, q_len, Hq, D) of a dtype in `DECODE_DTYPES`, a unit last stride, any others.
        lse: (B, Hq, q_len) float32, contiguous: the log-sum-exp of the scores, base e; -inf where a
            query sees no key (and 0 in out).
        cache: its tensors.
        rotation: how each sequence is rotated.
        softmax_scale: multiplies the scores.
        window: how many slots back a query sees; 0 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0.0 for none.
        backend: of `choose_decode`, not the reference.
    """
    values.check_cache(cache, rotation)
    _module(f"{backend}_decode").decode(
        q, out, lse, cache, rotation, softmax_scale, window, softcap
    )


def _interprets(backend: str, device: str) -> bool:
    if backend not in _ON_CPU or device != "cpu":
        return False
    module = _module(backend)
    return bool(module.interpreting() if backend == "triton" else module.emulating())


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def table() -> list[dict[str, Any]]:
    """One row a backend: name, devices, and why it is missing (None where it is not)."""
    return [_row(name) for name in BACKENDS]


def attention_table() -> list[dict[str, Any]]:
    """The rows of `table` for the backends that `attention` has besides."""
    return [_row(name) for name in ATTENTION_BACKENDS if name not in BACKENDS]


def _row(name: str) -> dict[str, Any]:
    return {"name": name, "devices": _DEVICES.get(name, ("any",)), "missing": missing(name)}
