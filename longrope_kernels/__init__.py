"""LongRoPE (arXiv 2402.13753): rotary position embedding, exact at any position."""

from ._version import __version__
from .attention import attention
from .rope import FactorSet, Rope
from .rotary import apply_rotary

__all__ = ["FactorSet", "Rope", "__version__", "apply_rotary", "attention"]
