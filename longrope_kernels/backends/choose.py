"""Which backend serves a call."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ..calls.records import FEW_QUERIES
from ..torch_private import constant_in_graphs

BACKENDS = ("reference", "native", "triton", "cuda")
# Our rotation before a library that has to be there; the choice of its own by compute capability.
FLASH_BACKENDS = ("flash-attn-2", "flash-attn-3", "flash-attn-4")
ATTENTION_BACKENDS = ("reference", "composed", "native", "triton", "cuda", *FLASH_BACKENDS)

# Fastest first, by device type; the reference serves every device and is the only one in float64.
ROTARY_CHOICE: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "cuda", "reference"),
    "cpu": ("native", "reference"),
}

# By device type, or that and the major compute capability or the maker, and by what a call needs;
# the reference serves the rest, and float64.
#   plain: causal or not, at most. torch's SDPA has its fastest kernels for these.
#   chunk: causal, of fewer queries than keys. SDPA serves it by FlashAttention-2.
#   wide: a head_dim above 128, which cuDNN has not; FlashAttention-2 again.
#   masked: a window or packed sequences, for which SDPA takes a mask in memory; sinks.
#   padded: left padding, or a window that flash-attn has not. A mask in memory too.
#   scored: softcap or the log-sum-exp, which SDPA has not.
_CUDA: dict[str, tuple[str, ...]] = {
    "plain": ("composed",),
    "chunk": ("composed",),
    "wide": ("composed",),
    "masked": ("triton", "cuda", "composed"),
    "padded": ("triton", "cuda", "composed"),
    "scored": ("triton", "cuda", "reference"),
}
_CPU: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_CUDA, ("composed",)),
    "scored": ("native", "reference"),
}
ATTENTION_CHOICE: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": _CUDA,
    "cuda 9": {
        **_CUDA,
        "chunk": ("flash-attn-4", "triton", "composed"),
        "wide": ("flash-attn-4", "composed"),
        "masked": ("flash-attn-4", "triton", "cuda", "composed"),
    },
    "cpu": _CPU,
    # oneMKL, from which SDPA has its products, uses no 512-bit vectors on AMD's processors.
    "cpu AMD": {
        **dict.fromkeys(_CUDA, ("native", "composed")),
        "chunk": ("composed",),
        "scored": _CPU["scored"],
    },
}
WIDE = 128  # the largest head_dim that is not
# Queries of a chunk behind a cache, up to which SDPA's mask costs more than its products gain over
# `native`, where that has 512-bit vectors: measured in float32.
SHORT_CHUNK = 128
# Over a cache of unrotated keys; the reference serves the rest.
DECODE_CHOICE: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "cuda", "reference"),
    "cpu": ("native", "reference"),
}
DECODE_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "native": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}
FUSED_DTYPES = (torch.bfloat16, torch.float16)
FUSED_HEAD_DIMS = range(16, 257)
CUDA_HEAD_DIMS = range(8, 129, 8)
ANY_HEAD_DIM = range(1, sys.maxsize)
# Of attention.
WITHOUT_GRADIENTS = ("native", "cuda")
WITHOUT_SINKS = ("cuda", *FLASH_BACKENDS)  # of decoding too
# Of attention and decoding in Triton, and of all that CUDA C++ is compiled for.
LEAST_CAPABILITY = (8, 0)
_NEEDS = f"it needs compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or more"

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
    reason: str | None
    if name in FLASH_BACKENDS:
        reason = _module("flash_attention").missing(name)
        return reason
    reason = part(name, "device").missing()
    return reason or (_device_lacks(name) if name == "cuda" else None)


def missing_products(name: str, capability: int | str | None = None) -> str | None:
    """`missing` for attention and decoding, which ask more of a device than rotating and appending.

    capability: of the device of the call, see `capability_of`; None asks the best there is.
    """
    reason = missing(name) or _device_lacks(name)
    old = isinstance(capability, int) and capability < LEAST_CAPABILITY[0]
    if reason is None and old and name in ("triton", "cuda") and torch.version.hip is None:
        return f"{_NEEDS}, and the device of the call has {capability}.x"
    return reason


@cache  # asked in each call
def _device_lacks(name: str) -> str | None:
    """What the CUDA devices of this process lack for the products of the backend's kernels."""
    if name not in ("triton", "cuda") or _interprets(name, "cpu") or not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        torch_is = f"this torch is for HIP {torch.version.hip}"
        return f"on ROCm ({torch_is}) it serves the rotation and append alone"
    best = max(range(torch.cuda.device_count()), key=torch.cuda.get_device_capability)
    found = torch.cuda.get_device_capability(best)
    if found >= LEAST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(best)
    return f"{_NEEDS}, and {name} has {'.'.join(map(str, found))}"


