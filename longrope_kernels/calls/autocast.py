"""What torch's autocast makes of the tensors of a call, as it does for torch's own attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..torch_private import constant_in_graphs
from .memory import device_type

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_of(x: torch.Tensor) -> torch.dtype | None:
    """What autocast makes of x: None outside of it, and for what it leaves alone, as float64."""
    kind = device_type(x)
    if not (kind == "cpu" or _exists(kind)):
        return None
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind) if x.dtype in DTYPES else None


def cast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of autocast where it is on, as torch casts for its own attention."""
    dtype = dtype_of(x)
    return x if dtype is None else x.to(dtype)


def like_cache(x: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """x in the dtype of what is stored where autocast is on.

    A cache keeps its dtype: to cast all of it at each step would cost more than the step. Beside
    float8 x is in the dtype of autocast.
    """
    if dtype_of(x) is None:
        return x
    if stored.dtype == torch.float8_e4m3fn:
        return cast(x)
    return x.to(stored.dtype) if stored.dtype in DTYPES else x


def alike(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches of two dtypes in that of autocast, where it is on: kernels read both in one."""
    if k.dtype == v.dtype or dtype_of(k) is None or dtype_of(v) is None:
        return k, v
    return cast(k), cast(v)


def off(x: torch.Tensor) -> AbstractContextManager[object]:
    """Where torch's own operators keep the dtypes they are given, on the device of x."""
    kind = device_type(x)
    if not _exists(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


@constant_in_graphs
def _exists(kind: str) -> bool:
    """Whether a kind of device has autocast, which torch.compile of torch 2.10 can't look into."""
    return torch.amp.is_autocast_available(kind)
