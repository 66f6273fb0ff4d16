"""Appending to a cache by the compiled CUDA backend (csrc/cuda/append.h)."""

from __future__ import annotations

from ...calls.records import AppendCall
from .device import extension, on_device, place_of


def append(call: AppendCall) -> None:
    """Write keys and values into the cache."""
    with on_device(call.k):
        extension().append(call, place_of(call.k))
