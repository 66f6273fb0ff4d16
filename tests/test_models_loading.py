"""Models that others load, move, wrap and change around `enable`."""

import types
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from model_cases import family_config, family_model, logits, max_diff, tokens
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from longrope_kernels.integrations.transformers import disable, enable
from longrope_kernels.integrations.transformers.markers import Rotated

CLOSE = 2e-5
both_caches = pytest.mark.parametrize("cache", ["unrotated", "rotated"])


# ------------------------------------------------------------------------------------- accelerate


def offloaded(model: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


@both_caches
def test_offloaded_again_once_enabled(cache):
    """As PEFT does where it loads adapters into an offloaded model."""
    model = enable(offloaded(family_model("phi3")), cache=cache)
    for _ in range(2):
        add_hook_to_module(model.model.rotary_emb, ModelHook())
        assert isinstance(model.model.rotary_emb(None, torch.arange(4)[None])[1], tuple)
        assert max_diff(logits(model), logits(family_model("phi3"))) < CLOSE
        remove_hook_from_submodules(model)
        model.load_state_dict(family_model("phi3").state_dict(), assign=True)
    assert torch.equal(logits(disable(model)), logits(family_model("phi3")))


def test_an_offloaded_model_takes_the_backend_of_where_it_runs():
    model = offloaded(family_model("llama"))
    expected = logits(family_model("llama"))
    assert max_diff(logits(enable(model, backend="native")), expected) < CLOSE


# ------------------------------------------------------------------------------ quantised weights


class Halves(torch.Tensor):
    """A weight that lies in two tensors and has no view, as torchao's quantised ones."""

    def __new__(cls, left: torch.Tensor, right: torch.Tensor) -> "Halves":
        shape = (left.shape[0], left.shape[1] + right.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=left.dtype)

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.left, self.right = left, right

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["left", "right"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].left, args[0].right)
        if func is torch.ops.aten.t.default:
            return torch.cat((args[0].left, args[0].right), 1).t()
        raise NotImplementedError(f"{func} of Halves")


def test_weights_that_have_no_views():
    found = []
    for sign in (1.0, -1.0, 1.0):
        model = family_model("llama")
        for layer in model.model.layers:
            for linear in layer.self_attn.children():
                weight = sign * linear.weight.detach()
                linear.weight = nn.Parameter(Halves(*weight.chunk(2, 1)), requires_grad=False)
        expected = logits(model)
        assert max_diff(logits(enable(model)), expected) < CLOSE
        found.append(model.model.longrope.settings.fingerprint)
    assert found[0] == found[2] != found[1]


# ----------------------------------------------------------------------- rotary modules changed


@both_caches
def test_a_hook_that_moves_positions_is_honoured(cache):
    model = family_model("llama")

    def stretched(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": 4 * kwargs["position_ids"]}

    hook = model.model.rotary_emb.register_forward_pre_hook(stretched, with_kwargs=True)
    expected = logits(model)
    assert max_diff(expected, logits(family_model("llama"))) > 0.1
    assert max_diff(logits(enable(model, cache=cache)), expected) < CLOSE
    hook.remove()
    assert max_diff(logits(model), logits(family_model("llama"))) < CLOSE
    model.model.rotary_emb.register_forward_pre_hook(stretched, with_kwargs=True)
    assert torch.equal(logits(disable(model)), expected)


def with_a_hook(rotary: Any) -> None:
    rotary.register_forward_hook(lambda module, args, out: (out[0] * 1.5, out[1] * 1.5))


def with_its_own_forward(rotary: Any) -> None:
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, 3 * position_ids)


@both_caches
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("change", [with_a_hook, with_its_own_forward])
def test_a_rotary_module_whose_tables_are_changed_is_refused(change, family, cache):
    model = family_model(family)
    change(model.model.rotary_emb)
    with pytest.raises(ValueError, match=r"model: expected .*RotaryEmbedding .*forward"):
        enable(model, cache=cache)
    assert not hasattr(model.model, "longrope")


@pytest.mark.parametrize("family", ["llama", "phi3", "llama yarn"])
@pytest.mark.parametrize("field", ["inv_freq", "attention_scaling"])
def test_frequencies_that_the_config_does_not_say(field, family):
    model = family_model(family)
    rotary = model.model.rotary_emb
    setattr(rotary, field, 2.0 * getattr(rotary, field))
    with pytest.raises(ValueError, match=r"model: its .*RotaryEmbedding .*its config"):
        enable(model)


def test_either_set_may_be_in_the_rotary_module():
    """transformers keeps that of its last forward."""
    model = family_model("phi3")
    logits(model, 100)
    expected = logits(model, 100)
    assert max_diff(logits(enable(model), 100), expected) < CLOSE


