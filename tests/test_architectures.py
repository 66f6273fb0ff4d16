"""Decoders of transformers, each built tiny and held to the untouched one: what the list says."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import family_model, logits, max_diff, tokens
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

from longrope_kernels import Rope, cli
from longrope_kernels.integrations import families
from longrope_kernels.integrations.transformers import (
    architectures,
    disable,
    enable,
    set_rope,
    trial,
)
from longrope_kernels.integrations.transformers.parts import slots_of
from longrope_kernels.integrations.transformers.probe import probe, tiny
from longrope_kernels.integrations.transformers.rotary import Turn
from longrope_kernels.integrations.transformers.shrunk import VOCABULARY, shrunk

TOOL = Path(__file__).parents[1] / "tools" / "architectures.py"
specification = importlib.util.spec_from_file_location("architectures_tool", TOOL)
tool = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tool)

FAMILIES = families.proven()["families"]
# Those that differ most: softcap, ropes by type of layer, layers without rotation, interleaved
# pairs, a part of each head, experts, values of another size than keys, sinks.
EIGHT = ("gemma2", "gemma3", "smollm3", "cohere", "gpt_neox", "mixtral", "deepseek_v3", "gpt_oss")
every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EIGHT else pytest.mark.full) for n in FAMILIES]
)


@every
def test_a_family_is_what_the_list_says(name):
    """The same run that made it; on another transformers what passed must pass again."""
    if FAMILIES[name]["type"] not in CONFIG_MAPPING:  # an older transformers
        return
    entry = tool.try_one(FAMILIES[name]["type"])
    if architectures.minor(transformers.__version__) == families.proven()["transformers"]:
        assert entry == FAMILIES[name]
    else:
        assert "reason" not in entry
        assert bool(entry["unrotated"]) <= bool(FAMILIES[name]["unrotated"])


# Of those with unrotated keys: layers beside attention that go over tokens, and sinks.
MIXING = {
    *("falcon_h1", "granitemoehybrid", "lara_mini", "lfm2_moe", "lfm3", "minimax", "olmo_hybrid"),
    *("qwen3_next", "recurrent_gemma", "zaya"),
}
SINKS = {"flint", "gpt_oss", "granite_swa", "granitemoe_swa"}
AT_ONCE = {"llama", "mixtral", "stablelm", "gpt_oss", "falcon_h1", "lfm2_moe", "qwen3_next", "zaya"}


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in AT_ONCE else pytest.mark.full)
        for n, entry in FAMILIES.items()
        if not entry["unrotated"]
    ],
)
def test_ranks_share_tokens_that_attention_alone_mixes(name, one_rank):
    """The others are refused before anything is changed, and go on without a group."""
    if FAMILIES[name]["type"] not in CONFIG_MAPPING:
        return
    cls, config = tool.class_of(FAMILIES[name]["type"])
    model, reason = tiny(cls, config), ""
    if name in MIXING:
        reason = r"its layers mix tokens outside of attention, as convolutions and states do"
    if name in SINKS:
        reason = r"s_aux: not served over the ranks of a group"
    if not reason:
        enable(model, group=one_rank)
        return
    enable(model)
    expected = rf"^group: expected None for {type(model.base_model).__name__}, got one: {reason}"
    for _ in range(2):
        with pytest.raises(ValueError, match=expected):
            enable(model, group=one_rank)
    (slot,) = slots_of(model)
    assert slot.module.settings.group is None


def test_ranks_share_layers_by_what_they_are(one_rank):
    """LFM2's, which its config chooses."""
    for kinds, served in ((["full_attention"] * 2, True), (["conv", "full_attention"], False)):
        config = shrunk(transformers.Lfm2Config(num_hidden_layers=2, layer_types=kinds))
        model = AutoModelForCausalLM.from_config(config).eval()
        if served:
            enable(model, group=one_rank)
            continue
        with pytest.raises(ValueError, match=r"^group: expected None for Lfm2Model, got one: its"):
            enable(model, group=one_rank)
        assert not any(hasattr(module, "longrope") for module in model.modules())


