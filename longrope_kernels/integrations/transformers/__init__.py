"""LongRoPE in Hugging Face models: `enable`, `disable` and `set_rope`."""

from __future__ import annotations

import importlib.metadata
import importlib.util

if importlib.util.find_spec("transformers") is None or (
    [int(part) for part in importlib.metadata.version("transformers").split(".")[:2]] < [5, 6]
):
    raise ImportError(
        "longrope_kernels.integrations.transformers needs transformers >= 5.6; "
        "pip install 'longrope-kernels[transformers]'"
    )

from .models import disable, enable, set_rope
from .rotary import ExactRotaryEmbedding

__all__ = ["ExactRotaryEmbedding", "disable", "enable", "set_rope"]
