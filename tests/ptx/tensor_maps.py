"""Tensor maps (the descriptors of TMA) that a kernel makes itself, field by field.

What the 128 bytes hold is the hardware's own; here every field has a place of our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .arithmetic import Builder
from .machine import WIDTHS, Machine, Mask, Step
from .memory import read_shared, write_shared
from .program import Instruction

SIZE = 128
# What a tensor map in global memory is aligned to.
_ALIGNMENT = 64
# Of each field: where it begins, the bytes of an element of it, and how many it has.
_FIELDS = {
    "global_address": (0, 8, 1),
    "rank": (8, 4, 1),
    "elemtype": (12, 4, 1),
    "interleave_layout": (16, 4, 1),
    "swizzle_mode": (20, 4, 1),
    "fill_mode": (24, 4, 1),
    "box_dim": (28, 4, 5),
    "global_dim": (48, 4, 5),
    "global_stride": (72, 8, 4),
    "element_stride": (104, 4, 5),
}
# Bytes of an element by elemtype, and of a row of the pattern by swizzle_mode.
_ELEMENTS = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
_SPANS = (16, 32, 64, 128)


class TensorMap(NamedTuple):
    """What one says; dimensions from the innermost on, strides in bytes but for that."""

    address: int
    box: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: int
    span: int

    @property
    def bytes(self) -> int:
        """Of a box."""
        return int(np.prod(self.box)) * self.element

    def elements(self, at: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of a box, the outermost dimension first, and which of them are inside."""
        addresses, inside = np.array(self.address), np.array(True)
        sizes = zip(at, self.box, self.shape, (self.element, *self.strides), strict=True)
        for axis, (start, count, size, stride) in enumerate(sizes):
            index = (start + np.arange(count)).reshape(-1, *(1,) * axis)
            addresses = addresses + index * stride
            inside = inside & (index >= 0) & (index < size)
        return addresses.reshape(-1), inside.reshape(-1)


@dataclass
class _Made:
    """When a map was written to global memory, and when it was acquired: (warp, clock)."""

    released: tuple[int, int]
    acquired: list[tuple[int, int]]


class TensorMaps:
    """Those that a block has made in global memory, by address."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.made: dict[int, _Made] = {}
        machine.resets.append(self.made.clear)

    def release(self, address: int, content: np.ndarray, warp: int) -> None:
        machine = self.machine
        if address % _ALIGNMENT:
            machine.fail(f"a tensor map at {address:#x}")
        words = content.view(np.uint64)
        machine.memory.store(address + 8 * np.arange(len(words)), words[:, None])
        self.made[address] = _Made((warp, self._tick(warp)), [])

    def acquire(self, addresses: np.ndarray, warps: np.ndarray) -> None:
        for address in addresses.tolist():
            for warp in warps.tolist():
                made = self._at(address)
                if not self._knows(warp, made.released):
                    self.machine.fail("a tensor map that another warp makes, no barrier between")
                made.acquired.append((warp, self._tick(warp)))

    def read(self, address: int, warp: int) -> TensorMap:
        """For a copy of a warp: after a barrier at least it must know of its being acquired."""
        if not any(self._knows(warp, of) for of in self._at(address).acquired):
            self.machine.fail("a tensor map with no fence.proxy.tensormap acquire before")
        words = self.machine.memory.load(address + 8 * np.arange(SIZE // 8), np.dtype("u8"))
        return self._decode(words.reshape(-1).view(np.uint8))

    def _at(self, address: int) -> _Made:
        if address not in self.made:
            self.machine.fail(f"no tensor map was made at {address:#x}")
        return self.made[address]

    def _tick(self, warp: int) -> int:
        now = int(self.machine.order.known[warp, warp])
        self.machine.order.known[warp, warp] += 1
        return now

    def _knows(self, warp: int, event: tuple[int, int]) -> bool:
        return bool(self.machine.order.known[warp, event[0]] >= event[1])

    def _decode(self, content: np.ndarray) -> TensorMap:
        def field(name: str, count: int = 1) -> tuple[int, ...]:
            start, size, _ = _FIELDS[name]
            return tuple(int(x) for x in content[start : start + size * count].view(f"u{size}"))

        rank, element = field("rank")[0] + 1, _ELEMENTS[field("elemtype")[0]]
        box, shape = field("box_dim", rank), field("global_dim", rank)
        strides, span = field("global_stride", rank - 1), _SPANS[field("swizzle_mode")[0]]
        made = TensorMap(field("global_address")[0], box, shape, strides, element, span)
        if not all(0 < x <= 256 for x in box) or not all(shape):
            self.machine.fail(f"a box of {box} of a tensor of {shape}")
        if made.address % 16 or any(x % 16 or not 0 < x < 2**40 for x in strides):
            self.machine.fail(f"a tensor at {made.address:#x} with strides of {strides} bytes")
        row = box[0] * element
        if row % 16 or (span > 16 and row > span):
            self.machine.fail(f"rows of {row} bytes in a pattern of {span}")
        if any(x != 1 for x in field("element_stride", rank)):
            raise NotImplementedError("elements that are not side by side")
        if field("interleave_layout")[0] or field("fill_mode")[0] or 16 < span != row:
            raise NotImplementedError(str(made))
        return made


def _replace(machine: Machine, instruction: Instruction) -> Step:
    """tensormap.replace.tile: one field, in shared memory."""
    _, _, name, space, _, kind = instruction.modifiers
    if name not in _FIELDS or space != "shared::cta":
        raise NotImplementedError(str(instruction))
    start, size, count = _FIELDS[name]
    address, *index, value = instruction.operands
    offset = start + size * (int(str(index[0]), 0) if index else 0)
    assert offset < start + size * count, instruction
    assert bool(index) == (count > 1), instruction
    addresses, values = machine.address(address), machine.source(value, "u" + kind[1:])
    if WIDTHS[kind] != 8 * size:
        raise NotImplementedError(str(instruction))

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        column = np.ascontiguousarray(np.broadcast_to(values, machine.threads)[active, None])
        if (addresses()[active] % SIZE).any():
            machine.fail("a tensor map that is not aligned")
        write_shared(
            machine, addresses()[active] + offset, column.view(np.uint8), machine.warp[active]
        )

    return run


def _release(machine: Machine, instruction: Instruction) -> Step:
    """tensormap.cp_fenceproxy: a map from shared to global memory, by whole warps."""
    to, of = (machine.address(x) for x in instruction.operands[:2])
    if int(str(instruction.operands[2]), 0) != SIZE or "global" not in instruction.modifiers:
        raise NotImplementedError(str(instruction))
    maps = machine.part(TensorMaps)

    def run(mask: Mask) -> None:
        for warp in np.flatnonzero(machine.whole_warps(mask)):
            first = machine.warp == warp
            target, source = np.unique(to()[first]), np.unique(of()[first])
            if len(target) > 1 or len(source) > 1:
                machine.fail("threads of a warp copy several tensor maps")
            content = read_shared(machine, source, SIZE, np.array([warp]))
            maps.release(int(target[0]), content[0], int(warp))

    return run


def _build(machine: Machine, instruction: Instruction) -> Step:
    if instruction.modifiers[:2] == ("replace", "tile"):
        return _replace(machine, instruction)
    if instruction.modifiers[0] == "cp_fenceproxy":
        return _release(machine, instruction)
    raise NotImplementedError(str(instruction))


BUILDERS: dict[str, Builder] = {"tensormap": _build}