@constant_in_graphs
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
        for name in ROTARY_CHOICE.get(device, ()):
            if missing(name) is None:
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "reference":
        return backend
    if is_float64:
        raise ValueError(
            f"backend: {backend!r} does not serve float64; expected 'reference' or another dtype"
        )
    return _named(backend, device)


def _named(
    backend: str,
    device: str,
    instead: str | None = None,
    capability: int | str | None = None,
) -> str:
    """The backend, if it is there and serves tensors on ``device``.

    instead: what serves attention or decoding where this does not; None for a rotation.
    """
    reason = missing(backend) if instead is None else missing_products(backend, capability)
    if reason is not None:
        if instead is not None and missing(backend) is None:
            reason += f"; expected {instead}"
        raise RuntimeError(f"backend: {backend!r} is not available: {reason}")
    if device not in _DEVICES[backend] and not _interprets(backend, device):
        raise ValueError(
            f"backend: {backend!r} serves tensors on {_DEVICES[backend][0]}, got {device}"
            + _ON_CPU.get(backend, "")
        )
    return backend


@constant_in_graphs
def choose_attention(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    needs: str,
    trains: bool = False,
    capability: int | str | None = None,
    libraries: bool = True,
    sinks: bool = False,
    own: bool = False,
) -> str:
    """The backend for attention: the named one, or the first of `ATTENTION_CHOICE` that can serve.

    Args:
        backend: a name, or None to choose.
        device: the type of the device the tensors are on.
        dtype: of q, k and v.
        head_dim: of q, k and v.
        needs: a column of the table.
        trains: whether gradients are wanted.
        capability: the major compute capability of the device, or its maker: see `capability_of`.
        libraries: whether those of others can be called here, as they cannot in a traced graph.
        sinks: whether a logit without a value joins each softmax.
        own: whether it is causal and each query stands at its own key, in rows: decoding in which
            all keys are new, which is what native serves.

    Raises:
        ValueError: an unknown name, or one that does not serve this call.
        RuntimeError: the named backend is not there; the message says how to get it.
    """
    if backend is None:
        if dtype == torch.float64:
            return "reference"
        tables = (ATTENTION_CHOICE.get(key) for key in (f"{device} {capability}", device, "cpu"))
        names = next(filter(None, tables))[needs]
        for name in names:
            if name in ("reference", "composed"):
                return name
            if (trains and name in WITHOUT_GRADIENTS) or (sinks and name in WITHOUT_SINKS):
                continue
            if name in FLASH_BACKENDS and not (
                libraries and _module("flash_attention").serves(name, capability, head_dim, trains)
            ):
                continue
            if name == "native" and not (own and device == "cpu"):  # others take the table of cpu
                continue
            served = dtype in _dtypes(name) and head_dim in _head_dims(name)
            if served and missing_products(name, capability) is None:
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
    if sinks and backend in WITHOUT_SINKS:
        raise ValueError(
            f"sinks: backend {backend!r} does not serve them; expected 'triton', 'composed' or "
            "'reference'"
        )
    if backend == "composed" and dtype == torch.float64:
        raise ValueError("backend: 'composed' does not serve float64; expected 'reference'")
    if backend == "composed" and needs == "scored":
        raise ValueError(
            "backend: 'composed' serves neither softcap nor return_lse; expected 'reference' or "
            "'triton'"
        )
    if backend in ("reference", "composed"):
        return backend
    _named(backend, device, "'composed' or 'reference'", capability)
    if backend == "native" and not own:
        raise ValueError(
            "backend: 'native' serves causal attention of queries to their own keys, without "
            "key_positions and cu_seqlens; expected 'composed' or 'reference', or `decode`"
        )
    dtypes = _dtypes(backend)
    if dtype not in dtypes:
        *first, last = (str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"backend: {backend!r} serves {', '.join(first)} and {last}, got {dtype}; expected "
            "'composed' or 'reference'"
        )
    head_dims = _head_dims(backend)
    if head_dim not in head_dims:
        steps = f" in steps of {head_dims.step}" if head_dims.step > 1 else ""
        raise ValueError(
            f"backend: {backend!r} serves a head_dim from {head_dims[0]} to {head_dims[-1]}{steps},"
            f" got {head_dim}; expected 'composed' or 'reference'"
        )
    return backend


