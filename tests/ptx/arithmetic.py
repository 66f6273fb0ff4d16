"""What a thread computes by itself. Each builder makes of an instruction what runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import WIDTHS, Machine, Mask, Step, numpy_type
from .program import Instruction

Builder = Callable[[Machine, Instruction], Step]

# The most that sin.approx and cos.approx err in [-pi, pi], and ex2, lg2, rcp and their kin of
# their value (PTX ISA 8.7, 9.7.3).
TRIGONOMETRIC_ERROR = 2.0**-20.5
RELATIVE_ERROR = 2.0**-22


def apply(
    machine: Machine,
    instruction: Instruction,
    function: Callable[..., np.ndarray],
    kinds: tuple[str, ...],
    result: str | None = None,
) -> Step:
    """``function`` of the operands, as types ``kinds``, into the first operand as ``result``."""
    target = machine.target(instruction.operands[0], result or instruction.type)
    operands = instruction.operands[1:]
    assert len(operands) == len(kinds), instruction
    sources = [machine.source(x, kind) for x, kind in zip(operands, kinds, strict=True)]

    def run(mask: Mask) -> None:
        np.copyto(target, function(*sources), where=mask)

    return run


def _same(function: Callable[..., np.ndarray], count: int) -> Builder:
    """All operands of the type of the instruction."""

    def build(machine: Machine, instruction: Instruction) -> Step:
        kind, of_values = instruction.type, function
        if "ftz" in instruction.modifiers:
            of_values = _flushed(of_values)
        if kind == "f16x2":
            of_values = _of_halves(of_values, machine.threads)
        return apply(machine, instruction, of_values, (kind,) * count)

    return build


def _of_halves(function: Callable[..., np.ndarray], threads: int) -> Callable[..., np.ndarray]:
    """``function`` of the two float16 in each register."""

    def of_registers(*x: np.ndarray) -> np.ndarray:
        halves = [np.broadcast_to(y, threads).copy().view(np.float16) for y in x]
        return function(*halves).view(np.uint32)

    return of_registers


def _bits(function: Callable[..., np.ndarray], count: int) -> Builder:
    return lambda machine, ins: apply(machine, ins, function, (ins.type,) * count)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormals to 0 of the same sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _flushed(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *x: flush(function(*map(flush, x)))


def _of_floats(of_floats: Any, of_integers: Any) -> Callable[..., np.ndarray]:
    return lambda a, b: (of_floats if a.dtype.kind == "f" else of_integers)(a, b)


def _minimum(machine: Machine, instruction: Instruction) -> Step:
    relu = "relu" in instruction.modifiers
    smaller = _of_floats(np.fmin, np.minimum)
    function = (lambda a, b: np.maximum(smaller(a, b), 0)) if relu else smaller
    return _same(function, 2)(machine, instruction)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once: products of float32 and float16 are exact in float64."""
    if a.dtype not in (np.float32, np.float16):
        raise NotImplementedError(f"fma of {a.dtype}")
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The quotient towards 0; 0 where hardware promises nothing."""
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    signed = np.where((a < 0) != (b < 0), -quotient, quotient)
    return np.where(b == 0, 0, signed).astype(a.dtype)


def _divide(machine: Machine, instruction: Instruction) -> Step:
    of_floats = instruction.type[0] == "f"
    return (_rounded(np.divide, 2) if of_floats else _bits(_truncated, 2))(machine, instruction)


def _multiply(machine: Machine, instruction: Instruction) -> Step:
    if instruction.type[0] == "f":
        # numpy rounds the product of two float16 once, too.
        return _same(np.multiply, 2)(machine, instruction)
    return _product(machine, instruction, added=False)


def _multiply_add(machine: Machine, instruction: Instruction) -> Step:
    return _product(machine, instruction, added=True)


def _product(machine: Machine, instruction: Instruction, added: bool) -> Step:
    """mul and mad of integers: lo, hi or wide."""
    kind, part = instruction.type, instruction.modifiers[0]
    width = WIDTHS[kind]
    if part == "lo":
        function = (lambda a, b, c: a * b + c) if added else np.multiply
        return apply(machine, instruction, function, (kind,) * (3 if added else 2))
    if width > 32:
        return apply(machine, instruction, _high_64, (kind,) * 2)
    wide = f"{kind[0]}{2 * width}"
    result = wide if part == "wide" else kind
    dtype, of_result = numpy_type(wide), numpy_type(result)

    def product(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        x = a.astype(dtype) * b.astype(dtype)
        if part == "hi":
            x >>= width
        x = x.astype(of_result)
        return x + c[0] if c else x

    kinds = (kind, kind, result) if added else (kind, kind)
    return apply(machine, instruction, product, kinds, result)


def _high_64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product = [int(x) * int(y) >> 64 for x, y in np.broadcast(a, b)]
    return np.array([x & (1 << 64) - 1 for x in product], np.uint64).view(a.dtype)


def _shift(machine: Machine, instruction: Instruction) -> Step:
    """shl and shr: an amount beyond the width is the width."""
    kind = instruction.type
    width = WIDTHS[kind]
    left = instruction.name == "shl"
    kind = kind if kind[0] == "s" else f"u{width}"

    def shift(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        amount = np.minimum(amount, width)
        last = np.minimum(amount, width - 1).astype(a.dtype)
        shifted = np.left_shift(a, last) if left else np.right_shift(a, last)
        if a.dtype.kind == "i" and not left:
            return shifted
        return np.where(amount == width, a.dtype.type(0), shifted)

    return apply(machine, instruction, shift, (kind, "u32"), kind)


def _extract(machine: Machine, instruction: Instruction) -> Step:
    """bfe: ``length`` bits from ``start`` on."""
    kind = instruction.type
    width = WIDTHS[kind]

    def extract(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        if start.size > 1 or length.size > 1:
            raise NotImplementedError("bfe by a register")
        first, bits = int(start[0]), int(length[0])
        if not 0 < bits <= width - first:
            raise NotImplementedError("bfe beyond the width")
        shifted = a << a.dtype.type(width - first - bits)
        return shifted >> a.dtype.type(width - bits)

    return apply(machine, instruction, extract, (kind, "u32", "u32"))


def _permute(machine: Machine, instruction: Instruction) -> Step:
    """prmt: four of the eight bytes of a and b."""

    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
        for i in range(4):
            chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (chosen & 7).astype(np.uint64))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), 255, 0)
            byte = np.where(chosen & 8, sign, byte).astype(np.uint32)
            result |= byte << np.uint32(8 * i)
        return result

    return apply(machine, instruction, permute, ("u32",) * 3)


def _count_bits(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(x[:, None].view(np.uint8), axis=1).sum(1)


def _logic(machine: Machine, instruction: Instruction) -> Step:
    """lop3: bit i of the table for the bits of a, b and c that make i."""
    table = int(str(instruction.operands[4]), 0)

    def of_bits(a: np.ndarray, b: np.ndarray, c: np.ndarray, _: np.ndarray) -> np.ndarray:
        result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return apply(machine, instruction, of_bits, ("u32",) * 4)


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(machine: Machine, instruction: Instruction) -> Step:
    """setp; the comparisons that end in u hold for NaN, ``ne`` does not."""
    name, *rest, kind = instruction.modifiers
    unordered = name not in _COMPARISONS
    function = _COMPARISONS[name.removesuffix("u")]
    combine = next((_COMBINATIONS[x] for x in rest if x in _COMBINATIONS), None)
    if kind[0] == "b":
        kind = "u" + kind[1:]

    def compare(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        x = function(a, b)
        if kind[0] == "f":
            nan = np.isnan(a) | np.isnan(b)
            x = x | nan if unordered else x & ~nan
        return combine(x, c[0]) if combine else x

    return apply(
        machine, instruction, compare, (kind, kind, *(("pred",) if combine else ())), "pred"
    )


def _select(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.type
    return apply(machine, instruction, lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"))


def _move(machine: Machine, instruction: Instruction) -> Step:
    """mov, also between a register and its parts in braces."""
    kind = instruction.type
    target, source = instruction.operands
    if isinstance(target, tuple):
        part = f"b{WIDTHS[kind] // len(target)}"
        whole = machine.source(source, kind)
        parts = [machine.target(x, part) for x in target]

        def unpack(mask: Mask) -> None:
            values = np.broadcast_to(whole, machine.threads).copy().view(parts[0].dtype)
            for i, x in enumerate(parts):
                np.copyto(x, values[i :: len(parts)], where=mask)

        return unpack
    if isinstance(source, tuple):
        part = f"b{WIDTHS[kind] // len(source)}"
        values = [machine.source(x, part) for x in source]
        whole = machine.target(target, kind)

        def pack(mask: Mask) -> None:
            columns = [np.broadcast_to(x, machine.threads) for x in values]
            np.copyto(whole, np.stack(columns, 1).reshape(-1).view(whole.dtype), where=mask)

        return pack
    return apply(machine, instruction, lambda x: x, (kind,))


# ------------------------------------------------------------------------------- approximations


def erring(exact: np.ndarray, error: Any) -> np.ndarray:
    """A result off by ``error``, now up, now down, the same in every run."""
    bits = exact.view(np.uint32)
    up = ((bits ^ (bits >> np.uint32(7)) ^ (bits >> np.uint32(13))) & np.uint32(1)).astype(bool)
    return (exact + np.where(up, error, -error)).astype(np.float32)


def _erring(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def approximate(*x: np.ndarray) -> np.ndarray:
        exact = function(*x)
        off = erring(exact, np.abs(exact) * RELATIVE_ERROR)
        # Powers of two and the like come out right.
        return np.where(exact == np.rint(exact), exact, off)

    return approximate


def _trigonometric(function: Callable[[np.ndarray], np.ndarray]) -> Builder:
    def build(machine: Machine, instruction: Instruction) -> Step:
        def approximate(x: np.ndarray) -> np.ndarray:
            inside = np.abs(x) <= np.float32(np.pi)
            exact = function(x.astype(np.float64)).astype(np.float32)
            return np.where(inside, erring(exact, TRIGONOMETRIC_ERROR), np.nan)

        return apply(machine, instruction, approximate, ("f32",))

    return build


def _rounded(function: Callable[..., np.ndarray], count: int) -> Builder:
    """Right to the last bit, or where the instruction says so, approximate.

    div.full errs by two units in the last place.
    """

    def build(machine: Machine, instruction: Instruction) -> Step:
        approximate = {"approx", "full"} & set(instruction.modifiers)
        return _same(_erring(function) if approximate else function, count)(machine, instruction)

    return build


BUILDERS: dict[str, Builder] = {
    "abs": _same(np.abs, 1),
    "add": _same(np.add, 2),
    "and": _bits(np.bitwise_and, 2),
    "bfe": _extract,
    "cos": _trigonometric(np.cos),
    "cvta": _bits(lambda x: x, 1),
    "div": _divide,
    "ex2": _same(_erring(np.exp2), 1),
    "fma": _same(_fused, 3),
    "lg2": _same(_erring(np.log2), 1),
    "lop3": _logic,
    "mad": _multiply_add,
    "max": _same(_of_floats(np.fmax, np.maximum), 2),
    "min": _minimum,
    "mov": _move,
    "mul": _multiply,
    "neg": _same(np.negative, 1),
    "not": _bits(np.invert, 1),
    "or": _bits(np.bitwise_or, 2),
    "popc": lambda machine, ins: apply(machine, ins, _count_bits, (ins.type,), "u32"),
    "prmt": _permute,
    "rcp": _rounded(np.reciprocal, 1),
    "rem": _bits(lambda a, b: (a - _truncated(a, b) * b).astype(a.dtype), 2),
    "selp": _select,
    "setp": _compare,
    "shl": _shift,
    "shr": _shift,
    "sin": _trigonometric(np.sin),
    "sqrt": _rounded(np.sqrt, 1),
    "sub": _same(np.subtract, 2),
    "tanh": _same(_erring(np.tanh), 1),
    "xor": _bits(np.bitwise_xor, 2),
}
