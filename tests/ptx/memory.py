"""Global memory, which is that of the tensors of a launch, and the shared memory of a block."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .arithmetic import Builder
from .machine import SHARED_BASE, WIDTHS, Machine, Mask, Step, numpy_type
from .program import Instruction


class OutsideError(Exception):
    """An address that no tensor of the launch has, or one that is not aligned."""


class GlobalMemory:
    """The storages of tensors, at the addresses that they have."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int, np.ndarray]] = []
        self.keep: list[torch.UntypedStorage] = []

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if size and all(start != piece[0] for piece in self.pieces):
            raw = (ctypes.c_uint8 * size).from_address(start)
            self.pieces.append((start, start + size, np.ctypeslib.as_array(raw)))
            self.keep.append(storage)

    def load(self, addresses: np.ndarray, dtype: np.dtype[Any], count: int = 1) -> np.ndarray:
        """``count`` elements from each address on: (addresses, count)."""
        result = np.empty((len(addresses), count), dtype)
        for words, places, rows in self._found(addresses, dtype, count):
            result[rows] = words[places]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: (addresses, count)."""
        for words, places, rows in self._found(addresses, values.dtype, values.shape[1]):
            words[places] = values[rows]

    def _found(
        self, addresses: np.ndarray, dtype: np.dtype[Any], count: int
    ) -> list[tuple[np.ndarray, np.ndarray, Any]]:
        size = dtype.itemsize * count
        if (addresses % size).any():
            raise OutsideError(f"address {addresses[addresses % size > 0][0]:#x} for {size} bytes")
        columns = np.arange(count)
        found, missing = [], np.ones(len(addresses), bool)
        for i, (start, end, memory) in enumerate(self.pieces):
            inside = (addresses >= start) & (addresses + size <= end)
            if not inside.any():
                continue
            rows = slice(None) if inside.all() else inside
            words = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
            places = (addresses[rows] - start) // dtype.itemsize
            found.append((words, places[:, None] + columns, rows))
            missing &= ~inside
            # The next access is likely to find its tensor here again.
            self.pieces.insert(0, self.pieces.pop(i))
            if not missing.any():
                return found
        if missing.any():
            raise OutsideError(f"address {addresses[missing][0]:#x} of no tensor of the launch")
        return found


def shared_places(machine: Machine, addresses: np.ndarray, size: int) -> np.ndarray:
    """Bytes of shared memory from each address on, (addresses, size), as indices."""
    if (addresses % size).any():
        machine.fail(f"address {addresses[addresses % size > 0][0]:#x} for {size} bytes")
    start = addresses - SHARED_BASE
    if (start < 0).any() or (start + size > len(machine.shared)).any():
        machine.fail(f"outside of shared memory, from {start.min()} to {start.max() + size}")
    return start[:, None] + np.arange(size)


def check(machine: Machine, wrong: str | None) -> None:
    if wrong:
        machine.fail(wrong)


def read_shared(machine: Machine, addresses: np.ndarray, size: int, warp: np.ndarray) -> np.ndarray:
    """Bytes from each address on, (addresses, size), for accesses of warps."""
    places = shared_places(machine, addresses, size)
    check(machine, machine.order.reads(places, warp[:, None]))
    return machine.shared[places]


def write_shared(
    machine: Machine, addresses: np.ndarray, values: np.ndarray, warp: np.ndarray
) -> None:
    """values: (addresses, size) bytes."""
    places = shared_places(machine, addresses, values.shape[1])
    check(machine, machine.order.writes(places, warp[:, None]))
    machine.shared[places] = values


def _vector(operand: Any) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _load(machine: Machine, instruction: Instruction) -> Step:
    space, kind = instruction.modifiers[0], instruction.type
    targets, address = instruction.operands
    if space == "param":
        return _load_parameter(machine, instruction)
    # A register may be wider than what it gets.
    results = [machine.target(x, _register_type(machine, x, kind)) for x in _vector(targets)]
    dtype = numpy_type(kind)
    addresses = machine.address(address)
    load = _spaces(machine)[space.partition("::")[0]][0]

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        values = load(addresses()[active], dtype, len(results), machine.warp[active])
        for i, result in enumerate(results):
            result[active] = values[:, i]

    return run


def _store(machine: Machine, instruction: Instruction) -> Step:
    space, kind = instruction.modifiers[0], instruction.type
    address, operands = instruction.operands
    values = [machine.source(x, kind) for x in _vector(operands)]
    addresses = machine.address(address)
    store = _spaces(machine)[space.partition("::")[0]][1]

    def run(mask: Mask) -> None:
        active = machine.active(mask)
        columns = [np.broadcast_to(x, machine.threads)[active] for x in values]
        store(addresses()[active], np.stack(columns, 1), machine.warp[active])

    return run


def _spaces(machine: Machine) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """How a space is read and written."""

    def load_global(addresses: np.ndarray, dtype: Any, count: int, _: np.ndarray) -> np.ndarray:
        return machine.memory.load(addresses, dtype, count)

    def store_global(addresses: np.ndarray, values: np.ndarray, _: np.ndarray) -> None:
        machine.memory.store(addresses, values)

    def load_shared(addresses: np.ndarray, dtype: Any, count: int, warp: np.ndarray) -> np.ndarray:
        return read_shared(machine, addresses, dtype.itemsize * count, warp).view(dtype)

    def store_shared(addresses: np.ndarray, values: np.ndarray, warp: np.ndarray) -> None:
        write_shared(machine, addresses, np.ascontiguousarray(values).view(np.uint8), warp)

    return {"global": (load_global, store_global), "shared": (load_shared, store_shared)}


def _register_type(machine: Machine, name: str, kind: str) -> str:
    declared = "b32" if name == "_" else machine.class_of(name)
    assert declared is not None
    return kind if WIDTHS[declared] == WIDTHS[kind] else f"{kind[0]}{WIDTHS[declared]}"


def _load_parameter(machine: Machine, instruction: Instruction) -> Step:
    name, kind = instruction.operands[0], instruction.type
    assert isinstance(name, str)
    result = machine.target(name, _register_type(machine, name, kind))
    parameter, bits = instruction.operands[1].base, numpy_type(kind)
    declared = dict(machine.program.parameters)[parameter]

    def run(mask: Mask) -> None:
        value = np.array([machine.parameters[parameter]], numpy_type(declared))
        np.copyto(result, value.view(bits)[0], where=mask)

    return run


def _atomic(machine: Machine, instruction: Instruction) -> Step:
    """atom.global.add of whole numbers, thread by thread; blocks run one after the other anyway."""
    kind = instruction.type
    if "global" not in instruction.modifiers or "add" not in instruction.modifiers:
        raise NotImplementedError(str(instruction))
    result = machine.target(instruction.operands[0], kind)
    addresses = machine.address(instruction.operands[1])
    added = machine.source(instruction.operands[2], kind)
    dtype = numpy_type(kind)

    def run(mask: Mask) -> None:
        places, values = addresses(), np.broadcast_to(added, machine.threads)
        for thread in np.flatnonzero(machine.active(mask)):
            at = places[thread : thread + 1]
            old = machine.memory.load(at, dtype)
            machine.memory.store(at, old + values[thread])
            result[thread] = old[0, 0]

    return run


BUILDERS: dict[str, Builder] = {"atom": _atomic, "ld": _load, "st": _store}
