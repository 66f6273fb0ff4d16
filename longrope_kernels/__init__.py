"""LongRoPE (arXiv 2402.13753): rotary position embedding, exact at any position."""

from . import _without_numpy  # noqa: F401  before all that imports torch
from ._version import __version__
from .cache.dense import KVCache
from .cache.paged import PagedKVCache
from .cache.rows import CacheFullError, PrefillAgain
from .cache.warmup import warmup
from .ops.append import append
from .ops.attention import attention
from .ops.decode import decode
from .ops.rerotate import rerotate_
from .ops.rotary import apply_rotary
from .rope import FactorSet, Rope

__all__ = [
    "CacheFullError",
    "FactorSet",
    "KVCache",
    "PagedKVCache",
    "PrefillAgain",
    "Rope",
    "__version__",
    "append",
    "apply_rotary",
    "attention",
    "decode",
    "rerotate_",
    "warmup",
]
