"""Which kernel a call of another library comes down to, by the profiler of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def longest_kernel(run: Callable[[], Any]) -> str | None:
    """The name of the kernel that takes most of the time on the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return longest(profile.events())


def longest(events: Iterable[Any]) -> str | None:
    """Of all on the GPU the one that took longest, all of its calls together."""
    times: dict[str, float] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] = times.get(event.name, 0.0) + event.time_range.elapsed_us()
    return max(times, key=lambda name: times[name], default=None)
