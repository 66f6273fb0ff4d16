"""Whose keys a cache holds: seen once a forward, in the first attention module.

A cache says nothing about how its keys were made, and keys that this model did not make (those
that prefix tuning learns, those of an untouched or another model) are another model's, silently.
So a cache is marked when it is empty, and the mark is compared when it is not. The mark is an
attribute, since copies and pickles of a cache go on where it was. Found by its type alone:
transformers has renamed the argument once.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .attention import NAME, Enabled, check_positions
from .kept import check_kept
from .markers import Rotated, Unrotated
from .masks import can_wait, is_slots, of_thread
from .sequences import MEMORY
from .settings import Settings

# Their slots lie in the order of tokens, and hold what was put into them.
_IN_ORDER = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
# Beside them those of hybrid models, with states and none or the same keys, where there are such.
_OF_HYBRIDS = (
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
)
_STATES = tuple(getattr(cache_utils, name, None) for name in _OF_HYBRIDS)
_MARK = "longrope_keys"
_SETS = "longrope_rotated_sets"


def before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a base model's first attention module, before it writes keys."""
    enabled: Enabled = module.longrope  # type: ignore[assignment]
    settings = enabled.settings
    everything = (*args, *kwargs.values())
    caches = [given for given in everything if isinstance(given, Cache)]
    MEMORY.tell(None)  # the rotary modules have heard it
    if not torch.compiler.is_compiling():
        MEMORY.forget()
        _check_given(caches, module.training)
    if settings.cache == "unrotated":
        _check_implementation(module.config)
    elif settings.chooses:
        _check_alone(everything)
    batch, queries = next(x.shape[:2] for x in everything if isinstance(x, torch.Tensor))
    in_order = settings.cache == "unrotated" and settings.group is None
    positions = _positions(everything, kwargs.get("position_ids")) if in_order else None
    for cache in caches:
        if in_order:
            _check_layers(cache, module.config, queries)
        _check_keys(cache, settings)
        if positions is not None:
            check_positions(positions, batch, queries)
            check_kept(cache, positions, _mask(everything), batch, queries)
        if settings.cache == "rotated" and settings.chooses and can_wait():
            _check_sets(cache, settings, _length(everything, kwargs.get("position_ids")))


