"""mbarrier: barriers in shared memory that count arrivals and the bytes of copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arithmetic import Builder
from .machine import Machine, Mask, Step
from .memory import check, shared_places
from .order import AGENTS
from .program import Instruction

SIZE = 8


@dataclass
class Barrier:
    """One of them: what its phase still waits for, and what those know who wait for its end.

    agent: of `Order`, for the copies that complete here. made: who wrote it, and when.
    """

    count: int
    agent: int
    made: tuple[int, int]
    coming: np.ndarray
    ended: np.ndarray
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    used: bool = False


class Barriers:
    """The mbarriers of a block, by address."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.known: dict[int, Barrier] = {}
        self.agents: dict[int, int] = {}
        machine.resets.append(self.reset)

    def reset(self) -> None:
        self.known.clear()
        self.agents.clear()

    def _places(self, address: int) -> np.ndarray:
        return shared_places(self.machine, np.array([address]), SIZE)

    def begin(self, address: int, count: int, warp: int) -> None:
        """mbarrier.init."""
        machine, order = self.machine, self.machine.order
        if count < 1:
            machine.fail(f"an mbarrier of {count} arrivals")
        # The ISA asks for mbarrier.inval before. Triton's specialised kernels begin mbarriers that
        # they never use several times in one place: where nobody came between, no state is lost.
        before = self.known.get(address)
        if before is not None and (before.used or before.count != count):
            machine.fail(f"an mbarrier where there is one that was used, at {address:#x}")
        agent = self.agents.setdefault(address, len(self.agents))
        if agent == AGENTS:
            raise NotImplementedError(f"more than {AGENTS} mbarriers")
        places = self._places(address)
        check(machine, order.writes(places, np.full_like(places, warp)))
        made = (warp, int(order.written[places[0, 0]]))
        barrier = Barrier(count, agent, made, order.clock(), order.clock(), count)
        self.known[address] = barrier

    def end(self, address: int, warp: int) -> None:
        """mbarrier.inval: the bytes are free for something else."""
        barrier = self.at(address, np.array([warp]))
        if barrier.bytes:
            self.machine.fail(f"an mbarrier that still waits for {barrier.bytes} bytes")
        del self.known[address]
        places = self._places(address)
        check(self.machine, self.machine.order.writes(places, np.full_like(places, warp)))

    def at(self, address: int, warps: np.ndarray) -> Barrier:
        """The one at an address, for an access of warps: to them it is like a read."""
        machine, order = self.machine, self.machine.order
        places = self._places(address)
        for warp in warps:
            check(machine, order.reads(places, np.full_like(places, warp)))
        if address not in self.known:
            machine.fail(f"no mbarrier at {address:#x}")
        barrier = self.known[address]
        writer, written = order.writer[places[0]], order.written[places[0]]
        if (writer != barrier.made[0]).any() or (written != barrier.made[1]).any():
            machine.fail(f"an mbarrier that was overwritten, at {address:#x}")
        barrier.used = True
        return barrier

    def expect(self, barrier: Barrier, count: int) -> None:
        barrier.bytes += count

    def arrive(self, barrier: Barrier, count: int, warps: np.ndarray) -> None:
        barrier.pending -= count
        if barrier.pending < 0:
            self.machine.fail(f"{-barrier.pending} arrivals too many at an mbarrier")
        self.machine.order.give(warps, barrier.coming)
        self._end_phase(barrier)

    def complete(self, barrier: Barrier, count: int) -> None:
        """Bytes of a copy have come."""
        barrier.bytes -= count
        self._end_phase(barrier)

    def _end_phase(self, barrier: Barrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.count
            barrier.ended = barrier.coming.copy()


def _warps(machine: Machine, threads: np.ndarray) -> np.ndarray:
    return np.unique(machine.warp[threads])


def _build(machine: Machine, instruction: Instruction) -> Step:
    what = instruction.modifiers[0]
    if what == "try_wait":
        return _wait(machine, instruction)
    if what == "arrive":
        return _arrive(machine, instruction)
    barriers = machine.part(Barriers)
    addresses = machine.address(instruction.operands[0])
    counts = machine.source((*instruction.operands, "0")[1], "u32")

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        for thread in np.flatnonzero(active):
            address, warp = int(addresses()[thread]), int(machine.warp[thread])
            count = int(np.broadcast_to(counts, machine.threads)[thread])
            if what == "init":
                barriers.begin(address, count, warp)
            elif what == "inval":
                barriers.end(address, warp)
            else:
                barriers.expect(barriers.at(address, np.array([warp])), count)

    if what not in ("init", "inval", "expect_tx"):
        raise NotImplementedError(str(instruction))
    return run


def _arrive(machine: Machine, instruction: Instruction) -> Step:
    """mbarrier.arrive, also with the bytes that the phase has to wait for."""
    state, address, *count = instruction.operands
    expects = "expect_tx" in instruction.modifiers
    if state != "_" or "noComplete" in instruction.modifiers:
        raise NotImplementedError(str(instruction))
    barriers, addresses = machine.part(Barriers), machine.address(address)
    numbers = machine.source(count[0] if count else "1", "u32")

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        number = np.broadcast_to(numbers, machine.threads)
        for at in np.unique(addresses()[active]):
            threads = active & (addresses() == at)
            warps = _warps(machine, threads)
            barrier, total = barriers.at(int(at), warps), int(number[threads].sum())
            if expects:
                barriers.expect(barrier, total)
            barriers.arrive(barrier, int(threads.sum()) if expects else total, warps)

    return run


def _wait(machine: Machine, instruction: Instruction) -> Step:
    """mbarrier.try_wait.parity: until the phase of that parity has ended.

    The hardware may give up and say so, and the text then tries again; here it does not give up.
    """
    if "parity" not in instruction.modifiers:
        raise NotImplementedError(str(instruction))
    result = machine.target(instruction.operands[0], "pred")
    barriers, addresses = machine.part(Barriers), machine.address(instruction.operands[1])
    parities = machine.source(instruction.operands[2], "u32")

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        # The ISA knows 0 and 1. Triton's specialised consumers wait for -1 where they mean 1 (an
        # i1 that was sign-extended); ptxas moves the lowest bit to the top for SYNCS.PHASECHK, so
        # only that one counts.
        of_threads = np.broadcast_to(parities & np.uint32(1), machine.threads)
        np.copyto(result, True, where=mask)
        for at, parity in np.unique(np.stack([addresses()[active], of_threads[active]]), axis=1).T:
            threads = active & (addresses() == at) & (of_threads == parity)
            _wait_for(int(at), int(parity), threads)

    def _wait_for(address: int, parity: int, threads: np.ndarray) -> None:
        warps = _warps(machine, threads)
        barrier = barriers.at(address, warps)

        def ended() -> bool:
            if barrier.phase & 1 == parity:
                return False
            machine.order.take(warps, barrier.ended)
            return True

        if not ended():
            machine.block_until(threads, ended)

    return run


PARTING = {"mbarrier"}
BUILDERS: dict[str, Builder] = {"mbarrier": _build}
