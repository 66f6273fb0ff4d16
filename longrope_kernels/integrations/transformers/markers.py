"""What an enabled model's rotary module returns in place of ``(cos, sin)``: positions, a marker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch


def _no_table(marker: Any, name: str) -> AttributeError:
    """The error of who rotates by itself, with the cosine and sine that a marker stands for."""
    return AttributeError(
        f"position_embeddings: expected to be handed to the model's own apply_rotary_pos_emb, got "
        f"{name!r} asked of what stands for sin; an enabled model makes no cosine and sine, so "
        "layers that rotate by themselves (PEFT's adaption prompts do) are not served",
        name=name,
        obj=marker,
    )


class Rotated(NamedTuple):
    """In place of sin (positions are in place of cos): what else the rotation needs.

    A named tuple of a tensor and a method, since layers' arguments are walked by accelerate, DDP
    and FSDP to move tensors: these rebuild a named tuple around a moved ``length``, where a module
    or a `Rope` in it would be moved, or taken apart.
    """

    length: torch.Tensor  # () of the positions' dtype, tokens: the longest sequence of the batch
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

    def __getattr__(self, name: str) -> NoReturn:
        raise _no_table(self, name)


class Unrotated(NamedTuple):
    """In place of sin: q and k stay as they are, the attention function rotates.

    ``note`` tells it by which rope and where, when a layer rotates; one that never does, has none.
    It tells the keywords too, so that a checkpoint which runs a layer again has them.
    """

    positions: torch.Tensor
    note: Callable[[torch.Tensor, dict[str, Any] | None], None]
    keywords: dict[str, Any] | None = None  # of `attention.before_base`

    def __getattr__(self, name: str) -> NoReturn:
        raise _no_table(self, name)
