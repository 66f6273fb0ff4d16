"""Arguments as ranks compare them and errors show them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from ..calls import values
from ..rope.value import Rope


def shown(x: object) -> object:
    """The numbers of a tensor where reading them is free, else its shape; a digest of a rope."""
    if isinstance(x, torch.Tensor):
        return x.tolist() if values.readable(x) else tuple(x.shape)
    if isinstance(x, Rope):
        return _of_rope(x)
    return list(x) if isinstance(x, Sequence) else x


@lru_cache(maxsize=64)
def _of_rope(rope: Rope) -> str:
    digest = hashlib.sha256(repr(rope).encode()).hexdigest()[:12]
    return f"a Rope of {len(rope.sets)} sets ({digest})"
