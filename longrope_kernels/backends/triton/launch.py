"""Launches: the first for arguments of a kind goes Triton's own way, later ones past its binder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.launch import Launch
from . import private

# What Triton chose, by all that its choice may depend on.
_CHOSEN: dict[tuple[Any, ...], private.Chosen] = {}
# So many are kept; other strides are another kind.
_MOST = 4096


def run_launch(plan: Launch) -> None:
    """Launch on the current device."""
    kernel, grid, args, constants, warps, stages = plan
    if not (private.USED and private.plain(kernel)):
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
        return
    device, stream = private.place()
    key = key_of(plan, device)
    chosen = _CHOSEN.get(key)
    if chosen is not None and private.unchanged(chosen):
        private.start(chosen, grid, stream, (*args, *constants.values()))
        return
    compiled = kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
    chosen = private.chosen(kernel, compiled)
    if chosen is not None and [*constants] == kernel.arg_names[len(args) :]:
        if len(_CHOSEN) >= _MOST:
            _CHOSEN.clear()
        _CHOSEN[key] = chosen


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
