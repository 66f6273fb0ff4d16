"""What is taken of Triton that is not public, each with its test: how it starts what it compiled.

Triton's own way from a call to the driver binds arguments by name, describes each as a string and
looks the description up, each time. What it chose once for arguments of one kind can be started
at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Releases whose sources were read for this and that its tests ran by; others start all themselves.
TRIED = ("3.6.", "3.7.", "3.8.", "3.9.")
# On ROCm Triton also asks how large the memory behind a pointer is.
USED = triton.__version__.startswith(TRIED) and torch.version.hip is None


class Chosen(NamedTuple):
    """A kernel that Triton compiled and loaded."""

    kernel: CompiledKernel
    run: Any  # starts it
    function: int  # the driver's handle
    metadata: Any
    scopes: tuple[tuple[dict[str, Any], str, Any], ...]  # of globals it was compiled with, by name


def plain(kernel: Any) -> bool:
    """Whether arguments alone decide what is launched, and nobody listens to it."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return False
    return (
        type(kernel) is JITFunction
        and not kernel.debug
        and not kernel.pre_run_hooks
        and not runtime.debug
        and runtime.add_stages_inspection_hook is None
        and not knobs.compilation.instrumentation_mode
    )


def place() -> tuple[int, int]:
    """The number of the current device, and its current stream."""
    active = driver.active
    device = active.get_current_device()
    return device, active.get_current_stream(device)


def chosen(kernel: Any, compiled: Any) -> Chosen | None:
    """What `start` takes, of what Triton has just started; None where that was none of its own."""
    if type(compiled) is not CompiledKernel:
        return None
    scopes = tuple(
        (scope, name, scope.get(name)) for (name, _), (_, scope) in kernel.used_global_vals.items()
    )
    of_driver = compiled.run, compiled.function, compiled.packed_metadata
    return Chosen(compiled, *of_driver, scopes)


def unchanged(what: Chosen) -> bool:
    """Whether globals that it was compiled with are what they were, without which Triton raises."""
    for scope, name, value in what.scopes:  # noqa: SIM110  a generator takes longer
        if scope.get(name) is not value:
            return False
    return True


def grid_of(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """A grid with all of its dimensions."""
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def start(what: Chosen, grid: tuple[int, int, int], stream: int, args: tuple[Any, ...]) -> None:
    """Start a kernel on the current device; args: all of them, constants included."""
    what.run(*grid, stream, what.function, what.metadata, None, None, None, *args)
