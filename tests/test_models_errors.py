"""What enabled models refuse, naming it, and how they are copied, saved and loaded."""

import copy
import importlib
import json
import pickle
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from model_cases import (
    FAMILIES,
    SWITCH,
    family_config,
    family_model,
    generated,
    logits,
    max_diff,
    tokens,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from longrope_kernels import Rope
from longrope_kernels.integrations import transformers as integration
from longrope_kernels.integrations.transformers import disable, enable, trial

CLOSE = 2e-5


def run(model: Any, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{"input_ids": tokens(), **arguments}).logits


# ------------------------------------------------------------------------------------- of enable

REFUSED = {
    "policy": ({"policy": "pin"}, "unexpected keyword argument 'policy'"),
    "cache": ({"cache": "paged"}, "cache: expected one of 'unrotated', 'rotated', got 'paged'"),
    "backend": ({"backend": "fast"}, "backend: expected one of .*got 'fast'"),
    "triton on a CPU": ({"backend": "triton"}, "triton"),
    "rope": ({"rope": [1.0]}, "rope: expected a Rope or None, got list"),
    "wide rope": ({"rope": Rope.plain(64)}, "rope: expected 32 rotary dimensions.*got 64"),
    "narrow rope": ({"rope": Rope.plain(16)}, "rope: expected 32 rotary dimensions.*got 16"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_argument_changes_nothing(arguments, message):
    model = family_model("phi3")
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        enable(model, **arguments)
    assert {key: dict(vars(module)) for key, module in model.named_modules()} == before

    enable(model, backend="reference")
    expected = repr(model)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        enable(model, **arguments)
    assert repr(model) == expected
    assert max_diff(logits(model), logits(family_model("phi3"))) < CLOSE


def test_other_architectures_are_named():
    config = GPTJConfig(n_embd=32, n_head=2, n_layer=1, vocab_size=8, rotary_dim=8)
    with pytest.raises(
        ValueError, match=r"model: expected a model .*rotary.*, got GPTJForCausalLM"
    ):
        enable(GPTJForCausalLM(config))


def test_a_subclass_with_its_own_rotation_is_not_taken_for_its_base():
    model = family_model("llama")
    model.model.rotary_emb.__class__ = type("OwnRotary", (type(model.model.rotary_emb),), {})
    with pytest.raises(ValueError, match=r"model: expected.*rotary module is a OwnRotary"):
        enable(model)


@pytest.mark.parametrize("more", [{}, {"alpha": 1000.0}], ids=["", "alpha, which is HunYuan's"])
def test_dynamic_scaling_is_refused(more):
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = family_model("llama", rope_parameters={**parameters, **more})
    rotary = model.model.rotary_emb
    with pytest.raises(ValueError, match=r"rope type .dynamic. .*length"):
        enable(model)
    assert model.model.rotary_emb is rotary
    at_512 = Rope.from_config(model.config, length=512)
    assert enable(model, rope=at_512).model.rotary_emb.rope is at_512


def test_dynamic_scaling_by_an_alpha_is_served():
    """HunYuan's, which no length changes."""
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    config = HunYuanDenseV1Config(
        **sizes, num_key_value_heads=1, num_hidden_layers=2, vocab_size=128, rope_scaling=scaling
    )
    model = HunYuanDenseV1ForCausalLM(config).eval()
    before = logits(model)
    assert max_diff(logits(enable(model, cache="rotated")), before) < CLOSE


def test_an_unknown_rope_type_is_named():
    model = family_model("llama")
    model.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(ValueError, match="spiral"):
        enable(model)


def test_bidirectional_attention_is_refused():
    model = family_model("llama")
    model.config.is_causal = False
    with pytest.raises(ValueError, match="model: expected causal attention"):
        enable(model)


def test_weights_that_are_kept_from_being_made(monkeypatch):
    """A tiny model has none there either."""
    monkeypatch.setattr(trial, "passed", set())
    model = family_model("llama")
    with init_empty_weights(), pytest.raises(ValueError, match=r"init_empty_weights.*outside"):
        enable(model)
    assert not hasattr(model.model, "longrope")
    logits(enable(model))


def test_weights_that_are_buffers():
    """As quantised layers (GPTQ, AWQ) keep them."""
    model = family_model("llama")
    for layer in model.model.layers:
        for linear in layer.self_attn.children():
            weight = linear.weight.detach()
            del linear.weight
            linear.register_buffer("weight", weight)
    expected = logits(model)
    assert max_diff(logits(enable(model)), expected) < CLOSE


# ---------------------------------------------------------------------------------- of a forward


def test_attention_modules_that_look_both_ways_are_refused():
    """As LLM2Vec makes them; the config does not say it."""
    model = enable(family_model("llama"))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal: expected True, got False"):
        run(model)


def test_attention_bias_is_refused():
    model = enable(family_model("phi3"))
    for dtype in (torch.float32, torch.bool, torch.int64):
        with pytest.raises(ValueError, match=r"attention_mask: .*attention bias of shape.*rotated"):
            run(model, attention_mask=torch.ones(2, 1, 24, 24, dtype=dtype))


def test_an_attention_bias_of_five_keys_is_refused():
    """Where the mask of an enabled model has as many numbers a sequence."""
    model, ids = enable(family_model("phi3")), tokens()
    cache = DynamicCache(config=model.config)
    run(model, input_ids=ids[:, :4], past_key_values=cache)
    bias = torch.tensor([0, 0, 1, 1, 1]).expand(2, 1, 1, 5)
    with pytest.raises(ValueError, match=r"attention_mask: .*bias of shape \(2, 1, 1, 5\)"):
        run(model, input_ids=ids[:, 4:5], attention_mask=bias, past_key_values=cache)


def test_a_mask_of_more_tokens_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask: expected as many tokens .* got 30"):
        run(enable(family_model("phi3")), attention_mask=torch.ones(2, 30), use_cache=False)


POSITIONS = {
    "of one token": torch.zeros(1, 1, dtype=torch.int64),
    "of fewer": torch.arange(12)[None],
    "of more": torch.arange(30)[None],
    "of other rows": torch.arange(24).expand(3, -1),
    "without rows": torch.arange(24),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS.keys())
def test_positions_of_another_shape_are_refused(positions):
    model, says = enable(family_model("llama")), "position_ids: expected shape .2, {0}. or .1, {0}."
    with pytest.raises(ValueError, match=says.format(24)):
        run(model, position_ids=positions)
    cache = DynamicCache(config=model.config)
    run(model, past_key_values=cache)
    with pytest.raises(ValueError, match=says.format(3)):
        run(model, input_ids=tokens(2, 3), position_ids=positions, past_key_values=cache)


def test_a_mask_with_holes_is_refused():
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 7] = 0
    with pytest.raises(ValueError, match=r"attention_mask: .*padding between its tokens"):
        run(enable(family_model("phi3")), attention_mask=mask)


@pytest.mark.parametrize("static", [False, True])
def test_a_mask_of_the_new_tokens_alone_is_refused(static):
    """transformers takes what is missing for padding; here it was taken for tokens."""
    model, ids = enable(family_model("llama")), tokens()
    cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=40)
    model(ids[:, :20], past_key_values=cache)
    new = torch.ones(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask: expected 21 tokens, .*, got 1"):
        model(ids[:, 20:21], attention_mask=new, past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_dropout_in_training_is_refused(name):
    model = enable(family_model(name, attention_dropout=0.1))
    assert max_diff(logits(model), logits(family_model(name))) < CLOSE  # none in eval mode
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 in training, got 0\.1"):
        model.train()(tokens())
    enable(model, cache="rotated")(tokens())


class RoundingLayer(DynamicLayer):
    """As caches that quantise do."""


def test_other_caches_are_named():
    model = enable(family_model("mistral sliding"))
    static = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ValueError, match=r"past_key_values: .*window, 8, got a StaticSliding"):
        run(model, past_key_values=static)
    with pytest.raises(ValueError, match=r"past_key_values: .*got RoundingLayer"):
        run(model, past_key_values=Cache(layers=[RoundingLayer(), RoundingLayer()]))
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(ValueError, match=r"past_key_values: .*got EncoderDecoderCache"):
        run(model, past_key_values=both)
    with pytest.raises(ValueError, match=r"past_key_values: .*window, 8, got a StaticSliding"):
        generated(model, tokens(), cache_implementation="static")
    untouched = generated(family_model("mistral sliding"), tokens(), cache_implementation="static")
    # Another model: before transformers 5.13 one keeps the cache that was refused, and fails by it.
    model = enable(family_model("mistral sliding"), cache="rotated")
    assert torch.equal(generated(model, tokens(), cache_implementation="static"), untouched)


def test_an_old_transformers_is_refused(monkeypatch):
    for version in ("4.57.6", "5.5.4"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        with pytest.raises(ImportError, match=r"needs transformers >= 5\.6"):
            importlib.reload(integration)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.10.0.dev0")
    importlib.reload(integration)


def test_another_attention_implementation_is_refused():
    """Nobody would rotate: the cache holds unrotated keys, and so are the queries."""
    model = enable(family_model("phi3"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attn_implementation: expected 'longrope'.*got 'sdpa'"):
        run(model)
    disable(model)
    assert torch.equal(logits(model), logits(family_model("phi3")))


def test_a_model_that_was_not_enabled_is_told_to():
    model = family_model("llama")
    enable(family_model("llama"))
    model.set_attn_implementation("longrope")
    with pytest.raises(ValueError, match=r"module: expected a model that .*enable was called on"):
        run(model)


def test_a_copied_config_of_an_enabled_model():
    """Says "longrope" as well; the error says what to do."""
    enabled = enable(family_model("llama"))
    model = type(enabled)(copy.deepcopy(enabled.config)).eval()
    model.load_state_dict(enabled.state_dict())
    with pytest.raises(ValueError, match=r"module: .*set_attn_implementation\('sdpa'\)"):
        run(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), logits(family_model("llama")))


def test_attention_weights_cannot_be_had():
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        run(enable(family_model("phi3")), output_attentions=True)
    model = family_model("phi3")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"model: expected config\.output_attentions=False"):
        enable(model)
    assert len(enable(model, cache="rotated")(tokens()).attentions) == 2


# ---------------------------------------------------------------------------- copying and saving


def test_copies_are_enabled_and_live_apart():
    model = enable(family_model("phi3"))
    ids = tokens(1, SWITCH - 3)
    expected = generated(model, ids)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generated(made, ids), expected)
        assert made.config is made.model.config
        assert made.config is not model.config
        disable(made)
        assert torch.equal(logits(made), logits(family_model("phi3")))
    assert torch.equal(generated(model, ids), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_the_untouched_model(name, tmp_path):
    model = family_model(name)
    model.save_pretrained(tmp_path / "untouched")
    enable(model).save_pretrained(tmp_path / "enabled")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "enabled" / file).read_text()) == json.loads(
            (tmp_path / "untouched" / file).read_text()
        )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "enabled").eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded), logits(family_model(name)))
    assert torch.equal(logits(enable(loaded)), logits(model))


