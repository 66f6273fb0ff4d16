"""Whether sass.py sees a register of a matrix product that is touched before the wait for it."""

from __future__ import annotations

import pytest
from sass import touched_too_early

# Two products in a loop, waited for one turn later, but for what ptxas never did here.
LOOP = """
		Function : attention_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDS.128 R152, [R3] ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, R152, gdesc[UR20], R24 ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, R156, gdesc[UR20], R24, gsb0 ;
        /*0060*/                   {first} ;
        /*0070*/              @!P4 BRA 0x20 ;
        /*0080*/                   {second} ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   {third} ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def loop(first: str = "NOP", second: str = "NOP", third: str = "NOP") -> list[str]:
    return touched_too_early(LOOP.format(first=first, second=second, third=third))


@pytest.mark.parametrize(
    "instruction",
    [
        "IADD3 R160, R161, R162, RZ",
        "LDS.128 R148, [R3]",  # up to R151
        "STS.128 [R3], R152",  # A may be read
        "SHFL.BFLY PT, R7, R8, 0x1, 0x1f",
        "ISETP.GE.AND P0, PT, R152, R153, PT",
        "HGMMA.64x16x16.F32.BF16 R32, R160, gdesc[UR20], R32",  # beside the first accumulator
        "HGMMA.64x16x16.F32.BF16 R24, R160, gdesc[UR20], R24",  # and after it in the same one
    ],
)
def test_other_registers_are_free(instruction: str) -> None:
    assert loop(first=instruction) == []


@pytest.mark.parametrize(
    ("instruction", "register"),
    [
        ("IADD3 R159, R161, R162, RZ", 159),
        ("MOV R152, R3", 152),
        ("LDS.128 R149, [R3]", 152),
        ("LDSM.16.M88.4 R150, [R3]", 152),
        ("IMAD.WIDE R150, R3, R4, R6", None),
        ("IMAD.WIDE R151, R3, R4, R6", 152),
        ("SHFL.BFLY PT, R153, R8, 0x1, 0x1f", 153),
        ("LOP3.LUT P0, R154, R3, R4, RZ, 0xc0, !PT", 154),
        ("HMMA.16816.F32.BF16 R20, R4, R6, R20", None),
        ("HMMA.16816.F32.BF16 R22, R4, R6, R22", 24),
        ("FMUL R3, R31, R4", 31),  # reads the accumulator
        ("STG.E [R2.64], R30", 30),
        (
            "HGMMA.64x16x16.F32.BF16 R32, R28, gdesc[UR20], R32, gsb0",
            28,
        ),  # which is A of another one
        ("HGMMA.64x16x16.F32.BF16 R152, R40, gdesc[UR20], RZ, !UPT, gsb0", 152),
    ],
)
def test_registers_of_a_product_are_not(instruction: str, register: int | None) -> None:
    faults = [fault.split(":")[0] for fault in loop(first=instruction)]
    assert faults == ([] if register is None else [f"attention_kernel 0x60 R{register}"])


def test_after_the_wait_they_are_free_again() -> None:
    assert loop(third="IADD3 R152, R24, R25, RZ") == []
    assert len(loop(second="IADD3 R152, R24, R25, RZ")) == 1


def test_on_every_way_to_the_instruction() -> None:
    """What stands before the first product is reached again from the end of the loop."""
    assert loop() == []
    text = LOOP.format(first="NOP", second="NOP", third="NOP")
    back = text.replace("BRA 0x20", "BRA 0x10")
    assert [fault.split()[1:3] for fault in touched_too_early(back)] == [["0x10", "R152:"]]


def test_a_wait_for_all_but_the_latest_frees_the_older_ones() -> None:
    text = """
		Function : two_groups
        /*0000*/                   HGMMA.64x16x16.F32.BF16 R24, R152, gdesc[UR20], R24, gsb0 ;
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R32, R160, gdesc[UR20], R32, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   MOV R152, R24 ;
        /*0040*/                   MOV R160, R4 ;
        /*0050*/                   MOV R5, R33 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   MOV R160, R33 ;
        /*0080*/                   EXIT ;
    """
    places = [fault.split()[1] for fault in touched_too_early(text)]
    assert places == ["0x40", "0x50"]


def test_half_precision_accumulators_and_operands_in_memory() -> None:
    text = """
		Function : halves
        /*0000*/                   HGMMA.64x16x16.F16 R24, gdesc[UR20], R24, gsb0 ;
        /*0010*/                   MOV R28, R4 ;
        /*0020*/                   MOV R27, R4 ;
        /*0030*/                   EXIT ;
    """
    assert [fault.split()[2] for fault in touched_too_early(text)] == ["R27:"]
