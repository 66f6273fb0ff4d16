"""`Rope` as a value: frozen, compared by its numbers, checked once, its tables kept."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from cases import factors, two_sets

from longrope_kernels import FactorSet, Rope, apply_rotary

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------- value


def test_frozen() -> None:
    rope = two_sets(8)
    with pytest.raises(FrozenInstanceError):
        rope.base = 5.0
    with pytest.raises(FrozenInstanceError):
        rope.sets[0].n_hat = 5


def test_equality_and_hash_are_of_the_numbers() -> None:
    one, other = two_sets(8), two_sets(8)
    assert one == other
    assert hash(one) == hash(other)
    one.tables(CPU)
    assert one == other, "tables are a cache and no part of the value"
    assert hash(one) == hash(other)
    different = [
        two_sets(9),
        two_sets(8, base=500000.0),
        two_sets(8, interleaved=True),
        Rope(one.sets[0]),
        Rope((FactorSet(one.sets[0].factors, 1, 1.05, 4096), one.sets[1])),
        Rope((FactorSet(one.sets[0].factors, 0, 1.06, 4096), one.sets[1])),
        Rope((FactorSet(one.sets[0].factors, 0, 1.05, 4095), one.sets[1])),
    ]
    assert all(one != rope for rope in different)
    assert len({one, other, *different}) == 1 + len(different)


def test_numbers_of_any_sequence_are_the_same_value() -> None:
    wanted = Rope((FactorSet((1.0, 2.5)),))
    for values in ([1, 2.5], (1.0, 2.5), torch.tensor([1.0, 2.5]), iter([1.0, 2.5])):
        assert Rope(FactorSet(values)) == wanted
    assert Rope([FactorSet([1, 2.5])], base=10000) == wanted
    assert hash(Rope([FactorSet([1, 2.5])], base=10000)) == hash(wanted)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda rope: pickle.loads(pickle.dumps(rope))]
)
@pytest.mark.parametrize("warm", [False, True], ids=["no-tables", "with-tables"])
def test_copies(duplicate: Any, warm: bool) -> None:
    rope = two_sets(8, base=5e5, interleaved=True)
    if warm:
        rope.tables(CPU)
    again = duplicate(rope)
    assert again == rope
    for mine, other in zip(tensors_of(again), tensors_of(rope), strict=True):
        assert torch.equal(mine, other)


def test_repr_shows_the_numbers_and_no_tables() -> None:
    rope = Rope(FactorSet((1.0, 2.0), 7))
    rope.tables(CPU)
    assert eval(repr(rope), {"Rope": Rope, "FactorSet": FactorSet}) == rope


def test_sizes() -> None:
    rope = two_sets(24)
    assert rope.pairs == 24
    assert rope.rotary_dim == 48
    assert Rope.plain(2).pairs == 1


# ---------------------------------------------------------------------------------------- tables


def tensors_of(rope: Rope) -> list[torch.Tensor]:
    return [x for x in rope.tables(CPU) if isinstance(x, torch.Tensor)]


def test_tables_are_made_once_and_kept() -> None:
    rope = two_sets(8)
    assert rope.to("cpu") is rope
    assert CPU in rope._tables
    assert rope.tables(CPU) is rope.tables(CPU)


def test_a_call_makes_the_tables() -> None:
    rope = Rope.plain(16)
    apply_rotary(torch.randn(1, 3, 2, 16), None, torch.arange(3), rope, backend="reference")
    assert CPU in rope._tables


def test_steps_are_the_rounded_fraction_of_a_turn() -> None:
    """``round(2**64 * theta / (2 pi lambda))``, by mpmath, as signed 64-bit integers."""
    import mpmath

    values = (1.0, 0.07, 64.3, 1e-3)
    rope = Rope(FactorSet(values), base=500000.0)
    steps = rope.tables(CPU).steps[0]
    assert steps.dtype == torch.int64
    with mpmath.workdps(60):
        for row, lambdas in enumerate(((1.0,) * 4, values)):
            for i, value in enumerate(lambdas):
                theta = mpmath.mpf(500000) ** (-mpmath.mpf(i) / 4) / mpmath.mpf(value)
                wanted = int(mpmath.nint(theta * 2**64 / (2 * mpmath.pi))) % 2**64
                assert int(steps[row, i]) % 2**64 == wanted


def test_default_device_and_dtype_do_not_change_the_tables() -> None:
    wanted = tensors_of(two_sets(8))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = tensors_of(two_sets(8))
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(got, wanted, strict=True):
        assert torch.equal(mine, other)
        assert mine.dtype == other.dtype


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 1.5])
def test_a_device_that_is_not_here_is_named(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device: expected one that is here, got {device!r}: "):
        two_sets(8).to(device)


def test_tables_made_in_inference_mode_serve_training() -> None:
    rope = two_sets(8)
    with torch.inference_mode():
        rope.to("cpu")
    q = torch.randn(1, 3, 2, 16, requires_grad=True)
    lengths = torch.tensor([5000])
    for backend in ("reference", None):
        out, _ = apply_rotary(q, None, torch.arange(3), rope, lengths=lengths, backend=backend)
        out.sum().backward()
    assert q.grad is not None


# ------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("length", "index"),
    [(0, 0), (1, 0), (4096, 0), (4097, 1), (131072, 1), (131073, 2), (10**9, 2)],
)
def test_set_index(length: int, index: int) -> None:
    bounds = (4096, 131072, 262144)
    for last in (262144, None):
        sets = [FactorSet((1.0,), max_length=b) for b in (*bounds[:2], last)]
        assert Rope(tuple(sets)).set_index(length) == index


def test_set_index_of_one_set() -> None:
    assert Rope(FactorSet((1.0,), max_length=10)).set_index(11) == 0
    assert Rope.plain(4).set_index(2**31) == 0


# -------------------------------------------------------------------------------------- validation


BAD_SETS = [
    ("factors", ValueError, {"factors": ()}),
    ("factors", ValueError, {"factors": (1.0, NAN)}),
    ("factors", ValueError, {"factors": (1.0, INF)}),
    ("factors", ValueError, {"factors": (1.0, 0.0)}),
    ("factors", ValueError, {"factors": (1.0, -1.0)}),
    ("factors", TypeError, {"factors": "ab"}),
    ("factors", TypeError, {"factors": 1.0}),
    ("factors", TypeError, {"factors": None}),
    ("factors", TypeError, {"factors": (1.0, None)}),
    ("factors", TypeError, {"factors": torch.ones(2, 2)}),
    ("n_hat", ValueError, {"n_hat": -1}),
    ("n_hat", ValueError, {"n_hat": 2**31}),
    ("n_hat", TypeError, {"n_hat": 1.0}),
    ("n_hat", TypeError, {"n_hat": True}),
    ("n_hat", TypeError, {"n_hat": None}),
    ("attention_factor", ValueError, {"attention_factor": 0.0}),
    ("attention_factor", ValueError, {"attention_factor": -1.0}),
    ("attention_factor", ValueError, {"attention_factor": NAN}),
    ("attention_factor", ValueError, {"attention_factor": INF}),
    ("attention_factor", TypeError, {"attention_factor": "1"}),
    ("attention_factor", TypeError, {"attention_factor": None}),
    ("attention_factor", TypeError, {"attention_factor": True}),
    ("max_length", ValueError, {"max_length": 0}),
    ("max_length", ValueError, {"max_length": -4}),
    ("max_length", ValueError, {"max_length": 2**31 + 1}),
    ("max_length", (TypeError, ValueError), {"max_length": 4096.0}),
]


@pytest.mark.parametrize(("name", "error", "values"), BAD_SETS)
def test_bad_factor_sets(name: str, error: type[Exception], values: dict[str, Any]) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .*got "):
        FactorSet(**{"factors": (1.0, 2.0), **values})


SHORT, LONG = FactorSet((1.0, 2.0), max_length=4096), FactorSet((3.0, 4.0))
BAD_ROPES = [
    ("sets", TypeError, {"sets": ()}),
    ("sets", TypeError, {"sets": (SHORT, (1.0, 2.0))}),
    ("sets", ValueError, {"sets": (SHORT, FactorSet((1.0,)))}),
    ("sets", ValueError, {"sets": (LONG, SHORT)}),
    ("sets", ValueError, {"sets": (SHORT, SHORT)}),
    ("sets", ValueError, {"sets": (LONG, LONG)}),
    ("base", ValueError, {"base": 0.0}),
    ("base", ValueError, {"base": -1.0}),
    ("base", ValueError, {"base": NAN}),
    ("base", ValueError, {"base": INF}),
    ("base", TypeError, {"base": "1e4"}),
    ("base", TypeError, {"base": None}),
    ("interleaved", TypeError, {"interleaved": 1}),
    ("interleaved", TypeError, {"interleaved": "half"}),
]


@pytest.mark.parametrize(("name", "error", "values"), BAD_ROPES)
def test_bad_ropes(name: str, error: type[Exception], values: dict[str, Any]) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .*got "):
        Rope(**{"sets": (SHORT, LONG), **values})


@pytest.mark.parametrize("rotary_dim", [0, -2, 3, 2.0, None, True])
def test_bad_plain(rotary_dim: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^rotary_dim: expected .*got "):
        Rope.plain(rotary_dim)


# ------------------------------------------------------------------------------------ constructors


def test_plain() -> None:
    rope = Rope.plain(96, base=500000.0, interleaved=True)
    assert rope.sets == (FactorSet((1.0,) * 48),)
    assert rope.base == 500000.0
    assert rope.interleaved


def test_longrope() -> None:
    short, long = factors(8, 1.0), factors(8, 9.0)
    rope = Rope.longrope(short, long, 4096, 131072, n_hat=(0, 9), base=5e5, interleaved=True)
    a = math.sqrt(1 + math.log(32) / math.log(4096))
    assert a == pytest.approx(1.1902380714238083, abs=1e-15)
    assert [s.factors for s in rope.sets] == [short, long]
    assert [s.max_length for s in rope.sets] == [4096, None]
    assert [s.n_hat for s in rope.sets] == [0, 9]
    assert [s.attention_factor for s in rope.sets] == pytest.approx([a, a], abs=1e-15)
    assert rope.base == 5e5
    assert rope.interleaved


@pytest.mark.parametrize("longest", [4096, 4095, 1])
def test_longrope_attention_factor_is_1_when_not_extended(longest: int) -> None:
    rope = Rope.longrope((1.0,), (2.0,), 4096, longest)
    assert [s.attention_factor for s in rope.sets] == [1.0, 1.0]


def test_longrope_attention_factor_of_an_odd_extension() -> None:
    rope = Rope.longrope((1.0,), (2.0,), 8192, 100000)
    wanted = math.sqrt(1 + math.log(100000 / 8192) / math.log(8192))
    assert rope.sets[1].attention_factor == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("given", [1.25, (1.0, 1.25)])
def test_longrope_attention_factor_overrides(given: Any) -> None:
    wanted = list(given) if isinstance(given, tuple) else [given, given]
    for longest in (None, 131072):
        rope = Rope.longrope((1.0,), (2.0,), 4096, longest, attention_factor=given, n_hat=3)
        assert [s.attention_factor for s in rope.sets] == wanted
        assert [s.n_hat for s in rope.sets] == [3, 3]


BAD_LONGROPE = [
    ("max_position_embeddings", {"max_position_embeddings": None}),
    ("max_position_embeddings", {"max_position_embeddings": 0}),
    ("max_position_embeddings", {"max_position_embeddings": -1}),
    ("max_position_embeddings", {"max_position_embeddings": "131072"}),
    ("original_max_position_embeddings", {"original_max_position_embeddings": 0}),
    ("original_max_position_embeddings", {"original_max_position_embeddings": 1}),
    ("original_max_position_embeddings", {"original_max_position_embeddings": -4096}),
    ("original_max_position_embeddings", {"original_max_position_embeddings": "4096"}),
    ("original_max_position_embeddings", {"original_max_position_embeddings": None}),
    ("short_factor", {"short_factor": 1.0}),
    ("short_factor", {"short_factor": (0.0, 1.0)}),
    ("long_factor", {"long_factor": "ab"}),
    ("long_factor", {"long_factor": (NAN, 1.0)}),
    ("(long|short)_factor", {"long_factor": (1.0,)}),
    ("attention_factor", {"attention_factor": (1.0, 2.0, 3.0)}),
    ("attention_factor", {"attention_factor": "1"}),
    ("n_hat", {"n_hat": (1, 2, 3)}),
    ("n_hat", {"n_hat": -1}),
]


@pytest.mark.parametrize(("name", "values"), BAD_LONGROPE)
def test_bad_longrope(name: str, values: dict[str, Any]) -> None:
    good = {
        "short_factor": (1.0, 2.0),
        "long_factor": (3.0, 4.0),
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
    }
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*expected"):
        Rope.longrope(**{**good, **values})


@pytest.mark.parametrize(("length", "index"), [(1, 0), (4096, 0), (4097, 1), (2**31, 1)])
def test_for_length_is_one_set_at_any_length(length, index):
    rope = Rope.longrope(
        [1.0, 2.0], [3.0, 4.0], 4096, 131072, n_hat=(1, 2), base=5e5, interleaved=True
    )
    one = rope.for_length(length)
    chosen = rope.sets[index]
    assert one == Rope(
        (FactorSet(chosen.factors, chosen.n_hat, chosen.attention_factor),), 5e5, True
    )
    assert one.for_length(1) == one


@pytest.mark.parametrize(
    ("length", "error"), [(0, ValueError), (True, TypeError), ("9", TypeError)]
)
def test_for_length_names_a_length_that_is_none(length, error):
    with pytest.raises(error, match="length: expected"):
        Rope.plain(8).for_length(length)
