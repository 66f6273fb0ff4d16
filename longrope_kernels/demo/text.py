"""A real long text that every machine has: the source of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch


def standard_library_bytes(count: int) -> torch.Tensor:
    """The first ``count`` bytes of the standard library's modules, in order of their names.

    Returns:
        (1, count) int64, one token a byte.

    Raises:
        RuntimeError: this Python came without that much source.
    """
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= count:
            return torch.tensor(list(text[:count]), dtype=torch.int64)[None]
    raise RuntimeError(
        f"the standard library in {sysconfig.get_path('stdlib')} holds {len(text)} bytes of "
        f"source; expected at least {count}"
    )