def capability_of(device: torch.device) -> int | str | None:
    """The major compute capability or the maker, by which `ATTENTION_CHOICE` tells them apart."""
    if device.type == "cpu":
        return _maker()
    found: int | None = _module("flash_attention").capability(device)
    return found


def capability_now(x: torch.Tensor) -> int | None:
    """The major compute capability of the GPU of x; None of others, and in a graph being traced."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return capability_of(x.device)  # type: ignore[return-value]  # of no maker


@cache
def _maker() -> str | None:
    """Whose the processor is, where that makes a difference."""
    return None if missing("native") else part("native", "device").maker()


@cache
def wide_vectors() -> bool:
    """Whether `native` has kernels of 512-bit vectors for this processor."""
    device = None if missing("native") else part("native", "device")
    return device is not None and device.instruction_sets()[0].startswith("avx512")


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes that the backend's attention serves."""
    return DECODE_DTYPES["native"] if backend == "native" else FUSED_DTYPES


def _head_dims(backend: str) -> range:
    """The head dims that the backend's attention serves."""
    if backend in FLASH_BACKENDS:
        head_dims: range = _module("flash_attention").LIBRARIES[backend].head_dims
        return head_dims
    return {"cuda": CUDA_HEAD_DIMS, "native": ANY_HEAD_DIM}.get(backend, FUSED_HEAD_DIMS)


@constant_in_graphs
def choose_decode(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    many: bool = False,
    sinks: bool = False,
    capability: int | None = None,
) -> str:
    """The backend for `decode`: the named one, or the first of `DECODE_CHOICE` that can serve.

    Args:
        backend: a name, or None to choose.
        device: the type of the device the tensors are on.
        dtype: of q.
        cache_dtype: of the caches: that of q, or float8_e4m3fn.
        head_dim: of q and the caches.
        many: whether a sequence has more queries than `FEW_QUERIES`.
        sinks: whether a logit without a value joins each softmax.
        capability: see `capability_now`.

    Raises:
        ValueError: an unknown name, or one that does not serve this call.
        RuntimeError: the named backend is not there; the message says how to get it.
    """
    if backend is None:
        for name in DECODE_CHOICE.get(device, ()):
            unserved = _unserved(name, dtype, cache_dtype, head_dim, many, sinks)
            if missing_products(name, capability) is None and not unserved:
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "reference":
        return backend
    _named(backend, device, "'reference'", capability)
    unserved = _unserved(backend, dtype, cache_dtype, head_dim, many, sinks)
    if unserved:
        raise ValueError(f"backend: {backend!r} serves {unserved}; expected 'reference'")
    return backend


def _unserved(
    backend: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    many: bool,
    sinks: bool,
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
    if backend == "cuda" and many:
        return f"up to {FEW_QUERIES} queries of a sequence, got more"
    if backend in WITHOUT_SINKS and sinks:
        return "no sinks"
    return None


def _interprets(backend: str, device: str) -> bool:
    if backend not in _ON_CPU or device != "cpu":
        return False
    module = part(backend, "device")
    return bool(module.interpreting() if backend == "triton" else module.emulating())


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"longrope_kernels.backends.{name}")


def table() -> list[dict[str, Any]]:
    """One row a backend: name, devices, and why it is missing (None where it is not), for the
    rotation and for attention and decoding.
    """
    return [_row(name) for name in BACKENDS]


def attention_table() -> list[dict[str, Any]]:
    """The rows of `table` for the backends that `attention` has besides."""
    return [_row(name) for name in ATTENTION_BACKENDS if name not in BACKENDS]


def _row(name: str) -> dict[str, Any]:
    devices = _DEVICES.get(name, ("any",))
    why = {"missing": missing(name), "missing_products": missing_products(name)}
    return {"name": name, "devices": devices, **why}


@cache
def part(backend: str, part: str) -> ModuleType:
    """A part of a backend; native has all of them in one module."""
    return _module("native" if backend == "native" else f"{backend}.{part}")
