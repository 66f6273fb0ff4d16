"""The rotary module of an enabled model, and what it does to the layers.

It makes no cos/sin table: in place of ``(cos, sin)`` it hands the layers ``(positions, marker)``.
The layers pass the pair on to ``apply_rotary_pos_emb``, which knows the marker (`contacts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...ops.rotary import apply_rotary
from ...rope.value import Rope
from ...torch_private import in_context_parallel
from .architectures import Architecture
from .contacts import install
from .markers import Rotated, Unrotated
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
        # For `disable`: the attention implementation (None: left as is), and hooks of the base.
        self.former_attention: str | None = None
        self.hooks: Sequence[RemovableHandle] = ()
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
        if in_context_parallel():
            self._check_shard()
        if self.settings.cache == "unrotated":
            return position_ids, Unrotated(position_ids)
        return position_ids, Rotated(position_ids.max() + 1, self._rotate)

    def _check_shard(self) -> None:
        """A shard of tokens shows neither the keys of the others nor the length of the whole."""
        if self.settings.cache == "rotated" and not self.settings.chooses:
            return
        raise RuntimeError(
            "context_parallel: an enabled model would attend within the shard of a rank and choose "
            "its factor set by it; expected enable(model, group=...) without that context, or "
            "enable(..., cache='rotated') with a Rope of one set"
        )

    def _rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: torch.Tensor,
        length: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return apply_rotary(
            q,
            k,
            positions.to(q.device),  # a layer may sit on another device than the embedding
            self.rope,
            layout="bhsd",
            lengths=length.to(q.device).expand(q.shape[0]),
            backend=self.settings.backend,
        )

    def extra_repr(self) -> str:
        sets = [(s.max_length, s.n_hat) for s in self.rope.sets]
        shown = f"rotary_dim={self.rope.rotary_dim}, sets(max_length, n_hat)={sets}"
        return f"{shown}, cache={self.settings.cache!r}"

    def _make_ready(self) -> None:
        """The tables of the model's device now, not during a traced or captured forward."""
        install(self.architecture)
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
