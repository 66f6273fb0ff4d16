"""LongRoPE (arXiv 2402.13753): rotary position embedding, exact at any position."""

from . import _without_numpy  # noqa: F401  before all that imports torch
from ._version import __version__
from .attention import attention
from .cache import KVCache
from .cache_rows import CacheFullError, PrefillAgain
from .decode import decode
from .paged_cache import PagedKVCache
from .rerotate import rerotate_
from .rope import FactorSet, Rope
from .rotary import apply_rotary

__all__ = [
    "CacheFullError",
    "FactorSet",
    "KVCache",
    "PagedKVCache",
    "PrefillAgain",
    "Rope",
    "__version__",
    "apply_rotary",
    "attention",
    "decode",
    "rerotate_",
]
