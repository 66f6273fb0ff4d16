"""How much memory a call takes at its peak, and how much there is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available() -> int:
    """Bytes that tensors can take now, on the device of the benchmarks."""
    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Bytes that ``run`` takes beyond what was there before it, its result included.

    On a GPU, of torch's allocator; on a CPU, of the resident set, so memory that the allocator
    kept from calls before is not seen. None where the system does not tell.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        _RESET.write_text("5")  # the peak of the resident set begins anew
        before = _resident("VmHWM")
    except (OSError, LookupError):
        run()
        return None
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise LookupError(field)
    return 1024 * int(found[1])
