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
from .contacts import check_dispatch, install
from .markers import Rotated, Unrotated
from .sequences import MEMORY, in_a_row
from .settings import Settings


class Turn:
    """What layers of one kind rotate by; bound methods of it travel in the markers."""

    def __init__(self, rope: Rope, backend: str | None) -> None:
        self.rope = rope
        self.backend = backend

    def note(self, positions: torch.Tensor, keywords: dict[str, Any] | None) -> None:
        """Tell the attention function of the layer that asks."""
        MEMORY.note(self.rope, positions, keywords)

    def rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: torch.Tensor,
        length: torch.Tensor,
        heads_axis: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q and k: (batch, heads, tokens, dim); heads and tokens the other way for axis 2."""
        q, k = in_a_row(q), in_a_row(k)
        return apply_rotary(
            q,
            k,
            positions.to(q.device),  # a layer may sit on another device than the embedding
            self.rope,
            layout="bshd" if heads_axis == 2 else "bhsd",
            lengths=length.to(q.device).expand(q.shape[0]),
            backend=self.backend,
        )


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
        kind: str = "",
    ) -> None:
        super().__init__()
        self.original = original
        self.architecture = architecture
        self.settings = settings
        self.kind = kind  # of the layers, where they do not say theirs
        # For `disable`: the attention implementation (None: left as is), and hooks of the base.
        self.former_attention: str | None = None
        self.hooks: Sequence[RemovableHandle] = ()
        # Hooks before its forward, which may move positions, run here as they did there; who holds
        # the handle of one removes it from both.
        self._forward_pre_hooks = original._forward_pre_hooks
        self._forward_pre_hooks_with_kwargs = original._forward_pre_hooks_with_kwargs
        self.train(original.training)
        self.use(settings)

    @property
    def rope(self) -> Rope:
        """What the model is rotated by; the first, where its layers are of several kinds."""
        return self.settings.rope

    def __getattr__(self, name: str) -> Any:
        """What some models read of the original: its config, its types of layers.

        Nothing private: what accelerate's hooks keep there (``_hf_hook``) is of that module alone.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("_"):
                raise
            return getattr(self.original, name)

    def use(self, settings: Settings) -> None:
        """Take other settings; on the devices where the old ones had their tables."""
        self.settings = settings
        self.turns = {kind: Turn(rope, settings.backend) for kind, rope in settings.ropes.items()}
        self._make_ready()

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, Rotated | Unrotated]:
        """The pair for the layers.

        Args:
            x: not read; the hidden states, of which transformers' module takes device and dtype.
            position_ids: (batch, seq) or (1, seq), int32 or int64.
            layer_type: the kind of the layers, where transformers' module is told it.
        """
        if in_context_parallel():
            self._check_shard()
        if not torch.compiler.is_compiling():
            check_dispatch(self.architecture)
            self._check_trace()
        if position_ids.is_floating_point():
            raise TypeError(f"position_ids: expected int32 or int64, got {position_ids.dtype}")
        turn = self.turns[self.kind if layer_type is None else layer_type]
        if torch.is_grad_enabled():
            # The caller may write those of the next forward there before a backward pass.
            position_ids = position_ids.clone()
        if self.settings.cache == "unrotated":
            return position_ids, Unrotated(position_ids, turn.note, MEMORY.told())
        return position_ids, Rotated(position_ids.max() + 1, turn.rotate)

    def _check_shard(self) -> None:
        """A shard of tokens shows neither the keys of the others nor the length of the whole."""
        if self.settings.cache == "rotated" and not self.settings.chooses:
            return
        raise RuntimeError(
            "context_parallel: an enabled model would attend within the shard of a rank and choose "
            "its factor set by it; expected enable(model, group=...) without that context, or "
            "enable(..., cache='rotated') with a Rope of one set"
        )

    def _check_trace(self) -> None:
        """What a mask and positions say is read, which such a graph would keep for any others."""
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if self.settings.cache == "unrotated" and tracing:
            raise RuntimeError(
                "torch.jit.trace: its graph would keep where the padding of this example lies; "
                "expected torch.export, torch.compile, or enable(model, cache='rotated')"
            )

    def extra_repr(self) -> str:
        shown = []
        for kind, rope in self.settings.ropes.items():
            sets = [(s.max_length, s.n_hat) for s in rope.sets]
            of = f"{kind}: " if kind else ""
            shown.append(f"{of}rotary_dim={rope.rotary_dim}, sets(max_length, n_hat)={sets}")
        return f"{', '.join(shown)}, cache={self.settings.cache!r}"

    def _make_ready(self) -> None:
        """The tables of the model's device now, not during a traced or captured forward."""
        install(self.architecture)
        for buffer in self.original.buffers():
            if buffer.device.type != "meta":
                for rope in self.settings.ropes.values():
                    rope.to(buffer.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_ready()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_ready()
