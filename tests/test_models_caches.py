"""Caches of enabled models: whose keys they hold, static ones with a window, one inside another."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from model_cases import (
    SWITCH,
    family_config,
    family_model,
    generated,
    logits,
    max_diff,
    published_model,
    tokens,
)
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MoshiForCausalLM,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import caches, disable, enable, set_rope
from longrope_kernels.integrations.transformers.probe import tiny

CLOSE = 2e-5
OTHERS = r"past_key_values: expected keys .* got a cache of keys"


def filled(model, kind=DynamicCache, count=20):
    cache = DynamicCache(config=model.config)
    if kind is StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        model(tokens(1, 24)[:, :count], past_key_values=cache)
    return cache


def goes_on(model, cache):
    """The next tokens are those of a whole forward."""
    with torch.no_grad():
        out = model(tokens(1, 24)[:, 20:], past_key_values=cache).logits
        expected = model(tokens(1, 24)).logits[:, 20:]
    return max_diff(out, expected) < CLOSE


# --------------------------------------------------------------------------------- whose keys


def another_model():
    model = family_model("llama")
    for weight in model.parameters():
        weight.data = weight.data.flip(0)
    return enable(model)


def same_queries():
    """Another one in all but what makes queries."""
    model = another_model()
    for layer, own in zip(model.model.layers, family_model("llama").model.layers, strict=True):
        layer.self_attn.q_proj = own.self_attn.q_proj
    return enable(model)


OTHER_MODELS = {
    "before enable": lambda: family_model("llama"),
    "of another model": another_model,
    "of one with the same queries": same_queries,
    "rotated": lambda: enable(family_model("llama"), cache="rotated"),
}


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("other", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_keys_of_others_are_refused(other, kind):
    cache, model = filled(other(), kind), enable(family_model("llama"))
    with pytest.raises(ValueError, match=OTHERS):
        goes_on(model, cache)
    assert int(cache.get_seq_length()) == 20
    cache.crop(-20) if kind is DynamicCache else cache.reset()
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    assert goes_on(model, cache)


def test_keys_of_another_offloaded_model_are_refused():
    """Whose weights both show nothing."""
    model, other = family_model("llama"), another_model()
    for each in (model, disable(other)):
        enable(cpu_offload(each, execution_device=torch.device("cpu")))
    assert goes_on(model, filled(model))
    with pytest.raises(ValueError, match=OTHERS), torch.no_grad():
        other(tokens(1, 24)[:, 20:], past_key_values=filled(model))


def test_a_cache_rotated_by_another_rope():
    model = enable(family_model("phi3"), cache="rotated")
    cache = filled(model)
    set_rope(model, Rope.plain(32))
    with pytest.raises(ValueError, match=OTHERS):
        goes_on(model, cache)
    set_rope(model, Rope.from_config(model.config))
    assert goes_on(model, cache)


# Of layers that are given what comes of positions, and of those with rotary modules of their own.
@pytest.mark.parametrize("name", ["phi3", "llama", "moshi"])
def test_rotated_keys_take_no_other_set(name):
    """Where a sequence grows over the switch, or is cut back below it."""
    if name == "moshi":
        model = tiny(MoshiForCausalLM, CONFIG_MAPPING["moshi"]())
    else:
        model = family_model(name)
    pairs = Rope.from_config(model.config).rotary_dim // 2
    rope = Rope.longrope([1.0] * pairs, [3.0] * pairs, SWITCH, 4 * SWITCH)
    ids, cache = tokens(1, SWITCH + 4) % 60, DynamicCache()  # without windows
    enable(model, rope=rope, cache="rotated")
    with torch.no_grad():
        model(ids[:, :-5], past_key_values=cache)
        model(ids[:, -5:-4], past_key_values=cache)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"factor set 1, that of 33 tokens.* by set 0"):
                model(ids[:, -4:-3], past_key_values=cache)
        assert cache.get_seq_length() == SWITCH
        cache.crop(-SWITCH)
        model(ids, past_key_values=cache)
        cache.crop(-5)
        with pytest.raises(ValueError, match=r"factor set 0, that of 32 tokens.* by set 1"):
            model(ids[:, -5:-4], past_key_values=cache)


def test_a_captured_graph_reads_no_positions(monkeypatch):
    """Where the host may not wait for a device, the sets are not compared."""
    model = enable(family_model("phi3"), cache="rotated")
    ids, cache = tokens(1, SWITCH + 1), DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        monkeypatch.setattr(caches, "can_wait", lambda: False)
        monkeypatch.setattr(caches, "_length", None)
        model(ids[:, -1:], past_key_values=cache)


def test_phi3_generates_over_the_switch_from_rotated_keys():
    """Its `generate()` prefills again there, as untouched."""
    model, ids = family_model("phi3"), tokens(2, SWITCH - 3)
    expected = generated(model, ids)
    assert torch.equal(generated(enable(model, cache="rotated"), ids), expected)


def test_an_unrotated_cache_takes_another_rope():
    model, one = enable(family_model("phi3", num_hidden_layers=1)), Rope.plain(32)
    cache = filled(model)
    assert goes_on(set_rope(model, one), cache)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("mode", ["unrotated", "rotated"])
def test_copies_of_a_cache_go_on(mode, kind):
    model = enable(family_model("phi3"), cache=mode)
    cache = filled(model, kind)
    assert goes_on(model, copy.deepcopy(cache))
    if kind is DynamicCache:
        assert goes_on(model, pickle.loads(pickle.dumps(cache)))
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([2]))
        cache.reorder_cache(torch.tensor([0]))
    assert goes_on(copy.deepcopy(model), copy.deepcopy(cache))
    assert goes_on(enable(disable(model), cache=mode, backend="reference"), cache)


def test_no_step_waits_for_a_static_cache(monkeypatch):
    """Its count is read once, when the cache is first seen."""
    model, reads, original = enable(family_model("phi3")), [], caches._is_empty
    cache = StaticCache(config=model.config, max_cache_len=48)
    monkeypatch.setattr(caches, "_is_empty", lambda one: reads.append(one) or original(one))
    with torch.no_grad():
        for part in tokens(1, 24).split([20, 1, 1, 1, 1], 1):
            model(part, past_key_values=cache)
    assert len(reads) == 1


# ------------------------------------------------------------------------------ adapters of PEFT


ADAPTERS = {
    "lora": lambda: LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    ),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
}


def adapted(kind):
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(family_config("llama", num_key_value_heads=4))
    model = get_peft_model(base, ADAPTERS[kind]()).eval()
    for name, weight in model.named_parameters():
        if "prompt_encoder" in name:
            weight.data.normal_(0, 1)
    return model


@pytest.mark.parametrize("cache", ["unrotated", "rotated"])
def test_adapters_that_rotate_by_themselves_are_named(cache):
    base = AutoModelForCausalLM.from_config(family_config("llama", num_key_value_heads=4))
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    model = get_peft_model(enable(base, cache=cache), config)
    with pytest.raises(AttributeError, match=r"rotate by themselves .PEFT's adaption prompts do"):
        model(tokens())


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_adapters(kind):
    given = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    model = adapted(kind)
    with torch.no_grad():
        expected = model(**given).logits
    made = model.generate(**given, max_new_tokens=6, do_sample=False)
    enable(model)
    with torch.no_grad():
        assert max_diff(model(**given).logits, expected) < CLOSE
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), made)
    model.train()
    model(**given, labels=given["input_ids"]).loss.backward()
    disable(model.eval())
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)
    if kind == "lora":
        merged = enable(model).merge_and_unload()
        with torch.no_grad():
            assert max_diff(merged(**given).logits, expected) < CLOSE


def test_prefix_tuning():
    """Its keys were learned as they are, rotated: refused by name, or served among rotated ones."""
    given = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    model = adapted("prefix")
    with torch.no_grad():
        expected = model(**given).logits
    enable(model)
    with pytest.raises(ValueError, match=OTHERS + ".*prefix tuning"), torch.no_grad():
        model(**given)
    enable(model, cache="rotated")
    with torch.no_grad():
        assert max_diff(model(**given).logits, expected) < CLOSE


# ------------------------------------------------------------------- static caches with a window


@pytest.mark.parametrize("name", ["phi-3-mini-128k", "phi-4-mini"])
def test_static_caches_of_published_models(name):
    """Their sliding window, 262144, is longer than any cache of theirs."""
    ids, static = tokens(1, 20), {"cache_implementation": "static", "disable_compile": True}
    expected = generated(published_model(name, sliding_window=262144), ids, **static)
    model = enable(published_model(name, sliding_window=262144))
    assert torch.equal(generated(model, ids, **static), expected)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        actual = model(ids, past_key_values=cache).logits
    assert max_diff(actual, logits(model, ids=ids)) < CLOSE


@pytest.mark.parametrize("length", [SWITCH, 48, 64])
def test_a_static_cache_no_longer_than_its_window(length):
    """Equally long ones say if that is all, from transformers 5.24 on."""
    model = enable(family_model("mistral", sliding_window=48))
    cache = StaticCache(config=model.config, max_cache_len=length)
    layer = cache.layers[0]
    if length < 48 or (
        length == 48 and isinstance(getattr(type(layer), "is_croppable", None), property)
    ):
        with torch.no_grad():
            model(tokens(1, 20), past_key_values=cache)
        assert goes_on(model, cache)
        return
    with pytest.raises(ValueError, match=r"past_key_values: expected max_cache_len .*48, got"):
        goes_on(model, cache)


@pytest.mark.parametrize("counts", [[20, 13], [32, 1], [33]], ids=str)
def test_a_static_cache_that_would_drop_keys(counts):
    """Shorter than its window and full: transformers forgets the first keys."""
    model = enable(family_model("mistral", sliding_window=48))
    cache = StaticCache(config=model.config, max_cache_len=32)
    for count in counts[:-1]:
        model(tokens(1, count), past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values: expected at most 32 tokens.* got 33"):
        model(tokens(1, counts[-1]), past_key_values=cache)


# ---------------------------------------------------------------------- a model inside a model


@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}], ids=str)
def test_llava_over_phi3(arguments):
    text = family_model("phi3").config
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=127)
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config).eval()
    ids = tokens(1, SWITCH - 12)
    ids[0, 3:7] = 127
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    rest = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **arguments}
    with torch.no_grad():
        expected = model(**given).logits
    made = model.generate(**given, **rest)
    vision_attention = config.vision_config._attn_implementation
    enable(model)
    with torch.no_grad():
        assert max_diff(model(**given).logits, expected) < CLOSE
    assert torch.equal(model.generate(**given, **rest), made)
    assert config.vision_config._attn_implementation == vision_attention
    disable(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)
