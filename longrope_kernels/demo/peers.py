"""transformers' rotation with a published model's factors: what the kernels are held against."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Phi3Config
from transformers.models.phi3 import modeling_phi3

from ..rope.published import published_configs


def phi3_config(name: str, **overrides: Any) -> Any:
    """A `Phi3Config` with the head geometry and factors of one of `published_configs`."""
    published = published_configs()[name]
    ratio = published["max_position_embeddings"] / published["original_max_position_embeddings"]
    geometry = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    rope = ("max_position_embeddings", "original_max_position_embeddings", "rope_theta")
    fields = {field: published[field] for field in (*geometry, *rope, "partial_rotary_factor")}
    fields["rope_scaling"] = {**published["rope_scaling"], "factor": ratio}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return Phi3Config(**{**fields, **tokens, **overrides})


class TransformersRotary:
    """What `Phi3Model` does: a table of cosines and sines, then ``apply_rotary_pos_emb``."""

    def __init__(self, config: Any, device: torch.device) -> None:
        self.embedding = modeling_phi3.Phi3RotaryEmbedding(config).to(device)

    def table(self, positions: torch.Tensor, dtype: torch.dtype) -> Any:
        """(cos, sin), each (1, seq, R) of ``dtype``, for positions (1, seq) int64."""
        return self.embedding(torch.empty(0, dtype=dtype, device=positions.device), positions)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> Any:
        """Rotated q and k, (1, seq, heads, dim) each, of tokens at ``positions``."""
        rotated = self.apply(q.transpose(1, 2), k.transpose(1, 2), *self.table(positions, q.dtype))
        return [x.transpose(1, 2) for x in rotated]

    @staticmethod
    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """Rotated q and k, (batch, heads, seq, dim) each."""
        return modeling_phi3.apply_rotary_pos_emb(q, k, cos, sin)
