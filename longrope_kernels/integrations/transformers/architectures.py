"""The models of transformers that `enable` knows: where their rotation and attention are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Names in ``transformers.models.<package>.modeling_<package>``.

    Its layers pass what the rotary module returns to ``apply_rotary_pos_emb`` of that module, and
    ``position_ids`` to their attention function.
    """

    package: str
    prefix: str
    hands_on_window: bool = True  # whether layers tell their attention function the sliding window

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(
            f"transformers.models.{self.package}.modeling_{self.package}"
        )

    @property
    def rotary(self) -> type:
        cls: type = getattr(self.module, f"{self.prefix}RotaryEmbedding")
        return cls

    @property
    def attention(self) -> type:
        cls: type = getattr(self.module, f"{self.prefix}Attention")
        return cls


ARCHITECTURES = (
    Architecture("phi3", "Phi3"),
    Architecture("phimoe", "Phimoe", hands_on_window=False),
    Architecture("llama", "Llama"),
    Architecture("mistral", "Mistral"),
    Architecture("qwen2", "Qwen2"),
    Architecture("qwen3", "Qwen3"),
)
SUPPORTED = "a model of transformers of the family " + ", ".join(a.package for a in ARCHITECTURES)


@cache
def by_rotary_class() -> dict[type, Architecture]:
    """The architecture of each rotary class. A subclass may rotate by another formula."""
    return {architecture.rotary: architecture for architecture in ARCHITECTURES}


def head_dim(config: Any) -> int:
    """Of the heads of a model with this config."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)
