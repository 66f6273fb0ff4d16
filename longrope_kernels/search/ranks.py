"""What the processes of torchrun agree on, beside the candidates that `distributed` shares out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return not is_shared() or dist.get_rank() == 0


def is_shared() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_shared() else 1


def from_main(make: Callable[[], _Value]) -> _Value:
    """What ``make`` gives on rank 0, which alone calls it, on every rank.

    Raises:
        RuntimeError: elsewhere, what ``make`` raised on rank 0, where that very error is raised.
    """
    if not is_shared():
        return make()
    box: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = f"{type(error).__name__}: {error}"
            dist.broadcast_object_list(box, src=0)
            raise
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise RuntimeError(f"rank 0: {box[1]}")
    value: _Value = box[0]
    return value
