"""Random mutations of good configs and files: a `Rope`, or an error that names what is wrong."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope_kernels import FactorSet, Rope
from longrope_kernels.rope import scaling
from longrope_kernels.rope.published import published_configs

pytestmark = pytest.mark.filterwarnings("ignore::longrope_kernels.rope.scaling.FactorWarning")

GEOMETRY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
    "longrope_n_hat": [0, 4],
}
LISTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 30.0]}
BETAS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 1.0, "mscale_all_dim": 0.7}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "longrope", **LISTS},
    {"type": "su", **LISTS, "factor": 8.0},
    {"rope_type": "longrope", **LISTS, "attention_factor": 1.2},
    {"rope_type": "longrope", **LISTS, "short_mscale": 1.1, "long_mscale": 1.2},
    {"rope_type": "yarn", "factor": 8.0, **BETAS},
    {"rope_type": "yarn", "attention_factor": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "default"},
]
CONFIGS = [
    {**GEOMETRY, "model_type": model, "longrope_n_hat": n_hat, "rope_parameters": scaling}
    for model, n_hat in (("llama", 4), ("phi3", [0, 4]))
    for scaling in SCALINGS
]
SIDECAR = {
    "format": "longrope_kernels.Rope",
    "version": 1,
    "base": 1e4,
    "interleaved": False,
    "sets": [
        {"factors": [1.0, 2.0], "n_hat": 0, "attention_factor": 1.0, "max_length": 64},
        {"factors": [1.0, 9.0], "n_hat": 7, "attention_factor": 1.1, "max_length": None},
    ],
}
# Whatever a program that writes such files may leave there.
ODD: list[Any] = [
    *(None, True, False, "", "64", "1e4", "abc", "\x00", [], {}, [[]], [None], {"a": 1}),
    *(0, -1, 1, 2, 3, 7, 2**31, 2**31 + 1, 2**63, 2**64, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 5e-324, 1e-30, 1e30, 1e300, 1.7976931348623157e308, -1e300),
    *(math.nan, math.inf, -math.inf, ["1.0"], [1.0] * 5, [1e-320] * 4, [10**400] * 4),
]


def mutated(value: Any, random_: random.Random) -> Any:
    """A copy with one to three places changed: another value, none, one more, another's."""
    value = copy.deepcopy(value)
    for _ in range(random_.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        pending = [value]
        while pending:
            inner = pending.pop()
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            places += [(inner, key) for key in keys]
            pending += [inner[key] for key in keys if isinstance(inner[key], dict | list)]
        if not places:
            return value
        inner, key = random_.choice(places)
        kind = random_.randrange(8)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner[key], int | float) and abs(inner[key]) < 2**64:
            inner[key] *= random_.choice([0, -1, 0.5, 2, 1e-200, 1e200, 1000])
        elif kind == 2 and isinstance(inner[key], int | float):
            inner[key] = str(inner[key])
        elif kind == 3:
            other, its_key = random_.choice(places)
            inner[key] = copy.deepcopy(other[its_key])
        else:
            inner[key] = copy.deepcopy(random_.choice(ODD))
    return value


def check(make: Callable[[], Any], given: object, *names: str) -> None:
    """Nothing but a value or an error of ours, which says what is wrong and what is expected."""
    try:
        rope = make()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert "expected" in text, (given, text)
        assert any(name in text for name in names), (given, text)
        return
    sets = rope.sets if isinstance(rope, Rope) else (rope,)
    numbers = [x for s in sets for x in (*s.factors, s.attention_factor)]
    assert all(type(x) in (int, float) and 0 < x < math.inf for x in numbers), given
    assert all(x >= 2.0**-24 for s in sets for x in s.factors), given


