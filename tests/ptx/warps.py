"""Branches, barriers, and what the threads of a warp tell one another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import Builder
from .machine import WARP, Machine, Mask, Step
from .program import Instruction


def _branch(machine: Machine, instruction: Instruction) -> Step:
    target = machine.program.target(instruction)
    if instruction.guard is None:

        def jump(mask: Mask) -> None:
            machine.next = target

        return jump
    guard, negated = machine.source(instruction.guard, "pred"), instruction.negated

    def run(mask: Mask) -> None:
        taken = ~guard if negated else guard
        of_active = taken if mask is True else taken[mask]
        if of_active.all():
            machine.next = target
        elif of_active.any():
            machine.next = np.where(taken, target, machine.next)

    return run


def _leave(machine: Machine, instruction: Instruction) -> Step:
    def run(mask: Mask) -> None:
        machine.exited |= machine.active(mask)

    return run


class _Barrier:
    """One of the sixteen: who has come, and whether the last one came."""

    def __init__(self, threads: int) -> None:
        self.come = np.zeros(threads, bool)
        self.turn = 0


def _barrier(machine: Machine, instruction: Instruction) -> Step:
    """bar.sync and barrier.sync: a number of threads, or all, wait for one another."""
    if "warp" in instruction.modifiers:
        return lambda mask: None  # the threads of a warp are in step
    if instruction.modifiers[0] not in ("sync", "cta"):
        raise NotImplementedError(str(instruction))
    number = machine.source(instruction.operands[0], "u32")
    expected = instruction.operands[1] if len(instruction.operands) > 1 else str(machine.threads)
    count = machine.source(expected, "u32")

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        machine.whole_warps(mask)
        which, of = (np.broadcast_to(x, machine.threads)[active] for x in (number, count))
        if (which != which[0]).any() or (of != of[0]).any():
            machine.fail("a barrier for each thread")
        barrier = machine.barriers.setdefault(int(which[0]), _Barrier(machine.threads))
        barrier.come |= active
        turn = barrier.turn
        if barrier.come.sum() > of[0]:
            machine.fail(f"{barrier.come.sum()} threads at a barrier of {of[0]}")
        if barrier.come.sum() == of[0]:
            machine.order.meet(np.unique(machine.warp[barrier.come]))
            barrier.come[:] = False
            barrier.turn += 1
        else:
            machine.block_until(mask, lambda: barrier.turn > turn)

    return run


def _shuffle(machine: Machine, instruction: Instruction) -> Step:
    """shfl.sync: the value of another lane of the warp, of this one where that is outside."""
    how = instruction.modifiers[1]
    results, value, lane, clamp, _ = instruction.operands
    if clamp not in ("31", "0x1f") and how != "up":
        raise NotImplementedError(str(instruction))
    name, _, valid = str(results).partition("|")
    result, values = machine.target(name, "b32"), machine.source(value, "b32")
    lanes, own = machine.source(lane, "u32").astype, np.arange(WARP)
    inside_of = machine.target(valid, "pred") if valid else None
    lanes_of: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "bfly": lambda x: own ^ x,
        "idx": lambda x: x & 31,
        "up": lambda x: own - x,
        "down": lambda x: own + x,
    }

    def run(mask: Mask) -> None:
        machine.whole_warps(mask)
        of = np.broadcast_to(lanes(np.int64), machine.threads).reshape(-1, WARP)
        source = lanes_of[how](of)
        inside = (source >= 0) & (source < WARP)
        rows = np.broadcast_to(values, machine.threads).reshape(-1, WARP)
        taken = np.take_along_axis(rows, np.where(inside, source, own), 1)
        np.copyto(result, taken.reshape(-1), where=mask)
        if inside_of is not None:
            np.copyto(inside_of, inside.reshape(-1), where=mask)

    return run


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce(machine: Machine, instruction: Instruction) -> Step:
    function, kind = _REDUCTIONS[instruction.modifiers[1]], instruction.type
    result = machine.target(instruction.operands[0], kind)
    values = machine.source(instruction.operands[1], kind)

    def run(mask: Mask) -> None:
        machine.whole_warps(mask)
        rows = np.broadcast_to(values, machine.threads).reshape(-1, WARP)
        of_warps = function.reduce(rows, axis=1, dtype=rows.dtype)
        np.copyto(result, np.repeat(of_warps, WARP), where=mask)

    return run


def _nothing(machine: Machine, instruction: Instruction) -> Step:
    return lambda mask: None


PARTING = {"bra", "ret", "exit", "bar", "barrier"}
BUILDERS: dict[str, Builder] = {
    "bar": _barrier,
    "barrier": _barrier,
    "bra": _branch,
    "exit": _leave,
    "griddepcontrol": _nothing,
    "membar": _nothing,
    "redux": _reduce,
    "ret": _leave,
    "shfl": _shuffle,
}
