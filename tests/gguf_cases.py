"""Tiny random models for transformers, and the same as GGUF for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

CONTEXT = 256  # llama.cpp rounds contexts up to multiples of it
VOCABULARY = 3 + 256
BASE = 10000.0


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # so that rotation matters
    "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
}


def make_model(family: str = "llama", **fields: Any) -> Any:
    """Random weights; 16 pairs."""
    torch.manual_seed(5)
    if family == "llama":
        config = LlamaConfig(**{**_SIZES, "num_key_value_heads": 2, **fields})
        return LlamaForCausalLM(config).eval()
    fields = {"num_key_value_heads": 4, "pad_token_id": 0, **fields}
    return Phi3ForCausalLM(Phi3Config(**{**_SIZES, **fields})).eval()


def write_gguf(
    model: Any, path: Path, quantised: bool = False, alignment: int | None = None
) -> Path:
    """The model as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    _write_tokens(writer)
    for name, weight in model.state_dict().items():
        _add(writer, name, weight, config, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokens(writer: gguf.GGUFWriter) -> None:
    """Three special tokens, and the bytes."""
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _add(
    writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, config: Any, quantised: bool
) -> None:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        target = f"blk.{layer}.{_NAMES[rest]}.weight"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if count := heads.get(_NAMES[rest]):  # Llama's rows stand in the order of its rotation
            halves = weight.view(count, 2, config.head_dim // 2, -1)
            weight = halves.transpose(1, 2).reshape(weight.shape)
    else:
        target = f"{_NAMES[stem]}.weight"
    array = weight.float().numpy().copy()
    if quantised and array.ndim == 2 and "output" not in target and "embd" not in target:
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    else:
        writer.add_tensor(target, array)
