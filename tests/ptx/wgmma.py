"""wgmma: products of matrices in shared memory by four warps, which run beside them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arithmetic import Builder
from .conversions import from_bfloat16, from_float16
from .machine import SHARED_BASE, WARP, Machine, MachineError, Mask, Step
from .matrices import fragments, rows_of_a
from .memory import check
from .order import CHUNK
from .program import Address, Instruction, Operand

# Warps and rows of a product, and the length of its inner dimension.
GROUP, ROWS, DEPTH = 4, 64, 16
# Bytes of a row of the pattern, by the mode that stands in a descriptor.
_SPANS = (16, 128, 64, 32)
_WIDEN = {"bf16": from_bfloat16, "f16": from_float16}


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Where the byte of an address lies: of rows of 128, 64 or 32 bytes; 16: where it is.

    The 16-byte pieces of a row are permuted by the number of the row, 128 bytes each.
    """
    turned: np.ndarray = address ^ ((address >> 7) & (span // 16 - 1)) << 4
    return turned


class Descriptor(NamedTuple):
    """Where a matrix of 16-bit elements lies in shared memory, in bytes."""

    start: int
    leading: int
    stride: int
    span: int

    def addresses(self, count: int, transposed: bool) -> np.ndarray:
        """Of the elements of ``count`` rows of DEPTH, (count, DEPTH).

        A row is one of A or a column of B. transposed: the elements of a column lie together.
        """
        row, column = np.arange(count)[:, None], np.arange(DEPTH)
        if transposed:
            width = self.span // 2
            steps = (self.leading, self.stride) if self.span > 16 else (self.stride, self.leading)
            offset = row % width * 2 + row // width * steps[0]
            offset = offset + column % 8 * self.span + column // 8 * steps[1]
        else:
            offset = row % 8 * self.span + row // 8 * self.stride
            inner = column * 2 if self.span > 16 else column % 8 * 2 + column // 8 * self.leading
            offset = offset + inner
        return swizzled(self.start + offset, self.span)


def decode(value: int) -> Descriptor:
    """The 64 bits of a matrix descriptor."""
    if value >> 49 & 7:
        raise MachineError(f"a matrix descriptor with a base offset: {value:#x}")
    start, leading, stride = ((value >> i & 0x3FFF) << 4 for i in (0, 16, 32))
    span = _SPANS[value >> 62]
    # The pattern counts its rows from addresses that are whole patterns.
    if start & (8 * span - 1) & ~127 and span > 16:
        raise MachineError(f"a matrix that begins within a pattern of {span} bytes: {start:#x}")
    return Descriptor(start, leading, stride, span)


class _Operand(NamedTuple):
    """The elements of a matrix as indices of 16-bit words, and the chunks they lie in."""

    words: np.ndarray
    chunks: np.ndarray


class Products:
    """The products that are going on in a block."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.groups = machine.warps // GROUP
        self.operands: dict[tuple[int, int, bool], _Operand] = {}
        # Of each four warps: the groups that were committed, and last the one that was not.
        self.going: list[list[list[np.ndarray]]] = []
        machine.resets.append(self.reset)
        self.reset()

    def reset(self) -> None:
        self.going = [[[]] for _ in range(self.groups)]

    def groups_of(self, mask: Mask) -> np.ndarray:
        """The fours of warps of a mask, none of which may be divided."""
        warps = self.machine.whole_warps(mask)
        fours = warps[: self.groups * GROUP].reshape(-1, GROUP)
        if (fours.any(1) != fours.all(1)).any() or warps[self.groups * GROUP :].any():
            self.machine.fail("warps of four are missing")
        return np.flatnonzero(fours.all(1))

    def warps_of(self, group: int) -> np.ndarray:
        return np.arange(GROUP * group, GROUP * group + GROUP)

    def load(self, value: int, count: int, transposed: bool, group: int) -> np.ndarray:
        """The bits of a matrix, (count, DEPTH); it is in use until its group is waited for."""
        key = (value, count, transposed)
        if key not in self.operands:
            self.operands[key] = self._operand(*key)
        words, chunks = self.operands[key]
        check(self.machine, self.machine.order.begin_use(chunks, self.warps_of(group)))
        self.going[group][-1].append(chunks)
        bits: np.ndarray = self.machine.shared.view(np.uint16)[words]
        return bits

    def _operand(self, value: int, count: int, transposed: bool) -> _Operand:
        places = decode(value).addresses(count, transposed) - SHARED_BASE
        if places.min() < 0 or places.max() + 2 > len(self.machine.shared):
            self.machine.fail(f"outside of shared memory, {places.min()} to {places.max() + 2}")
        return _Operand(places // 2, np.unique(places // CHUNK))

    def commit(self, mask: Mask) -> None:
        for group in self.groups_of(mask):
            self.going[group].append([])

    def wait(self, mask: Mask, pending: int) -> None:
        """Until no more than the last ``pending`` groups are going on."""
        for group in self.groups_of(mask):
            *committed, last = self.going[group]
            ended = max(len(committed) - pending, 0)
            for chunks in (x for of_group in committed[:ended] for x in of_group):
                self.machine.order.end_use(chunks, self.warps_of(group))
            self.going[group] = [*committed[ended:], last]


def _same(machine: Machine, values: np.ndarray, group: int) -> int:
    """The one value that all threads of four warps have."""
    of_group = np.broadcast_to(values, machine.threads)[group * GROUP * WARP :][: GROUP * WARP]
    if (of_group != of_group[0]).any():
        machine.fail("threads of four warps differ in an operand")
    return int(of_group[0])


def _check_fence(machine: Machine, instruction: Instruction, registers: set[str]) -> None:
    """Nothing but products may compute a register of a product after the last wgmma.fence.

    Read off the text: the fence stands before the product with no branch between. Plain moves may
    stand there, and Triton's do where an accumulator begins as a copy of another one: to ptxas both
    names are one value, which it has in its place before the fence (WARPGROUP.ARRIVE).
    """
    program, registers = machine.program, set(registers)
    at = next(i for i, x in enumerate(program.instructions) if x is instruction)
    targets = {program.target(x) for x in program.instructions if x.name == "bra"}
    while True:
        before = program.instructions[at - 1]
        if at == 0 or at in targets or before.name == "bra":
            raise MachineError(f"no wgmma.fence before: {instruction}")
        at -= 1
        if before.name == "wgmma":
            if before.modifiers[0] == "fence":
                return
        elif before.name != "st" and registers & _names(before.operands[:1]):
            if before.name != "mov" or not all(isinstance(x, str) for x in before.operands):
                raise MachineError(f"{before} computes after wgmma.fence what is in: {instruction}")
            registers |= _names(before.operands[1:])


def _names(operands: tuple[Operand, ...]) -> set[str]:
    """The registers among operands, those in braces too."""
    names: set[str] = set()
    for x in operands:
        if not isinstance(x, Address):
            names |= {x} if isinstance(x, str) else set(x)
    return names


def _columns(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """The row and column of the product that a register of each of 128 threads holds."""
    i, thread = np.arange(registers)[:, None], np.arange(GROUP * WARP)
    lane = thread % WARP
    row = thread // WARP * 16 + lane // 4 + i % 4 // 2 * 8
    return row, i // 4 * 8 + lane % 4 * 2 + i % 2


def _multiply(machine: Machine, instruction: Instruction) -> Step:
    """wgmma.mma_async.m64nNk16: (64, 16) by (16, N), float32 sums.

    The result is there at once, as Triton's text moves it between registers before the wait; its
    operands in shared memory are in use until then.
    """
    _, _, _, shape, of_d, of_a, of_b = instruction.modifiers
    columns = int(shape.removeprefix("m64n").removesuffix("k16"))
    if of_d != "f32" or of_a != of_b or of_a not in _WIDEN:
        raise NotImplementedError(str(instruction))
    targets, first, second, scale, *flags = instruction.operands
    assert not isinstance(targets, (str, Address))
    if len(targets) != columns // 2:
        raise MachineError(f"{len(targets)} registers for {columns} columns: {instruction}")
    numbers = [int(str(x), 0) for x in flags]
    sign = numbers[0] * numbers[1]
    transposed_a, transposed_b = (False, *numbers[2:])[-2:]
    products, widen = machine.part(Products), _WIDEN[of_a]
    results = [machine.target(x, "f32") for x in targets]
    row, column = _columns(len(results))
    added = machine.source(scale, "pred")
    of_second = machine.source(second, "u64")
    fragment: tuple[str, ...] = () if isinstance(first, (str, Address)) else first
    _check_fence(machine, instruction, _names((targets, fragment)))
    a_registers = [machine.source(x, "b32") for x in fragment]
    of_first = None if fragment else machine.source(first, "u64")

    def run(mask: Mask) -> None:
        for group in products.groups_of(mask):
            b = products.load(_same(machine, of_second, group), columns, bool(transposed_b), group)
            threads = slice(group * GROUP * WARP, (group + 1) * GROUP * WARP)
            if of_first is None:
                lanes = machine.thread[threads].reshape(GROUP, WARP)
                a = rows_of_a(fragments(machine, a_registers, lanes)).reshape(ROWS, DEPTH)
            else:
                a = products.load(_same(machine, of_first, group), ROWS, bool(transposed_a), group)
            product = np.matmul(widen(a), widen(b).T)
            values = (product if sign > 0 else -product)[row, column]
            if _same(machine, added, group):
                for d, value in zip(results, values, strict=True):
                    d[threads] += value
            else:
                for d, value in zip(results, values, strict=True):
                    d[threads] = value

    return run


def _build(machine: Machine, instruction: Instruction) -> Step:
    what = instruction.modifiers[0]
    products = machine.part(Products)
    if what == "mma_async":
        return _multiply(machine, instruction)
    if what == "fence":
        return lambda mask: None  # `_check_fence` has read where it stands
    if what == "commit_group":
        return products.commit
    if what == "wait_group":
        pending = int(str(instruction.operands[0]))
        return lambda mask: products.wait(mask, pending)
    raise NotImplementedError(str(instruction))


BUILDERS: dict[str, Builder] = {"wgmma": _build}
