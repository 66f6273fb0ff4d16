"""cp.async: copies from global to shared memory that end when they are waited for, not before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arithmetic import Builder
from .machine import Machine, Mask, Step
from .memory import check, shared_places
from .program import Instruction


@dataclass
class _Copy:
    """What threads have asked for: the bytes, where they go, and the group of each thread."""

    thread: np.ndarray
    places: np.ndarray
    values: np.ndarray
    group: np.ndarray


class Copies:
    """The copies that are going on in a block."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.going: list[_Copy] = []
        self.groups = np.zeros(machine.threads, np.int64)
        machine.resets.append(self.reset)

    def reset(self) -> None:
        self.going.clear()
        self.groups[:] = 0

    def begin(self, thread: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
        order, warp = self.machine.order, self.machine.warp[thread][:, None]
        check(self.machine, order.writes(places, warp, copy=True))
        self.going.append(_Copy(thread, places, values, self.groups[thread]))

    def commit(self, mask: Mask) -> None:
        self.groups[mask if mask is not True else slice(None)] += 1

    def wait(self, mask: Mask, pending: int) -> None:
        """End all groups of these threads but the last ``pending`` ones."""
        machine, rest = self.machine, []
        active = machine.active(mask)
        for copy in self.going:
            ended = active[copy.thread] & (copy.group < self.groups[copy.thread] - pending)
            if ended.any():
                places = copy.places[ended]
                machine.shared[places] = copy.values[ended]
                machine.order.copied_by(places, machine.warp[copy.thread[ended]][:, None])
            if not ended.all():
                left = ~ended
                rest.append(
                    _Copy(copy.thread[left], copy.places[left], copy.values[left], copy.group[left])
                )
        self.going = rest


def _copy(machine: Machine, instruction: Instruction) -> Step:
    """cp.async [to], [from], size, size of what is read: the rest is 0."""
    copies, what = machine.part(Copies), instruction.modifiers[1]
    if what == "commit_group":
        return copies.commit
    if what == "wait_all":
        return lambda mask: copies.wait(mask, -1)
    if what == "wait_group":
        pending = int(str(instruction.operands[0]))
        return lambda mask: copies.wait(mask, pending)
    to, of = (machine.address(x) for x in instruction.operands[:2])
    size = int(str(instruction.operands[2]), 0)
    sizes = instruction.operands[3] if len(instruction.operands) > 3 else str(size)
    to_read = machine.source(sizes, "u32")

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        read = np.broadcast_to(to_read, machine.threads)[active]
        if not np.isin(read, (0, size)).all():
            raise NotImplementedError(f"part of {instruction}")
        values = np.zeros((len(read), size), np.uint8)
        if read.any():
            addresses = of()[active][read > 0]
            words = machine.memory.load(addresses, np.dtype(np.uint32), size // 4)
            values[read > 0] = words.view(np.uint8)
        thread = np.flatnonzero(active)
        copies.begin(thread, shared_places(machine, to()[active], size), values)

    return run


def build(machine: Machine, instruction: Instruction) -> Step:
    if instruction.modifiers[0] != "async" or "bulk" in instruction.modifiers:
        raise NotImplementedError(str(instruction))
    return _copy(machine, instruction)


BUILDERS: dict[str, Builder] = {"cp": build}
