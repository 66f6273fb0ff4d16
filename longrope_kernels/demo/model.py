"""A Phi-3 of Phi-3-mini's head geometry, with and without the kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import Phi3ForCausalLM

from ..integrations.transformers import disable, enable
from .peers import phi3_config

Step = Callable[[str], None]


def build_model(device: torch.device) -> Any:
    """Two layers of 32 heads of 96 over bytes, random weights (seed 0), float32."""
    config = phi3_config(
        "phi-3-mini-128k", num_hidden_layers=2, intermediate_size=1024, vocab_size=256
    )
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).to(device).eval()


@torch.no_grad()
def real_queries_and_keys(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first layer's q and k for a text, before rotation: (1, seq, heads, dim) each."""
    layer, config = model.model.layers[0], model.config
    qkv = layer.self_attn.qkv_proj(layer.input_layernorm(model.model.embed_tokens(tokens)))
    heads = qkv.unflatten(-1, (-1, layer.self_attn.head_dim))
    q_heads, k_heads = config.num_attention_heads, config.num_key_value_heads
    return heads[:, :, :q_heads], heads[:, :, q_heads : q_heads + k_heads]


@torch.no_grad()
def logits_agreement(model: Any, tokens: torch.Tensor, step: Step) -> dict[str, float]:
    """Largest differences of logits from the untouched float32 model, on one text.

    Args:
        model: untouched, float32; left as it came.
        tokens: (1, seq).
        step: called with what is done next.
    """

    def logits(a_model: Any) -> torch.Tensor:
        return a_model(tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]

    step("model: logits, float32, untouched")
    truth = logits(model)
    step("model: logits, float32, kernels")
    exact = logits(enable(model))
    disable(model)
    # As from_pretrained(dtype=...) does; .to(bfloat16) would round the untouched one's frequencies.
    rotary = copy.deepcopy(model.model.rotary_emb)
    low = copy.deepcopy(model).to(torch.bfloat16)
    low.model.rotary_emb = rotary
    step("model: logits, bfloat16, untouched")
    low_untouched = logits(low)
    step("model: logits, bfloat16, kernels")
    low_exact = logits(enable(low))
    return {
        "tokens": tokens.shape[1],
        "largest_logit": float(truth.abs().max()),
        "float32_kernels": float((exact - truth).abs().max()),
        "bfloat16_untouched": float((low_untouched - truth).abs().max()),
        "bfloat16_kernels": float((low_exact - truth).abs().max()),
    }


@torch.no_grad()
def generate_agreement(model: Any, prompt: torch.Tensor, new: int, step: Step) -> dict[str, Any]:
    """Whether greedy ``generate()`` gives the same tokens with and without the kernels.

    With transformers' own cache, which is filled again at the switch: keys that were made under
    another set give other values in the layers above.

    Args:
        model: untouched; left as it came.
        prompt: (1, seq).
        new: tokens to generate.
        step: called with what is done next.
    """

    def generate() -> list[int]:
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return out[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]

    step("model: generate(), untouched")
    expected = generate()
    step("model: generate(), kernels")
    enable(model, cache="rotated")
    actual = generate()
    disable(model)
    return {
        "prompt_tokens": prompt.shape[1],
        "new_tokens": new,
        "untouched": expected,
        "kernels": actual,
        "equal": actual == expected,
    }
