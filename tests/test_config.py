"""`Rope.from_config`, and parity with transformers' own reading of the same configs."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Target, every_target, factors
from transformers import Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from longrope_kernels import FactorSet, Rope
from longrope_kernels.rope.published import published_configs

Config = dict[str, Any]
SHORT, LONG = list(factors(8, 1.0)), list(factors(8, 9.0))
A = math.sqrt(1 + math.log(32) / math.log(4096))
PUBLISHED = sorted(published_configs())

pytestmark = pytest.mark.filterwarnings("ignore::longrope_kernels.rope.scaling.FactorWarning")


def config_5(**parameters: Any) -> Config:
    """As transformers 5 writes it: everything about RoPE in rope_parameters."""
    return {
        "head_dim": 16,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 5e5,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 4096,
            **parameters,
        },
    }


def config_4(**scaling: Any) -> Config:
    """As transformers 4 and the published files write it."""
    return {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_theta": 5e5,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            **scaling,
        },
    }


def wanted(short_a: float = A, long_a: float = A, n_hat: int = 0) -> Rope:
    return Rope((FactorSet(SHORT, n_hat, short_a, 4096), FactorSet(LONG, n_hat, long_a)), base=5e5)


def as_object(config: Config) -> SimpleNamespace:
    return SimpleNamespace(**config)


@pytest.mark.parametrize("make", [config_5, config_4])
@pytest.mark.parametrize("form", [dict, as_object], ids=["dict", "object"])
def test_longrope(make: Any, form: Any) -> None:
    config = form(make())
    before = copy.deepcopy(config)
    assert Rope.from_config(config) == wanted()
    assert Rope.from_config(config, n_hat=7) == wanted(n_hat=7)
    assert config == before, "the config was changed"


@pytest.mark.parametrize("name", ["longrope", "su"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_names_of_the_type(key: str, name: str) -> None:
    config = config_4()
    del config["rope_scaling"]["type"]
    config["rope_scaling"][key] = name
    assert Rope.from_config(config) == wanted()


@pytest.mark.parametrize("make", [config_5, config_4])
def test_attention_factor(make: Any) -> None:
    assert Rope.from_config(make(attention_factor=1.5)) == wanted(1.5, 1.5)


@pytest.mark.parametrize("make", [config_5, config_4])
def test_factor_in_place_of_max_position_embeddings(make: Any) -> None:
    """transformers takes ``factor`` first."""
    a = math.sqrt(1 + math.log(8) / math.log(4096))
    rope = Rope.from_config(make(factor=8.0))
    assert [s.attention_factor for s in rope.sets] == pytest.approx([a, a], abs=1e-15)


@pytest.mark.parametrize("make", [config_5, config_4])
def test_mscales_of_phi_3_5_moe(make: Any) -> None:
    config = make(short_mscale=1.243163121016122, long_mscale=1.243163121016123)
    assert Rope.from_config(config) == wanted(1.243163121016122, 1.243163121016123)


def test_not_extended() -> None:
    config = {**config_5(), "max_position_embeddings": 4096}
    assert Rope.from_config(config) == wanted(1.0, 1.0)


@pytest.mark.parametrize("place", ["top", "rope_parameters"])
def test_partial_rotary_factor(place: str) -> None:
    config = config_5()
    config["head_dim"] = 32
    (config if place == "top" else config["rope_parameters"])["partial_rotary_factor"] = 0.5
    assert Rope.from_config(config) == wanted()
    plain = {"head_dim": 128, "partial_rotary_factor": 0.75}
    assert Rope.from_config(plain) == Rope.plain(96)


@pytest.mark.parametrize(
    "config",
    [
        {"head_dim": 64},
        {"hidden_size": 256, "num_attention_heads": 4, "head_dim": None},
        {"head_dim": 64, "rope_scaling": None, "rope_theta": 1e4},
        {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"head_dim": 64, "rope_scaling": {"type": "default"}},
    ],
    ids=["nothing", "hidden-size", "null", "rope_parameters", "rope_scaling"],
)
def test_default_is_plain(config: Config) -> None:
    assert Rope.from_config(config) == Rope.plain(64)
    assert Rope.from_config(as_object(config)) == Rope.plain(64)


@pytest.mark.parametrize(
    ("config", "rotary_dim", "base"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4, "rope_embedding_base": 1000000}, 16, 1e6),
        ({"head_dim": 64, "rotary_pct": 0.25, "rotary_emb_base": 25000}, 16, 25e3),
        ({"hidden_size": 7168, "num_attention_heads": 128, "qk_rope_head_dim": 64}, 64, 1e4),
        ({"model_type": "minimax_m2", "head_dim": 129, "rotary_dim": 98}, 98, 1e4),
        ({"model_type": "minimax_m3_vl_text", "head_dim": 128, "rotary_dim": 64}, 128, 1e4),
        ({"hidden_size": 2048, "num_attention_heads": 32, "kv_channels": 128}, 128, 1e4),
    ],
    ids=["phi-3-small", "gpt-neox", "deepseek", "minimax-m2", "minimax-m3", "jetmoe"],
)
@pytest.mark.parametrize("form", [dict, as_object], ids=["dict", "object"])
def test_other_names_of_fields(config: Config, rotary_dim: int, base: float, form: Any) -> None:
    assert Rope.from_config(form(config)) == Rope.plain(rotary_dim, base=base)


def test_plain_reads_the_base() -> None:
    assert Rope.from_config({"head_dim": 64, "rope_theta": 5e5}).base == 5e5
    config = {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}
    assert Rope.from_config(config).base == 2e6


@pytest.mark.parametrize("make", [config_5, config_4])
@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_factor_lists_missing_or_of_the_wrong_length(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"config.*{name}"):
        Rope.from_config(make(**{name: None}))
    with pytest.raises(ValueError, match=rf"8 numbers in {name} for 16.*got 7"):
        Rope.from_config(make(**{name: SHORT[:7]}))
    with pytest.raises((TypeError, ValueError), match=name):
        Rope.from_config(make(**{name: 3.0}))


def test_missing_fields() -> None:
    config = config_5()
    del config["max_position_embeddings"]
    with pytest.raises(ValueError, match=r"config.*\bmax_position_embeddings"):
        Rope.from_config(config)
    with pytest.raises(ValueError, match=r"config.*head_dim"):
        Rope.from_config({"rope_theta": 1e4})
    with pytest.raises(TypeError, match=r"config: .*got 'microsoft/phi'"):
        Rope.from_config("microsoft/phi")


def test_other_types_are_refused() -> None:
    for name in ("axial", "mrope", "ntk"):
        with pytest.raises(ValueError, match=rf"config.*linear.*yarn.*longrope.*got '{name}'"):
            Rope.from_config({"head_dim": 64, "rope_scaling": {"type": name, "factor": 2.0}})
    layers = {"full": {"rope_type": "default"}, "sliding": {"rope_type": "default"}}
    with pytest.raises(ValueError, match="config"):
        Rope.from_config({"head_dim": 64, "rope_parameters": layers})
    with pytest.raises(ValueError, match="config"):
        Rope.from_config({"head_dim": 64, "rope_scaling": "longrope"})


@pytest.mark.parametrize("beside", [{"sliding_attention": None}, {"rope_theta": 1e4}])
def test_parameters_of_some_layers(beside: Config) -> None:
    """As files have them where a kind of layers has no rotation, and as transformers 5.0 wrote."""
    layers = {"full_attention": {"rope_type": "linear", "factor": 8.0}, **beside}
    with pytest.raises(ValueError, match=r"one set of rope_parameters.*each of full_attention$"):
        Rope.from_config({"head_dim": 64, "rope_parameters": layers})


# ---------------------------------------------------------------------------------- transformers


def phi3(name: str, **changes: Any) -> Phi3Config:
    published = {**published_configs()[name], **changes}
    fields = ("num_attention_heads", "num_key_value_heads", "hidden_size", "rope_theta")
    fields += ("original_max_position_embeddings", "max_position_embeddings")
    fields += ("partial_rotary_factor", "rope_scaling")
    kwargs = {field: copy.deepcopy(published[field]) for field in fields}
    return Phi3Config(**kwargs, vocab_size=64, pad_token_id=0, num_hidden_layers=1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_dict_and_transformers_object_agree(name: str) -> None:
    rope = Rope.from_config(published_configs()[name])
    assert Rope.from_config(phi3(name)) == rope
    assert rope.rotary_dim == 96
    assert [s.max_length for s in rope.sets] == [4096, None]


@pytest.mark.parametrize("seq_len", [1, 4096, 4097, 131072])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_attention_factor_of_transformers(name: str, seq_len: int) -> None:
    config = phi3(name)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=seq_len)
    rope = Rope.from_config(config)
    chosen = rope.sets[rope.set_index(seq_len)]
    assert chosen.attention_factor == pytest.approx(attention_factor, rel=1e-15)
    i = torch.arange(rope.pairs, dtype=torch.float64)
    mine = rope.base ** (-i / rope.pairs) / torch.tensor(chosen.factors, dtype=torch.float64)
    # Theirs is float32: a rounded exponent (times ln base), power, product and quotient.
    assert ((inv_freq.double() - mine) / mine).abs().max() < 16 * torch.finfo(torch.float32).eps
    exact = rope.tables(torch.device("cpu")).inv_freq[rope.set_index(seq_len), 1]
    assert ((exact - mine) / mine).abs().max() < 8 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("length", [64, 4097], ids=["short", "long"])
@pytest.mark.parametrize("name", PUBLISHED)
@every_target
def test_parity_with_phi3_at_short_positions(target: Target, name: str, length: int) -> None:
    """At positions below 64 a float32 angle is off by 64 eps for each of its four roundings."""
    config = phi3(name)
    module = Phi3RotaryEmbedding(config)
    heads = config.num_attention_heads // 8
    dim = config.hidden_size // config.num_attention_heads
    q, k = torch.randn(1, heads, 64, dim), torch.randn(1, 1, 64, dim)
    positions = torch.arange(64)[None]
    # The module chooses by the largest position it sees: the last one carries the length.
    shown = torch.cat((positions, torch.tensor([[length - 1]])), 1)
    cos, sin = (x[:, :64] for x in module(q, shown))
    wanted = apply_rotary_pos_emb(q, k, cos, sin)
    got = target.rotary(
        q, k, positions, Rope.from_config(config), layout="bhsd", lengths=torch.tensor([length])
    )
    eps = torch.finfo(torch.float32).eps
    for mine, theirs in zip(got, wanted, strict=True):
        bound = (64 * 4 + 4) * eps * theirs.abs().max()
        assert (mine.cpu() - theirs).abs().max() <= bound


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
@pytest.mark.parametrize("original", [4096, 64, None])
def test_old_phi3_files_as_transformers_reads_them(kind: str, original: int | None) -> None:
    """May 2024 said "yarn" and meant longrope; without an original length it is 4096."""
    file = {
        **config_4(type=kind),
        "model_type": "phi3",
        "original_max_position_embeddings": original,
    }
    if original is None:
        del file["original_max_position_embeddings"]
    read = Phi3Config(**copy.deepcopy(file), vocab_size=64, pad_token_id=0)
    module = Phi3RotaryEmbedding(read)
    for given in (file, read):
        rope = Rope.from_config(given)
        assert [s.max_length for s in rope.sets] == [original or 4096, None]
        assert [s.factors for s in rope.sets] == [tuple(SHORT), tuple(LONG)]
        assert {s.attention_factor for s in rope.sets} == {module.attention_scaling}
        assert rope.base == 5e5


def test_phi3s_own_original_length_goes_before_that_of_its_rope() -> None:
    file = {**config_4(type="longrope", original_max_position_embeddings=64), "model_type": "phi3"}
    del file["original_max_position_embeddings"]
    read = Phi3Config(**copy.deepcopy(file), vocab_size=64, pad_token_id=0)
    assert [Rope.from_config(given).sets[0].max_length for given in (file, read)] == [4096, 4096]


def test_yarn_with_lists_is_yarn_in_other_models() -> None:
    config = {**config_4(type="yarn", factor=4.0), "model_type": "llama"}
    plain = {**config_4(), "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert Rope.from_config(config) == Rope.from_config(plain)
    assert len(Rope.from_config({**config, "model_type": None}).sets) == 2


def test_rope_scaling_goes_first_as_in_transformers() -> None:
    both = {**config_4(), "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    read = Phi3Config(**copy.deepcopy(both), vocab_size=64, pad_token_id=0)
    assert read.rope_parameters["rope_type"] == "longrope"
    assert Rope.from_config(both) == Rope.from_config(read) == wanted()


def test_no_original_length_is_the_maximum() -> None:
    """As transformers: nothing is extended, and the long list is for what is beyond."""
    config = config_5()
    del config["rope_parameters"]["original_max_position_embeddings"]
    rope = Rope.from_config(config)
    assert [(s.max_length, s.attention_factor) for s in rope.sets] == [(131072, 1.0), (None, 1.0)]
