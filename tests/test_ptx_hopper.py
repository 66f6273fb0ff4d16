"""The machine of tests/ptx itself: wgmma, mbarriers and the tensor memory accelerator.

Kernels of a few lines, written by hand, against numpy; and that what the PTX ISA forbids raises.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ptx.by_hand import run
from ptx.machine import SHARED_BASE, MachineError

BARRIER = SHARED_BASE + 65536
MAP = SHARED_BASE + 66048


def fill(of: str, size: int, at: int = 0, threads: int = 128) -> str:
    """Shared memory from ``at`` on becomes ``size`` bytes of the tensor at a register."""
    lines = ["cvt.u64.u32 %rd90, %r2;", f"add.s64 %rd91, {of}, %rd90;"]
    for i in range(0, size, 16 * threads):
        lines += [f"ld.global.v4.b32 {{%r90, %r91, %r92, %r93}}, [%rd91+{i}];"]
        to = SHARED_BASE + at + i
        lines += [f"st.shared.v4.b32 [%r2+{to}], {{%r90, %r91, %r92, %r93}};"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- wgmma

FENCE = "fence.proxy.async.shared::cta;\nbar.sync 0;\nwgmma.fence.sync.aligned;"
WAIT = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
N = 64
A_AT, B_AT = 0, 8192
SPANS = {128: 1, 64: 2, 32: 3, 16: 0}


def product(a: str, b: str, flags: str = "1, 1, 0, 0", scale: str = "0") -> str:
    registers = ", ".join(f"%f{i}" for i in range(N // 2))
    shape = f"m64n{N}k16.f32.bf16.bf16"
    return f"wgmma.mma_async.sync.aligned.{shape} {{{registers}}}, {a}, {b}, {scale}, {flags};"


def descriptor(at: int, leading: int, stride: int, span: int) -> int:
    start = (SHARED_BASE + at) >> 4
    return start | leading >> 4 << 16 | stride >> 4 << 32 | SPANS[span] << 62


def results(of: str = "%rd3") -> str:
    """Store the registers of the product, (N / 2, 128) float32."""
    lines = ["shl.b32 %r80, %r1, 2;", "cvt.u64.u32 %rd80, %r80;", f"add.s64 %rd81, {of}, %rd80;"]
    lines += [f"st.global.b32 [%rd81+{512 * i}], %f{i};" for i in range(N // 2)]
    return "\n".join(lines)


def as_matrix(d: torch.Tensor) -> torch.Tensor:
    """The product from its registers: two of a row, 8 rows further, 8 columns further."""
    by_lane = d.view(N // 8, 2, 2, 4, 8, 4)  # columns of 8, upper or lower, which, warp, row, pair
    return by_lane.permute(3, 1, 4, 0, 5, 2).reshape(64, N)


def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 16, generator=generator).bfloat16() for _ in range(2))
    return a, b


def inner_major(x: torch.Tensor, span: int) -> tuple[torch.Tensor, int, int]:
    """Rows of x lie together: its bytes, leading and stride byte offsets."""
    memory = torch.zeros(8192 // 2, dtype=torch.bfloat16)
    for row in range(64):
        for piece in range(2):
            if span == 16:  # 8 x 8 matrices: those of one row of them together
                at = row // 8 * 256 + piece * 128 + row % 8 * 16
            else:  # 128 bytes, of one, two or four rows, count for the pattern
                turned = piece ^ (row // (128 // span)) % (span // 16)
                at = row * span + turned * 16
            memory[at // 2 : at // 2 + 8] = x[row, 8 * piece : 8 * piece + 8]
    return memory, 128, 256 if span == 16 else 8 * span


def outer_major(x: torch.Tensor, span: int) -> tuple[torch.Tensor, int, int]:
    """Columns of x lie together, in parts of ``span`` bytes."""
    memory = torch.zeros(8192 // 2, dtype=torch.bfloat16)
    for column in range(16):
        for piece in range(8):
            part, inside = divmod(piece, span // 16)
            line = part * 16 + column if span > 16 else part * 8 + column // 8 * 64 + column % 8
            if span > 16:
                inside ^= (column // (128 // span)) % (span // 16)
            at = line * span + inside * 16
            memory[at // 2 : at // 2 + 8] = x[8 * piece : 8 * piece + 8, column]
    return (memory, 1024, 128) if span == 16 else (memory, 16 * span, 8 * span)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("layout_a", [inner_major, outer_major])
@pytest.mark.parametrize("layout_b", [inner_major, outer_major])
def test_wgmma_multiplies_matrices_of_each_layout(
    layout_a: Callable[..., tuple[torch.Tensor, int, int]],
    layout_b: Callable[..., tuple[torch.Tensor, int, int]],
    span: int,
) -> None:
    a, b = matrices()
    (bytes_a, *of_a), (bytes_b, *of_b) = layout_a(a, span), layout_b(b, span)
    d = torch.empty(N // 2, 128)
    flags = f"1, 1, {int(layout_a is outer_major)}, {int(layout_b is outer_major)}"
    first, second = descriptor(A_AT, *of_a, span), descriptor(B_AT, *of_b, span)
    body = [
        fill("%rd1", 8192, A_AT),
        fill("%rd2", 8192, B_AT),
        *(f"mov.b64 %rd10, {first};", f"mov.b64 %rd11, {second};", FENCE),
        *(product("%rd10", "%rd11", flags), product("%rd10", "%rd11", flags, "1"), WAIT),
        results(),
    ]
    run("\n".join(body), bytes_a, bytes_b, d)
    torch.testing.assert_close(as_matrix(d), 2 * a.float() @ b.float().T)


def test_wgmma_may_subtract() -> None:
    a, b = matrices()
    (bytes_a, *of_a), (bytes_b, *of_b) = inner_major(a, 128), inner_major(b, 128)
    d = torch.empty(N // 2, 128)
    first, second = descriptor(A_AT, *of_a, 128), descriptor(B_AT, *of_b, 128)
    body = [
        fill("%rd1", 8192, A_AT),
        fill("%rd2", 8192, B_AT),
        *(f"mov.b64 %rd10, {first};", f"mov.b64 %rd11, {second};", FENCE),
        *(product("%rd10", "%rd11", "1, -1, 0, 0"), WAIT, results()),
    ]
    run("\n".join(body), bytes_a, bytes_b, d)
    torch.testing.assert_close(as_matrix(d), -a.float() @ b.float().T)


def steps() -> dict[str, str]:
    """A kernel that multiplies right, step by step."""
    a, b = (descriptor(at, 128, 1024, 128) for at in (A_AT, B_AT))
    return {
        "fill": fill("%rd1", 16384),
        "fence": "fence.proxy.async.shared::cta;",
        "barrier": "bar.sync 0;",
        "descriptors": f"mov.b64 %rd10, {a};\nmov.b64 %rd11, {b};",
        "wgmma.fence": "wgmma.fence.sync.aligned;",
        "product": product("%rd10", "%rd11"),
        "commit": "wgmma.commit_group.sync.aligned;",
        "wait": "wgmma.wait_group.sync.aligned 0;",
        "second barrier": "bar.sync 0;",
        "overwrite": fill("%rd1", 16384),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"barrier": ""}, "another warp wrote, with no barrier"),
        ({"fence": ""}, r"no fence\.proxy\.async"),
        ({"fence": "", "barrier": "bar.sync 0;\nfence.proxy.async;"}, None),
        ({"wgmma.fence": ""}, r"no wgmma\.fence"),
        ({"product": "mov.b32 %f3, %f2;\n" + product("%rd10", "%rd11")}, None),
        ({"product": "add.s32 %f3, %f2, 1;\n" + product("%rd10", "%rd11")}, "computes after"),
        ({"wait": ""}, "may still read"),
        ({"commit": ""}, "may still read"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "may still read"),
        ({"second barrier": ""}, "another warp reads, with no barrier"),
        ({"product": "@%p2 " + product("%rd10", "%rd11")}, "warps of four are missing"),
        ({"descriptors": f"mov.b64 %rd11, {1 << 49};"}, "base offset"),
        ({"descriptors": f"mov.b64 %rd11, {descriptor(128, 1, 1024, 128)};"}, "within a pattern"),
        ({"descriptors": "cvt.u64.u32 %rd11, %r1;"}, "differ in an operand"),
    ],
)
def test_wgmma_needs_its_fences_barriers_and_waits(
    changes: dict[str, str], message: str | None
) -> None:
    body, x = "\n".join((steps() | changes).values()), torch.zeros(16384 // 4)
    if message is None:
        run(body, x)
    else:
        with pytest.raises(MachineError, match=message):
            run(body, x)


def test_cp_async_is_of_the_generic_proxy_too() -> None:
    to = "\n".join(
        f"cp.async.cg.shared.global [%r2+{SHARED_BASE + i}], [%rd20+{i}], 16;"
        for i in range(0, 16384, 2048)
    )
    copies = f"cvt.u64.u32 %rd21, %r2;\nadd.s64 %rd20, %rd1, %rd21;\n{to}\ncp.async.wait_all;"
    body, x = steps() | {"fill": copies}, torch.zeros(16384 // 4)
    run("\n".join(body.values()), x)
    body["fence"] = ""
    with pytest.raises(MachineError, match=r"no fence\.proxy\.async"):
        run("\n".join(body.values()), x)
    run("\n".join(body.values()), x, unfenced=["copied"])


def test_fewer_than_four_warps_multiply_nothing() -> None:
    with pytest.raises(MachineError, match="warps of four"):
        run("wgmma.commit_group.sync.aligned;", threads=96)


# ---------------------------------------------------------------------------------- mbarriers

INIT = f"mov.b32 %r10, {BARRIER};\n@%p1 mbarrier.init.shared::cta.b64 [%r10], {{}};\nbar.sync 0;"


def wait(parity: int) -> str:
    return f"""
{{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared.b64 complete, [%r10], {parity};
@!complete bra.uni waitLoop;
}}
"""


# The first warp writes and arrives, the others wait and read.
HANDOVER = f"""{INIT.format(32)}
@%p2 st.shared.b32 [{SHARED_BASE}], %r10;
@%p2 mbarrier.arrive.shared::cta.b64 _, [%r10];
{wait(0)}
@%p3 ld.shared.b32 %r11, [{SHARED_BASE}];
"""


def test_an_mbarrier_orders_who_arrives_before_who_waits() -> None:
    machine = run(HANDOVER)
    assert (machine.registers["%r11"][32:] == BARRIER).all()
    with pytest.raises(MachineError, match="no barrier between"):
        run(HANDOVER.replace(wait(0), ""))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (HANDOVER.replace(f"{INIT.format(32)}", INIT.format(33)), "all threads wait.*try_wait"),
        (HANDOVER.replace("arrive.shared::cta.b64 _, [%r10]", "expect_tx.b64 [%r10], 8"), "wait"),
        (HANDOVER.replace(wait(0), wait(0) + wait(1)), "all threads wait.*try_wait"),
        (HANDOVER.replace(INIT.format(32), f"mov.b32 %r10, {BARRIER};"), "no mbarrier"),
        (INIT.format(1).replace("bar.sync 0;", "") + wait(0), "no barrier between"),
        (
            INIT.format(9) + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10], 10;",
            "1 arrivals too many",
        ),
        (
            INIT.format(1) + "@%p1 st.shared.b32 [%r10], %r1;\nbar.sync 0;" + wait(1),
            "overwritten",
        ),
        (HANDOVER + "bar.sync 0;\n@%p1 mbarrier.inval.shared::cta.b64 [%r10];" + wait(0), "no "),
        (HANDOVER + "bar.sync 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r10], 32;", "one that was"),
    ],
)
def test_mbarriers_that_are_used_wrong(body: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        run(body)


def test_the_phases_of_an_mbarrier_alternate() -> None:
    arrive = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];"
    run(INIT.format(1) + wait(1) + arrive + wait(0) + arrive + wait(1) + arrive + wait(0))
    with pytest.raises(MachineError, match="all threads wait"):  # only the lowest bit counts
        run(INIT.format(1) + wait(-1) + arrive + wait(-1))


# -------------------------------------------------------------------------------- tensor maps

ROWS, COLUMNS, BOX = 5, 128, 8
# The first one acquires the tensor map for all, after a barrier.
ACQUIRE = """@%p2 fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;
bar.sync 0;"""


def make_map(span: int, columns: int = COLUMNS, fence: str = ACQUIRE) -> str:
    """A map at %rd2 of the bfloat16 matrix (ROWS, columns) at %rd1, boxes (BOX, span / 2)."""
    fields = {
        "global_address": ("b64", "%rd1"),
        "rank": ("b32", "1"),
        "box_dim 0": ("b32", "%r21"),
        "box_dim 1": ("b32", "%r22"),
        "global_dim 0": ("b32", "%r23"),
        "global_dim 1": ("b32", "%r24"),
        "global_stride 0": ("b64", "%rd21"),
        "element_stride 0": ("b32", "%r25"),
        "element_stride 1": ("b32", "%r25"),
        "elemtype": ("b32", "10"),
        "interleave_layout": ("b32", "0"),
        "swizzle_mode": ("b32", str({16: 0, 32: 1, 64: 2, 128: 3}[span])),
        "fill_mode": ("b32", "0"),
    }
    lines = [f"shl.b32 %r20, %r1, 2;\n@%p2 st.shared.b32 [%r20+{MAP}], 0;\nbar.warp.sync -1;"]
    for number, value in enumerate((span // 2, BOX, columns, ROWS, 1), 21):
        lines.append(f"mov.b32 %r{number}, {value};")
    lines += [f"mov.b64 %rd21, {2 * columns};", f"mov.b64 %rd22, {MAP};"]
    for field, (kind, value) in fields.items():
        name, *index = field.split()
        where = ", ".join(["[%rd22]", *index, value])
        lines.append(f"@%p1 tensormap.replace.tile.{name}.shared::cta.b1024.{kind} {where};")
    lines.append(
        "@%p2 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync"
        ".aligned [%rd2], [%rd22], 128;"
    )
    return "\n".join([*lines, fence])


def load(column: int, row: int, span: int) -> str:
    kind = "2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f"""mov.b32 %r30, {column};
