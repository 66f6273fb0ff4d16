"""A Phi-3 of Phi-3-mini's head geometry, with and without the kernels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Phi3ForCausalLM

from ..integrations.transformers import disable, enable
from .peers import phi3_config


def build_model(device: torch.device) -> Any:
    """Two layers of 32 heads of 96 over bytes, random weights (seed 0), float32."""
    sizes = {"num_hidden_layers": 2, "intermediate_size": 1024, "vocab_size": 256}
    torch.manual_seed(0)
    return Phi3ForCausalLM(phi3_config("phi-3-mini-128k", **sizes)).to(device).eval()


@torch.no_grad()
def logits_agreement(model: Any, tokens: torch.Tensor) -> dict[str, float]:
    """Largest differences of logits from the untouched float32 model; it stays as it came."""

    def logits(a_model: Any) -> torch.Tensor:
        return a_model(tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]

    truth = logits(model)
    exact = logits(enable(model))
    disable(model)
    low = copy.deepcopy(model).to(torch.bfloat16)
    # As from_pretrained(dtype=...) does; .to(bfloat16) rounds the untouched one's frequencies.
    low.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    untouched = logits(low)
    return {
        "tokens": tokens.shape[1],
        "largest_logit": float(truth.abs().max()),
        "float32_kernels": float((exact - truth).abs().max()),
        "bfloat16_untouched": float((untouched - truth).abs().max()),
        "bfloat16_kernels": float((logits(enable(low)) - truth).abs().max()),
    }


@torch.no_grad()
def generate_agreement(model: Any, prompt: torch.Tensor, new: int) -> dict[str, Any]:
    """Whether greedy ``generate()`` gives the same tokens with and without the kernels.

    With ``cache="rotated"`` everything is read again at the switch to the long set, as transformers
    does. By default it is not: values above the first layer stay those made under the short set,
    and only what comes before the switch is compared.
    """

    def generate() -> list[int]:
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return out[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]

    expected = generate()
    enable(model, cache="rotated")
    rotated = generate()
    enable(disable(model))
    free = generate()
    disable(model)
    short = max(model.config.original_max_position_embeddings + 1 - prompt.shape[1], 0)
    same = rotated == expected and free[:short] == expected[:short]
    tokens = {"untouched": expected, "kernels": rotated, "kernels_by_default": free}
    return {"prompt_tokens": prompt.shape[1], "new_tokens": new, **tokens, "equal": same}
