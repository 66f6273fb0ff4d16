"""Every rope type, and every published list, against transformers' own frequencies.

transformers computes them in float32. With ``u = 2**-24``, the relative error of one rounding:
``base**e`` has that of the exponent times ``ln base`` and one unit in the last place (2 u) of its
own; base, factor, product, reciprocal and quotient add u each. That is ``(ln base + 8) u``. A ramp
between two frequencies (yarn, llama3) is off by some u of its own, which against the smaller
result counts ``lambda_i`` times. What is compared with is the float64 table the reference reads.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HunYuanDenseV1Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import (
    HunYuanDenseV1RotaryEmbedding,
)

from longrope_kernels import Rope
from longrope_kernels.rope import scaling
from longrope_kernels.rope.published import published_configs

Config = dict[str, Any]
CPU = torch.device("cpu")
U = 2.0**-24
LISTS = json.loads((Path(__file__).parent / "data" / "factor_lists.json").read_text("utf-8"))
CONFIGS: dict[str, Config] = {**published_configs(), **LISTS["configs"]}

pytestmark = pytest.mark.filterwarnings("ignore::longrope_kernels.rope.scaling.FactorWarning")

GEOMETRY = [(64, 1.0), (128, 0.75), (80, 0.5), (8, 1.0)]
BASES = [1e4, 5e5, 1e6]
EVERY_GEOMETRY = [
    pytest.param(*g, b, id=f"D{g[0]}-{g[1]}-{b:g}") for g, b in product(GEOMETRY, BASES)
]
geometry = pytest.mark.parametrize(("head_dim", "partial", "base"), EVERY_GEOMETRY)


def config(kind: str, head_dim: int, partial: float, base: float, **fields: Any) -> Config:
    """As a config.json of transformers 5; ``max_position_embeddings`` 32768."""
    return {
        "head_dim": head_dim,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": base,
            "partial_rotary_factor": partial,
            **fields,
        },
    }


def as_4(config: Config) -> Config:
    """The same as a config.json of transformers 4."""
    parameters = dict(config["rope_parameters"])
    top = {name: parameters.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    parameters["type"] = parameters.pop("rope_type")
    rest = {name: value for name, value in config.items() if name != "rope_parameters"}
    return {**rest, **top, "rope_scaling": parameters}


def theirs(config: Config, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """inv_freq (P,) float32 and the attention factor."""
    fields = copy.deepcopy(config)
    made = LlamaConfig(vocab_size=8, num_attention_heads=1, hidden_size=8, **fields)
    kind = fields["rope_parameters"]["rope_type"]
    return ROPE_INIT_FUNCTIONS[kind](made, seq_len=seq_len)


def assert_parity(
    rope: Rope,
    inv_freq: torch.Tensor,
    attention_factor: float,
    index: int = 0,
    base: float | None = None,
    ramp: float = 0.0,
) -> None:
    """``ramp`` is the error of the ramp in units of u; ``base`` theirs where it differs."""
    mine = rope.tables(CPU).inv_freq[index, 1]
    assert inv_freq.dtype == torch.float32
    assert mine.shape == inv_freq.shape
    factors = torch.tensor(rope.sets[index].factors, dtype=torch.float64)
    bound = (math.log(base or rope.base) + 8 + ramp * factors) * U
    error = ((inv_freq.double() - mine) / mine).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert rope.sets[index].attention_factor == pytest.approx(attention_factor, rel=1e-15)


def ropes_of(config: Config, made: Rope, **arguments: Any) -> Rope:
    """The rope, after all three ways to it agree."""
    assert Rope.from_config(config, **arguments) == made
    assert Rope.from_config(as_4(config), **arguments) == made
    fields = copy.deepcopy(config)
    object_ = LlamaConfig(vocab_size=8, num_attention_heads=1, hidden_size=8, **fields)
    assert Rope.from_config(object_, **arguments) == made
    return made


@pytest.mark.parametrize("factor", [1.0, 4.0, 7.3])
@geometry
def test_linear(head_dim: int, partial: float, base: float, factor: float) -> None:
    made = scaling.linear(int(head_dim * partial), factor, base=base)
    fields = config("linear", head_dim, partial, base, factor=factor)
    assert_parity(ropes_of(fields, made), *theirs(fields))


@pytest.mark.parametrize("length", [None, 1, 32767, 32768, 32769, 50000, 2**20])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@geometry
def test_dynamic(
    head_dim: int, partial: float, base: float, factor: float, length: int | None
) -> None:
    rotary_dim = int(head_dim * partial)
    made = scaling.dynamic_ntk(rotary_dim, factor, 32768, length or 32768, base=base)
    fields = config("dynamic", head_dim, partial, base, factor=factor)
    rope = ropes_of(fields, made, length=length)
    largest = rope.sets[0].factors[-1]
    scaled = base * largest ** (rotary_dim / (rotary_dim - 2))
    assert_parity(rope, *theirs(fields, length), base=scaled)
    if length is None or length <= 32768:
        assert set(rope.sets[0].factors) == {1.0}
    assert rope.sets[0].max_length == max(length or 0, 32768)


def test_dynamic_with_an_alpha() -> None:
    """HunYuan's, of no length; its factor is not read."""
    scaling_4 = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    fields = {"head_dim": 128, "rope_theta": 1e4, "rope_scaling": scaling_4}
    rope = Rope.from_config(fields, length=16384)
    assert rope == scaling.ntk_aware(128, 1000.0)
    rotary = HunYuanDenseV1RotaryEmbedding(HunYuanDenseV1Config(**copy.deepcopy(fields)))
    own = rotary.inv_freq.double()
    torch.testing.assert_close(rope.tables(CPU).inv_freq[0, 1], own, rtol=40 * U, atol=0)