@both_caches
def test_positions_between_tokens_are_named(cache):
    model = enable(family_model("phi3"), cache=cache)
    with pytest.raises(TypeError, match=r"position_ids: expected int32 or int64, got torch.float"):
        model(tokens(), position_ids=torch.arange(24)[None] / 2)


# ----------------------------------------------------------------------- attention of one's own


def attend(self: Any, hidden_states: Any, position_embeddings: Any = None, **_: Any) -> Any:
    """By torch's attention, past transformers' interface."""
    heads = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (
        projection(hidden_states).view(heads).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Foreign(nn.Module):
    forward = attend

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__()
        dim, kv_heads = config.hidden_size, config.num_key_value_heads
        self.head_dim = dim // config.num_attention_heads
        self.q_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj, self.v_proj = (nn.Linear(dim, kv_heads * self.head_dim) for _ in range(2))


def by_method(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = types.MethodType(attend, attention)


def by_subclass(model: Any) -> None:
    own = type("OwnAttention", (LlamaAttention,), {"forward": attend})
    model.model.layers[1].self_attn.__class__ = own


def by_module(model: Any) -> None:
    model.model.layers[1].self_attn = Foreign(model.config)


@pytest.mark.parametrize("change", [by_method, by_subclass, by_module])
def test_attention_that_is_not_transformers(change):
    """It asks for a rotation, and attends itself: unrotated it would attend without any."""
    model = family_model("llama")
    change(model)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"model: expected LlamaAttention.*layers\.1\.self_attn"):
        enable(model)
    assert max_diff(logits(enable(model, cache="rotated")), expected) < CLOSE


def test_a_forward_that_is_wrapped_is_transformers():
    model = family_model("llama")
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    assert max_diff(logits(enable(model)), logits(family_model("llama"))) < CLOSE


@both_caches
def test_no_attention_of_transformers_at_all(cache):
    model = family_model("llama")
    for layer in model.model.layers:
        layer.self_attn = Foreign(model.config)
    with pytest.raises(ValueError, match=r"model: expected LlamaAttention.* in LlamaModel"):
        enable(model, cache=cache)


class OwnModel(LlamaPreTrainedModel):
    """Code of a model's own repository around the rotary module of transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Foreign(config, i) for i in range(config.num_hidden_layers))
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        states = self.embed_tokens(input_ids)
        turn = self.rotary_emb(states, position_ids=torch.arange(states.shape[1])[None])
        for layer in self.layers:
            states = states + layer(states, position_embeddings=turn)[0]
        return BaseModelOutputWithPast(last_hidden_state=states)


@torch.no_grad()
def test_a_model_of_its_own_around_a_known_rotary_module():
    model = OwnModel(family_config("llama")).eval()
    expected = model(tokens())[0]
    with pytest.raises(ValueError, match=r"Foreign does not call transformers' attention"):
        enable(model)
    enable(model, cache="rotated")
    assert isinstance(model.rotary_emb(None, torch.arange(4)[None])[1], Rotated)
    assert max_diff(model(tokens())[0], expected) < CLOSE


# ------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("family", ["phi3 sliding", "phimoe sliding", "mistral sliding"])
def test_a_window_that_is_changed_in_the_config(family, window):
    model, untouched = enable(family_model(family)), family_model(family)
    model.config.sliding_window = untouched.config.sliding_window = window
    assert max_diff(logits(model), logits(untouched)) < CLOSE


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_window_that_layers_keep(when):
    """transformers' masks take that of the config, and layers hand on the one they were made by."""
    model, untouched = family_model("qwen2 sliding"), family_model("qwen2 sliding")
    for one in (model, untouched):
        if one is model and when == "after":
            enable(model)
        one.config.sliding_window = 4
    with pytest.raises(ValueError, match=r"sliding_window: expected 8 in the config.* got 4"):
        logits(enable(model) if when == "before" else model)
    assert max_diff(logits(enable(model, cache="rotated")), logits(untouched)) < CLOSE


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_jit_trace_is_refused(family):
    """Its graph keeps what the mask of the example said, for any other."""

    class Logits(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    ids, mask = tokens(), torch.ones_like(tokens())
    model = enable(family_model(family))
    try:
        torch.jit.trace(Logits(family_model(family)), (ids, mask), check_trace=False)
    except IndexError:  # an older transformers traces no masks at all
        with pytest.raises((IndexError, RuntimeError)):
            torch.jit.trace(Logits(model), (ids, mask), check_trace=False)
        return
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace: .*torch\.export"):
        torch.jit.trace(Logits(model), (ids, mask), check_trace=False)
    expected = logits(family_model(family), ids=ids)
    assert max_diff(logits(model, ids=ids), expected) < CLOSE
    traced = torch.jit.trace(Logits(enable(model, cache="rotated")), (ids, mask), check_trace=False)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = family_model(family)(ids, attention_mask=mask).logits
        assert max_diff(traced(ids, mask)[mask.bool()], expected[mask.bool()]) < CLOSE