def test_a_pipeline_generates():
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, 128)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left"
    )
    prompts = ["w3 w4 w5", " ".join(f"w{i}" for i in range(10, 30))]
    answers = []
    for model in (family_model("phi3"), enable(family_model("phi3"))):
        generate = pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
        out = generate(prompts, batch_size=2, max_new_tokens=6, do_sample=False)
        answers.append([row[0]["generated_text"] for row in out])
    assert answers[1] == answers[0]
    assert all(
        answer.startswith(prompt) for answer, prompt in zip(answers[0], prompts, strict=True)
    )


def test_repr_says_what_holds():
    shown = repr(enable(family_model("phi3")))
    assert f"sets(max_length, n_hat)=[({SWITCH}, 0), (None, 0)]" in shown
    assert "cache='unrotated'" in shown
    assert family_config("phi3").rope_parameters["original_max_position_embeddings"] == SWITCH


# ------------------------------------------------------------------------- torch's context_parallel


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "cache"), [("phi3", "unrotated"), ("llama", "unrotated"), ("phi3", "rotated")]
)
def test_refused_under_torchs_context_parallel(family, cache, one_rank):
    """Where a shard would attend to itself alone, or choose its set by itself."""
    from torch.distributed.tensor.experimental import context_parallel

    model = enable(family_model(family), cache=cache)
    positions = torch.arange(tokens().shape[1])[None]
    expected = r"^context_parallel: an enabled model would attend within the shard"
    with (
        context_parallel(one_rank, buffers=[positions], buffer_seq_dims=[1]),
        pytest.raises(RuntimeError, match=expected),
    ):
        run(model, position_ids=positions, use_cache=False)
    run(model, position_ids=positions, use_cache=False)