def test_others_read_no_alpha() -> None:
    scaling_4 = {"type": "dynamic", "factor": 2.0}
    fields = {"model_type": "llama", "head_dim": 128, "max_position_embeddings": 4096}
    ropes = [
        Rope.from_config({**fields, "rope_scaling": scaling_4 | more}, length=16384)
        for more in ({}, {"alpha": 1000.0})
    ]
    assert ropes[0] == ropes[1]


YARN: list[Config] = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"beta_fast": 24, "beta_slow": 1, "truncate": False},
    {"beta_fast": 4.0, "beta_slow": 4.0},
    {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    {"mscale": 0.707, "mscale_all_dim": 0.5},
    {"mscale": 0.707, "mscale_all_dim": 0.0},
    {"mscale": 1.0},
    {"attention_factor": 1.25, "mscale": 0.707, "mscale_all_dim": 0.5},
]


@pytest.mark.parametrize("options", YARN, ids=lambda o: "-".join(o) or "defaults")
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
@geometry
def test_yarn(head_dim: int, partial: float, base: float, factor: float, options: Config) -> None:
    made = scaling.yarn(int(head_dim * partial), factor, 4096, base=base, **options)
    named = {"factor": factor, "original_max_position_embeddings": 4096, **options}
    fields = config("yarn", head_dim, partial, base, **named)
    # Ends of the ramp that are no whole numbers are rounded to float32 there, beside the ramp's
    # difference, quotient and its two complements; those ends lie below 2 P.
    assert_parity(ropes_of(fields, made), *theirs(fields), ramp=8)


