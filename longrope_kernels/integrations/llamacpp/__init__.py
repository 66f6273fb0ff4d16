"""Ropes in GGUF files, as llama.cpp reads them: `export` writes one, `check` asks the engine."""

from __future__ import annotations

from .engine import Answer, check
from .exporting import Exported, export

__all__ = ["Answer", "Exported", "check", "export"]
