"""cp.async.bulk.tensor: boxes of tensors to and from shared memory, by tensor maps.

A load ends when no thread of the block can go on without it, the last one asked for first; a store
when it is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .machine import SHARED_BASE, Machine, MachineError, Mask, Step
from .mbarriers import Barrier, Barriers
from .memory import OutsideError, check
from .order import CHUNK
from .program import Address, Instruction
from .tensor_maps import TensorMap, TensorMaps
from .wgmma import swizzled

_ALIGNMENT = 128


@dataclass
class _Copy:
    """A box on its way: its places in shared memory, for loads the mbarrier, who asked and how."""

    map: TensorMap
    at: tuple[int, ...]
    places: np.ndarray
    barrier: Barrier | None
    thread: int
    group: int
    asked: Instruction

    @property
    def chunks(self) -> np.ndarray:
        return np.unique(self.places // CHUNK)


class TensorCopies:
    """Those that are going on in a block."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.loads: list[_Copy] = []
        self.stores: list[_Copy] = []
        self.groups = np.zeros(machine.threads, np.int64)
        machine.resets.append(self.reset)
        machine.landings.append(self.land)
        machine.ends.append(self.end)

    def reset(self) -> None:
        self.loads.clear()
        self.stores.clear()
        self.groups[:] = 0

    def places(self, of: TensorMap, address: int) -> np.ndarray:
        """Bytes of a box in shared memory, (elements, bytes of one)."""
        machine = self.machine
        if address % _ALIGNMENT:
            machine.fail(f"a box at {address:#x}")
        linear = address + np.arange(of.bytes).reshape(-1, of.element)
        places = swizzled(linear, of.span) - SHARED_BASE
        if places.min() < 0 or places.max() >= len(machine.shared):
            machine.fail(f"outside of shared memory, from {places.min()} to {places.max()}")
        return places

    def load(self, copy: _Copy) -> None:
        warp = int(self.machine.warp[copy.thread])
        check(self.machine, self.machine.order.begin_copy(copy.chunks, warp))
        self.loads.append(copy)

    def land(self) -> bool:
        if not self.loads:
            return False
        machine, copy = self.machine, self.loads.pop()
        addresses, inside = copy.map.elements(copy.at)
        kind = np.dtype(f"u{copy.map.element}")
        values = np.zeros((len(addresses), 1), kind)
        try:
            values[inside] = machine.memory.load(addresses[inside], kind)
        except OutsideError as error:
            raise OutsideError(f"{error}: {copy.map} at {copy.at}, {copy.asked}") from error
        machine.shared[copy.places] = values.view(np.uint8)
        barrier = copy.barrier
        assert barrier is not None
        machine.order.land(copy.chunks, barrier.agent, barrier.coming)
        machine.part(Barriers).complete(barrier, copy.map.bytes)
        return True

    def store(self, copy: _Copy) -> None:
        warps = self.machine.warp[[copy.thread]]
        check(self.machine, self.machine.order.begin_use(copy.chunks, warps))
        self.stores.append(copy)

    def commit(self, mask: Mask) -> None:
        self.groups[mask if mask is not True else slice(None)] += 1

    def wait(self, mask: Mask, pending: int) -> None:
        active = self.machine.active(mask)
        for copy in list(self.stores):
            if active[copy.thread] and copy.group < self.groups[copy.thread] - pending:
                self._finish(copy)

    def _finish(self, copy: _Copy) -> None:
        """A store reads its bytes as late as it may."""
        machine = self.machine
        addresses, inside = copy.map.elements(copy.at)
        values = machine.shared[copy.places].view(f"u{copy.map.element}")
        machine.memory.store(addresses[inside], values[inside])
        machine.order.end_use(copy.chunks, machine.warp[[copy.thread]])
        self.stores.remove(copy)

    def end(self) -> None:
        for copy in (*self.loads, *self.stores):
            raise MachineError(f"the block ends before a copy does: {copy.asked}")


def build(machine: Machine, instruction: Instruction) -> Step:
    copies, what = machine.part(TensorCopies), instruction.modifiers[2]
    if what == "commit_group":
        return copies.commit
    if what == "wait_group":
        pending = int(str(instruction.operands[0]))
        return lambda mask: copies.wait(mask, pending)
    if what == "tensor":
        return _tensor(machine, instruction)
    raise NotImplementedError(str(instruction))


def _tensor(machine: Machine, instruction: Instruction) -> Step:
    dimensions, to, of, *how = instruction.modifiers[3:]
    loads = to in ("shared::cluster", "shared::cta") and of == "global"
    known = ["mbarrier::complete_tx::bytes"] if loads else ["bulk_group"]
    if how != known or not (loads or (to, of) == ("global", "shared::cta")):
        raise NotImplementedError(str(instruction))
    first, second, *rest = instruction.operands
    described, place = (second, first) if loads else (first, second)
    assert isinstance(described, Address)
    if len(described.coordinates) != int(dimensions[0]):
        raise MachineError(f"{len(described.coordinates)} coordinates: {instruction}")
    copies, maps = machine.part(TensorCopies), machine.part(TensorMaps)
    barriers = machine.part(Barriers)
    map_at = machine.address(Address(described.base, described.offset))
    place_at, barrier_at = machine.address(place), machine.address(rest[0]) if loads else None
    coordinates = [machine.source(x, "s32") for x in described.coordinates]

    def run(mask: Mask) -> None:
        for thread in np.flatnonzero(machine.active(mask)):
            warp = int(machine.warp[thread])
            tensor_map = maps.read(int(map_at()[thread]), warp)
            if len(tensor_map.box) != len(coordinates):
                machine.fail(f"a tensor of {len(tensor_map.box)} dimensions")
            at = tuple(int(np.broadcast_to(x, machine.threads)[thread]) for x in coordinates)
            places = copies.places(tensor_map, int(place_at()[thread]))
            barrier = None
            if barrier_at is not None:
                barrier = barriers.at(int(barrier_at()[thread]), machine.warp[[thread]])
            group = int(copies.groups[thread])
            copy = _Copy(tensor_map, at, places, barrier, int(thread), group, instruction)
            (copies.load if loads else copies.store)(copy)

    return run