mov.b32 %r31, {row};
mov.b32 %r32, {SHARED_BASE};
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], {span * BOX};
@%p1 cp.async.bulk.tensor.{kind} [%r32], [%rd2, {{%r30, %r31}}], [%r10];
"""


# Of what is loaded: the first 128 threads read 16 bytes each.
READ = f"""cvt.u64.u32 %rd90, %r2;
add.s64 %rd91, %rd3, %rd90;
setp.lt.s32 %p4, %r1, {{}};
@%p4 ld.shared.v4.b32 {{{{%r90, %r91, %r92, %r93}}}}, [%r2+{SHARED_BASE}];
@%p4 st.global.v4.b32 [%rd91], {{{{%r90, %r91, %r92, %r93}}}};
"""


def memory_of_map() -> torch.Tensor:
    """Room for a tensor map, aligned as one must be."""
    room = torch.zeros(256, dtype=torch.uint8)
    return room[-room.data_ptr() % 64 :]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("column", "row"), [(0, 0), (8, 2), (-8, -3), (120, 4)])
def test_a_load_fills_what_is_outside_with_zeros(span: int, column: int, row: int) -> None:
    x = torch.arange(1, ROWS * COLUMNS + 1).view(ROWS, COLUMNS).to(torch.int16)
    out = torch.full((BOX, span // 2), -1, dtype=torch.int16)
    pieces = BOX * span // 16
    body = INIT.format(1) + make_map(span) + load(column, row, span) + wait(0)
    run(body + READ.format(pieces), x, memory_of_map(), out)
    padded = torch.zeros(32, 512, dtype=torch.int16)
    padded[8 : 8 + ROWS, 64 : 64 + COLUMNS] = x
    expected = padded[8 + row :, 64 + column :][:BOX, : span // 2].reshape(-1, 8)
    turned = [
        i ^ (i // 8) % (span // 16) if span > 16 else i  # of 128 bytes each: their number
        for i in range(pieces)
    ]
    torch.testing.assert_close(out.view(-1, 8)[turned], expected)


GOOD_LOAD = INIT.format(1) + make_map(128) + load(0, 0, 128)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (GOOD_LOAD + READ.format(64), "copy that was not waited for"),
        (GOOD_LOAD + wait(1) + READ.format(64), "copy that was not waited for"),
        (GOOD_LOAD, "ends before a copy"),
        (GOOD_LOAD.replace("b64 _, [%r10], 1024", "b64 _, [%r10], 1040") + wait(0), "all threads"),
        (GOOD_LOAD.replace(ACQUIRE, ""), "no fence.proxy.tensormap"),
        (
            GOOD_LOAD.replace(
                ACQUIRE, "bar.sync 0;\n@%p3 fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;"
            ),
            "no fence.proxy.tensormap",
        ),
        (GOOD_LOAD.replace("tensormap.cp", "bar.warp.sync -1;//"), "no tensor map"),
        (GOOD_LOAD.replace("mov.b64 %rd21, 256;", "mov.b64 %rd21, 257;"), "strides"),
        (
            fill("%rd1", 512, threads=32).replace("ld.", "@%p2 ld.").replace("st.", "@%p2 st.")
            + "\nbar.sync 0;\n"
            + GOOD_LOAD,
            r"generic proxy wrote, with no fence\.proxy\.async",
        ),
    ],
)
def test_loads_that_are_used_wrong(body: str, message: str) -> None:
    x, out = torch.zeros(ROWS, COLUMNS, dtype=torch.int16), torch.zeros(1024)
    with pytest.raises(MachineError, match=message):
        run(body, x, memory_of_map(), out)


def test_reads_of_other_warps_end_before_a_load_begins() -> None:
    read = f"@%p3 ld.shared.b32 %r40, [{SHARED_BASE}];\n"
    x, out = torch.zeros(ROWS, COLUMNS, dtype=torch.int16), torch.zeros(1024)
    begin, end = INIT.format(1) + make_map(128), load(0, 0, 128) + wait(0)
    barrier, fence = "bar.sync 0;\n", "fence.proxy.async;\n"
    run(begin + read + fence + barrier + end, x, memory_of_map(), out)
    run(begin + read + barrier + fence + end, x, memory_of_map(), out)
    machine = run(begin + read + barrier + end, x, memory_of_map(), out, unfenced=["read"])
    assert machine.order.passed == {"read"}
    for between, message in (("", "another warp reads"), (barrier, "generic proxy read")):
        with pytest.raises(MachineError, match=message):
            run(begin + read + between + end, x, memory_of_map(), out)


STORE = f"""mov.b32 %r30, 64;
mov.b32 %r31, 3;
mov.b32 %r32, {SHARED_BASE};
@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{%r30, %r31}}], [%r32];
@%p1 cp.async.bulk.commit_group;
"""
STORED = {
    "map": make_map(128),
    "fill": fill("%rd3", 1024, threads=32).replace("ld.", "@%p2 ld.").replace("st.", "@%p2 st."),
    "fence": "fence.proxy.async.shared::cta;",
    "barrier": "bar.sync 0;",
    "store": STORE,
    "wait": "@%p1 cp.async.bulk.wait_group.read 0;\nbar.sync 0;",
}


def test_a_store_writes_what_is_inside() -> None:
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.int16)
    values = torch.arange(BOX * 64).to(torch.int16)
    run("\n".join(STORED.values()), x, memory_of_map(), values)
    pieces = values.view(BOX, 8, 8)
    box = torch.stack([pieces[row, torch.arange(8) ^ row] for row in range(BOX)])
    expected = torch.zeros_like(x)
    expected[3:, 64:] = box.view(BOX, 64)[: ROWS - 3]
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fence": ""}, r"no fence\.proxy\.async"),
        ({"wait": "bar.sync 0;\n@%p3 st.shared.b32 [1024], %r1;"}, "may still read"),
        ({"wait": ""}, "ends before a copy"),
    ],
)
def test_stores_need_fences_and_waits(changes: dict[str, str], message: str) -> None:
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.int16)
    with pytest.raises(MachineError, match=message):
        run("\n".join((STORED | changes).values()), x, memory_of_map(), torch.zeros(256))
