"""`enable`, `disable` and `set_rope`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from ...backends import choose as backends
from ...distributed.blocks import BACKENDS as SPREAD_BACKENDS
from ...distributed.ranks import Group, ranks_of
from ...distributed.shards import Order, check_order
from ...rope.value import Rope
from .architectures import ROTATED_ALONE
from .caches import fingerprint
from .contacts import MissingError, check_own
from .parts import Slot, slots_of
from .probe import UnfitError, frequencies
from .ropes import given, head_dim
from .settings import CACHES, Cache, Settings
from .spread_loss import heads_of, put_loss, take_loss
from .trial import check_contacts

Model = TypeVar("Model", bound=nn.Module)
SUPPORTED = "a model that contains a decoder of transformers with rotary embeddings"


def enable(
    model: Model,
    *,
    rope: Rope | Mapping[str, Rope] | None = None,
    cache: Cache = "unrotated",
    backend: str | None = None,
    group: Group = None,
    order: Order = "balanced",
) -> Model:
    """Give a model of transformers LongRoPE's rotation, attention and cache.

    Its attention becomes `attention` and `decode`, exact at any position, its cache (any
    DynamicCache or StaticCache, also that of ``generate()``) holds unrotated keys, and each
    sequence of a batch, packed ones too, takes the factor set of its own length. One that grows
    into the next set takes it, for all its cached keys, from the next token on, which costs
    nothing; who knows the final length beforehand gives ``rope=rope.for_length(n)``. The weights,
    the config that ``save_pretrained`` writes and the names in ``state_dict()`` stay as they are.

    Args:
        model: any module that contains a decoder of transformers >= 5.6 which rotates as most do,
            with whatever head; ``longrope info --models`` lists those that were tried. Others are
            tried now. Changed in place. On a model enabled before, the arguments given now hold.
        rope: the embedding; None reads it from the model's config. A threshold, which the
            published configs have no field for: ``Rope.from_config(model.config, n_hat=...)``.
            Where layers of several types have each their own, a dict of those to be exchanged, by
            the type. Pairs are those of the model's code, or interleaved where a rope says so.
        cache: "unrotated", or "rotated": only the rotation is replaced, transformers' own attention
            and cache stay, and one factor set serves the whole batch, that of its largest position
            plus one, as without `enable`.
        backend: as in `attention` and `decode`, None for the fastest; "native" is "composed" where
            it is about `attention`. A named one must serve the device the model is on now.
        group: the ranks that share each sequence (docs/distributed.md): a process group, or a mesh
            of one or two dimensions. They call the model alike, with whole inputs.
        order: of the tokens over these ranks, as in `shard`; "contiguous" where windows are short.

    Returns:
        The same model.

    Raises:
        ValueError: naming the argument: no model that is supported, or not with this cache, and
            why; a rotation or layers that another package has replaced; a config whose rotation
            this package does not know, or that needs a length (dynamic NTK); a rope that rotates
            more or fewer dimensions than the model does; an unknown cache or backend, or a backend
            that does not serve the model's device or dtype; with ``group`` a cache "rotated", a
            head that is not of a causal language model, or layers that mix tokens outside of
            attention or have sinks. Nothing is changed then.
        TypeError: ``rope`` is not a `Rope`, or ``group`` is no group.
        RuntimeError: the named backend is not available; the installed transformers has not what
            this relies on.
    """
    if rope is not None and not isinstance(rope, Rope | Mapping):
        raise TypeError(f"rope: expected a Rope or None, got {type(rope).__name__}")
    if cache not in CACHES:
        shown = ", ".join(map(repr, CACHES))
        raise ValueError(f"cache: expected one of {shown}, got {cache!r}")
    slots = _slots(model, probing=True)
    if not slots:
        raise ValueError(f"model: expected {SUPPORTED}, got {type(model).__name__}")

    heads = []
    check_order(order)
    if group is None and order != "balanced":
        raise ValueError(f"order: expected 'balanced' without group=, got {order!r}")
    if group is not None:
        ranks_of(group)
        if cache != "unrotated":
            raise ValueError(f"cache: expected 'unrotated' with group=, got {cache!r}")
        heads = heads_of(model, [slot.base for slot in slots])
    if any(getattr(part, "use_kernels", False) for part in (model, *(s.base for s in slots))):
        raise ValueError(
            "use_kernels: expected False, since kernels of the Hub stand in for a model's own "
            "rotation; load it with use_kernels=False"
        )
    chosen = []
    for slot in slots:
        check_own(slot.architecture)
        slot.check_layers(cache)
        if cache == "unrotated" and slot.architecture.unrotated:
            raise ValueError(
                f"cache: {type(slot.base).__name__} {ROTATED_ALONE}: {slot.architecture.unrotated}"
            )
        ropes = _ropes(slot, rope)
        settings = Settings(ropes, cache, backend, fingerprint(slot.attentions[0]), group, order)
        _check(settings, slot)
        chosen.append(settings)
    for slot in slots:
        kind = slot.architecture, type(slot.base), slot.base.config, cache
        check_contacts(*kind, spread=group is not None)
    disable(model)
    slots = _slots(model, probing=True)
    for slot, settings in zip(slots, chosen, strict=True):
        slot.put(settings)
    for head in heads:
        put_loss(head, group, order)
    return model


def disable(model: Model) -> Model:
    """Put back what `enable` replaced, the very same objects.

    Args:
        model: one that was enabled; on any other nothing happens.

    Returns:
        The same model.
    """
    for slot in _slots(model):
        if slot.is_replaced:
            slot.take_back()
    take_loss(model)
    return model


def set_rope(model: Model, rope: Rope | Mapping[str, Rope]) -> Model:
    """Exchange the rope of an enabled model; nothing else is made anew, so that it costs nothing.

    Cache and backend stay. An unrotated cache may go on: its keys take the new rope from the next
    token on; a rotated one is refused in the next forward. A graph of ``torch.compile`` is compiled
    again. For one ``generate()`` whose final length is known:
    ``set_rope(model, rope.for_length(n))``.

    Args:
        model: one that was enabled, changed in place.
        rope: of any number of sets; or a dict of them, by the type of layers, as in `enable`.

    Returns:
        The same model.

    Raises:
        ValueError: the model was not enabled; the rope rotates other dimensions than the model.
            Nothing is changed then.
        TypeError: ``rope`` is not a `Rope`.
    """
    if not isinstance(rope, Rope | Mapping):
        raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
    slots = [slot for slot in _slots(model) if slot.is_replaced]
    if not slots:
        raise ValueError(
            f"model: expected one that enable(model) was called on, got {type(model).__name__}"
        )
    chosen = []
    for slot in slots:
        settings: Settings = slot.module.settings
        ropes = given(rope, settings.ropes, slot.architecture.interleaved)
        chosen.append(dataclasses.replace(settings, ropes=ropes))
    for slot, settings in zip(slots, chosen, strict=True):
        _check(settings, slot)
    for slot, settings in zip(slots, chosen, strict=True):
        slot.use(settings)
    return model


def cache_of(model: nn.Module) -> Cache:
    """With which cache `enable` serves a model: "unrotated" where it can, known or tried."""
    for slot in _slots(model, probing=True):
        if slot.architecture.unrotated:
            return "rotated"
        try:
            check_contacts(slot.architecture, type(slot.base), slot.base.config, "unrotated")
        except MissingError:
            return "rotated"
    return "unrotated"


def _slots(model: nn.Module, *, probing: bool = False) -> list[Slot]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {SUPPORTED}, got {type(model).__name__}")
    try:
        return slots_of(model, probing=probing)
    except UnfitError as unfit:
        raise ValueError(
            f"model: expected {SUPPORTED}, got {type(model).__name__}: {unfit}"
        ) from unfit


def _ropes(slot: Slot, rope: Rope | Mapping[str, Rope] | None) -> dict[str, Rope]:
    """Those asked for; the config's are not read where each kind of layers is given one."""
    kinds = set(slot.kinds)
    if isinstance(rope, Rope) and len(kinds) == 1:
        own = dict.fromkeys(kinds, rope)
    else:
        own = slot.own_ropes()
    return given(rope, own, slot.architecture.interleaved)


