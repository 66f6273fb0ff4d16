"""float8 (e4m3fn) to float16, which holds each of its numbers, from the bits.

Caches come as bytes, so that one code path serves devices with and without the conversion, and the
interpreter.
"""

import triton
import triton.language as tl

from .rotation import _INTERPRETED

# How a device turns e4m3 into float16; 0 is a cache of another dtype.
CONVERT = tl.constexpr(1)  # cvt, from compute capability 8.9 on
SHIFT = tl.constexpr(2)  # with integers

# Four bytes at a time. The exponent and mantissa of e4m3, shifted into those of float16, are 2**-8
# of the number, subnormals included. The codes of NaN become 1.875, all others at most 1.75: only
# 1.875 times 35008 overflows, and infinity times 0 is the NaN to add.
_SHIFT_TWO = tl.constexpr("""
    prmt.b32 b, $2, 0, {select};
    shr.u32 h, b, 1;
    and.b32 h, h, 0x3f803f80;
    lop3.b32 h, b, 0x80008000, h, 0xea;
    mul.rn.f16x2 b, h, large;
    mul.rn.f16x2 h, h, exponent;
    fma.rn.f16x2 {out}, b, zero, h;
""")
_SHIFT_FOUR = tl.constexpr(
    "{ .reg .b32 b, h, large, exponent, zero;"
    "mov.b32 large, 0x78467846; mov.b32 exponent, 0x5c005c00; mov.b32 zero, 0;"
    + _SHIFT_TWO.value.format(select="0x1404", out="$0")
    + _SHIFT_TWO.value.format(select="0x3424", out="$1")
    + "}"
)
_CONVERT_FOUR = tl.constexpr(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
    "cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }"
)


@triton.jit
def half_of_e4m3(x, FLOAT8: tl.constexpr):
    """The numbers (float16) of e4m3 codes x (uint8); NaN stays NaN."""
    if _INTERPRETED:
        bits = x.to(tl.int32)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        half = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        y = tl.where((bits & 0x7FFF) == 0x3F80, float("nan"), half).to(tl.float16)
    else:
        y = tl.inline_asm_elementwise(
            _CONVERT_FOUR if FLOAT8 == CONVERT else _SHIFT_FOUR,
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return y


@triton.jit
def half_pieces(pieces, FLOAT8: tl.constexpr):
    """Pieces of e4m3 codes (uint8) to float16."""
    halves = ()
    for i in tl.static_range(len(pieces)):
        halves += (half_of_e4m3(pieces[i], FLOAT8),)
    return halves


@triton.jit
def _as_16_bits(x):
    if _INTERPRETED:
        y = x
    else:
        y = tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)
    return y


@triton.jit
def pieces_as_16_bits(pieces):
    """The same 16-bit pieces, for a product, by a step that Triton does not look behind.

    Where it finds bytes loaded, it lays out the operands of a product for them, and stores and
    loads their 16 bits with conflicts at the banks; or it converts in the layout of the product, in
    which each byte of a column is a load of its own.
    """
    same = ()
    for i in tl.static_range(len(pieces)):
        same += (_as_16_bits(pieces[i]),)
    return same
