"""Ropes in GGUF files, as llama.cpp reads them: `export` writes one, `check` asks the engine."""

from __future__ import annotations

try:
    from .engine import Answer, check
    from .exporting import Exported, export
except ImportError as error:
    raise ImportError(
        f"{__name__} needs gguf and numpy: pip install 'longrope-kernels[gguf]'"
    ) from error

__all__ = ["Answer", "Exported", "check", "export"]
