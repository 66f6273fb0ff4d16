"""What the processes of torchrun agree on, beside the candidates that `distributed` shares out.

``sharing`` of them, in the order of their ranks, share each sequence: they measure it together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")


def rank() -> int:
    """Of this process, 0 where it is the only one."""
    return dist.get_rank() if is_shared() else 0


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return rank() == 0


def is_shared() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_shared() else 1


def sequence_group(sharing: int) -> dist.ProcessGroup | None:
    """The processes that share sequences with this one; None where it has its own."""
    if sharing == 1:
        return None
    count = rank_count()
    if count % sharing:
        raise ValueError(
            f"--context-parallel: expected a number that divides the {count} processes of torchrun "
            f"(torchrun --nproc-per-node N --no-python longrope ...), got {sharing}"
        )
    own: dist.ProcessGroup
    own, _ = dist.new_subgroups(sharing)
    return own


def shared_out(items: Sequence[_Item], do: Callable[[_Item], _Value], sharing: int) -> list[_Value]:
    """``do`` of each item, on every rank: each ``sharing`` processes do some of them."""
    groups = rank_count() // sharing
    if groups == 1:
        return [do(item) for item in items]
    own = [do(item) for item in items[dist.get_rank() // sharing :: groups]]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    of_groups = everyone[::sharing]
    return [of_groups[i % groups][i // groups] for i in range(len(items))]


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
