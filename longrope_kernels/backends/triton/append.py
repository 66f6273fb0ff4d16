"""Appending to a cache by one Triton kernel."""

from __future__ import annotations

from ...calls.records import AppendCall
from .launch import on_device, run_launch


def append(call: AppendCall) -> None:
    """Write keys and values into the cache."""
    from ...kernels import append as kernels

    with on_device(call.k):
        run_launch(kernels.plan(call))
