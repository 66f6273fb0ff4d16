"""Training enabled models, and what `disable` puts back."""

import copy
from functools import partial

import pytest
import torch
from model_cases import (
    FAMILIES,
    ONE_OF_EACH,
    SHARED,
    SWITCH,
    family_model,
    gradients,
    logits,
    max_diff,
    tokens,
)
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from longrope_kernels.integrations.transformers import disable, enable


def check_gradients(expected, actual):
    """Beside the largest of all."""
    scale = max(float(e.abs().max()) for e in expected)
    for e, a in zip(expected, actual, strict=True):
        assert max_diff(a, e) <= 1e-5 * scale


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_untouched_models(name):
    expected = gradients(family_model(name))
    actual = gradients(enable(family_model(name)))
    check_gradients(expected, actual)


@pytest.mark.parametrize("name", ["phi3", "mistral sliding"])
def test_gradients_of_right_padded_rows(name):
    """Padding has label -100; its own outputs are nobody's business."""
    ids, mask = tokens(), torch.ones(2, 24, dtype=torch.int64)
    mask[0, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for model in (family_model(name), enable(family_model(name))):
        model.train()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        found.append([p.grad for p in model.parameters()])
    check_gradients(*found)


@pytest.mark.parametrize("padding", [0, 5])
def test_a_few_queries_take_each_their_own_set_with_gradients_too(padding):
    """Across the switch, as without gradients."""
    model, ids, mask = enable(family_model("phi3")), tokens(2, 40), torch.ones(2, 40).long()
    mask[0, :padding] = 0
    found = []
    for recorded in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.set_grad_enabled(recorded):
            for at in (slice(0, 30), slice(30, 40)):
                given = {"attention_mask": mask[:, : at.stop], "past_key_values": cache}
                out = model(ids[:, at], **given).logits
        found.append(out)
    assert max_diff(*found) < 2e-5


@pytest.mark.parametrize("count", [8, 20])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("name", ["phi3", "mistral sliding"])
def test_gradients_through_a_cache(name, padding, count):
    """A chunk after a cached one, as in training over segments; decode has no gradient."""
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    first, found = 30 - count, []
    for model in (family_model(name), enable(family_model(name))):
        cache = None
        for at in (slice(0, first), slice(first, 30)):
            out = model(
                ids[:, at],
                attention_mask=mask[:, : at.stop],
                position_ids=positions[:, at],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
        out.logits.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    check_gradients(*found)


def checkpoint(model, **kwargs):
    """By its name today, or by that of transformers 5.17."""
    today = getattr(model, "activation_checkpointing_enable", None)
    (today or model.gradient_checkpointing_enable)(kwargs)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_activation_checkpointing(name, use_reentrant):
    expected = gradients(enable(family_model(name)))
    model = enable(family_model(name))
    checkpoint(model, use_reentrant=use_reentrant)
    for a, e in zip(gradients(model), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("cache", ["unrotated", "rotated"])
def test_activation_checkpointing_in_a_graph_of_any_length(cache):
    """Of unrotated keys by the setting that the documentation names, as torch's error does."""
    setting = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    torch.compiler.reset()
    model = enable(family_model("phi3"), cache=cache)
    model.config.use_cache = False
    checkpoint(model, use_reentrant=False)
    model.compile(fullgraph=True, dynamic=True, backend="eager")
    if cache == "unrotated":
        with pytest.raises(torch._dynamo.exc.Unsupported, match=setting):
            gradients(model)
    with torch._dynamo.config.patch(setting, cache == "unrotated"):
        for count, stance in ((24, "default"), (SWITCH + 8, "fail_on_recompile")):
            ids = tokens(2, count)
            model.zero_grad()
            with torch.compiler.set_stance(stance):
                actual = gradients(model, ids)
            check_gradients(gradients(family_model("phi3"), ids), actual)


def test_two_forwards_before_one_backward_under_checkpointing():
    """What layers share in a forward is not that of the last one when it is run again."""
    found = []
    for checkpointed in (False, True):
        model = enable(family_model("phi3")).train()
        if checkpointed:
            checkpoint(model, use_reentrant=False)
        loss = torch.zeros(())
        for start in (0, 100):
            positions = torch.arange(start, start + 24)[None]
            loss = loss + model(tokens(), position_ids=positions, labels=tokens()).loss
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, e in zip(*found, strict=True):
        assert torch.equal(a, e)


def test_two_packings_of_the_same_positions_under_checkpointing():
    """Borders tell them apart too."""
    found, positions = [], torch.arange(24)[None]
    for checkpointed in (False, True):
        model = enable(family_model("phi3")).train()
        if checkpointed:
            checkpoint(model, use_reentrant=False)
        loss = torch.zeros(())
        for borders in (torch.tensor([0, 9, 24]), torch.tensor([0, 16, 24])):
            given = {"cu_seq_lens_q": borders, "position_ids": positions, "labels": tokens(1)}
            loss = loss + model(tokens(1), **given).loss
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, e in zip(*found, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["phi3", "qwen3"])
def test_autocast_is_no_further_off_than_the_untouched_model(name):
    truth = gradients(family_model(name))
    found = []
    for model in (family_model(name), enable(family_model(name))):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model))
    for t, own, actual in zip(truth, *found, strict=True):
        assert actual.dtype == torch.float32
        assert max_diff(actual, t) <= 2 * max_diff(own, t) + 1e-6


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_steps_under_autocast(name):
    """From a cache too, of which qwen3 keeps float32 keys beside bfloat16 values."""
    found, ids = [], tokens(2, 24)
    truth = logits(family_model(name), ids=ids)[:, 20:]
    for model in (family_model(name), enable(family_model(name))):
        cache = DynamicCache(config=model.config)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            steps = [model(ids[:, i, None], past_key_values=cache).logits for i in range(20, 24)]
        found.append(torch.cat(steps, 1))
    own, actual = (max_diff(x, truth) for x in found)
    assert actual <= 2 * own + 1e-6


def test_trainer_follows_the_untouched_model(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 40)]
    losses = []
    for model in (family_model("phi3"), enable(family_model("phi3"))):
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("cache", ["unrotated", "rotated"])
def test_positions_written_in_place_before_a_backward(cache, checkpointed):
    """As into the one buffer of a loader; what is run again reads those of its own forward."""
    found = []
    for model in (family_model("phi3"), enable(family_model("phi3"), cache=cache)):
        model.train()
        if checkpointed:
            checkpoint(model, use_reentrant=False)
        positions = torch.arange(24)[None]
        first = model(tokens(), position_ids=positions, labels=tokens()).loss
        positions.mul_(7)
        first.backward()
        found.append([p.grad for p in model.parameters()])
    check_gradients(*found)


