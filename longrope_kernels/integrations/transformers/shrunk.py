"""A config of transformers made small: all that says how its layers are made, at tiny sizes.

What a model does is tried on a tiny one of the same config. Config classes name their sizes
differently, so those that exist are set, and the rest stays.
"""

from __future__ import annotations

import copy
from typing import Any

VOCABULARY = 64
WINDOW = 6  # shorter than what is tried, so that a window shows

_SIZES = (
    (VOCABULARY, ("vocab_size",)),
    (64, (
        "hidden_size", "d_model", "n_embd", "dim", "lru_width", "attention_hidden_size",
        "embedding_size", "word_embed_proj_dim", "hidden_dim", "nemo_conv_channels",
        "ext_pw_out_channel", "depthwise_separable_out_channel",
    )),
    (32, (
        "intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "ffn_hidden_size",
        "shared_expert_intermediate_size", "shared_intermediate_size", "dense_intermediate_size",
        "moe_shared_expert_intermediate_size", "block_ff_dim", "moe_latent_size",
        "mamba_d_head", "mamba_head_dim",
    )),
    (128, ("mamba_d_ssm",)),
    (16, (
        "head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "q_lora_rank",
        "kv_lora_rank", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "mamba_d_state",
        "ssm_state_size", "state_size", "linear_key_head_dim", "linear_value_head_dim",
        "index_head_dim",
    )),
    (4, (
        "num_attention_heads", "n_head", "num_heads", "num_experts", "num_local_experts",
        "n_routed_experts", "moe_num_experts", "linear_num_value_heads", "index_n_heads",
        "mamba_n_groups", "n_groups", "mamba_n_heads", "mamba_num_heads",
    )),
    (2, (
        "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "num_experts_per_token",
        "moe_k", "moe_top_k", "top_k", "num_global_key_value_heads", "linear_num_key_heads",
        "mamba_expand", "attn_layer_period",
    )),
    (1, (
        "n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace",
        "num_nextn_predict_layers", "attn_layer_offset",
    )),
)  # fmt: skip
_SIZE_OF = {name: size for size, names in _SIZES for name in names}
# Of these some configs leave one out and their models need it.
_NEEDED = (
    "head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_group",
    "topk_group", "n_shared_experts",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_ENCODERS = ("vision_config", "audio_config")  # which no text passes


def shrunk(config: Any, most_layers: int = 8) -> Any:
    """A copy of a config at tiny sizes, with as many layers as show each kind of them."""
    fields = copy.deepcopy(config.to_dict())
    sizes = {
        name: _power_of_2(min(size, fields[name] or size))
        for name, size in _SIZE_OF.items()
        if _is_size(fields.get(name)) or (name in _NEEDED and fields.get(name, 0) is None)
    }
    if "vocab_size" in sizes:
        sizes["vocab_size"] = VOCABULARY  # also where the model has fewer than what is tried
    heads = fields.get("num_attention_heads")
    if heads is not None and fields.get("num_key_value_heads") == heads:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if fields.get("head_dim", 0) is None and "qk_rope_head_dim" in fields:
        del sizes["head_dim"]
    if "mamba_d_head" in sizes and "mamba_n_heads" in sizes:
        inner = sizes.get("mamba_d_ssm") or sizes["mamba_expand"] * sizes["hidden_size"]
        sizes["mamba_d_head"] = inner // sizes["mamba_n_heads"]
    layers = next((fields[name] for name in _LAYERS if _is_size(fields.get(name))), 0)
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == layers > 0
    }
    kept = min(layers, max(2, _enough(list(lists.values()), most_layers)))
    sizes |= {name: kept for name in _LAYERS if _is_size(fields.get(name))}
    fields |= sizes | {name: value[:kept] for name, value in lists.items()}
    for name, value in fields.items():
        if name.endswith("_token_id") and _is_size(value) and value >= VOCABULARY:
            fields[name] = VOCABULARY - 1
        if "window" in name and _is_size(value) and value > WINDOW:
            fields[name] = WINDOW
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            fields[name] = {key: one for key, one in value.items() if int(key) < kept}
    fields["pad_token_id"] = 0
    fields.pop("qk_head_dim", None)  # older configs of latent attention keep the sum of two sizes
    for name in _ENCODERS:
        if isinstance(fields.get(name), dict):
            small = _SIZE_OF | dict.fromkeys(_LAYERS, 2)
            part = {key: min(size, fields[name].get(key) or 0) for key, size in small.items()}
            fields[name] |= {key: size for key, size in part.items() if size}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(name), dict):
            _cut_factors(fields[name], fields)
    return type(config).from_dict(fields)


def _cut_factors(parameters: dict[str, Any], fields: dict[str, Any]) -> None:
    """As many factors as the tiny heads have pairs, of all layers or of each kind of them."""
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    shares = (one.get("partial_rotary_factor") for one in (parameters, fields))
    pairs = int(head_dim * next((share for share in shares if share), 1.0)) // 2
    for name, value in parameters.items():
        if isinstance(value, dict):
            _cut_factors(value, fields)
        elif name in ("short_factor", "long_factor"):
            parameters[name] = [*value, *value[-1:] * pairs][:pairs]


def _power_of_2(most: int) -> int:
    """The largest one up to that, so that sizes divide each other as those of `_SIZES` do."""
    return 1 << (most.bit_length() - 1)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _enough(lists: list[list[Any]], most: int) -> int:
    """How many layers show each kind there is."""
    if not lists:
        return 0
    kinds = [repr(kind) for kind in zip(*lists, strict=True)]
    found = max(kinds.index(kind) for kind in set(kinds)) + 1
    return min(found, most)