def test_yarn_without_factor_or_original_length() -> None:
    fields = config("yarn", 64, 1.0, 1e4, factor=None, original_max_position_embeddings=4096)
    made = scaling.yarn(64, 8.0, 4096)
    assert_parity(ropes_of(fields, made), *theirs(fields), ramp=8)
    fields = config("yarn", 64, 1.0, 1e4, factor=8.0)
    made = scaling.yarn(64, 8.0, 32768)
    assert_parity(ropes_of(fields, made), *theirs(fields), ramp=8)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_original_length_of_the_top_level_goes_first(kind: str) -> None:
    """As Phi-3's configs have it; transformers copies it over that of rope_parameters."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    named = {"factor": 8.0, "original_max_position_embeddings": 8192, **bands}
    fields = config(kind, 64, 1.0, 1e4, **named) | {"original_max_position_embeddings": 2048}
    made = scaling.llama3(64, 8.0, 1.0, 4.0, 2048) if bands else scaling.yarn(64, 8.0, 2048)
    assert_parity(ropes_of(fields, made), *theirs(fields), ramp=32)


@pytest.mark.parametrize("original", [16, 100, 4096])
def test_yarn_where_the_ramp_leaves_the_pairs(original: int) -> None:
    """A small base or length clips its ends, at 0 and at 2 P - 1 as in transformers."""
    for head_dim, base in product((8, 64), (20.0, 1e4)):
        made = scaling.yarn(head_dim, 4.0, original, base=base)
        named = {"factor": 4.0, "original_max_position_embeddings": original}
        fields = config("yarn", head_dim, 1.0, base, **named)
        assert_parity(ropes_of(fields, made), *theirs(fields), ramp=8)


@pytest.mark.parametrize("bands", [(1.0, 4.0), (1, 32), (0.5, 2.0)])
@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
@geometry
def test_llama3(
    head_dim: int, partial: float, base: float, factor: float, bands: tuple[float, float]
) -> None:
    low, high = bands
    made = scaling.llama3(int(head_dim * partial), factor, low, high, 8192, base=base)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    fields = config(
        "llama3", head_dim, partial, base, **dict(zip(names, (factor, *bands, 8192), strict=True))
    )
    # The ramp goes with the turns, at most ``high``, which are off as the frequency is.
    ramp = (math.log(base) + 12) * high / (high - low)
    assert_parity(ropes_of(fields, made), *theirs(fields), ramp=ramp)


@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("partial", [1.0, 0.25, 0.3, 0.0])
@pytest.mark.parametrize("base", BASES)
def test_proportional(partial: float, factor: float, base: float) -> None:
    made = scaling.proportional(64, partial, factor, base=base)
    fields = config("proportional", 64, partial, base, factor=factor)
    rope = ropes_of(fields, made)
    inv_freq, attention_factor = theirs(fields)
    still = inv_freq == 0
    mine = rope.tables(CPU)
    assert (mine.inv_freq[0, 1][still] < 1e-29).all()
    assert (mine.steps[0, 1][still] == 0).all()
    assert attention_factor == rope.sets[0].attention_factor == 1
    turning = mine.inv_freq[0, 1][~still]
    error = (inv_freq[~still].double() - turning).abs() / turning
    assert (error <= (math.log(base) + 8) * U).all()


# ------------------------------------------------------------------------------ published factors


def longrope_config(
    head_dim: int, base: float, short: Sequence[float], long: Sequence[float], longest: int
) -> Config:
    named = {"short_factor": list(short), "long_factor": list(long)}
    fields = config("longrope", head_dim, 1.0, base, original_max_position_embeddings=4096, **named)
    return {**fields, "max_position_embeddings": longest}


def assert_longrope_parity(rope: Rope, fields: Config) -> None:
    bound = rope.sets[0].max_length
    assert bound is not None
    for seq_len in (1, bound, bound + 1, 2 * bound):
        inv_freq, attention_factor = theirs(fields, seq_len)
        assert_parity(rope, inv_freq, attention_factor, rope.set_index(seq_len))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_published_configs(name: str) -> None:
    published = CONFIGS[name]
    rope = Rope.from_config(published)
    fields = {**longrope_config(1, 1.0, (), (), published["max_position_embeddings"])}
    fields["head_dim"] = published["head_dim"]
    fields["rope_parameters"] |= {
        "rope_theta": published["rope_theta"],
        "partial_rotary_factor": published["partial_rotary_factor"],
        "short_factor": published["rope_scaling"]["short_factor"],
        "long_factor": published["rope_scaling"]["long_factor"],
        "original_max_position_embeddings": published["original_max_position_embeddings"],
    }
    assert Rope.from_config(fields) == rope
    assert_longrope_parity(rope, fields)


@pytest.mark.parametrize("name", sorted(LISTS["sets"]))
def test_published_sets(name: str) -> None:
    """The searched sets of LLaMA2 and Mistral, each as the long set of a config."""
    factors = LISTS["sets"][name]
    longest = 131072 if name.startswith("ft") else int(name.split("k")[0]) * 1024
    fields = longrope_config(128, 1e4, [1.0] * 64, factors, longest)
    rope = Rope.from_config(fields)
    assert rope == Rope.longrope([1.0] * 64, factors, 4096, longest)
    assert_longrope_parity(rope, fields)


@pytest.mark.parametrize(
    ("name", "critical_pair"),
    [("LongRoPE2 LLaMA3-8B 128k (microsoft/nnscaler example)", 33), ("phi-4-mini", 31)],
)
def test_the_published_longrope2_sets_are_ntk_below_their_critical_pair(
    name: str, critical_pair: int
) -> None:
    """They are printed with ten digits, so with an error of up to 5e-10."""
    published = CONFIGS[name]
    rope = Rope.from_config(published)
    long = rope.sets[1].factors
    made = scaling.longrope2(
        rope.rotary_dim,
        long[critical_pair:],
        published["original_max_position_embeddings"],
        published["max_position_embeddings"],
        critical_pair=critical_pair,
        base=rope.base,
    )
    assert made.sets[1].factors == pytest.approx(long, rel=5e-10)
    assert made.sets[0] == rope.sets[0]
    assert made.sets[1].attention_factor == rope.sets[1].attention_factor
    theory = scaling.critical_pair(
        rope.rotary_dim, published["original_max_position_embeddings"], base=rope.base
    )
    assert critical_pair < theory < critical_pair + 4
