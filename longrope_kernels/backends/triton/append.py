"""Appending to a cache by one Triton kernel."""

from __future__ import annotations

from ...calls.records import AppendCall
from ...kernels import append as kernels
from ...kernels.launch import as_bytes
from .launch import run


def append(call: AppendCall) -> None:
    """Write keys and values into the cache."""
    cache = as_bytes(call.cache)
    if cache is not call.cache:  # to replace it takes longer than to look
        call = call._replace(cache=cache)
    run(kernels.plan, call)
