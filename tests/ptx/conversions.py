"""Conversions between types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import Builder, apply, flush
from .machine import Machine, Mask, Step, numpy_type
from .program import Instruction


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def from_float16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def _float8_values() -> np.ndarray:
    """The 256 values of e4m3 (the finite kind), float32."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, (code & 7) / 8
    normal = (1 + fraction) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, fraction * 2.0**-6, normal)
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


_FLOAT8 = _float8_values()
_NARROW: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bf16": to_bfloat16, "f16": to_float16}
_WIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": from_bfloat16,
    "f16": from_float16,
}


def _convert(machine: Machine, instruction: Instruction) -> Step:
    *how, to, of = instruction.modifiers
    if to in ("bf16x2", "f16x2"):
        return _convert_two(machine, instruction, to[:-2], of)
    if unknown := set(how) & {"sat", "relu", "rna", "rp", "rm"}:
        raise NotImplementedError(f"{unknown} of {instruction}")
    result = numpy_type(to)
    kinds = (f"b{16}" if of in _WIDE else of,)

    def convert(x: np.ndarray) -> np.ndarray:
        if of in _WIDE:
            x = _WIDE[of](x)
        if "ftz" in how:
            x = flush(x)
        if to in _NARROW:
            return _NARROW[to](x.astype(np.float32))
        if result.kind in "iu" and x.dtype.kind == "f":
            return _to_integer(x, how, result)
        return x.astype(result)

    return apply(machine, instruction, convert, kinds, "b16" if to in _NARROW else to)


def _to_integer(x: np.ndarray, how: list[str], result: np.dtype) -> np.ndarray:
    """Rounded as ``how`` says; what does not fit is the nearest that does, NaN 0."""
    round_ = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounded = next(round_[name] for name in how if name in round_)(x.astype(np.float64))
    limits = np.iinfo(result)
    inside = np.clip(np.nan_to_num(rounded, nan=0.0), float(limits.min), float(limits.max))
    return np.where(inside >= limits.max, limits.max, inside.astype(result))


def _convert_two(machine: Machine, instruction: Instruction, to: str, of: str) -> Step:
    """cvt to a pair: of two float32, the first one in the upper half, or of two float8."""
    if of == "e4m3x2":
        half = machine.target(instruction.operands[0], "b32")
        source = machine.source(instruction.operands[1], "b16")

        def unpack(mask: Mask) -> None:
            low, high = (
                to_float16(_FLOAT8[x]).astype(np.uint32) for x in (source & 255, source >> 8)
            )
            np.copyto(half, low | high << np.uint32(16), where=mask)

        return unpack
    narrow = _NARROW[to]

    def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)

    return apply(machine, instruction, pack, ("f32", "f32"), "b32")


BUILDERS: dict[str, Builder] = {"cvt": _convert}