def test_layers_that_need_all_tokens_are_refused(one_rank, monkeypatch):
    """Where they fail on some of them."""
    forward = modeling_llama.LlamaMLP.forward

    def with_places(self, x):
        return forward(self, x) + torch.linspace(0, 1, 12)[:, None]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", with_places)
    monkeypatch.setattr(trial, "passed", set())
    model = tiny(transformers.LlamaForCausalLM, transformers.LlamaConfig())
    enable(model)
    expected = r"^group: expected None for LlamaModel, got one: its layers fail on some of the tok"
    with pytest.raises(ValueError, match=expected):
        enable(model, group=one_rank)


def test_as_many_as_the_readme_says():
    rotated, unrotated = families.counts()
    assert rotated >= 90
    assert unrotated >= 60
    for entry in FAMILIES.values():
        assert {"forward", "cache"} <= set(entry["rotated_checks"])
        assert bool(entry["unrotated"]) != ("unrotated_checks" in entry)
    readme = " ".join((TOOL.parents[1] / "README.md").read_text("utf-8").split())
    assert f"{rotated} families of decoders of transformers" in readme
    assert f"{unrotated} of them with unrotated keys" in readme


def test_a_proof_finds_what_differs(monkeypatch):
    """Layers that do not rotate."""
    model = tiny(transformers.LlamaForCausalLM, transformers.LlamaConfig()).double()
    assert tool.prove(model, "unrotated") == [check.__name__ for check in tool.CHECKS]
    monkeypatch.setattr(Turn, "note", lambda *_: None)
    trial.passed.clear()
    with pytest.raises(RuntimeError, match=r"llama: an enabled model gives other results"):
        tool.prove(model, "unrotated")


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma3"])
def test_a_probe_finds_what_the_list_says(name, monkeypatch):
    """As for a transformers of another minor version, on which nothing has been proved."""
    config = shrunk(CONFIG_MAPPING[FAMILIES[name]["type"]]().get_text_config(decoder=True))
    base = AutoModelForCausalLM.from_config(config).base_model
    (slot,) = slots_of(base)
    assert probe(type(base), config) == slot.architecture
    monkeypatch.setattr(architectures, "proven", lambda: {"transformers": "5.0", "families": {}})
    assert slots_of(base) == []
    (probed,) = slots_of(base, probing=True)
    assert probed.architecture == slot.architecture


def test_the_command_line_and_the_list_agree():
    shown = CliRunner().invoke(cli.app, ["info", "--models"]).stdout
    assert f"{families.counts()[0]} families" in shown
    for name in (*FAMILIES, *families.proven()["others"]):
        assert f"\n  {name} " in shown


# --------------------------------------------------------------------- ropes by the kind of layers


def gemma() -> Any:
    return tiny(Gemma3ForCausalLM, Gemma3TextConfig())


def test_layers_of_several_kinds_have_each_their_own_rope():
    model, ids = gemma(), tokens(1, 20) % 60
    expected = logits(model, ids=ids)
    rope = Rope.plain(16, base=777.0)
    for cache in ("rotated", "unrotated"):
        enable(model, cache=cache)
        assert max_diff(logits(model, ids=ids), expected) < 1e-3
        own = model.model.rotary_emb.settings.ropes
        assert own["sliding_attention"].base == 10_000
        assert own["full_attention"].base == 1_000_000
        enable(model, rope={"full_attention": rope}, cache=cache)
        changed = logits(model, ids=ids)
        assert max_diff(changed, expected) > 1e-2
        set_rope(enable(model, cache=cache), {"full_attention": rope})
        assert torch.equal(logits(model, ids=ids), changed)
        assert model.model.rotary_emb.settings.ropes["sliding_attention"].base == 10_000
    disable(model)
    assert torch.equal(logits(model, ids=ids), expected)


