"""The machine of tests/ptx itself: what it computes, and that what PTX forbids raises.

Kernels of a few lines, written by hand, against numpy.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from ptx.by_hand import run
from ptx.machine import SHARED_BASE, MachineError
from ptx.memory import OutsideError

# The address of a thread's 4, 8 or 16 bytes in the tensor at %rd1, and of those in shared memory.
PLACES = f"""
mul.wide.u32 %rd10, %r1, 4;
add.s64 %rd11, %rd1, %rd10;
mul.wide.u32 %rd12, %r1, 8;
add.s64 %rd13, %rd2, %rd12;
shl.b32 %r10, %r1, 2;
add.s32 %r11, %r10, {SHARED_BASE};
"""


def of_each_thread(body: str, values: torch.Tensor) -> torch.Tensor:
    """What ``body`` makes in %rd20 (64 bits) of a thread's 32 bits of ``values`` in %r20."""
    out = torch.zeros(len(values), dtype=torch.int64)
    text = f"{PLACES} ld.global.b32 %r20, [%rd11]; {body} st.global.b64 [%rd13], %rd20;"
    run(text, values, out, threads=len(values))
    return out


INTEGERS = torch.tensor(
    [0, 1, -1, 2, 31, -32, 255, 2**31 - 1, -(2**31), 12345, -54321, 1 << 20, 7, -7, 100, 3] * 2,
    dtype=torch.int32,
)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mul.wide.s32 %rd20, %r20, -3;", lambda x: -3 * x),
        ("mul.wide.u32 %rd20, %r20, 3;", lambda x: 3 * (x % 2**32)),
        ("mul.hi.s32 %r21, %r20, 1000; cvt.s64.s32 %rd20, %r21;", lambda x: 1000 * x >> 32),
        ("mad.wide.s32 %rd20, %r20, 5, 11;", lambda x: 5 * x + 11),
        ("div.s32 %r21, %r20, -7; cvt.s64.s32 %rd20, %r21;", lambda x: math.trunc(x / -7)),
        ("rem.s32 %r21, %r20, 7; cvt.s64.s32 %rd20, %r21;", lambda x: int(math.fmod(x, 7))),
        ("shr.s32 %r21, %r20, 40; cvt.s64.s32 %rd20, %r21;", lambda x: x >> 31),
        ("shr.u32 %r21, %r20, 4; cvt.u64.u32 %rd20, %r21;", lambda x: (x % 2**32) >> 4),
        ("shl.b32 %r21, %r20, 32; cvt.u64.u32 %rd20, %r21;", lambda x: 0),
        ("bfe.u32 %r21, %r20, 3, 5; cvt.u64.u32 %rd20, %r21;", lambda x: x >> 3 & 31),
        ("bfe.s32 %r21, %r20, 0, 8; cvt.s64.s32 %rd20, %r21;", lambda x: (x + 128) % 256 - 128),
        ("min.relu.s32 %r21, %r20, 9; cvt.s64.s32 %rd20, %r21;", lambda x: max(min(x, 9), 0)),
        ("popc.b32 %r21, %r20; cvt.u64.u32 %rd20, %r21;", lambda x: (x % 2**32).bit_count()),
        ("prmt.b32 %r21, %r20, 0, 0x4101; cvt.u64.u32 %rd20, %r21;",
         lambda x: (x >> 8 & 255) + (x & 255) * 256 + (x >> 8 & 255) * 65536),
        ("setp.lt.u32 %p4, %r20, 100; selp.b64 %rd20, 1, 0, %p4;", lambda x: x % 2**32 < 100),
        ("mov.b64 %rd20, {%r1, %r20};", None),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_integers(body: str, expected: object) -> None:
    out = of_each_thread(body, INTEGERS)
    if expected is None:
        wanted = [(x << 32) + i for i, x in enumerate(INTEGERS.tolist())]
    else:
        wanted = [int(expected(x)) for x in INTEGERS.tolist()]
    assert out.tolist() == wanted


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("fma.rn.f32 %r21, %r20, %r20, 0fBF800000;",
         lambda x: (x.double() ** 2 - 1).float()),
        ("min.f32 %r21, %r20, 0f7FC00000;", lambda x: x),
        ("neg.f32 %r21, %r20;", lambda x: -x),
        ("cvt.rni.s32.f32 %r22, %r20; cvt.rn.f32.s32 %r21, %r22;", lambda x: x.round()),
        ("cvt.rn.bf16x2.f32 %r22, %r20, 0f00000000; and.b32 %r21, %r22, 0xffff0000;",
         lambda x: x.bfloat16().float()),
        ("{ .reg .b16 half; cvt.rn.f16.f32 half, %r20; cvt.f32.f16 %r21, half; }",
         lambda x: x.half().float()),
        ("setp.neu.f32 %p4, %r20, 0f3F800000; selp.f32 %r21, 0f40000000, %r20, %p4;",
         lambda x: torch.where(x == 1, x, 2.0)),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_floats(body: str, expected: object) -> None:
    x = torch.cat((torch.randn(28) * 100, torch.tensor([0.0, 1.0, -0.5, 1e-30])))
    out = of_each_thread(f"{body} cvt.u64.u32 %rd20, %r21;", x.view(torch.int32))
    assert torch.equal(out.to(torch.int32).view(torch.float32), expected(x))


