"""Ropes in GGUF files, as llama.cpp reads them: `export` writes one, `check` asks the engine."""

from __future__ import annotations

from .check import Answer, check
from .export import Exported, export

__all__ = ["Answer", "Exported", "check", "export"]
