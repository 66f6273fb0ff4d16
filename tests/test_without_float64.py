"""The reference on devices without float64: Apple's GPUs (mps), and some of Intel's (xpu).

There is none here. A CPU stands for it that is said to have no float64, and on which every operator
that makes a tensor of it raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import truth
from cases import special_positions, two_sets
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth import Expected

from longrope_kernels import Rope, apply_rotary, attention, decode
from longrope_kernels.backends import reference
from longrope_kernels.calls.records import Selection
from longrope_kernels.rope import raw, tables

CPU = torch.device("cpu")


class NoFloat64(TorchDispatchMode):
    """Raises where an operator returns a tensor of float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func}: no float64 on this device")
        return made


@contextmanager
def device_without_float64(*ropes: Rope) -> Iterator[None]:
    """A device of that kind, to which the tables of the ropes have come from the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "has_float64", lambda device: False)
        for rope in ropes:
            rope._tables[CPU] = rope.tables(CPU).to(CPU)
        with NoFloat64():
            yield


def test_the_guard_sees_float64() -> None:
    with pytest.raises(TypeError, match="no float64"), NoFloat64():
        torch.zeros(2).double()


@pytest.mark.parametrize(("device", "there"), [("mps", False), ("cpu", True), ("cuda", True)])
def test_which_devices_have_float64(device: str, there: bool) -> None:
    assert tables.has_float64(torch.device(device)) is there


@pytest.mark.parametrize("there", [False, True])
def test_an_xpu_says_itself(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        has_fp64 = there

    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda device: Properties, raising=False
    )
    assert tables.has_float64(torch.device("xpu")) is there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rotation_is_exact_and_its_gradient(dtype: torch.dtype, interleaved: bool) -> None:
    positions, lengths = special_positions(7)[None], torch.tensor([5000])
    x = torch.randn(1, positions.shape[1], 2, 20).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    rope = two_sets(8, interleaved=interleaved)
    with device_without_float64(rope):
        no_k = x[:, :, :0]
        q, _ = apply_rotary(x, no_k, positions, rope, lengths=lengths, backend="reference")
        q.backward(grad)
    assert_close(q, truth.rotary(x, positions, rope, lengths=lengths))
    assert x.grad is not None
    assert_close(x.grad, truth.rotary(grad, positions, rope, lengths=lengths, backward=True))


def test_cosines_are_within_the_promise_at_any_position() -> None:
    """1e-6, of which the angle takes 3e-7 at most."""
    positions = torch.randint(-(2**31), 2**31, (1, 4000))
    rope = Rope.plain(96)
    with device_without_float64(rope):
        cos, sin = reference.cos_sin(rope.tables(CPU), Selection(), positions)
    angle = truth.angles(rope.base, [1.0] * rope.pairs, positions)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos.double() - angle.cos()).abs().max() < 5e-7
    assert (sin.double() - angle.sin()).abs().max() < 5e-7


def test_attention_is_as_right_as_with_float64() -> None:
    q, k, v = torch.randn(1, 40, 2, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    positions, lengths = torch.arange(131000, 131040), torch.tensor([131040])

    def attend(rope: Rope, dtype: torch.dtype) -> torch.Tensor:
        three = (x.to(dtype) for x in (q, k, v))
        out = attention(*three, positions, rope, lengths=lengths, window=9, backend="reference")
        assert isinstance(out, torch.Tensor)
        return out

    rope = two_sets(8)
    with device_without_float64(rope):
        out = attend(rope, torch.float32)
    low = attend(two_sets(8), torch.float32)
    assert_close(out, Expected(attend(two_sets(8), torch.float64), low))


def test_decode_is_as_right_as_with_float64() -> None:
    q, k, v = torch.randn(2, 1, 2, 16), torch.randn(2, 70, 1, 16), torch.randn(2, 70, 1, 16)
    lens = torch.tensor([70, 33])

    def attend(rope: Rope, dtype: torch.dtype) -> torch.Tensor:
        three = (x.to(dtype) for x in (q, k, v))
        out = decode(*three, lens, rope, backend="reference")
        assert isinstance(out, torch.Tensor)
        return out

    rope = two_sets(8)
    with device_without_float64(rope):
        out = attend(rope, torch.float32)
    low = attend(two_sets(8), torch.float32)
    assert_close(out, Expected(attend(two_sets(8), torch.float64), low))


def test_factors_on_the_device_go_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    x, factors = torch.randn(1, 5, 1, 8), torch.tensor([1.0, 1.5, 2.0, 8.0])
    exact, _ = apply_rotary(x, x, torch.arange(70000, 70005), factors, 3)
    copied = []
    monkeypatch.setattr(raw, "has_float64", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copied.append(x) or x.clone())
    out, _ = apply_rotary(x, x, torch.arange(70000, 70005), factors, 3)
    assert copied[0] is factors
    assert torch.equal(out, exact)
