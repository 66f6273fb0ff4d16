"""The rotary module of an enabled model, and what it does to the layers.

It makes no cos/sin table: in place of ``(cos, sin)`` it hands the layers ``(positions, marker)``.
The layers pass the pair on to ``apply_rotary_pos_emb`` of their modelling module, where a
dispatcher knows the marker and calls the original function on any other. The dispatcher is put
there by the first `enable` and stays: it changes nothing for models that are not enabled, and
enabled models may be copied, pickled and unpickled without anybody counting them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ...ops.rotary import apply_rotary
from ...rope.value import Rope
from .architectures import Architecture
from .settings import Settings


class ExactRotaryEmbedding(nn.Module):
    """Stands in for a rotary module of transformers: hands on positions where that makes a table.

    It keeps the original as a submodule, so that ``.to()`` moves both alike; the buffers of that
    one are not persistent, so ``state_dict()`` does not change.
    """

    def __init__(
        self,
        original: nn.Module,
        architecture: Architecture,
        settings: Settings,
    ) -> None:
        super().__init__()
        self.original = original
        self.architecture = architecture
        self.settings = settings
        self.former_config: Any = None  # that of the base model, for `disable`; None: not replaced
        self.train(original.training)
        self._make_ready()

    @property
    def rope(self) -> Rope:
        """What the model is rotated by."""
        return self.settings.rope

    def use(self, settings: Settings) -> None:
        """Take other settings; on the devices where the old ones had their tables."""
        self.settings = settings
        self._make_ready()

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Rotated | Unrotated]:
        """The pair for the layers.

        Args:
            x: not read; the hidden states, of which transformers' module takes device and dtype.
            position_ids: (batch, seq) or (1, seq), int32 or int64.
        """
        if self.settings.cache == "unrotated":
            return position_ids, Unrotated(position_ids)
        return position_ids, Rotated(position_ids.max() + 1, self._rotate)

    def _rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: torch.Tensor,
        length: torch.Tensor,
        unsqueeze_dim: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return apply_rotary(
            q,
            k,
            positions.to(q.device),  # a layer may sit on another device than the embedding
            self.rope,
            layout="bhsd" if unsqueeze_dim == 1 else "bshd",
            lengths=length.to(q.device).expand(q.shape[0]),
            backend=self.settings.backend,
        )

    def extra_repr(self) -> str:
        sets = [(s.max_length, s.n_hat) for s in self.rope.sets]
        shown = f"rotary_dim={self.rope.rotary_dim}, sets(max_length, n_hat)={sets}"
        return f"{shown}, cache={self.settings.cache!r}, policy={self.settings.policy!r}"

    def _make_ready(self) -> None:
        """The tables of the model's device now, not during a traced or captured forward."""
        install_dispatcher(self.architecture)
        for buffer in self.original.buffers():
            if buffer.device.type != "meta":
                self.rope.to(buffer.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_ready()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_ready()


class Rotated(NamedTuple):
    """In place of sin (positions are in place of cos): what else the rotation needs.

    A named tuple of a tensor and a method, since layers' arguments are walked by accelerate, DDP
    and FSDP to move tensors: these rebuild a named tuple around a moved ``length``, where a module
    or a `Rope` in it would be moved, or taken apart.
    """

    length: torch.Tensor  # () of the positions' dtype, tokens: the longest sequence of the batch
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Unrotated(NamedTuple):
    """In place of sin: q and k stay as they are, the attention function rotates."""

    positions: torch.Tensor


def install_dispatcher(architecture: Architecture) -> None:
    """Let the modelling module's ``apply_rotary_pos_emb`` know the markers."""
    module: Any = architecture.module
    original = module.apply_rotary_pos_emb
    if getattr(original, "dispatches_longrope", False):
        return

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if isinstance(sin, Unrotated):
            return q, k
        if isinstance(sin, Rotated):
            return sin.rotate(q, k, cos, sin.length, unsqueeze_dim)
        return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    apply_rotary_pos_emb.__doc__ = original.__doc__
    apply_rotary_pos_emb.dispatches_longrope = True  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = apply_rotary_pos_emb