def test_a_rope_for_layers_of_several_kinds_is_named():
    model = gemma()
    with pytest.raises(ValueError, match=r"rope: expected a dict .*sliding_att.*one Rope"):
        enable(model, rope=Rope.plain(16))
    with pytest.raises(ValueError, match=r"rope: expected kinds of .*got 'all'"):
        enable(model, rope={"all": Rope.plain(16)})
    with pytest.raises(TypeError, match="rope: expected a Rope or None, got float"):
        enable(model, rope={"full_attention": 1.0})


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (3, 1), (5, 5), (6, 3), (7, 1)])
def test_heads_of_any_number_are_tried_on_a_tiny_model(heads, kv_heads):
    """The tiny one has a hidden size of its own, which its heads must divide."""
    sizes = {"hidden_size": 32 * heads, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=32
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = tokens() % 32
    truth = logits(model, ids=ids)
    assert max_diff(logits(enable(model), ids=ids), truth) < 1e-5


def test_pairs_are_those_of_the_models_code():
    """A config says nothing of them; a rope may."""
    model = tiny(transformers.CohereForCausalLM, transformers.CohereConfig())
    enable(model, rope=Rope.plain(16))
    assert model.model.rotary_emb.rope.interleaved
    other = Rope.plain(32, interleaved=True)
    assert enable(family_model("llama"), rope=other).model.rotary_emb.rope == other


# ---------------------------------------------------------------------------------- what is refused


def test_what_can_not_lie_unrotated_is_named():
    model = tiny(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config())
    with pytest.raises(
        ValueError, match=r"cache: DeepseekV3Model is served with .*rotated.*value: 16 "
    ):
        enable(model)
    enable(model, cache="rotated")


def test_sinks_in_a_compiled_prefill_of_a_static_cache():
    torch.compiler.reset()
    kinds = ["full_attention"] * 2
    config = CONFIG_MAPPING["granite_swa"](num_hidden_layers=2, layer_types=kinds)
    model = tiny(transformers.GraniteSWAForCausalLM, config)
    ids = tokens(1, 20) % VOCABULARY
    expected = logits(model, ids=ids)
    enable(model)
    cache = StaticCache(config=model.config, max_cache_len=32)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(ids, past_key_values=cache).logits
    assert max_diff(actual, expected) < 2e-5


def test_a_mask_that_is_more_than_causal_is_named():
    """As of images in a text, whose tokens see one another."""
    model = tiny(Gemma3ForCausalLM, Gemma3TextConfig(use_bidirectional_attention=True))
    with pytest.raises((ValueError, RuntimeError), match=r"attention_mask: .*or_masks|causal"):
        enable(model)


def test_axial_positions_are_named():
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"got Qwen2VL.*(axes|rotates by)"):
        enable(model)


def foreign(name: str) -> Any:
    module = types.ModuleType(name)
    sys.modules[name] = module
    source = "def fast_rotation(q, k, cos, sin, unsqueeze_dim=1):\n    return q, k\n"
    source += "def fast_forward(self, *args, **kwargs):\n    return None\n"
    exec(source, vars(module))
    return module


def test_another_rotation_in_the_place_is_named(monkeypatch):
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", foreign("liger_kernel.rope").fast_rotation
    )
    model = family_model("llama")
    with pytest.raises(ValueError, match=r"got liger_kernel\.rope\.fast_rotation, .*rope=False"):
        enable(model)
    assert not hasattr(model.model, "longrope")


@pytest.mark.parametrize("cache", ["unrotated", "rotated"])
def test_another_rotation_put_there_since_is_named(monkeypatch, cache):
    """As Trainer(use_liger_kernel=True) does with the model that it is given."""
    model = enable(family_model("llama"), cache=cache)
    other = foreign("liger_kernel.rope").fast_rotation
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    with pytest.raises(ValueError, match=r"got liger_kernel\.rope\.fast_rotation, .*rope=False"):
        logits(model)
    monkeypatch.undo()
    logits(model)


def test_another_layer_in_the_place_is_named(monkeypatch):
    monkeypatch.setattr(
        modeling_llama.LlamaAttention, "forward", foreign("unsloth.models").fast_forward
    )
    with pytest.raises(ValueError, match=r"LlamaAttention\.forward .*got unsloth\.models\.fast_"):
        enable(family_model("llama"))


def test_kernels_of_the_hub_are_named():
    model = family_model("llama")
    model._use_kernels = True
    with pytest.raises(ValueError, match="use_kernels: expected False"):
        enable(model)
