"""The threads of a block: their registers, and who runs next.

All threads at one instruction run it together, as arrays with an element for each thread. Those
with the lowest program counter run first, so that threads that parted meet again where their paths
do; where that is not enough, those who come first to an instruction for whole warps wait there for
the others. Who waits for a barrier does not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import numpy as np

from .order import Order
from .program import Address, Instruction, Operand, Program

WARP = 32
# Dynamic shared memory does not begin at 0.
SHARED_BASE = 1024

# Which threads run an instruction: all, or those where it is true.
Mask = Any
Step = Callable[[Mask], None]
Part = TypeVar("Part")

WIDTHS = {"pred": 1, "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "e4m3x2": 16} | {
    f"{kind}{width}": width for kind in "busf" for width in (8, 16, 32, 64)
}
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def numpy_type(name: str) -> np.dtype[Any]:
    """Of a PTX type; those that numpy lacks are their bits."""
    if name == "pred":
        return np.dtype(bool)
    if name[0] in _KINDS and name[1:].isdigit():
        return np.dtype(f"{_KINDS[name[0]]}{WIDTHS[name] // 8}")
    return np.dtype("f2" if name == "f16" else f"u{WIDTHS[name] // 8}")


class MachineError(Exception):
    """What a kernel must not do."""


class _DividedError(MachineError):
    """Threads of these warps are missing, (warps,) bool."""

    def __init__(self, what: str, warps: np.ndarray) -> None:
        super().__init__(what)
        self.warps = warps


class Machine:
    """A block of a program: `run` runs one of them.

    threads: of the block. shared: bytes of shared memory. memory: the global one.
    unfenced_copies: of `Order`.
    """

    def __init__(
        self,
        program: Program,
        threads: int,
        shared: int,
        memory: Any,
        unfenced_copies: bool = False,
    ) -> None:
        from . import instructions  # which need this module's names

        self.program, self.threads, self.memory = program, threads, memory
        self.warps = threads // WARP
        self.thread = np.arange(threads, dtype=np.uint32)
        self.warp = (self.thread // WARP).astype(np.int64)
        self.registers: dict[str, np.ndarray] = {}
        self.parameters: dict[str, int | float] = {}
        self.shared = np.zeros(shared, np.uint8)
        self.order = Order(self.warps, shared, unfenced_copies)
        self.special = {
            f"%{name}.{axis}": np.zeros(threads, np.uint32)
            for name in ("tid", "ctaid", "ntid", "nctaid")
            for axis in "xyz"
        }
        self.special["%laneid"] = self.thread % WARP
        self.special["%tid.x"][:] = self.thread
        self.special["%ntid.x"][:] = threads
        for name in ("%ntid.y", "%ntid.z"):
            self.special[name][:] = 1
        # The threads that run, and what keeps one from running.
        self.counter = np.zeros(threads, np.int64)
        self.blocked = np.zeros(threads, bool)
        self.exited = np.zeros(threads, bool)
        # Those who wait for the rest of their warp, and what they would say if it never came.
        self.apart = np.zeros(threads, bool)
        self.divided: _DividedError | None = None
        self.waits: list[Callable[[], bool]] = []
        self.barriers: dict[int, Any] = {}
        self.parts: dict[Any, Any] = {}
        self.next: Any = 0
        self.resets: list[Callable[[], None]] = []
        self.executed = np.zeros(len(program.instructions), np.int64)
        self.now: Instruction | None = None
        self.steps = [self._guarded(i, instructions.build(self, i)) for i in program.instructions]
        self.leaders = set(program.labels.values())
        self.leaders |= {
            i + 1 for i, x in enumerate(program.instructions) if instructions.parts_threads(x)
        }

    # ------------------------------------------------------------------------------- operands

    def source(self, operand: Operand, kind: str) -> np.ndarray:
        """The values of an operand as a type: an element for each thread, or one for all."""
        assert isinstance(operand, str), operand
        if operand in self.special:
            return self.special[operand].view(numpy_type(kind))
        if self.class_of(operand):
            return self._view(operand, kind)
        return np.array([self._literal(operand, kind)]).view(numpy_type(kind))

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """Where an instruction puts a result of a type."""
        assert isinstance(operand, str), operand
        return (
            np.empty(self.threads, numpy_type(kind))
            if operand == "_"
            else self._view(operand, kind)
        )

    def address(self, operand: Operand) -> Callable[[], np.ndarray]:
        """The addresses of ``[register + offset]``, int64."""
        assert isinstance(operand, Address), operand
        kind = self.class_of(operand.base)
        if kind is None:
            fixed = np.full(self.threads, self._literal(operand.base, "b64") + operand.offset)
            return lambda: fixed.astype(np.int64)
        register = self._view(operand.base, "u" + kind[1:])
        return lambda: register.astype(np.int64) + operand.offset

    def put(self, target: np.ndarray, values: np.ndarray, mask: Mask) -> None:
        np.copyto(target, values, where=mask)

    def active(self, mask: Mask) -> np.ndarray:
        """The mask as an array."""
        return np.ones(self.threads, bool) if mask is True else mask

    def part(self, kind: Callable[[Machine], Part]) -> Part:
        """The one part of a kind that this machine has."""
        if kind not in self.parts:
            self.parts[kind] = kind(self)
        return self.parts[kind]

    def whole_warps(self, mask: Mask) -> np.ndarray:
        """The warps of a mask, (warps,) bool; none of them may be divided."""
        lanes = self.active(mask).reshape(self.warps, WARP)
        divided = lanes.any(1) != lanes.all(1)
        if divided.any():
            raise _DividedError(f"threads of a warp are missing: {self.now}", divided)
        return lanes.all(1)

    def fail(self, what: str) -> NoReturn:
        raise MachineError(f"{what}: {self.now}")

    def class_of(self, name: str) -> str | None:
        """The declared type of a register; None for what is none."""
        declared = self.program.registers
        return declared.get(name) or declared.get(re.sub(r"\d+$", "", name))

    def _view(self, name: str, kind: str) -> np.ndarray:
        declared = self.class_of(name)
        assert declared is not None, name
        if name not in self.registers:
            self.registers[name] = np.zeros(self.threads, numpy_type(declared))
        register = self.registers[name]
        if WIDTHS[kind] > WIDTHS[declared]:
            raise MachineError(f"{name} is no {kind}")
        if WIDTHS[kind] < WIDTHS[declared]:
            narrow = register.view(numpy_type("u" + str(WIDTHS[kind])))
            return narrow[:: WIDTHS[declared] // WIDTHS[kind]].view(numpy_type(kind))
        return register.view(numpy_type(kind))

    def _literal(self, text: str, kind: str) -> Any:
        """A number, in the unsigned type of as many bits."""
        bits = numpy_type(kind) if kind == "pred" else np.dtype(f"u{WIDTHS[kind] // 8}")
        if text == "global_smem":
            return bits.type(SHARED_BASE)
        if text[:2] in ("0f", "0d"):
            return bits.type(int(text[2:], 16))
        number = int(text.rstrip("U"), 0)
        return bits.type(number & (1 << 8 * bits.itemsize) - 1)

    # ------------------------------------------------------------------------------- running

    def run(self, block: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Run a block of a grid from beginning to end."""
        for i, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"][:] = block[i]
            self.special[f"%nctaid.{axis}"][:] = grid[i]
        for register in self.registers.values():
            # NaN, and no address.
            register.view(np.uint8)[:] = 1 if register.dtype == bool else 0xFF
        self.shared[:] = 0xFF
        self.order.reset()
        self.counter[:] = 0
        self.blocked[:] = self.exited[:] = self.apart[:] = False
        self.waits.clear()
        self.barriers.clear()
        for reset in self.resets:
            reset()
        with np.errstate(all="ignore"):
            for mask, at in self._turns():
                self._run_from(at, mask)

    def _turns(self) -> Iterator[tuple[Mask, int]]:
        """Who runs next, and from where."""
        while not self.exited.all():
            self.waits = [wait for wait in self.waits if not wait()]
            ready = ~(self.blocked | self.exited | self.apart)
            if not ready.any():
                if self.divided is not None and self.apart.any():
                    raise self.divided
                at = sorted(
                    {str(self.program.instructions[i - 1]) for i in self.counter[self.blocked]}
                )
                raise MachineError("all threads wait, behind " + "; ".join(at))
            at = int(self.counter[ready].min())
            ready &= self.counter == at
            yield (True if ready.all() else ready), at

    def _run_from(self, at: int, mask: Mask) -> None:
        """Up to where other threads may have to run, or to join."""
        instructions, steps, executed = self.program.instructions, self.steps, self.executed
        everybody = mask is True
        weight = self.warps if everybody else int(mask.reshape(-1, WARP).any(1).sum())
        while True:
            self.now = instructions[at]
            executed[at] += weight
            self.next = at + 1
            try:
                steps[at](mask)
            except _DividedError as divided:
                self._leave_apart(at, mask, divided)
                return
            at += 1
            if at in self.leaders:
                if everybody and isinstance(self.next, int) and not self.blocked.any():
                    if self.exited.any():
                        return
                    at = self.next
                    continue
                if isinstance(self.next, int):
                    self.counter[mask] = self.next
                else:
                    self.counter[mask] = self.next[mask]
                return

    def _leave_apart(self, at: int, mask: Mask, divided: _DividedError) -> None:
        """Of threads at an instruction that did not run, those of divided warps wait there."""
        here = self.active(mask)
        alone = here & np.repeat(divided.warps, WARP)
        self.counter[here] = at
        self.apart |= alone
        self.divided = divided
        counters, apart = self.counter.reshape(-1, WARP), self.apart.reshape(-1, WARP)
        together = apart.all(1) & (counters == counters[:, :1]).all(1)
        self.apart &= ~np.repeat(together, WARP)
        self.executed[at] -= int(here.reshape(-1, WARP).any(1).sum())

    def block_until(self, mask: Mask, released: Callable[[], bool]) -> None:
        """Threads stop here until ``released``, which is asked at every turn."""
        waiting = self.active(mask).copy()
        self.blocked |= waiting

        def wait() -> bool:
            if released():
                self.blocked &= ~waiting
                return True
            return False

        self.waits.append(wait)

    def _guarded(self, instruction: Instruction, step: Step) -> Step:
        if instruction.guard is None or instruction.name == "bra":
            return step
        guard, negated = self.source(instruction.guard, "pred"), instruction.negated

        def run(mask: Mask) -> None:
            taken = ~guard if negated else guard
            taken = taken.copy() if mask is True else taken & mask
            if taken.any():
                step(True if taken.all() else taken)

        return run