FIELDS = ("config", "factor", "n_hat", "base", "max_position_embeddings", "sets", "max_length")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_configs(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(1000):
        config = mutated(random_.choice(CONFIGS), random_)
        check(lambda config=config: Rope.from_config(config), config, *FIELDS)


def test_mutated_published_configs() -> None:
    random_ = random.Random(0)
    for _ in range(300):
        config = mutated(random_.choice(list(published_configs().values())), random_)
        check(lambda config=config: Rope.from_config(config), config, *FIELDS)


@pytest.mark.parametrize("config", CONFIGS[: len(SCALINGS)])
def test_unmutated_configs_are_read(config: dict[str, Any]) -> None:
    """Or else the tests above would see nothing but errors."""
    assert Rope.from_config(config).sets[-1].n_hat == 4


def test_mutated_sidecars(tmp_path: Path) -> None:
    path, random_ = tmp_path / "longrope.json", random.Random(0)
    for _ in range(400):
        content = mutated(SIDECAR, random_)
        path.write_text(json.dumps(content), "utf-8")
        check(lambda: Rope.load(path), content, str(path))


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_mutated_bytes(kind: str, tmp_path: Path) -> None:
    """Bytes that are lost, doubled or others, as files come over bad lines."""
    path, random_ = tmp_path / f"factors.{kind}", random.Random(0)
    text = json.dumps(SIDECAR) if kind == "json" else "# long\n7\n1.0\n2.5\n30.0\n"
    read = Rope.load if kind == "json" else lambda path: scaling.load_csv(path, n_hat_first=True)
    for _ in range(400):
        data = bytearray(text.encode())
        for _ in range(random_.randint(1, 4)):
            i = random_.randrange(len(data))
            data[i : i + random_.randint(0, 2)] = random_.randbytes(random_.randint(0, 2))
        path.write_bytes(data)
        check(lambda: read(path), bytes(data), str(path))


def test_mutated_arrays() -> None:
    random_ = random.Random(0)
    good = {
        "rope_factors_short.weight": [1.0, 1.1],
        "rope_factors_long.weight": [1.0, 9.0],
        "rope_freqs.weight": [1.0, 2.0],
    }
    names = (
        *good,
        "_factor",
        "arrays",
        "attention_factor",
        "n_hat",
        "base",
        "max_position_embeddings",
    )
    for _ in range(1000):
        picked = random_.choice([list(good)[:2], list(good)[2:]])
        arguments = {
            "arrays": {name: good[name] for name in picked},
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131072,
            "attention_factor": 1.2,
            "n_hat": 0,
            "base": 1e4,
        }
        changed = mutated(arguments, random_)
        arrays = changed.pop("arrays", None)
        if isinstance(arrays, dict):
            check(
                lambda a=arrays, c=changed: scaling.from_arrays(a, **c), (arrays, changed), *names
            )


@pytest.mark.parametrize("depth", [10_000, 200_000])
def test_deeply_nested_json(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "longrope.json"
    path.write_text("[" * depth + "]" * depth, "utf-8")
    with pytest.raises(ValueError, match=r"longrope\.json: expected"):
        Rope.load(path)


NAMED: list[tuple[str, dict[str, Any]]] = [
    ("num_attention_heads", {"num_attention_heads": 0}),
    ("num_attention_heads", {"num_attention_heads": "4"}),
    ("hidden_size", {"hidden_size": "64"}),
    ("head_dim", {"head_dim": "16"}),
    ("head_dim", {"head_dim": 10**12}),
    ("rope_theta", {"rope_theta": "10000"}),
    ("max_position_embeddings", {"max_position_embeddings": "131072"}),
    ("original_max_position_embeddings", {"original_max_position_embeddings": 4096.5}),
    *(
        ("partial_rotary_factor", {"partial_rotary_factor": share})
        for share in (math.nan, -1.0, 1.5, 1e308)
    ),
    ("longrope_n_hat", {"longrope_n_hat": ["0", 4]}),
]


@pytest.mark.parametrize(("name", "change"), NAMED)
def test_the_field_is_named(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^config: expected .*\b{name}\b"):
        Rope.from_config({**GEOMETRY, **change, "rope_parameters": SCALINGS[0]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "8") for name in ("factor", "attention_factor", "short_mscale")),
        ("short_factor", ["1.0", 1.1, 1.2, 1.3]),
        ("long_factor", [1.0, True, 1.2, 1.3]),
    ],
)
def test_numbers_as_strings(name: str, value: Any) -> None:
    scaling_ = {**SCALINGS[0], name: value}
    with pytest.raises(ValueError, match=rf"^config: expected .*\b{name}\b"):
        Rope.from_config({**GEOMETRY, "rope_parameters": scaling_})


# ------------------------------------------------------------------------------- factors of no use


@pytest.mark.parametrize("factor", [5e-324, 1e-320, 1e-300, 1e-12, 2.0**-25])
def test_factors_too_small_for_float64(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"factors: expected at least 2\*\*-24.*got {factor}"):
        FactorSet((1.0, factor))
    from longrope_kernels import apply_rotary

    for factors in ([factor], torch.tensor([factor], dtype=torch.float64)):
        with pytest.raises(ValueError, match="factors: expected at least"):
            apply_rotary(torch.ones(1, 1, 1, 2), None, torch.arange(1), factors, 0)


def test_the_least_factor_keeps_its_angle() -> None:
    """At 2**31 - 1, by mpmath: the steps have it to 1e-6 still, and float64 to 2 rad."""
    import mpmath

    rope, n = Rope(FactorSet((2.0**-24,))), 2**31 - 1
    step = int(rope.tables(torch.device("cpu")).steps[0, 1, 0])
    with mpmath.workdps(60):
        angle = n * mpmath.mpf(2) ** 24
        turns = mpmath.mpf(n * step % 2**64) / 2**64
        assert abs(mpmath.cos(angle) - mpmath.cos(2 * mpmath.pi * turns)) < 1e-6


def test_a_base_below_1_makes_later_pairs_too_fast() -> None:
    assert Rope(FactorSet((1.0, 1.0)), base=0.5).base == 0.5
    for base in (1e-320, 1e-20):
        with pytest.raises(ValueError, match=r"base: expected .*pair 1"):
            Rope(FactorSet((1.0, 1.0)), base=base)


def test_a_config_as_factors_is_refused_in_a_line_that_names_from_config() -> None:
    from longrope_kernels import apply_rotary

    config: Any = published_configs()["phi-3-mini-128k"]
    with pytest.raises(TypeError, match=r"factors: expected a Rope \(Rope.from_config") as error:
        apply_rotary(torch.ones(1, 1, 1, 96), None, torch.arange(1), config, 0)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("value", ["1.5", b"1.5", True])
def test_strings_are_no_factors(value: Any) -> None:
    with pytest.raises(TypeError, match="factors: expected a sequence of numbers"):
        FactorSet((1.0, value))