@pytest.mark.parametrize("count", [1, 4])
def test_checkpointing_that_drops_a_cache_is_refused(count):
    """transformers' layers do, and each token would attend to those of its own forward alone."""
    model, cache = enable(family_model("phi3")), DynamicCache()
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    checkpoint(model.train(), use_reentrant=False)
    with pytest.raises(ValueError, match=r"past_key_values: .*checkpointing.*eval\(\)"):
        model(tokens(2, count), past_key_values=cache)


@pytest.mark.parametrize("way", list(CheckpointImpl))
def test_a_cache_that_is_written_again_in_the_backward_is_refused(way):
    """By torch's own checkpointing, which knows of no caches; by itself a model makes one."""
    found = []
    for model in (family_model("phi3"), enable(family_model("phi3"))):
        model.train().enable_input_require_grads()
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=way),
            check_fn=lambda module: hasattr(module, "self_attn"),
        )
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters()])
    check_gradients(*found)
    with pytest.raises(ValueError, match=r"past_key_values: .*use_cache=False"):
        model(tokens(), labels=tokens()).loss.backward()


# ------------------------------------------------------------------------ layers that others change


def deepened(model):
    """The first layer once more on top, as where models are grown in depth."""
    layer = copy.deepcopy(model.model.layers[0])
    layer.self_attn.layer_idx = len(model.model.layers)
    model.model.layers.append(layer)
    model.config.num_hidden_layers += 1
    return model


def trained_whole(model):
    """PEFT trains a copy of each of these modules in its place."""
    return get_peft_model(
        model, LoraConfig(target_modules=["down_proj"], modules_to_save=["self_attn"])
    )


