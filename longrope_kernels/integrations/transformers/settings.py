"""What `enable` was told, as every part of an enabled model reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...distributed.ranks import Group
from ...distributed.shards import Order
from ...rope.value import Rope

Cache = Literal["unrotated", "rotated"]
CACHES = ("unrotated", "rotated")


@dataclass(frozen=True)
class Settings:
    """The arguments of `enable`, and what tells the model's unrotated keys from those of others."""

    ropes: dict[str, Rope]  # by the kind of layers, "" where all have one
    cache: Cache
    backend: str | None
    fingerprint: int
    group: Group = None  # of the ranks that share a sequence; None: each has its own
    order: Order = "balanced"  # in which they share its tokens

    @property
    def rope(self) -> Rope:
        """The first, which is all there is of most models."""
        return next(iter(self.ropes.values()))

    @property
    def chooses(self) -> bool:
        """Whether sequences may differ in their factor set."""
        return any(len(rope.sets) > 1 for rope in self.ropes.values())

    @property
    def keys(self) -> int | dict[str, Rope]:
        """What a cache is marked by: who made its unrotated keys, or what rotated them."""
        return self.fingerprint if self.cache == "unrotated" else self.ropes

    @property
    def attention_backend(self) -> str | None:
        """For `attention`, where "native" is the rotation of "composed"."""
        return "composed" if self.backend == "native" else self.backend

    @property
    def decode_backend(self) -> str | None:
        """For `decode`, which takes its own choice beside backends of `attention` alone."""
        return self.backend if self.backend in ("reference", "native", "triton", "cuda") else None
