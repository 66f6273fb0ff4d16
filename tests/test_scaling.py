"""The scalings' own formulas, their errors, what is warned about, and composition."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longrope_kernels import FactorSet, Rope
from longrope_kernels.rope import scaling
from longrope_kernels.rope.published import published_configs
from longrope_kernels.rope.scaling import FactorWarning

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
quiet = pytest.mark.filterwarnings("ignore::longrope_kernels.rope.scaling.FactorWarning")


def inv_freq(rope: Rope) -> torch.Tensor:
    return rope.tables(CPU).inv_freq[-1, 1]


# ---------------------------------------------------------------------------------------- formulas


def test_a_factor_of_1_is_plain() -> None:
    plain = Rope.plain(32, base=5e5, interleaved=True)
    same = {"base": 5e5, "interleaved": True}
    assert scaling.linear(32, 1, **same) == plain
    assert scaling.ntk_aware(32, 1.0, **same) == plain
    assert scaling.yarn(32, 1.0, 4096, **same) == plain
    assert scaling.llama3(32, 1.0, 1.0, 4.0, 8192, **same) == plain
    assert scaling.proportional(32, 1.0, **same) == plain


@pytest.mark.parametrize(("rotary_dim", "factor", "base"), [(64, 8.0, 1e4), (128, 1.7, 5e5)])
def test_ntk_is_another_base(rotary_dim: int, factor: float, base: float) -> None:
    """To float64 rounding; the power of a ratio loses some units where the base is large."""
    other = base * factor ** (rotary_dim / (rotary_dim - 2))
    ntk = scaling.ntk_aware(rotary_dim, factor, base=base)
    torch.testing.assert_close(
        inv_freq(ntk), inv_freq(Rope.plain(rotary_dim, base=other)), rtol=1e-14, atol=0
    )
    assert ntk.base == base
    assert ntk.sets[0].factors[0] == 1
    assert ntk.sets[0].factors[-1] == factor


def test_dynamic_ntk_is_ntk_of_the_length() -> None:
    rope = scaling.dynamic_ntk(64, 4.0, 2048, 8192)
    assert rope.sets[0].factors == scaling.ntk_aware(64, 4 * 4.0 - 3).sets[0].factors
    assert rope.sets[0].max_length == 8192
    at_most = scaling.dynamic_ntk(64, 4.0, 2048, 100)
    assert at_most.sets[0] == FactorSet((1.0,) * 32, max_length=2048)


def test_dynamic_ntk_in_steps() -> None:
    lengths = (2048, 4096, 8192)
    rope = Rope(tuple(scaling.dynamic_ntk(64, 4.0, 2048, n).sets[0] for n in lengths))
    assert [rope.set_index(n) for n in (1, 2048, 2049, 8192)] == [0, 0, 1, 2]


def test_yarn_ends_are_exact() -> None:
    factors = scaling.yarn(128, 3.3, 4096).sets[0].factors
    assert factors[0] == 1
    assert factors[-1] == 3.3
    assert list(factors) == sorted(factors)


def test_yarn_attention_factor() -> None:
    def a(**options: Any) -> float:
        return scaling.yarn(64, 40.0, 4096, **options).sets[0].attention_factor

    assert a() == pytest.approx(0.1 * math.log(40) + 1, rel=1e-15)
    wanted = (0.0707 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert a(mscale=0.707, mscale_all_dim=0.5) == pytest.approx(wanted, rel=1e-15)
    assert a(attention_factor=0.5, mscale=0.707, mscale_all_dim=0.5) == 0.5


def test_llama3_bands() -> None:
    """The published numbers of Llama 3.1: factor 8, 1 and 4 turns in 8192 tokens."""
    rope = scaling.llama3(128, 8.0, 1.0, 4.0, 8192, base=5e5)
    for i, factor in enumerate(rope.sets[0].factors):
        turns = 8192 * 5e5 ** (-i / 64) / (2 * math.pi)
        if turns > 4:
            assert factor == 1
        elif turns < 1:
            assert factor == 8
        else:
            share = (turns - 1) / 3
            assert 1 / factor == pytest.approx((1 - share) / 8 + share, rel=1e-14)


def test_longrope2() -> None:
    rope = scaling.longrope2(16, 8.0, 4096, 32768, critical_pair=4, n_hat=(0, 3), base=5e5)
    assert rope.sets[0].factors == (1.0,) * 8
    assert rope.sets[1].factors == pytest.approx([8 ** (i / 4) for i in range(4)] + [8.0] * 4)
    assert rope == Rope.longrope(
        (1.0,) * 8, rope.sets[1].factors, 4096, 32768, n_hat=(0, 3), base=5e5
    )


@pytest.mark.parametrize(
    ("arguments", "pair"), [((128, 8192, 5e5), 35), ((128, 4096, 1e4), 46), ((8, 10**9, 2.0), 4)]
)
def test_critical_pair(arguments: tuple[int, int, float], pair: int) -> None:
    rotary_dim, length, base = arguments
    assert scaling.critical_pair(rotary_dim, length, base=base) == pair
    periods = [2 * math.pi * base ** (2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    assert sum(period <= length for period in periods) == pair


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: scaling.linear(8, 2.0, **more),
        lambda **more: scaling.ntk_aware(8, 2.0, **more),
        lambda **more: scaling.dynamic_ntk(8, 2.0, 64, 128, **more),
        lambda **more: scaling.yarn(8, 2.0, 64, **more),
        lambda **more: scaling.llama3(8, 2.0, 1.0, 4.0, 64, **more),
        lambda **more: scaling.proportional(8, 0.5, 2.0, **more),
        lambda **more: scaling.longrope2(8, 2.0, 64, 128, critical_pair=2, **more),
    ],
    ids=["linear", "ntk_aware", "dynamic_ntk", "yarn", "llama3", "proportional", "longrope2"],
)
def test_threshold_base_and_pairing_go_through(make: Callable[..., Rope]) -> None:
    rope = make(n_hat=5, base=77.0, interleaved=True)
    assert {s.n_hat for s in rope.sets} == {5}
    assert rope.base == 77
    assert rope.interleaved


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("rotary_dim", lambda: scaling.linear(7, 2.0)),
    ("rotary_dim", lambda: scaling.linear(0, 2.0)),
    ("rotary_dim", lambda: scaling.linear(8.0, 2.0)),  # type: ignore[arg-type]
    ("rotary_dim", lambda: scaling.ntk_aware(2, 2.0)),
    ("rotary_dim", lambda: scaling.dynamic_ntk(2, 2.0, 64, 128)),
    ("head_dim", lambda: scaling.proportional(7, 0.5)),
    ("factor", lambda: scaling.linear(8, 0.0)),
    ("factor", lambda: scaling.linear(8, NAN)),
    ("factor", lambda: scaling.ntk_aware(8, -1.0)),
    ("factor", lambda: scaling.yarn(8, INF, 64)),
    ("factor", lambda: scaling.llama3(8, "8", 1.0, 4.0, 64)),  # type: ignore[arg-type]
    ("factor", lambda: scaling.proportional(8, 0.5, 0.0)),
    ("length", lambda: scaling.dynamic_ntk(8, 2.0, 64, 0)),
    ("max_position_embeddings", lambda: scaling.dynamic_ntk(8, 2.0, 0, 64)),
    ("original_max_position_embeddings", lambda: scaling.yarn(8, 2.0, 0)),
    ("original_max_position_embeddings", lambda: scaling.llama3(8, 2.0, 1.0, 4.0, -1)),
    ("beta_fast", lambda: scaling.yarn(8, 2.0, 64, beta_fast=0.5)),
    ("beta_slow", lambda: scaling.yarn(8, 2.0, 64, beta_slow=0.0)),
    ("base", lambda: scaling.yarn(8, 2.0, 64, base=1.0)),
    ("base", lambda: scaling.critical_pair(8, 64, base=0.5)),
    ("low_freq_factor", lambda: scaling.llama3(8, 2.0, 0.0, 4.0, 64)),
    ("high_freq_factor", lambda: scaling.llama3(8, 2.0, 4.0, 4.0, 64)),
    ("partial_rotary_factor", lambda: scaling.proportional(8, 1.5)),
    ("partial_rotary_factor", lambda: scaling.proportional(8, -0.5)),
    ("partial_rotary_factor", lambda: scaling.proportional(8, "1")),  # type: ignore[arg-type]
    ("critical_pair", lambda: scaling.longrope2(8, 2.0, 64, 128, critical_pair=0)),
    ("critical_pair", lambda: scaling.longrope2(8, 2.0, 64, 128, critical_pair=4)),
    ("critical_pair", lambda: scaling.longrope2(8, 2.0, 64, 128, critical_pair=True)),
    ("factors_above", lambda: scaling.longrope2(8, (2.0,), 64, 128, critical_pair=2)),
    ("factors_above", lambda: scaling.longrope2(8, (0.0, 1.0), 64, 128, critical_pair=2)),
    ("factors_above", lambda: scaling.longrope2(8, "ab", 64, 128, critical_pair=2)),
    ("max_position_embeddings", lambda: scaling.longrope2(8, 2.0, 64, critical_pair=2)),
]


@pytest.mark.parametrize(("name", "call"), BAD)
def test_bad_arguments(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*got "):
        call()


# ---------------------------------------------------------------------------------------- warnings


def messages(sets: list[tuple[float, ...]], factor: float | None = None) -> list[str]:
    bounds = [*range(1, len(sets)), None]
    rope = Rope(tuple(FactorSet(s, max_length=b) for s, b in zip(sets, bounds, strict=True)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaling.check(rope, factor)
    assert all(w.category is FactorWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_nothing_odd() -> None:
    assert not messages([(1.0, 1.0, 2.0), (1.0, 2.0, 5.0)], 4.0)


def test_not_monotone() -> None:
    (message,) = messages([(1.0, 3.0, 2.5, 4.0, 3.5)])
    assert "not monotone" in message
    assert "3.0 for pair 1 to 2.5 for pair 2 (and 1 more)" in message
    (message,) = messages([(1.0, 1.0), (3.0, 2.0)])
    assert message.startswith("long_factor: not monotone")


def test_beyond() -> None:
    (message,) = messages([(1.0, 5.0, 5.1, 6.0)], 4.0)
    assert "6.0 for pair 3 (and 1 more) is beyond 1.25 s = 5, s = 4" in message
    assert not messages([(1.0, 5.0)], 4.0)
    assert not messages([(1.0, 6.0)])


def test_short_above_long() -> None:
    (message,) = messages([(1.0, 2.0, 3.0), (1.0, 1.5, 3.0)])
    assert message.startswith("short_factor: 2.0 for pair 1 is larger than the 1.5 of long_factor")
    (message,) = messages([(1.0,), (3.0,), (2.0,)])
    assert "factors of set 1: 3.0 for pair 0 is larger than the 2.0 of factors of set 2" in message


def test_a_config_is_checked() -> None:
    config = {
        "head_dim": 4,
        "max_position_embeddings": 4096 * 4,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [9, 1]},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Rope.from_config(config)
    assert all(w.category is FactorWarning and w.filename == __file__ for w in caught)
    seen = " ".join(str(w.message) for w in caught)
    for text in ("long_factor: not monotone", "beyond 1.25 s = 5", "pair 1 is larger than"):
        assert text in seen
    config["rope_scaling"] |= {"long_factor": [1, 9], "factor": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Rope.from_config(config)


@quiet
@pytest.mark.parametrize("name", sorted(published_configs()))
def test_the_published_sets_are_not_reported(name: str) -> None:
    config = published_configs()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rope = Rope.from_config(config)
        scaling.check(rope, 32.0)
    changed = Rope((rope.sets[0], FactorSet((*rope.sets[1].factors[:-1], 70.0))))
    with pytest.warns(FactorWarning, match=r"70.0 for pair 47 .*beyond 1.25 s = 40"):
        scaling.check(changed, 32.0)


# ----------------------------------------------------------------------------------------- configs


def config(kind: str, **fields: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 1e4, **fields}
    return {"head_dim": 16, "max_position_embeddings": 64, "rope_parameters": parameters}


LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
BAD_CONFIGS = [
    ("factor", config("linear")),
    ("factor", config("linear", factor="2")),
    ("factor", config("linear", factor=-2.0)),
    ("factor", config("dynamic")),
    ("factor", config("yarn", factor=0)),
    ("max_position_embeddings", {**config("dynamic", factor=2), "max_position_embeddings": None}),
    ("max_position_embeddings", {**config("dynamic", factor=2), "max_position_embeddings": "64"}),
    ("max_position_embeddings", {**config("yarn", factor=2), "max_position_embeddings": None}),
    ("original_max_position_embeddings", config("yarn", original_max_position_embeddings=-1)),
    ("beta_fast", config("yarn", factor=2, beta_fast=0.5)),
    ("low_freq_factor", config("llama3", **{**LLAMA3, "low_freq_factor": None})),
    ("high_freq_factor", config("llama3", **{**LLAMA3, "high_freq_factor": None})),
    ("high_freq_factor", config("llama3", **{**LLAMA3, "high_freq_factor": 0.5})),
    ("partial_rotary_factor", config("linear", factor=2, partial_rotary_factor="half")),
    ("partial_rotary_factor", config("proportional", partial_rotary_factor=1.5)),
    ("rotary dimensions", config("default", partial_rotary_factor=0.2)),
    ("rotary dimensions", config("default", partial_rotary_factor=0.0)),
    ("longrope_n_hat", {**config("default"), "longrope_n_hat": "4"}),
    ("longrope_n_hat", {**config("default"), "longrope_n_hat": [1, 2, 3]}),
]


@pytest.mark.parametrize(("name", "bad"), BAD_CONFIGS)
def test_bad_configs(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^config: .*\b{name}\b.*got "):
        Rope.from_config(bad)


def test_bad_arguments_of_from_config() -> None:
    for length in (0, -1, "64"):
        with pytest.raises((TypeError, ValueError), match=r"^length: expected .*got "):
            Rope.from_config(config("dynamic", factor=2), length=length)
    with pytest.raises(ValueError, match=r"^n_hat: expected one value .*got \(1, 2\)"):
        Rope.from_config(config("linear", factor=2), n_hat=(1, 2))
    with pytest.raises(ValueError, match=r"^attention_factor: expected"):
        Rope.from_config(config("yarn", factor=2, attention_factor=-1.0))


@quiet
def test_n_hat_of_a_config() -> None:
    linear = config("linear", factor=2.0)
    assert Rope.from_config(linear, n_hat=3) == scaling.linear(16, 2.0, n_hat=3)
    assert Rope.from_config({**linear, "longrope_n_hat": 4}) == scaling.linear(16, 2.0, n_hat=4)
    assert Rope.from_config({**linear, "longrope_n_hat": 4}, n_hat=0) == scaling.linear(16, 2.0)
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "attention_factor": 1.0}
    longrope = config("longrope", **lists, original_max_position_embeddings=64)
    for n_hat, wanted in ((4, [4, 4]), ([0, 8], [0, 8])):
        rope = Rope.from_config({**longrope, "longrope_n_hat": n_hat})
        assert [s.n_hat for s in rope.sets] == wanted


def test_interleaved_of_a_config() -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
    for kind in ("default", "linear", "longrope"):
        read = config(kind, **lists, original_max_position_embeddings=64)
        assert Rope.from_config(read, interleaved=True).interleaved
        assert not Rope.from_config(read).interleaved


# ----------------------------------------------------------------------------------------- compose

numbers = st.floats(1e-2, 1e3)  # products of three are factors, too


@st.composite
def ropes(draw: st.DrawFn, pairs: int, bounds: list[int | None]) -> Rope:
    def one(bound: int | None) -> FactorSet:
        values = draw(st.lists(numbers, min_size=pairs, max_size=pairs))
        return FactorSet(values, draw(st.integers(0, 300)), draw(numbers), bound)

    return Rope(tuple(one(bound) for bound in bounds), base=5e5)


@given(st.data())
def test_compose(data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, 4))
    several: list[int | None] = [64, 128, None]
    choices = st.sampled_from([[None], several])
    first = data.draw(ropes(pairs, data.draw(choices)))
    later = data.draw(ropes(pairs, data.draw(choices)))
    product = first.compose(later)
    count = max(len(first.sets), len(later.sets))
    assert len(product.sets) == count
    for i, got in enumerate(product.sets):
        one, two = (r.sets[i if len(r.sets) > 1 else 0] for r in (first, later))
        assert got.factors == tuple(a * b for a, b in zip(one.factors, two.factors, strict=True))
        assert (got.n_hat, got.attention_factor) == (two.n_hat, two.attention_factor)
        assert got.max_length == (several if count > 1 else [None])[i]
    assert product.base == 5e5


@given(ropes(3, [None]), ropes(3, [64, None]), ropes(3, [64, None]))
def test_compose_is_associative_and_has_a_unit(a: Rope, b: Rope, c: Rope) -> None:
    """Up to the rounding of two products in float64."""
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    for one, two in zip(left.sets, right.sets, strict=True):
        assert one.factors == pytest.approx(two.factors, rel=4e-16)
        assert one.n_hat == two.n_hat
    assert Rope.plain(6, base=5e5).compose(b) == b


def test_compose_of_two_single_sets_takes_the_later_bound() -> None:
    first, later = (Rope(FactorSet((2.0,), max_length=n)) for n in (64, 128))
    assert first.compose(later) == Rope(FactorSet((4.0,), max_length=128))


def test_stages_as_published() -> None:
    """The published 2048k set of Mistral beyond 1.25 s: its last factor is a product of two."""
    tuned = Rope(FactorSet([1.07, 63.97]))
    final = tuned.compose(Rope(FactorSet([1.01, 6.6], attention_factor=1.3)))
    assert final.sets[0].factors == (1.07 * 1.01, 63.97 * 6.6)
    assert final.sets[0].attention_factor == 1.3


TWO = Rope((FactorSet((1.0, 2.0), max_length=64), FactorSet((3.0, 4.0))))
BAD_LATER = [
    ("pairs", Rope.plain(2)),
    ("base", Rope.plain(4, base=5e5)),
    ("interleaved", Rope.plain(4, interleaved=True)),
    ("max_length", Rope((FactorSet((1.0, 2.0), max_length=65), FactorSet((3.0, 4.0))))),
    ("max_length", Rope((*(FactorSet((1.0, 2.0), max_length=n) for n in (64, 128)), TWO.sets[1]))),
]


@pytest.mark.parametrize(("name", "later"), BAD_LATER)
def test_compose_of_what_does_not_fit(name: str, later: Rope) -> None:
    with pytest.raises(ValueError, match=rf"^later: expected .*{name}.*got "):
        TWO.compose(later)


def test_compose_of_no_rope() -> None:
    with pytest.raises(TypeError, match=re.escape("later: expected a Rope, got tuple")):
        TWO.compose((1.0, 2.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^factors: expected finite"):
        Rope(FactorSet((1e300,))).compose(Rope(FactorSet((1e300,))))
