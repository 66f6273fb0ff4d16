"""Launches: the first for arguments of a kind goes Triton's own way, later ones past its binder.

Two things are kept: by what Triton's choice depends on, the kernel that it chose (`run_launch`),
and by the kind of a call, all that is launched for it, so that no plan is made (`run`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ...calls.kinds import Form, filled, form_of, kind_of
from ...kernels.launch import Launch
from . import private
from .device import on_device

# What Triton chose, by all that its choice may depend on.
_CHOSEN: dict[tuple[Any, ...], private.Chosen] = {}
# What is launched for a call: None until its kind comes again, False where plans must be made.
_READY: dict[tuple[Any, ...], _Ready | bool | None] = {}
# So many are kept of each; other strides are another kind.
_MOST = 4096


class _Ready(NamedTuple):
    kernel: Any
    chosen: private.Chosen
    device: int
    grid: tuple[int, int, int]
    form: Form  # of the kernel's arguments


def run(plan: Callable[..., Launch | None], *arguments: Any) -> None:
    """Launch what ``plan`` says of a call, on the device of its first tensor; None is nothing.

    It must follow from the kind of the arguments, of which the call is the first. Where the kernel
    takes another tensor than these, such as a view of one, a plan is made for each call.
    """
    kind = kind_of(*arguments) if private.USED else None
    key = plan, kind
    ready = _READY.get(key, True)
    if _started(ready, arguments):
        return
    with on_device(arguments[0][0]):
        if _started(ready, arguments):  # which was not the current one
            return
        launch = plan(*arguments)
        chosen = run_launch(launch)
        if launch is None or chosen is None or kind is None:
            return
        if ready is True:  # the first of its kind
            _keep(_READY, key, None)
        elif ready is None:
            form = form_of((*launch.args, *launch.constants.values()), arguments)
            device, _ = private.place()
            grid = private.grid_of(launch.grid)
            made = _Ready(launch.kernel, chosen, device, grid, form) if form else False
            _keep(_READY, key, made)


def _started(ready: _Ready | bool | None, arguments: tuple[Any, ...]) -> bool:
    """Whether what is ready may be started as it is, on the current device, and was."""
    if type(ready) is not _Ready:
        return False
    if not (private.plain(ready.kernel) and private.unchanged(ready.chosen)):
        return False
    device, stream = private.place()
    if device != ready.device:
        return False
    private.start(ready.chosen, ready.grid, stream, filled(ready.form, arguments))
    return True


def run_launch(plan: Launch | None) -> private.Chosen | None:
    """Launch on the current device; returns what Triton chose for it, where that may be kept."""
    if plan is None:
        return None
    kernel, grid, args, constants, warps, stages = plan
    if not (private.USED and private.plain(kernel)):
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
        return None
    device, stream = private.place()
    key = key_of(plan, device)
    chosen = _CHOSEN.get(key)
    if chosen is not None and private.unchanged(chosen):
        private.start(chosen, private.grid_of(grid), stream, (*args, *constants.values()))
        return chosen
    compiled = kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
    chosen = private.chosen(kernel, compiled)
    if chosen is None or [*constants] != kernel.arg_names[len(args) :]:
        return None
    _keep(_CHOSEN, key, chosen)
    return chosen


def _keep(kept: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    if len(kept) >= _MOST:
        kept.clear()
    kept[key] = value


def key_of(plan: Launch, device: int) -> tuple[Any, ...]:
    """All that Triton's choice of a compiled kernel may depend on, and no tensor.

    Triton tells apart dtypes, pointers and numbers by whether 16 divides them, numbers also by
    their type, by the bits that they need, and 1 from all others. Numbers stand here as they are,
    which is finer.
    """
    key = [plan.kernel.fn, device, plan.warps, plan.stages, *plan.constants.values()]
    add = key.append
    for group in plan.args:
        if type(group) is int:
            add(group)
            continue
        for x in group if type(group) is tuple else (group,):
            if x is None or type(x) is int:
                add(x)
            elif isinstance(x, Tensor):
                add(x.dtype)
                add(x.data_ptr() % 16)
            else:
                key += (type(x), x)
    return tuple(key)
