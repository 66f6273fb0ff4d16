"""The ops as torch.library sees them: opcheck, fake tensors, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Shape, Target, every_kernel, every_target, factors, positions_for, two_sets
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from longrope_kernels import FactorSet, Rope, apply_rotary
from longrope_kernels.calls import schema
from longrope_kernels.calls.records import RotaryCall, Selection

ops = torch.ops.longrope_kernels
CPU = torch.device("cpu")
HEADS = {"q-and-k": (2, 1), "no-k": (2, 0)}


def op_arguments(
    target: Target, kv_heads: int, requires_grad: bool, selection: str, conjugate: bool = False
) -> tuple[Any, ...]:
    """What the public function hands to the ops, by hand."""
    q, k = torch.randn(2, 5, 2, 16), torch.randn(2, 5, kv_heads, 16)
    q, k = (target.move(x).requires_grad_(requires_grad) for x in (q, k))
    tables = two_sets(6).tables(torch.device(target.device))
    lengths = target.move(torch.tensor([5, 5000])) if selection == "lengths" else None
    sets = target.move(torch.tensor([1, 0], dtype=torch.int32)) if selection == "sets" else None
    positions = target.move(positions_for(10, 7).reshape(2, 5))
    call = RotaryCall(q, k, positions, tables, Selection(lengths, sets), conjugate)
    return (*schema.flatten(call), target.backend)


# Each pair of the three once.
CHECKED = [
    ("q-and-k", "lengths", True),
    ("q-and-k", "sets", False),
    ("no-k", "lengths", False),
    ("no-k", "sets", True),
]


@pytest.mark.parametrize(("heads", "selection", "requires_grad"), CHECKED)
@every_kernel
def test_opcheck_rotary(target: Target, heads: str, selection: str, requires_grad: bool) -> None:
    kv_heads = HEADS[heads][1]
    arguments = op_arguments(target, kv_heads, requires_grad, selection, requires_grad)
    torch.library.opcheck(ops.rotary.default, arguments)


@pytest.mark.parametrize("kv_heads", HEADS.values(), ids=HEADS)
@every_kernel
def test_opcheck_rotary_inplace(target: Target, kv_heads: tuple[int, int]) -> None:
    arguments = op_arguments(target, kv_heads[1], False, "lengths")
    torch.library.opcheck(ops.rotary_.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kernel
def test_opcheck_frequencies(target: Target, dtype: torch.dtype) -> None:
    values = target.move(torch.tensor(factors(6), dtype=dtype))
    torch.library.opcheck(ops.frequencies.default, (values, 10000.0))


@every_target
def test_frequencies_are_those_of_a_rope(target: Target) -> None:
    values = target.move(torch.tensor(factors(6), dtype=torch.float64))
    inv_freq, steps = ops.frequencies(values, 5e5)
    wanted = Rope(FactorSet(factors(6)), base=5e5).tables(CPU)
    assert inv_freq.shape == wanted.inv_freq.shape
    error = (inv_freq.cpu() - wanted.inv_freq).abs() / wanted.inv_freq
    assert error.max() <= 4 * torch.finfo(torch.float64).eps
    drift = (steps.cpu() - wanted.steps).double().abs() / wanted.steps.double().abs()
    assert drift.max() <= 2.0**-50


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("where", ["made-inside", "made-outside"])
@every_target
def test_fake_tensors(target: Target, where: str, layout: str, inplace: bool) -> None:
    """Shapes, dtypes, devices and strides without data; nothing fake is left behind."""
    shape = Shape(1, 5, 4, 2, 16, layout=layout, dtype=torch.bfloat16)
    lengths = torch.tensor([5000])
    real = [target.move(x) for x in (*shape.qk(), torch.arange(5), lengths)]
    rope = two_sets(8)
    with FakeTensorMode() as mode:
        if where == "made-inside":
            rope = two_sets(8)
        q, k, positions, lengths = (mode.from_tensor(x) for x in real)
        fake = target.rotary(q, k, positions, rope, lengths=lengths, layout=layout, inplace=inplace)
    q, k, positions, lengths = real
    outs = target.rotary(q, k, positions, rope, lengths=lengths, layout=layout, inplace=inplace)
    wanted = target.rotary(q, k, positions, two_sets(8), lengths=lengths, layout=layout)
    for imagined, out, other in zip(fake, outs, wanted, strict=True):
        assert isinstance(imagined, FakeTensor)
        assert not isinstance(out, FakeTensor)
        assert imagined.shape == out.shape
        assert imagined.dtype == out.dtype
        assert imagined.device == out.device
        assert imagined.stride() == out.stride()
        assert inplace or torch.equal(out, other)
    assert not any(isinstance(table, FakeTensor) for table in rope.tables(CPU))


@every_target
def test_autocast_changes_nothing(target: Target) -> None:
    """The rotation keeps the dtype it is given; float32 stays float32 inside and outside."""
    shape = Shape(1, 18, 2, 1, 32)
    q, k = shape.qk()
    args = (q, k, positions_for(18, 128), shape.rope())
    wanted = target.rotary(*args)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        got = target.rotary(*args)
    for mine, other in zip(got, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other)


@every_target
def test_projection_under_autocast(target: Target) -> None:
    """As in a model: a bf16 projection under autocast, its float32 weight gets a gradient."""
    weight = target.move(torch.randn(32, 32)).requires_grad_()
    x = target.move(torch.randn(1, 6, 32))
    with torch.autocast(target.device, dtype=torch.bfloat16):
        q = torch.nn.functional.linear(x, weight).unflatten(-1, (2, 16))
        out, _ = target.rotary(q, None, torch.arange(6), Rope.plain(16))
        assert out.dtype == torch.bfloat16
        out.square().mean().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
@every_target
def test_q_and_k_of_two_dtypes_under_autocast(target: Target, inplace: bool) -> None:
    """A norm makes float32 of one of them: each keeps its dtype, and what it gives alone."""
    shape = Shape(1, 18, 2, 1, 32)
    q, k = shape.qk()
    pairs = [(q, k.to(torch.bfloat16)), (q.to(torch.float16), k)]
    at, rope = positions_for(18, 128), shape.rope()
    for q, k in pairs:
        wanted = [target.rotary(x.clone(), None, at, rope)[0] for x in (q, k)]
        with torch.autocast(target.device, dtype=torch.bfloat16):
            got = target.rotary(q.clone(), k.clone(), at, rope, inplace=inplace)
        for mine, other in zip(got, wanted, strict=True):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)
        with pytest.raises(TypeError, match="k: expected the dtype of q"):
            target.rotary(q, k, at, rope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_the_reference_under_autocast(dtype: torch.dtype) -> None:
    q = torch.randn(1, 18, 2, 32).to(dtype)
    args = (q, q, positions_for(18, 128), Shape(1, 18, 2, 1, 32).rope())
    wanted = apply_rotary(*args, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = apply_rotary(*args, backend="reference")
    assert all(map(torch.equal, got, wanted))
