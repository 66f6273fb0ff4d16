"""The machine of tests/ptx itself: wgmma.

Kernels of a few lines, written by hand, against numpy; and that what the PTX ISA forbids raises.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ptx.by_hand import run
from ptx.machine import SHARED_BASE, MachineError


def fill(of: str, size: int, at: int = 0, threads: int = 128) -> str:
    """Shared memory from ``at`` on becomes ``size`` bytes of the tensor at a register."""
    lines = ["cvt.u64.u32 %rd90, %r2;", f"add.s64 %rd91, {of}, %rd90;"]
    for i in range(0, size, 16 * threads):
        lines += [f"ld.global.v4.b32 {{%r90, %r91, %r92, %r93}}, [%rd91+{i}];"]
        to = SHARED_BASE + at + i
        lines += [f"st.shared.v4.b32 [%r2+{to}], {{%r90, %r91, %r92, %r93}};"]
    return "\n".join(lines)


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
    run("\n".join(body.values()), x, unfenced_copies=True)


def test_fewer_than_four_warps_multiply_nothing() -> None:
    with pytest.raises(MachineError, match="warps of four"):
        run("wgmma.commit_group.sync.aligned;", threads=96)
