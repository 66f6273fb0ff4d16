"""Small models of every family that `enable` knows, from their configs, and what to feed them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.nemotron import modeling_nemotron

from longrope_kernels.rope.published import published_configs

VOCABULARY = 128
SWITCH = 32  # where the short set of the small models ends, in tokens

SHARED = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32 * SWITCH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Larger than the default, so that attention is far from uniform and rotation matters.
    "initializer_range": 0.06,
}


def longrope(pairs: int, **parameters: Any) -> dict[str, Any]:
    """rope_parameters of type longrope, its two lists far apart."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.01 * i for i in range(pairs)],
        "long_factor": [1.5 + i for i in range(pairs)],
        "original_max_position_embeddings": SWITCH,
        **parameters,
    }


def _scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_PHI3 = {"original_max_position_embeddings": SWITCH}
_QWEN = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

# name: (model_type, fields beside the shared ones)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"rope_parameters": longrope(16, factor=32.0), **_PHI3}),
    "phi3 partial": (
        "phi3",
        {"rope_parameters": longrope(12, partial_rotary_factor=0.75, factor=32.0), **_PHI3},
    ),
    "phi3 sliding": (
        "phi3",
        {"rope_parameters": longrope(16, factor=32.0), **_PHI3, "sliding_window": 8},
    ),
    "phimoe": (
        "phimoe",
        {
            "rope_parameters": longrope(16, short_mscale=1.1, long_mscale=1.3),
            "num_local_experts": 2,
        },
    ),
    "phimoe sliding": (
        "phimoe",
        {
            "rope_parameters": longrope(16, short_mscale=1.1, long_mscale=1.3),
            "num_local_experts": 2,
            "sliding_window": 8,
        },
    ),
    "llama": ("llama", {}),
    "llama linear": ("llama", {"rope_parameters": _scaled("linear", factor=4.0)}),
    "llama llama3": (
        "llama",
        {
            "rope_parameters": _scaled(
                "llama3", factor=8.0, original_max_position_embeddings=SWITCH, **_LLAMA3
            )
        },
    ),
    "llama yarn": (
        "llama",
        {"rope_parameters": _scaled("yarn", factor=8.0, original_max_position_embeddings=SWITCH)},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral sliding": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": ("qwen2", _QWEN),  # a full layer below a sliding one
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 sliding": ("qwen3", {"head_dim": 32, **_QWEN}),
}
# The first of each package.
ONE_OF_EACH = ("phi3", "phimoe", "llama", "mistral", "qwen2", "qwen3")


@cache
def _weights(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(family_config(name)).state_dict()


def family_config(name: str, **overrides: Any) -> Any:
    """A config of `FAMILIES`, its fields replaced by ``overrides``."""
    model_type, fields = FAMILIES[name]
    return AutoConfig.for_model(model_type, **copy.deepcopy({**SHARED, **fields, **overrides}))


def family_model(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """An untouched model in eval mode; the same weights in each call."""
    # As from_pretrained(dtype=...) does; .to(dtype) would round transformers' frequencies as well.
    model = AutoModelForCausalLM.from_config(family_config(name, **overrides), dtype=dtype)
    of_layers = model.state_dict().keys()  # a model may have fewer
    model.load_state_dict({key: _weights(name)[key] for key in of_layers})
    if dtype == torch.float64 and name.startswith("phimoe"):
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model.eval()


# Families whose layers hand no keywords on to their attention. Nemotron's of transformers 5.6, a
# class for each implementation, does not call transformers' interface.
KEEPING = ["stablelm", *["nemotron"] * (not hasattr(modeling_nemotron, "NemotronSdpaAttention"))]


def keeping_model(model_type: str) -> Any:
    """Of one of `KEEPING`."""
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHARED)).eval()


def published_config(
    name: str = "phi-3-mini-128k", original: int = 4096, **overrides: Any
) -> Phi3Config:
    """Two layers of four heads (two of keys) of the published head geometry and factors."""
    published = published_configs()[name]
    fields = {
        **SHARED,
        "hidden_size": 4 * published["head_dim"],
        "max_position_embeddings": 32 * original,
        "original_max_position_embeddings": original,
        "rope_theta": published["rope_theta"],
        "rope_scaling": {**published["rope_scaling"], "factor": 32.0},
        "partial_rotary_factor": published["partial_rotary_factor"],
    }
    return Phi3Config(**{**fields, **overrides})


@cache
def _published_weights(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return Phi3ForCausalLM(published_config(name)).state_dict()


def published_model(
    name: str = "phi-3-mini-128k", dtype: torch.dtype = torch.float32, **config: Any
) -> Phi3ForCausalLM:
    """As `family_model`, of `published_config`."""
    model = Phi3ForCausalLM._from_config(published_config(name, **config), dtype=dtype)
    model.load_state_dict(_published_weights(name))
    return model.eval()


def tokens(batch: int = 2, seq: int = 24, seed: int = 3) -> torch.Tensor:
    """(batch, seq) int64, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, seq), generator=generator)


def padded(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows (tokens,) of different lengths: (batch, seq) int64."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask.long()


@torch.no_grad()
def logits(model: Any, start: int = 0, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Of one forward without a cache, the first token at position ``start``."""
    ids = tokens() if ids is None else ids
    positions = torch.arange(start, start + ids.shape[1])[None]
    return model(ids, position_ids=positions, use_cache=False).logits


def generated(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What ``generate()`` makes of ``ids``, 8 new tokens by default."""
    torch.manual_seed(11)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **arguments}
    return model.generate(ids, **arguments)


def max_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def gradients(model: Any, ids: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Of all parameters, of the language-model loss of one training step."""
    ids = tokens() if ids is None else ids
    model.train()
    model(ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]
