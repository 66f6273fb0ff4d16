"""Bad input: the right exception, naming the argument, what came and what is expected.

Each message once, by the front end; then all cases on every backend, in place, where nothing may
be written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cases import KERNELS, REFERENCE, Target, every_target, factors, two_sets
from decode_truth import bits

from longrope_kernels import FactorSet, Rope, apply_rotary
from longrope_kernels.backends import choose as backends

Arguments = dict[str, Any]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Bad:
    """``change`` makes good arguments bad; the message must name, and hold each of ``says``."""

    id: str
    names: str
    error: type[Exception]
    change: Callable[[Arguments], Arguments | None]
    says: tuple[str, ...] = ()


def replace(**values: Any) -> Callable[[Arguments], Arguments]:
    return lambda _: values


def raw(**values: Any) -> Callable[[Arguments], Arguments]:
    """Raw factors in place of the Rope, and ``values`` over them."""
    return lambda _: {"factors": factors(8), "n_hat": 0, **values}


def several(**values: Any) -> Callable[[Arguments], Arguments]:
    """A Rope of two sets, and ``values`` over it."""
    return lambda _: {"factors": two_sets(8), **values}


def packed(**values: Any) -> Callable[[Arguments], Arguments]:
    """Packed tokens of two sequences with their sets, and ``values`` over them."""
    return lambda _: {
        "q": torch.randn(5, 4, 16),
        "k": torch.randn(5, 2, 16),
        "layout": "thd",
        "factors": two_sets(8),
        "lengths": torch.tensor([3, 9000]),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        **values,
    }


def strided(name: str, heads: int) -> Callable[[Arguments], Arguments]:
    return lambda _: {name: torch.randn(2, 5, heads, 32)[..., ::2]}


Q_SHAPES = ("(2, 5, 64)", "batch, seq, heads, dim")
QK = [
    Bad("q-list", "q", TypeError, replace(q=[1.0]), ("list", "tensor")),
    Bad("q-rank", "q", ValueError, replace(q=torch.randn(2, 5, 64)), Q_SHAPES),
    Bad("k-rank", "k", ValueError, replace(k=torch.randn(2, 5, 64)), Q_SHAPES),
    Bad("q-rank-thd", "q", ValueError, replace(layout="thd"), ("(2, 5, 4, 16)", "tokens")),
    Bad("q-int", "q", TypeError, lambda a: {"q": a["q"].int()}, ("int32", "float32")),
    Bad("q-complex", "q", TypeError, lambda a: {"q": a["q"] * 1j}, ("complex64", "float32")),
    Bad("k-list", "k", TypeError, replace(k=[1.0]), ("list", "tensor")),
    Bad("k-dtype", "k", TypeError, lambda a: {"k": a["k"].half()}, ("float16", "float32")),
    Bad("k-device", "k", ValueError, lambda a: {"k": a["k"].to("meta")}, ("meta", "device of q")),
    Bad("k-batch", "k", ValueError, replace(k=torch.randn(3, 5, 2, 16)), ("batch 2", "(3, 5,")),
    Bad("k-seq", "k", ValueError, replace(k=torch.randn(2, 6, 2, 16)), ("seq 5", "(2, 6,")),
    Bad("k-dim", "k", ValueError, replace(k=torch.randn(2, 5, 2, 32)), ("dim 16", "2, 32)")),
    Bad("q-dim-small", "q", ValueError, replace(q=torch.randn(2, 5, 4, 15)), ("16", "15")),
    Bad("k-dim-small", "k", ValueError, replace(k=torch.randn(2, 5, 2, 14)), ("16", "14")),
    Bad("q-stride", "q", ValueError, strided("q", 4), ("unit stride", "contiguous")),
    Bad("k-stride", "k", ValueError, strided("k", 2), ("unit stride", "contiguous")),
    Bad("layout", "layout", ValueError, replace(layout="bsdh"), ("bsdh", "bshd", "bhsd", "thd")),
    Bad("layout-list", "layout", ValueError, replace(layout=["bshd"]), ("['bshd']", "bshd")),
    Bad("layout-none", "layout", ValueError, replace(layout=None), ("None", "bshd")),
    Bad("backend", "backend", ValueError, replace(backend="cudnn"), ("cudnn", "reference")),
]

INT64_OVER = torch.tensor([0, 1, 2, 3, 2**31])
INT64_UNDER = torch.tensor([0, 1, 2, 3, -(2**31) - 1])
POSITIONS = [
    Bad("list", "positions", TypeError, replace(positions=[0, 1, 2, 3, 4]), ("list",)),
    Bad("float", "positions", TypeError, replace(positions=torch.rand(5)), ("float32", "int64")),
    Bad("int16", "positions", TypeError, replace(positions=torch.zeros(5).short()), ("int16",)),
    Bad("short", "positions", ValueError, replace(positions=torch.arange(4)), ("(4,)", "(5,)")),
    Bad("scalar", "positions", ValueError, replace(positions=torch.tensor(4)), ("()", "(5,)")),
    Bad("batch", "positions", ValueError, replace(positions=torch.zeros(3, 5).long()), ("(3, 5)",)),
    Bad(
        "turned", "positions", ValueError, replace(positions=torch.zeros(5, 2).long()), ("(2, 5)",)
    ),
    Bad("3d", "positions", ValueError, replace(positions=torch.zeros(1, 2, 5).long()), ("(2, 5)",)),
    Bad(
        "device",
        "positions",
        ValueError,
        replace(positions=torch.zeros(5, device="meta").long()),
        ("meta", "device of q"),
    ),
    Bad("high", "positions", ValueError, replace(positions=INT64_OVER), (str(2**31), "2**31 - 1")),
    Bad("low", "positions", ValueError, replace(positions=INT64_UNDER), (str(-(2**31) - 1),)),
    Bad(
        "high-in-int64-batch",
        "positions",
        ValueError,
        replace(positions=torch.stack((torch.arange(5), INT64_OVER))),
        (str(2**31),),
    ),
    Bad("thd-rank", "positions", ValueError, packed(positions=torch.zeros(2, 5).long()), ("(5,)",)),
]


def one_bad(value: float) -> list[float]:
    return [*factors(7), value]


FACTORS = [
    Bad("nan", "factors", ValueError, raw(factors=one_bad(NAN)), ("nan", "7")),
    Bad("inf", "factors", ValueError, raw(factors=one_bad(INF)), ("inf", "7")),
    Bad("zero", "factors", ValueError, raw(factors=one_bad(0.0)), ("0.0", "above 0")),
    Bad("negative", "factors", ValueError, raw(factors=one_bad(-2.0)), ("-2.0", "above 0")),
    Bad("empty", "factors", ValueError, raw(factors=[]), ("(0,)",)),
    Bad("string", "factors", TypeError, raw(factors="abc"), ("abc",)),
    Bad("none", "factors", TypeError, raw(factors=None), ("None",)),
    Bad("number", "factors", TypeError, raw(factors=2.0), ("2.0",)),
    Bad("2d", "factors", ValueError, raw(factors=torch.ones(1, 8)), ("(1, 8)", "(P,)")),
    Bad("int", "factors", TypeError, raw(factors=torch.ones(8).int()), ("int32", "floating")),
    Bad("grad", "factors", ValueError, raw(factors=torch.ones(8, requires_grad=True)), ("grad",)),
    Bad("tensor-nan", "factors", ValueError, raw(factors=torch.tensor(one_bad(NAN))), ("nan",)),
    Bad("tensor-zero", "factors", ValueError, raw(factors=torch.tensor(one_bad(0))), ("0.0",)),
    Bad("n_hat-beside", "factors", ValueError, replace(n_hat=3), ("Rope", "n_hat")),
    Bad("n_hat-0-beside", "factors", ValueError, replace(n_hat=0), ("Rope", "n_hat")),
    Bad("base-beside", "factors", ValueError, replace(base=5e5), ("Rope", "base")),
    Bad("pairing-beside", "factors", ValueError, replace(interleaved=True), ("interleaved",)),
    Bad("attention-beside", "factors", ValueError, replace(attention_factor=2.0), ("attention_f",)),
]
NUMBERS = [
    Bad("none", "n_hat", TypeError, raw(n_hat=None), ("None", "int")),
    Bad("negative", "n_hat", ValueError, raw(n_hat=-1), ("-1", "from 0")),
    Bad("large", "n_hat", ValueError, raw(n_hat=2**31), (str(2**31), "2**31 - 1")),
    Bad("float", "n_hat", TypeError, raw(n_hat=1.5), ("1.5",)),
    Bad("bool", "n_hat", TypeError, raw(n_hat=True), ("True",)),
    Bad("list", "n_hat", TypeError, raw(n_hat=[0]), ("[0]", "whole number")),
    Bad("zero", "base", ValueError, raw(base=0.0), ("0.0", "above 0")),
    Bad("negative", "base", ValueError, raw(base=-1e4), ("-10000.0", "above 0")),
    Bad("nan", "base", ValueError, raw(base=NAN), ("nan", "finite")),
    Bad("string", "base", TypeError, raw(base="1e4"), ("1e4",)),
    Bad("list", "base", TypeError, raw(base=[1e4]), ("[10000.0]", "number")),
    Bad("zero", "attention_factor", ValueError, raw(attention_factor=0.0), ("0.0", "above 0")),
    Bad("nan", "attention_factor", ValueError, raw(attention_factor=NAN), ("nan", "finite")),
    Bad("string", "attention_factor", TypeError, raw(attention_factor="1"), ("'1'",)),
    Bad("number", "interleaved", TypeError, raw(interleaved=2), ("2", "bool")),
]
LONG = torch.tensor([5, 5000])
SELECTION = [
    Bad("none", "lengths", ValueError, several(), ("sets", "2 factor sets", "(2,)")),
    Bad("list", "lengths", TypeError, several(lengths=[5, 5000]), ("list",)),
    Bad("float", "lengths", TypeError, several(lengths=LONG.float()), ("float32", "int64")),
    Bad("shape", "lengths", ValueError, several(lengths=torch.ones(5).int()), ("(2,)", "(5,)")),
    Bad("2d", "lengths", ValueError, several(lengths=LONG[None]), ("(2,)", "(1, 2)")),
    Bad("device", "lengths", ValueError, several(lengths=LONG.to("meta")), ("meta",)),
    Bad("negative", "lengths", ValueError, several(lengths=torch.tensor([5, -1])), ("-1",)),
    Bad("int64", "sets", TypeError, several(sets=torch.tensor([0, 1])), ("int64", "int32")),
    Bad("shape", "sets", ValueError, several(sets=torch.ones(3).int()), ("(2,)", "(3,)")),
    Bad("high", "sets", ValueError, several(sets=torch.tensor([0, 2]).int()), ("2", "0 to 1")),
    Bad("low", "sets", ValueError, several(sets=torch.tensor([-1, 0]).int()), ("-1", "0 to 1")),
    Bad("layout", "cu_seqlens", ValueError, several(lengths=LONG, cu_seqlens=LONG), ("thd",)),
    Bad("float", "cu_seqlens", TypeError, packed(cu_seqlens=torch.zeros(3)), ("float32",)),
    Bad("list", "cu_seqlens", TypeError, packed(cu_seqlens=[0, 2, 5]), ("list",)),
    Bad("2d", "cu_seqlens", ValueError, packed(cu_seqlens=LONG[None]), ("(1, 2)", "+ 1")),
    Bad("one", "cu_seqlens", ValueError, packed(cu_seqlens=LONG[:1]), ("(1,)", "+ 1")),
    Bad("start", "cu_seqlens", ValueError, packed(cu_seqlens=torch.tensor([1, 2, 5])), ("[1, 2",)),
    Bad("end", "cu_seqlens", ValueError, packed(cu_seqlens=torch.tensor([0, 2, 4])), ("5",)),
    Bad("past", "cu_seqlens", ValueError, packed(cu_seqlens=torch.tensor([0, 2, 6])), ("6",)),
    Bad(
        "descending",
        "cu_seqlens",
        ValueError,
        packed(cu_seqlens=torch.tensor([0, 4, 2, 5]), lengths=torch.ones(3).int()),
        ("ascending",),
    ),
    Bad(
        "lengths",
        "lengths",
        ValueError,
        packed(cu_seqlens=torch.tensor([0, 1, 2, 5])),
        ("(3,)", "(2,)"),
    ),
]


def by_id(cases: list[Bad]) -> list[Any]:
    return [pytest.param(case, id=f"{case.names}-{case.id}") for case in cases]


def good(target: Target) -> Arguments:
    return {
        "q": torch.randn(2, 5, 4, 16),
        "k": torch.randn(2, 5, 2, 16),
        "positions": torch.arange(5),
        "factors": Rope(FactorSet(factors(8))),
        "backend": target.backend,
    }


INPLACE = Bad("inplace", "inplace", TypeError, replace(inplace="no"), ("'no'", "bool"))
CASES = [*QK, *POSITIONS, *FACTORS, *NUMBERS, *SELECTION, INPLACE]


def message(bad: Bad, call: Callable[..., object], arguments: Arguments) -> str:
    """What the call raises; no tensor may have changed."""
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and not x.is_meta}
    before = {name: bits(x) for name, x in tensors.items()}
    with pytest.raises(bad.error) as raised:
        call(**arguments)
    for name, x in tensors.items():
        assert torch.equal(bits(x), before[name]), (bad.id, name)
    text = str(raised.value)
    assert re.search(rf"(?<!\w){bad.names}(?!\w)", text), text
    return text


def assert_says(bad: Bad, text: str) -> None:
    for said in bad.says:
        assert said in text, f"{said!r} is not in: {text}"


def changed(target: Target, bad: Bad) -> Arguments:
    """Good arguments made bad, on the device of the target."""
    arguments = good(target)
    arguments.update(bad.change(arguments) or {})
    return {
        name: x if isinstance(x, torch.Tensor) and x.is_meta else target.move(x)
        for name, x in arguments.items()
    }


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are read on every device."""
    monkeypatch.setenv("LONGROPE_CHECK", "1")