def test_sine_and_cosine_err_as_much_as_they_may() -> None:
    x = torch.linspace(-math.pi, math.pi, 64)[1:33]
    for name, exact in (("sin", torch.sin), ("cos", torch.cos)):
        out = of_each_thread(
            f"{name}.approx.f32 %r21, %r20; cvt.u64.u32 %rd20, %r21;", x.view(torch.int32)
        )
        error = (out.to(torch.int32).view(torch.float32).double() - exact(x.double())).abs()
        assert 0.9 * 2**-20.5 < error.max() < 1.2 * 2**-20.5
    outside = torch.full((32,), 3.2).view(torch.int32)
    out = of_each_thread("sin.approx.f32 %r21, %r20; cvt.u64.u32 %rd20, %r21;", outside)
    assert out.to(torch.int32).view(torch.float32).isnan().all()


def test_threads_part_and_meet_again() -> None:
    """A loop of as many turns as the thread says; a shuffle after it needs the whole warp."""
    body = """
    mov.b32 %r21, 0;
    again:
    setp.ge.s32 %p4, %r21, %r20;
    @%p4 bra done;
    add.s32 %r21, %r21, 1;
    bra again;
    done:
    shfl.sync.bfly.b32 %r22, %r21, 1, 31, -1;
    cvt.u64.u32 %rd20, %r22;
    """
    turns = torch.arange(64, dtype=torch.int32) * 7 % 5
    assert of_each_thread(body, turns).tolist() == turns.view(-1, 2).flip(1).flatten().tolist()


def test_threads_meet_before_the_place_where_they_parted() -> None:
    """Those of the shorter path come first to where only whole warps go on."""
    body = """
    and.b32 %r21, %r1, 1;
    setp.eq.s32 %p4, %r21, 0;
    bra start;
    meet:
    shfl.sync.bfly.b32 %r22, %r20, 1, 31, -1;
    bra done;
    start:
    @%p4 bra meet;
    add.s32 %r20, %r20, 100;
    bra meet;
    done:
    cvt.u64.u32 %rd20, %r22;
    """
    values = torch.arange(64, dtype=torch.int32)
    changed = values + 100 * (values % 2)
    assert of_each_thread(body, values).tolist() == changed.view(-1, 2).flip(1).flatten().tolist()


def test_a_warp_that_is_divided_cannot_shuffle() -> None:
    body = """
    setp.eq.s32 %p4, %r1, 3;
    @%p4 bra done;
    shfl.sync.bfly.b32 %r22, %r20, 1, 31, -1;
    done:
    mov.b64 %rd20, 0;
    """
    with pytest.raises(MachineError, match="threads of a warp are missing"):
        of_each_thread(body, INTEGERS)


@pytest.mark.parametrize("how", ["idx", "up", "down", "bfly"])
def test_shuffles(how: str) -> None:
    values = torch.arange(64, dtype=torch.int32) * 3
    out = of_each_thread(
        f"shfl.sync.{how}.b32 %r22|%p4, %r20, 2, {0 if how == 'up' else 31}, -1; "
        "cvt.u64.u32 %rd20, %r22;",
        values,
    )
    lane = np.arange(32)
    source = {"idx": 0 * lane + 2, "up": lane - 2, "down": lane + 2, "bfly": lane ^ 2}[how]
    source = np.where((source < 0) | (source > 31), lane, source)
    assert out.tolist() == values[np.concatenate((source, source + 32))].tolist()


