"""enable() on small Phi-3 models against the untouched ones."""

import copy
from types import SimpleNamespace

import pytest
import torch
from model_cases import generated, gradients, logits, max_diff, tokens
from model_cases import published_config as small_config
from model_cases import published_model as small_model
from transformers import (
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.phi3 import modeling_phi3

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import ExactRotaryEmbedding, disable, enable
from longrope_kernels.integrations.transformers.ropes import rope_of
from longrope_kernels.rope.published import published_configs

MODELS = tuple(published_configs())
MODES = {
    "rotated-reference": {"cache": "rotated", "backend": "reference"},
    "rotated-native": {"cache": "rotated", "backend": "native"},
    "unrotated-reference": {"backend": "reference"},
    "unrotated-native": {"backend": "native"},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
both_caches = pytest.mark.parametrize("cache", ["rotated", "unrotated"])


# ---------------------------------------------------------------------------------------- results


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_logits_are_within_twice_the_models_own_error(name, dtype, mode):
    truth = logits(small_model(name, torch.float64))
    own_error = max_diff(logits(small_model(name, dtype)), truth)
    error = max_diff(logits(enable(small_model(name, dtype), **mode)), truth)
    assert error <= 2 * own_error


@every_mode
@pytest.mark.parametrize("name", MODELS)
def test_fp32_logits_agree_at_short_positions(name, mode):
    expected = logits(small_model(name))
    assert max_diff(logits(enable(small_model(name), **mode)), expected) < 2e-5
    without_rotation = logits(small_model(name), ids=tokens().flip(1)).flip(1)
    assert max_diff(without_rotation, expected) > 0.1  # order matters here: the test can fail


@every_mode
@pytest.mark.parametrize("last", [4094, 4095, 4096, 4097])
def test_the_set_changes_where_transformers_changes_it(last, mode):
    """A last position of 4095 makes 4096 tokens, which are short; one more is long."""
    start = last - tokens().shape[1] + 1
    expected = logits(small_model(), start)
    assert max_diff(logits(enable(small_model(), **mode), start), expected) < 2e-3
    short = enable(small_model(), rope=Rope(Rope.from_config(small_config()).sets[:1]))
    differs = max_diff(logits(short, start), expected) > 0.05
    assert differs == (last > 4095)


@every_mode
def test_logits_at_two_million_are_nearer_the_truth_than_the_untouched_models(mode):
    start = 2**21
    truth = logits(enable(small_model(dtype=torch.float64)), start)
    error = max_diff(logits(enable(small_model(), **mode), start), truth)
    assert error < 1e-4 < max_diff(logits(small_model(), start), truth)


def test_one_long_sequence_takes_the_batch_with_it_as_in_transformers():
    positions = torch.stack((torch.arange(24), torch.arange(4090, 4090 + 24)))
    expected = small_model()(tokens(), position_ids=positions).logits
    actual = enable(small_model(), cache="rotated")(tokens(), position_ids=positions).logits
    assert max_diff(actual, expected) < 2e-3


def test_each_sequence_takes_its_own_set():
    positions = torch.stack((torch.arange(24), torch.arange(4090, 4090 + 24)))
    actual = enable(small_model())(tokens(), position_ids=positions).logits
    for row, start in enumerate((0, 4090)):
        alone = logits(small_model(), start, tokens()[row : row + 1])
        assert max_diff(actual[row : row + 1], alone) < 2e-3


def test_n_hat_keeps_the_first_tokens_unscaled():
    config = small_config()
    below = enable(small_model(), rope=Rope.from_config(config, n_hat=24))
    plain = enable(small_model(), rope=Rope.plain(96))
    assert max_diff(logits(below), logits(plain)) < 1e-6
    assert max_diff(logits(below), logits(small_model())) > 1e-2


@both_caches
@pytest.mark.parametrize("n_hat", [16, [4, 16]])
def test_a_threshold_of_the_config(n_hat, cache):
    model = small_model()
    expected = logits(enable(small_model(), rope=Rope.from_config(model.config, n_hat=n_hat)))
    model.config.longrope_n_hat = n_hat
    assert max_diff(logits(enable(model, cache=cache)), expected) < 2e-5
    assert max_diff(expected, logits(small_model())) > 1e-2


def test_attention_factors_of_both_sets_in_the_config():
    """Which transformers reads of PhiMoE alone."""
    rope = Rope.longrope([1.0] * 48, [2.0] * 48, 4096, attention_factor=(1.1, 1.3))
    written = rope.to_config(head_dim=96, max_position_embeddings=131072)
    config = small_config()
    vars(config).update(written)
    model = Phi3ForCausalLM(config)
    assert enable(model).model.rotary_emb.rope == rope
    assert enable(disable(model), rope=rope).model.rotary_emb.rope == rope


def test_layers_of_a_kind_have_their_own_original_length():
    longrope = {
        **{"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.2},
        **{"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]},
        "original_max_position_embeddings": 20,
    }
    config = Gemma3TextConfig(
        **{"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16},
        original_max_position_embeddings=40,  # which transformers does not read then
        rope_parameters={"full_attention": longrope, "sliding_attention": {}},
    )
    rope = rope_of(Gemma3RotaryEmbedding(config), "full_attention", interleaved=False)
    assert rope.sets[0].max_length == 20


def test_a_config_without_scaling_is_the_plain_embedding():
    model = small_model(rope_scaling=None)
    expected = logits(model)
    assert max_diff(logits(enable(model)), expected) < 2e-5


@pytest.mark.parametrize(
    "make", [Phi3Model, Phi3ForSequenceClassification, Phi3ForTokenClassification]
)
def test_every_head(make):
    torch.manual_seed(1)
    model = make(small_config()).eval()
    with torch.no_grad():
        expected = model(tokens())[0]
        assert max_diff(enable(model)(tokens())[0], expected) < 2e-5
    assert isinstance(model.base_model.rotary_emb, ExactRotaryEmbedding)


# --------------------------------------------------------------------------------------- training


@every_mode
@pytest.mark.parametrize("name", ["phi-3-mini-128k", "phi-4-mini"])
def test_training_gradients(name, mode):
    expected = gradients(small_model(name))
    actual = gradients(enable(small_model(name), **mode))
    for a, e in zip(actual, expected, strict=True):
        assert max_diff(a, e) <= 1e-5 * float(e.abs().max())


@both_caches
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, cache):
    expected = gradients(enable(small_model(), cache=cache))
    model = enable(small_model(), cache=cache)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for a, e in zip(gradients(model), expected, strict=True):
        assert torch.equal(a, e)


@both_caches
def test_training_under_autocast(cache):
    model = enable(small_model(), cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------- generate


GENERATE = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@both_caches
@pytest.mark.parametrize("arguments", GENERATE.values(), ids=GENERATE.keys())
def test_generate_gives_the_same_tokens(arguments, cache):
    expected = generated(small_model(), tokens(), **arguments)
    assert expected.shape == (2, 32)
    model = enable(small_model(), cache=cache)
    assert torch.equal(generated(model, tokens(), **arguments), expected)


@both_caches
def test_generate_with_left_padding(cache):
    ids = tokens()
    mask = torch.ones_like(ids)
    ids[0, :9], mask[0, :9] = 0, 0
    expected = generated(small_model(), ids, attention_mask=mask)
    model = enable(small_model(), cache=cache)
    assert torch.equal(generated(model, ids, attention_mask=mask), expected)


def test_a_rotated_cache_crosses_the_switch_as_transformers_does():
    """It drops its cache there and prefills again under the long set; before 5.20 one token."""
    expected = generated(small_model(original=26), tokens())
    model = enable(small_model(original=26), cache="rotated")
    assert torch.equal(generated(model, tokens()), expected)
    assert not torch.equal(generated(small_model(), tokens()), expected)


# ----------------------------------------------------------------------------- life of the module


def test_enable_returns_the_model_and_twice_is_once():
    model = small_model()
    assert enable(model) is model
    expected = logits(model)
    original = model.model.rotary_emb.original
    dispatcher = modeling_phi3.apply_rotary_pos_emb
    enable(model)
    assert model.model.rotary_emb.original is original
    assert modeling_phi3.apply_rotary_pos_emb is dispatcher
    assert torch.equal(logits(model), expected)


def test_enable_again_takes_the_new_arguments():
    model = enable(enable(small_model()), rope=Rope.plain(96))
    assert torch.equal(logits(model), logits(enable(small_model(), rope=Rope.plain(96))))


@both_caches
def test_disable_restores_the_model_bit_for_bit(cache):
    model = small_model()
    rotary, expected = model.model.rotary_emb, logits(model)
    enable(model, cache=cache)
    assert not torch.equal(logits(model, 10**5), logits(small_model(), 10**5))
    assert disable(model) is model
    assert model.model.rotary_emb is rotary
    assert torch.equal(logits(model), expected)
    disable(model)
    assert torch.equal(logits(model), expected)


def test_untouched_models_stay_untouched_beside_an_enabled_one():
    expected = logits(small_model(), 10**5)
    enable(small_model())
    assert torch.equal(logits(small_model(), 10**5), expected)


def test_state_dict_is_unchanged_and_loads(tmp_path):
    model = small_model()
    names = list(model.state_dict())
    enable(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = Phi3ForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.rotary_emb).__name__ == "Phi3RotaryEmbedding"
    assert torch.equal(logits(enable(loaded.eval())), logits(model))


def test_deepcopy_and_torch_save(tmp_path):
    model = enable(small_model())
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    disable(copied)
    assert isinstance(model.model.rotary_emb, ExactRotaryEmbedding)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))


def test_an_enabled_model_moves_and_keeps_exact_angles():
    """.to(bfloat16) rounds the frequencies of transformers' module; the Rope's stay exact."""
    moved = enable(small_model()).to(torch.bfloat16)
    assert torch.equal(logits(moved, 4000), logits(enable(small_model(dtype=torch.bfloat16)), 4000))


def test_moving_layer_arguments_between_devices_keeps_the_rotation():
    """accelerate and DDP rebuild the tuples they find in a layer's arguments."""
    model = enable(small_model(), cache="rotated")
    positions, rotation = model.model.rotary_emb(torch.empty(0), torch.arange(24)[None])
    rebuilt = type(rotation)(*(x.to("cpu") if hasattr(x, "to") else x for x in rotation))
    q = torch.randn(1, 4, 24, 96)
    expected = modeling_phi3.apply_rotary_pos_emb(q, q, positions, rotation)
    actual = modeling_phi3.apply_rotary_pos_emb(q, q, positions, rebuilt)
    assert torch.equal(actual[0], expected[0])


@every_mode
def test_compile_fullgraph(mode):
    torch.compiler.reset()
    model = enable(small_model(), **mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for start in (0, 4090):  # one graph for both sets
        with torch.compiler.set_stance("fail_on_recompile" if start else "default"):
            actual = logits(compiled, start)
        assert max_diff(actual, logits(model, start)) < 2e-5


# ---------------------------------------------------------------------------------------- refusals


def test_unsupported_models_are_named():
    config = GPTJConfig(n_embd=32, n_head=2, n_layer=1, vocab_size=8, rotary_dim=8)
    with pytest.raises(ValueError, match=r"decoder of transformers .*, got GPTJForCausalLM"):
        enable(GPTJForCausalLM(config))
    with pytest.raises(ValueError, match=r"decoder of transformers .*, got SimpleNamespace"):
        enable(SimpleNamespace())


def test_a_rope_wider_than_a_head_is_refused_and_nothing_changed():
    model = small_model()
    with pytest.raises(ValueError, match=r"rope: expected 96 rotary dimensions.*got 128"):
        enable(model, rope=Rope.plain(128))
    with pytest.raises(TypeError, match="rope: expected a Rope or None, got dict"):
        enable(model, rope={"factors": [1.0]})
    assert type(model.model.rotary_emb) is modeling_phi3.Phi3RotaryEmbedding


def test_a_backend_that_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="backend: expected one of"):
        enable(small_model(), backend="fast")
    for arguments in ({"cache": "rotated", "backend": "native"}, {"backend": "composed"}):
        with pytest.raises(ValueError, match="does not serve float64"):
            enable(small_model(dtype=torch.float64), **arguments)