@pytest.mark.parametrize("bad", by_id(CASES))
def test_bad_input(bad: Bad) -> None:
    assert_says(bad, message(bad, apply_rotary, changed(REFERENCE, bad)))


@every_target
def test_nothing_is_written(target: Target, checked: None) -> None:
    for bad in CASES:
        arguments = changed(target, bad)
        assert_says(bad, message(bad, partial(apply_rotary, inplace=True), arguments))


@pytest.mark.parametrize("name", ["sets", "cu_seqlens", "lengths"])
@every_target
def test_one_set_still_checks_shapes_and_dtypes(target: Target, name: str) -> None:
    """A selection that one set does not need is not read, but a float is a mistake all the same."""
    arguments = {n: target.move(x) for n, x in good(target).items()}
    arguments[name] = target.move(torch.rand(2))
    with pytest.raises(TypeError, match=name):
        apply_rotary(**arguments)


@pytest.mark.parametrize("target", KERNELS)
def test_float64_is_for_the_reference(target: Target) -> None:
    q = target.move(torch.randn(1, 3, 2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"backend.*float64.*reference"):
        target.rotary(q, None, torch.arange(3), Rope.plain(16))


@pytest.mark.parametrize("target", KERNELS)
def test_a_backend_that_is_not_there_raises_and_never_falls_back(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: f"{name} needs a frobnicator")
    with pytest.raises(RuntimeError, match=f"backend.*{target.backend}.*needs a frobnicator"):
        target.rotary(torch.randn(1, 3, 2, 16), None, torch.arange(3), Rope.plain(16))


@pytest.mark.parametrize("target", KERNELS)
def test_the_choice_passes_over_what_is_missing(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "missing", lambda n: None if n == "reference" else f"no {n}")
    assert backends.choose_rotary(None, target.device, False) == "reference"


def test_positional_and_keyword_positions_of_the_signature() -> None:
    """The signature of the documentation: five positional arguments, the rest by keyword."""
    q, rope = torch.randn(1, 3, 2, 16), Rope.plain(16)
    apply_rotary(q, None, torch.arange(3), (1.0,) * 8, 0, base=1e4)
    with pytest.raises(TypeError):
        apply_rotary(q, None, torch.arange(3), rope, None, 1e4)