def test_a_warp_adds_up() -> None:
    values = torch.arange(64, dtype=torch.int32)
    out = of_each_thread("redux.sync.add.s32 %r22, %r20, -1; cvt.u64.u32 %rd20, %r22;", values)
    assert out.tolist() == [values[:32].sum()] * 32 + [values[32:].sum()] * 32


# ------------------------------------------------------------------------------- shared memory

# A thread writes its number and reads that of the same lane of the other warp.
EXCHANGE = f"""
st.shared.b32 [%r11], %r20;
BETWEEN
xor.b32 %r21, %r10, 128;
add.s32 %r21, %r21, {SHARED_BASE};
ld.shared.b32 %r22, [%r21];
AFTER
cvt.u64.u32 %rd20, %r22;
"""


def exchange(between: str, after: str = "") -> torch.Tensor:
    values = torch.arange(64, dtype=torch.int32)
    return of_each_thread(EXCHANGE.replace("BETWEEN", between).replace("AFTER", after), values)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.sync 3, 64;"])
def test_a_barrier_puts_accesses_in_order(barrier: str) -> None:
    assert exchange(barrier).tolist() == [*range(32, 64), *range(32)]
    assert exchange(barrier, f"{barrier} st.shared.b32 [%r11], %r20;").sum() == 63 * 32


@pytest.mark.parametrize("between", ["", "bar.warp.sync -1;", "@%p2 bar.sync 1, 32;"])
def test_reading_what_another_warp_wrote_needs_a_barrier(between: str) -> None:
    with pytest.raises(MachineError, match=r"another warp wrote.*ld\.shared"):
        exchange(between)


def test_writing_what_another_warp_reads_needs_a_barrier() -> None:
    with pytest.raises(MachineError, match=r"another warp reads.*st\.shared"):
        exchange("bar.sync 0;", "st.shared.b32 [%r11], %r20;")


def test_shared_memory_and_registers_begin_with_nan() -> None:
    out = of_each_thread("ld.shared.b32 %r21, [%r11]; cvt.u64.u32 %rd20, %r21;", INTEGERS)
    assert (out == 2**32 - 1).all()
    assert (of_each_thread("cvt.u64.u32 %rd20, %r55;", INTEGERS) == 2**32 - 1).all()


def test_a_barrier_that_not_all_reach_ends_the_run() -> None:
    with pytest.raises(MachineError, match=r"all threads wait, behind @%p2 bar\.sync 0"):
        of_each_thread("@%p2 bar.sync 0; mov.b64 %rd20, 0;", torch.arange(64, dtype=torch.int32))


def test_a_count_is_given_before_it_is_added_to() -> None:
    """By one thread in two."""
    body = """
    mov.b32 %r21, 7; and.b32 %r22, %r20, 1; setp.eq.s32 %p3, %r22, 1;
    @%p3 atom.global.gpu.acq_rel.add.u32 %r21, [%rd11 + 0], 5;
    ld.global.b32 %r22, [%rd11]; sub.s32 %r21, %r22, %r21; cvt.s64.s32 %rd20, %r21;
    """
    got = of_each_thread(body, torch.arange(32, dtype=torch.int32))
    assert got.tolist() == [5 if x % 2 else x - 7 for x in range(32)]


def test_memory_of_no_tensor() -> None:
    with pytest.raises(OutsideError, match="of no tensor of the launch"):
        of_each_thread("ld.global.b32 %r21, [%rd11+4]; mov.b64 %rd20, 0;", INTEGERS)
    with pytest.raises(OutsideError, match="for 8 bytes"):
        of_each_thread("ld.global.v2.b32 {%r21, %r22}, [%rd11]; mov.b64 %rd20, 0;", INTEGERS)
    with pytest.raises(MachineError, match="outside of shared memory"):
        of_each_thread("st.shared.b32 [%r10], %r20; mov.b64 %rd20, 0;", INTEGERS)


COPY = """
cp.async.ca.shared.global [%r11], [%rd11], 4, 4;
cp.async.commit_group;
WAIT
ld.shared.b32 %r21, [%r11];
cvt.s64.s32 %rd20, %r21;
"""