def fingerprint(attention: nn.Module) -> int:
    """Tells models apart whose keys have the same shape: of some of each weight beside them.

    The same in copies, and in another process that loads the same weights. Of weights that lie
    elsewhere (accelerate's offloading), which show nothing, it is another number each time.
    """
    found = 0
    for weight in chain(attention.parameters(), attention.buffers()):  # what quantised layers have
        if not weight.is_meta:
            for part in _plain(weight):
                some = part.detach().flatten()[:: max(1, part.numel() // 64)]
                found = zlib.crc32(str(some.tolist()).encode(), found)
    return found or secrets.randbits(64)


def _plain(weight: Any) -> Iterator[torch.Tensor]:
    """The tensors that a weight is made of: quantised ones (torchao's) may have no views."""
    if hasattr(weight, "to_local"):  # a DTensor: what this rank has of it
        weight = weight.to_local()
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _plain(getattr(weight, name))


def _check_implementation(config: Any) -> None:
    """With another attention function nobody would rotate."""
    if config._attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation: expected {NAME!r}, which enable(model) has set, got "
            f"{config._attn_implementation!r}; disable(model) before choosing another, or "
            "enable(model, cache='rotated'), which goes with any"
        )


def _check_alone(given: tuple[Any, ...]) -> None:
    """Continuous batching: a factor set is that of all its sequences, and their keys stay."""
    if any(type(one).__name__ == "PagedAttentionCache" for one in given):
        raise ValueError(
            "generate_batch: expected a rope of one factor set, got one that chooses by length, "
            "and sequences of several lengths share a forward; give rope=rope.for_length(n) of the "
            "longest, or generate()"
        )


def _check_given(caches: list[Cache], training: bool) -> None:
    """A cache that the model was given comes to its layers."""
    slots, of_thread.slots = of_thread.slots, 0  # not of a layer that is run again
    if slots and not caches:
        if not training:  # without a cache, transformers takes the slots for those of the mask
            raise ValueError(
                "attention_mask: expected as many tokens as input_ids has, since there is no "
                f"cache, got {slots}"
            )
        raise ValueError(
            "past_key_values: expected None in training with activation checkpointing, whose "
            "layers drop the cache, got one with keys; model.eval(), or no checkpointing"
        )


def _check_layers(cache: Any, config: Any, queries: int) -> None:
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(
            f"past_key_values: expected a DynamicCache or StaticCache, got {type(cache).__name__}"
        )
    for layer in layers:
        if type(layer) in _IN_ORDER or type(layer) in _STATES:
            continue
        if type(layer) is not StaticSlidingWindowLayer:
            raise ValueError(
                "past_key_values: expected layers of type "
                f"{', '.join(t.__name__ for t in _IN_ORDER)}, got {type(layer).__name__}; "
                "enable(model, cache='rotated') takes it"
            )
        # It has window slots at most. Where it has just as many, newer ones say if that was all.
        window = config.sliding_window
        if layer.max_cache_len >= window and not getattr(layer, "is_croppable", False):
            raise ValueError(
                f"past_key_values: expected max_cache_len below the sliding window, {window}, got "
                "a StaticSlidingWindowLayer that drops keys; use a DynamicCache, or "
                "enable(model, cache='rotated')"
            )
        count, dropped = layer.get_mask_sizes(queries)
        if count + dropped > layer.max_cache_len:
            raise ValueError(
                f"past_key_values: expected at most {layer.max_cache_len} tokens, the length of "
                f"the static cache, got {count + dropped}; a sliding one drops keys then"
            )


def _check_keys(cache: Any, settings: Settings) -> None:
    """Mark a cache that is empty, and refuse one of other keys."""
    held, own = getattr(cache, _MARK, None), settings.keys
    if held is own or held == own:
        return
    rotated = settings.cache == "rotated"
    if not (rotated and held is None) and not _is_empty(cache):
        whose = "of another model" if held is not None else "that this model did not make"
        expected = f"{'rotated by its present rope' if rotated else 'unrotated'}, of this model"
        raise ValueError(
            f"past_key_values: expected keys {expected} since enable(model), got a cache of keys "
            f"{whose} (prefix tuning's, of a model that was not enabled or enabled otherwise, or "
            "of another rope); begin with an empty cache"
            + ("" if rotated else ", or enable(model, cache='rotated')")
        )
    setattr(cache, _MARK, own)


def _check_sets(cache: Any, settings: Settings, length: int) -> None:
    """Rotated keys keep the factor set of their forward, and queries of another do not fit them."""
    own = {kind: rope.set_index(length) for kind, rope in settings.ropes.items()}
    held = getattr(cache, _SETS, own)
    if held != own and not _is_empty(cache):
        kind = next(kind for kind in own if held[kind] != own[kind])
        raise ValueError(
            f"past_key_values: expected keys rotated by factor set {own[kind]}, that of {length} "
            f"tokens, got a cache of keys rotated by set {held[kind]}; prefill an empty cache, or "
            "give rope=rope.for_length(n) of the final length, or enable(model), whose unrotated "
            "keys take any set"
        )
    setattr(cache, _SETS, own)


def _length(given: tuple[Any, ...], positions: torch.Tensor | None) -> int:
    """By which the layers choose their set; waits for the device, which holds the positions.

    Layers that have rotary modules of their own are given positions, others what comes of them; 0,
    which is of the first set always, where a layer is given neither.
    """
    for one in given:
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Rotated):
            return int(one[1].length)
    return 0 if positions is None else int(positions.max()) + 1


def _positions(given: tuple[Any, ...], own: torch.Tensor | None) -> torch.Tensor | None:
    """Those of the new tokens: what the rotary module made, or what a layer of its own has."""
    for one in given:
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Unrotated):
            return one[1].positions
    return own


def _mask(given: tuple[Any, ...]) -> torch.Tensor | None:
    """That of `masks.slots_of_mask`."""
    return next((x for x in given if isinstance(x, torch.Tensor) and is_slots(x)), None)


def _is_empty(cache: Any) -> bool:
    """Waits for the device where a static cache's count is, on first sight alone."""
    length = cache.get_seq_length()
    if torch.compiler.is_compiling() and isinstance(length, torch.Tensor):
        return True  # a graph can't tell, and is given what a forward outside of it has filled
    return int(length) == 0
