"""LongRoPE's exact rotation in Hugging Face models: `enable` and `disable`.

The model's rotary module is replaced by one that makes no cos/sin table: in place of
``(cos, sin)`` it hands the layers ``(positions, _Rotation)``. The layers pass the pair on to
``apply_rotary_pos_emb`` of their modelling module, where a dispatcher calls `apply_rotary` on such
a pair and the original function on any other. The dispatcher is put there by the first `enable`
and stays: it changes nothing for models that are not enabled, and enabled models may be copied,
pickled and unpickled without anybody counting them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .. import backends
from ..rope import Rope
from ..rotary import apply_rotary

try:
    from transformers.models.phi3 import modeling_phi3
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
except ImportError as error:
    raise ImportError(
        "longrope_kernels.integrations.transformers needs transformers >= 5; "
        "pip install 'longrope-kernels[transformers]'"
    ) from error

Model = TypeVar("Model", bound=nn.Module)

_SUPPORTED = "the Phi-3 family of transformers (model_type phi3: Phi-3, Phi-3.5-mini, Phi-4-mini)"


def enable(model: Model, *, rope: Rope | None = None, backend: str | None = None) -> Model:
    """Rotate the queries and keys of a Phi-3 model by `apply_rotary`, exactly at any position.

    The weights, the config and the names in ``state_dict()`` stay as they are. As transformers
    does, one factor set serves the whole batch, that of its largest position plus one, chosen on
    the device: results agree with the untouched model, also where ``generate()`` drops its cache
    as a sequence grows past the original length. (Choosing for each sequence needs a cache of
    unrotated keys; the cache of transformers holds rotated ones.)

    Args:
        model: any module that contains Phi-3 models of transformers >= 5, with whatever head.
            Changed in place. On a model enabled before, the arguments given now hold.
        rope: the embedding; None reads it from the model's config. A threshold, which the
            published configs have no field for: ``Rope.from_config(model.config, n_hat=...)``.
        backend: as in `apply_rotary`; a named one must serve the device the model is on now.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no Phi-3 rotary module; the config holds no rotation this package
            knows; ``rope`` rotates more dimensions than a head has; an unknown backend, or one
            that does not serve the model's device or dtype. Nothing is changed then.
        TypeError: ``rope`` is not a `Rope`.
        RuntimeError: the named backend is not available.
    """
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope or None, got {type(rope).__name__}")
    slots = _rotary_slots(model)
    if not slots:
        raise ValueError(f"model: expected {_SUPPORTED}, got {type(model).__name__}")
    if backend is not None:
        weight = next(model.parameters())
        backends.choose_rotary(backend, weight.device.type, weight.dtype == torch.float64)

    replacements = []
    for _, _, module in slots:
        original = module.original if isinstance(module, ExactRotaryEmbedding) else module
        own_rope = Rope.from_config(original.config) if rope is None else rope
        _check_head_dim(own_rope, original.config)
        replacements.append(ExactRotaryEmbedding(original, own_rope, backend))
    for (parent, name, _), replacement in zip(slots, replacements, strict=True):
        setattr(parent, name, replacement)
    return model


def disable(model: Model) -> Model:
    """Put back the rotary modules that `enable` replaced, the very same objects.

    Args:
        model: one that was enabled; on any other nothing happens.

    Returns:
        The same model.
    """
    for parent, name, module in _rotary_slots(model):
        if isinstance(module, ExactRotaryEmbedding):
            setattr(parent, name, module.original)
    return model


class ExactRotaryEmbedding(nn.Module):
    """Stands in for ``Phi3RotaryEmbedding``: hands on positions where that one makes a table.

    It keeps the original as a submodule, so that ``.to()`` moves both alike; the buffers of that
    one are not persistent, so ``state_dict()`` does not change.
    """

    def __init__(self, original: nn.Module, rope: Rope, backend: str | None) -> None:
        super().__init__()
        self.original = original
        self.rope = rope
        self.backend = backend
        self.train(original.training)
        self._make_ready()

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, _Rotation]:
        """The pair for the layers.

        Args:
            x: not read; the hidden states, of which transformers' module takes device and dtype.
            position_ids: (batch, seq) or (1, seq), int32 or int64.
        """
        return position_ids, _Rotation(position_ids.max() + 1, self._rotate)

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
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        sets = [(s.max_length, s.n_hat) for s in self.rope.sets]
        return f"rotary_dim={self.rope.rotary_dim}, sets(max_length, n_hat)={sets}"

    def _make_ready(self) -> None:
        """The tables of the model's device now, not during a traced or captured forward."""
        _install_dispatcher()
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


class _Rotation(NamedTuple):
    """In place of sin (positions are in place of cos): what else the rotation needs.

    A named tuple of a tensor and a method, since layers' arguments are walked by accelerate, DDP
    and FSDP to move tensors: these rebuild a named tuple around a moved ``length``, where a module
    or a `Rope` in it would be moved, or taken apart.
    """

    length: torch.Tensor  # () of the positions' dtype, tokens: the longest sequence of the batch
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def _install_dispatcher() -> None:
    original = modeling_phi3.apply_rotary_pos_emb
    if getattr(original, "dispatches_longrope", False):
        return

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if isinstance(sin, _Rotation):
            return sin.rotate(q, k, cos, sin.length, unsqueeze_dim)
        return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    apply_rotary_pos_emb.__doc__ = original.__doc__
    apply_rotary_pos_emb.dispatches_longrope = True  # type: ignore[attr-defined]
    modeling_phi3.apply_rotary_pos_emb = apply_rotary_pos_emb


def _rotary_slots(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, attribute, module) of each rotary module, replaced or not.

    A subclass may rotate by another formula, and is not ours to replace.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {_SUPPORTED}, got {type(model).__name__}")
    return [
        (parent, name, module)
        for parent in model.modules()
        if not isinstance(parent, ExactRotaryEmbedding)
        for name, module in parent.named_children()
        if type(module) is Phi3RotaryEmbedding or isinstance(module, ExactRotaryEmbedding)
    ]


def _check_head_dim(rope: Rope, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope.rotary_dim > head_dim:
        raise ValueError(
            f"rope: expected at most {head_dim} rotary dimensions, the model's head_dim, "
            f"got {rope.rotary_dim}"
        )