def test_copies_end_when_they_are_waited_for() -> None:
    out = of_each_thread(COPY.replace("WAIT", "cp.async.wait_group 0;"), INTEGERS)
    assert out.tolist() == INTEGERS.tolist()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;", "bar.sync 0;"])
def test_a_copy_that_was_not_waited_for_is_not_there(wait: str) -> None:
    with pytest.raises(MachineError, match="a copy that was not waited for"):
        of_each_thread(COPY.replace("WAIT", wait), INTEGERS)


def test_copies_of_nothing_are_zeros() -> None:
    body = COPY.replace("4, 4;", "4, %r30;").replace("WAIT", "cp.async.wait_all;")
    body = f"and.b32 %r30, %r1, 1; shl.b32 %r30, %r30, 2; {body}"
    expected = [x if i % 2 else 0 for i, x in enumerate(INTEGERS.tolist())]
    assert of_each_thread(body, INTEGERS).tolist() == expected


# ------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_to_registers_and_back(transposed: bool) -> None:
    """Four 8 x 8 matrices, one below the other: each lane has two neighbours of a row."""
    matrices = torch.randint(-(2**15), 2**15, (32, 8)).to(torch.int16)
    out = torch.zeros(32, 8, dtype=torch.int16)
    how = ".trans" if transposed else ""
    body = f"""
    add.s32 %r11, %r2, {SHARED_BASE};
    cvt.u64.u32 %rd12, %r2;
    add.s64 %rd13, %rd1, %rd12;
    add.s64 %rd14, %rd2, %rd12;
    ld.global.v4.b32 {{%r21, %r22, %r23, %r24}}, [%rd13];
    st.shared.v4.b32 [%r11], {{%r21, %r22, %r23, %r24}};
    ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{%r31, %r32, %r33, %r34}}, [%r11];
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r11], {{%r31, %r32, %r33, %r34}};
    ld.shared.v4.b32 {{%r21, %r22, %r23, %r24}}, [%r11];
    st.global.v4.b32 [%rd14], {{%r21, %r22, %r23, %r24}};
    """
    run(body, matrices, out, threads=32)
    rows = matrices.view(4, 8, 8)
    assert torch.equal(out.view(4, 8, 8), rows.mT if transposed else rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_products(dtype: torch.dtype) -> None:
    """mma.sync.m16n8k16 of fragments that each lane loads by itself, as the ISA lays them out."""
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    out = torch.zeros(16, 8)
    lane = "shr.u32 %r11, %r1, 2; and.b32 %r12, %r1, 3;"  # row and pair of columns
    at = "mad.lo.s32 %r13, %r11, {row}, {more}; mad.lo.s32 %r13, %r12, {column}, %r13;"
    place = at + " cvt.u64.u32 %rd10, %r13; add.s64 %rd11, {of}, %rd10; {access}"
    loads = [
        place.format(
            row=32, column=4, more=more, of="%rd1", access=f"ld.global.b32 %r{20 + i}, [%rd11];"
        )
        for i, more in enumerate((0, 8 * 32, 16, 8 * 32 + 16))
    ]
    loads += [
        place.format(
            row=32, column=4, more=16 * i, of="%rd2", access=f"ld.global.b32 %r{30 + i}, [%rd11];"
        )
        for i in (0, 1)
    ]
    access = "{}.global.v2.b32 {}, {};"
    for i in (0, 1):
        pair = f"{{%r{40 + 2 * i}, %r{41 + 2 * i}}}"
        loads.append(
            place.format(
                row=32,
                column=8,
                more=256 * i,
                of="%rd3",
                access=access.format("ld", pair, "[%rd11]"),
            )
        )
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    product = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%r40, %r41, %r42, %r43}}, "
        "{%r20, %r21, %r22, %r23}, {%r30, %r31}, {%r40, %r41, %r42, %r43};"
    )
    stores = [
        place.format(row=32, column=8, more=256 * i, of="%rd4",
                     access=access.format("st", "[%rd11]", f"{{%r{40 + 2 * i}, %r{41 + 2 * i}}}"))
        for i in (0, 1)
    ]  # fmt: skip
    run("\n".join([lane, *loads, product, *stores]), a, b, c, out, threads=32)
    expected = a.double() @ b.double().T + c.double()
    assert (out - expected).abs().max() < 1e-5


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match=re.escape("vadd.s32 %r21, %r20, %r20")):
        of_each_thread("vadd.s32 %r21, %r20, %r20;", INTEGERS)