@pytest.mark.parametrize("first", ["change", "enable"])
@pytest.mark.parametrize("change", [deepened, trained_whole])
def test_layers_that_are_copied_rotate(change, first):
    """Each copy has a config of its own, with an attention implementation of its own."""
    ids, model = tokens(2, 40), change(family_model("phi3"))
    expected = logits(model, ids=ids)
    model = enable(model) if first == "change" else change(enable(family_model("phi3")))
    assert max_diff(logits(model, ids=ids), expected) < 2e-5
    assert torch.equal(logits(disable(model), ids=ids), expected)


def test_a_copy_that_trains_in_the_place_of_the_first_attention_sees_its_cache():
    """PEFT keeps the original beside it, of which no forward comes to."""
    model = enable(trained_whole(family_model("phi3")))
    with torch.no_grad():
        keys_of_others = family_model("phi3")(tokens()).past_key_values
        with pytest.raises(ValueError, match="past_key_values: expected keys unrotated"):
            model(tokens(), past_key_values=keys_of_others)


def test_a_layer_that_came_later_is_enabled_again():
    """It came from a model that was not enabled."""
    model, ids = family_model("phi3"), tokens(2, 40)
    expected = logits(model, ids=ids)
    enable(model).model.layers[1] = family_model("phi3").model.layers[1]
    assert max_diff(logits(enable(model), ids=ids), expected) < 2e-5
    assert torch.equal(logits(disable(model), ids=ids), expected)


# ----------------------------------------------------------------------------------------- disable


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_disable_puts_everything_back(name, attention):
    model = family_model(name)
    model.set_attn_implementation(attention)
    expected, config, rotary = logits(model), model.config, model.model.rotary_emb
    before = {key: list(vars(module)) for key, module in model.named_modules()}
    fields = copy.deepcopy(config.to_dict())
    for backend in ("reference", None):
        enable(model, backend=backend)
        assert model.config._attn_implementation == "longrope"
    assert disable(model) is model
    assert model.config is config
    assert model.model.config is config
    assert config._attn_implementation == attention
    assert config.to_dict() == fields
    assert model.model.rotary_emb is rotary
    assert rotary.config is config
    assert {key: list(vars(module)) for key, module in model.named_modules()} == before
    first = model.model.layers[0].self_attn
    assert not first._forward_pre_hooks
    assert not first._forward_pre_hooks_with_kwargs
    assert torch.equal(logits(model), expected)


def test_encoders_keep_their_attention():
    """In the same base model as the decoder, and their configs in its own."""
    encoder = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "phi4_multimodal",
        **{**SHARED, "eos_token_id": 2, "original_max_position_embeddings": 32},
        vision_config={**encoder, "num_hidden_layers": 2, "image_size": 28},
        audio_config={
            **encoder,
            "num_blocks": 2,
            "nemo_conv_channels": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    tower = model.model.embed_tokens_extend.image_embed.img_processor
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        tower.config._attn_implementation = "eager"
        expected = tower(pixels).last_hidden_state
        for change in (enable, disable):
            change(model)
            assert tower.config._attn_implementation == "eager"
            assert torch.equal(tower(pixels).last_hidden_state, expected)
    assert model.config._attn_implementation == "sdpa"


def test_what_the_caller_changed_in_the_config_stays():
    model = enable(family_model("phi3"))
    model.config.use_cache = False
    assert disable(model).config.use_cache is False


def test_models_of_one_config_object():
    """They share its attention implementation: one of them enabled, the other says so."""
    first = family_model("phi3")
    second = type(first)(first.config).eval()
    expected = logits(second)
    enable(first)
    with pytest.raises(ValueError, match=r"module: .*shares its config object"):
        logits(second)
    enable(second)
    assert max_diff(logits(second), expected) < 2e-5
    for one, other in ((first, second), (second, first)):
        disable(one)
        implementation = first.config._attn_implementation
        refused = other if implementation == "sdpa" else one
        with pytest.raises(ValueError, match=r"attn_implementation: |module: "):
            logits(refused)
        disable(other)
        assert first.config._attn_implementation == "sdpa"
        assert torch.equal(logits(second), expected)
        enable(torch.nn.ModuleList([first, second]))


def test_hooks_of_others_stay():
    model, seen = family_model("phi3"), []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(1))
    logits(enable(model))
    logits(disable(model))
    assert len(seen) == 2