def test_refused_with_a_group_under_torchs_context_parallel(one_rank):
    from torch.distributed.tensor.experimental import context_parallel

    model = enable(family_model("llama"), group=one_rank)
    with (
        context_parallel(one_rank, buffers=[tokens()], buffer_seq_dims=[1]),
        pytest.raises(RuntimeError, match=r"^context_parallel: .* without that context"),
    ):
        run(model, use_cache=False)


def test_one_set_is_rotated_under_torchs_context_parallel(one_rank):
    """Positions are all that it reads; the attention is torch's, which has none for a CPU there."""
    from torch.distributed.tensor.experimental import context_parallel

    model = enable(family_model("llama"), cache="rotated")
    positions = torch.arange(tokens().shape[1])[None]
    with context_parallel(one_rank, buffers=[positions], buffer_seq_dims=[1]):
        model.model.rotary_emb(None, positions)


def sharded(model, mesh):
    """As `fully_shard` does, the layers and then what is around them."""
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)


def split(model, mesh):
    """As transformers' own tensor parallelism does."""
    for layer in model.model.layers:
        parallelize_module(
            layer.self_attn, mesh, {"qkv_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
        )


@pytest.mark.parametrize("change", [sharded, split])
def test_weights_that_are_spread_before(change, one_rank):
    model = family_model("phi3")
    expected = logits(model)
    change(model, one_rank)
    assert max_diff(logits(enable(model)), expected) < CLOSE
