"""What the accesses of a kernel cost the memories: sectors, and turns of the banks.

Global memory moves sectors of 32 bytes, whole, for each request of a warp. Shared memory has 32
banks of four bytes, each of which serves one word a turn: lanes that want different words of a bank
wait for one another. Requests of 8 and 16 bytes a lane are served for half and for a quarter of a
warp at a time, rows of matrices eight at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import WARP, WIDTHS, Machine, Mask, Step
from .program import Address, Instruction, Operand

SECTOR = 32
BANKS = 32


@dataclass
class Count:
    """Of an instruction or several: what was asked for, and what it took.

    asked: bytes. sectors: of global memory, for each request of a warp by itself. turns, least: of
    the banks, and how many there would be without conflicts.
    """

    asked: int = 0
    sectors: int = 0
    turns: int = 0
    least: int = 0

    def add(self, other: Count) -> None:
        self.asked += other.asked
        self.sectors += other.sectors
        self.turns += other.turns
        self.least += other.least


def of_global(addresses: np.ndarray, size: int, warp: np.ndarray) -> Count:
    """Lanes of warps that access ``size`` bytes each, aligned."""
    sectors = np.unique(np.stack((warp, addresses // SECTOR)), axis=1).shape[1]
    return Count(asked=len(addresses) * size, sectors=sectors)


def of_shared(addresses: np.ndarray, size: int, thread: np.ndarray) -> Count:
    """As `of_global`; threads by their numbers in the block, those of a row of matrices in turn."""
    together = WARP * 4 // max(size, 4)
    words = addresses[:, None] // 4 + np.arange(max(size // 4, 1))
    group = np.broadcast_to((thread // together)[:, None], words.shape)
    wanted = np.unique(np.stack((group.ravel(), words.ravel())), axis=1)
    banks, waiting = np.unique(wanted[0] * BANKS + wanted[1] % BANKS, return_counts=True)
    groups = np.unique(banks // BANKS)
    turns = sum(int(waiting[banks // BANKS == g].max()) for g in groups)
    return Count(asked=len(addresses) * size, turns=turns, least=len(groups))


class CountingMachine(Machine):
    """A machine that counts; `counts` by instruction and space, `touched` sectors of all blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.counts: dict[tuple[int, str], Count] = {}
        self.touched: dict[str, list[np.ndarray]] = {"read": [], "written": []}
        self.built = 0
        super().__init__(*args, **kwargs)

    def _guarded(self, instruction: Instruction, step: Step) -> Step:
        index, self.built = self.built, self.built + 1
        accesses = list(self._accesses(instruction))
        if accesses:
            inner = step

            def step(mask: Mask) -> None:
                active = self.active(mask)
                for space, kind, address, size, lanes in accesses:
                    self._count(index, space, kind, address(), size, active & lanes())
                inner(mask)

        return super()._guarded(instruction, step)

    def _accesses(self, instruction: Instruction) -> Any:
        """(space, read or written, addresses, bytes a lane, which lanes) of an instruction."""
        everyone = np.ones(self.threads, bool)
        name, operands = instruction.name, instruction.operands
        space = instruction.modifiers[0].partition("::")[0] if instruction.modifiers else ""
        if name in ("ld", "st") and space in ("global", "shared"):
            values = operands[1 - _place(operands)]
            count = len(values) if isinstance(values, tuple) else 1
            size = count * WIDTHS[instruction.type] // 8
            kind = "read" if name == "ld" else "written"
            yield space, kind, self.address(operands[_place(operands)]), size, lambda: everyone
        elif name in ("ldmatrix", "stmatrix"):
            at = _place(operands)
            count = len(operands[1 - at])
            rows = self.thread % WARP < 8 * count
            kind = "read" if name == "ldmatrix" else "written"
            yield "shared", kind, self.address(operands[at]), 16, lambda: rows
        elif name == "cp" and isinstance(operands[0] if operands else None, Address):
            if "bulk" in instruction.modifiers:
                return
            size = int(str(operands[2]), 0)
            read = self.source(operands[3], "u32") if len(operands) > 3 else np.array([size])
            yield "shared", "written", self.address(operands[0]), size, lambda: everyone
            yield "global", "read", self.address(operands[1]), size, lambda: read > 0

    def _count(
        self, index: int, space: str, kind: str, address: np.ndarray, size: int, lanes: np.ndarray
    ) -> None:
        if not lanes.any():
            return
        count = self.counts.setdefault((index, space), Count())
        if space == "shared":
            count.add(of_shared(address[lanes], size, self.thread[lanes].astype(np.int64)))
        else:
            count.add(of_global(address[lanes], size, self.warp[lanes]))
            self.touched[kind].append(np.unique(address[lanes] // SECTOR))

    def total(self, space: str) -> Count:
        total = Count()
        for (_, of), count in self.counts.items():
            if of == space:
                total.add(count)
        return total

    def distinct(self, kind: str) -> int:
        """Bytes of the sectors of global memory that were read or written, each once."""
        sectors = self.touched[kind]
        return SECTOR * len(np.unique(np.concatenate(sectors))) if sectors else 0


def _place(operands: tuple[Operand, ...]) -> int:
    """Which of two operands is the address."""
    return 0 if isinstance(operands[0], Address) else 1
