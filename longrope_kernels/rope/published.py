"""The published LongRoPE factors that come with the package, as Hugging Face configs."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def published_configs() -> dict[str, dict[str, Any]]:
    """Configs by short name ("phi-3-mini-128k", "phi-3.5-mini", "phi-4-mini").

    Each has the model's name and geometry, ``rope_theta`` and ``rope_scaling`` with both factor
    lists, as `Rope.from_config` reads them, and under ``source`` where the lists were read.
    """
    text = files("longrope_kernels").joinpath("data/published_factors.json").read_text("utf-8")
    return json.loads(text)  # type: ignore[no-any-return]