def _check(settings: Settings, slot: Slot) -> None:
    config = slot.original.config
    for kind, (place, layer_type) in slot.kinds.items():
        rotated, rope = 2 * frequencies(place.original, layer_type).numel(), settings.ropes[kind]
        if rope.rotary_dim != rotated:  # other dimensions would make a pair
            raise ValueError(
                f"rope: expected {rotated} rotary dimensions, which this model rotates, got "
                f"{rope.rotary_dim}; is it another model's?"
            )
    dim = head_dim(slot.attentions[0], config)
    dim = settings.rope.rotary_dim if dim is None else dim
    device, dtype = _device(slot.base), next(slot.base.parameters()).dtype
    if settings.cache == "rotated":
        if settings.backend is not None:
            backends.choose_rotary(settings.backend, device, dtype == torch.float64)
        return
    if not getattr(config, "is_causal", True):
        raise ValueError("model: expected causal attention, got a config with is_causal=False")
    if getattr(config, "output_attentions", False):
        raise ValueError(
            "model: expected config.output_attentions=False, got True; fused attention has no "
            "weights to show, enable(model, cache='rotated')"
        )
    if settings.group is not None:
        if settings.attention_backend not in (None, *SPREAD_BACKENDS):
            raise ValueError(
                f"backend: expected one of {', '.join(SPREAD_BACKENDS)}, native or None with "
                f"group=, got {settings.backend!r}"
            )
    elif settings.attention_backend is not None:
        backends.choose_attention(settings.attention_backend, device, dtype, dim, "masked")
    if settings.decode_backend is not None:
        backends.choose_decode(settings.decode_backend, device, dtype, dtype, dim)


def _device(base: nn.Module) -> str:
    """Where it runs: accelerate's offloading keeps weights elsewhere until then."""
    weight = next(base.parameters())
    if weight.is_meta:
        for module in base.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device).type
    return weight.device.type
