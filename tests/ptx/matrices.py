"""ldmatrix, stmatrix and mma.sync: matrices in the registers of a warp."""

from __future__ import annotations

import numpy as np

from .arithmetic import Builder
from .conversions import from_bfloat16, from_float16
from .machine import WARP, Machine, Mask, Step
from .memory import read_shared, write_shared
from .program import Instruction

_LANE = np.arange(WARP)
_ROW, _COLUMN = _LANE // 4, 2 * (_LANE % 4)


def _values(machine: Machine, names: object, kind: str = "b32") -> list[np.ndarray]:
    assert isinstance(names, tuple)
    return [machine.source(x, kind) for x in names]


def _threads_of(machine: Machine, mask: Mask) -> np.ndarray:
    """The threads of whole warps, (warps, 32)."""
    return machine.thread.reshape(-1, WARP)[machine.whole_warps(mask)]


def _row_addresses(address: np.ndarray, threads: np.ndarray, count: int) -> np.ndarray:
    """Of matrix i the rows' addresses are those of lanes 8 i and up: (warps, count, 8)."""
    return address[threads[:, : 8 * count]].reshape(-1, count, 8)


def _load_matrices(machine: Machine, instruction: Instruction) -> Step:
    targets, address = instruction.operands
    assert isinstance(targets, tuple)
    results = [machine.target(x, "b32") for x in targets]
    addresses, transposed = machine.address(address), "trans" in instruction.modifiers

    def run(mask: Mask) -> None:
        threads = _threads_of(machine, mask)
        rows = _row_addresses(addresses(), threads, len(results))
        warp = np.broadcast_to(machine.warp[threads[:, :1]][..., None], rows.shape)
        data = read_shared(machine, rows.reshape(-1), 16, warp.reshape(-1)).view(np.uint16)
        matrices = data.reshape(-1, len(results), 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.stack([matrices[:, :, _ROW, _COLUMN + i] for i in (0, 1)], -1)
        for i, result in enumerate(results):
            result[threads] = np.ascontiguousarray(pairs[:, i]).view(np.uint32)[..., 0]

    return run


def _store_matrices(machine: Machine, instruction: Instruction) -> Step:
    address, sources = instruction.operands
    values, addresses = _values(machine, sources), machine.address(address)
    transposed = "trans" in instruction.modifiers

    def run(mask: Mask) -> None:
        threads = _threads_of(machine, mask)
        rows = _row_addresses(addresses(), threads, len(values))
        matrices = np.empty((*rows.shape[:2], 8, 8), np.uint16)
        for i, value in enumerate(values):
            pairs = np.broadcast_to(value, machine.threads)[threads][..., None].view(np.uint16)
            for j in (0, 1):
                matrices[:, i, _ROW, _COLUMN + j] = pairs[..., j]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        data = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        warp = np.broadcast_to(machine.warp[threads[:, :1]][..., None], rows.shape)
        write_shared(machine, rows.reshape(-1), data, warp.reshape(-1))

    return run


_WIDEN = {"bf16": from_bfloat16, "f16": from_float16}


def fragments(machine: Machine, registers: list[np.ndarray], threads: np.ndarray) -> np.ndarray:
    """Registers of 16-bit pairs, (warps, registers, 32, 2) as bits."""
    columns = [np.broadcast_to(x, machine.threads)[threads] for x in registers]
    return np.stack(columns, 1)[..., None].view(np.uint16)


def rows_of_a(parts: np.ndarray) -> np.ndarray:
    """The 16 x 16 first factor of a warp from its four registers, (warps, 16, 16)."""
    a = np.empty((len(parts), 16, 16), parts.dtype)
    for i, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        for j in (0, 1):
            a[:, row + _ROW, column + _COLUMN + j] = parts[:, i, :, j]
    return a


def _multiply(machine: Machine, instruction: Instruction) -> Step:
    """mma.sync.m16n8k16: (16, 16) by (16, 8), float32 sums."""
    _, _, shape, *layout, of_d, of_a, of_b, of_c = instruction.modifiers
    if shape != "m16n8k16" or layout != ["row", "col"] or of_a != of_b or of_a not in _WIDEN:
        raise NotImplementedError(str(instruction))
    if (of_c, of_d) != ("f32", "f32"):
        raise NotImplementedError(str(instruction))
    targets, *sources = instruction.operands
    assert isinstance(targets, tuple)
    results = [machine.target(x, "f32") for x in targets]
    a_registers, b_registers = (_values(machine, x) for x in sources[:2])
    c_registers, widen = _values(machine, sources[2], "f32"), _WIDEN[of_a]

    def run(mask: Mask) -> None:
        threads = _threads_of(machine, mask)
        a = widen(rows_of_a(fragments(machine, a_registers, threads)))
        of_b = fragments(machine, b_registers, threads)
        b = np.empty((len(threads), 16, 8), np.uint16)
        for i, j in np.ndindex(2, 2):
            b[:, 8 * i + _COLUMN + j, _ROW] = of_b[:, i, :, j]
        product = np.matmul(a, widen(b))
        for i, (c, d) in enumerate(zip(c_registers, results, strict=True)):
            of_lanes = product[:, 8 * (i // 2) + _ROW, _COLUMN + i % 2]
            d[threads] = np.broadcast_to(c, machine.threads)[threads] + of_lanes

    return run


BUILDERS: dict[str, Builder] = {
    "ldmatrix": _load_matrices,
    "mma": _multiply,
    "stmatrix": _store_matrices,
}
