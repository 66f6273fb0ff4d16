"""What happens before a forward: checks, pinned sets kept beside the cache, and prefilling again.

`Policy` "pin" keeps the sets of the first forward as an attribute of the cache object, and a hook
before the base model's forward hands them to the layers. "recompute" empties the cache where a
sequence is about to cross into another set, before ``generate()`` cuts off what is cached. "switch"
needs neither, only that Phi-3's own way of emptying the cache is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)
from transformers.generation import GenerationMixin

from ...calls.values import readable
from ...rope.value import Rope, sets_of_lengths
from .attention import NAME, Enabled, last_positions
from .settings import Settings

# Their slots lie in the order of tokens, and hold what was put into them.
_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
_PINNED = "longrope_sets"


def enabled_of(model: nn.Module) -> Enabled | None:
    """What `enable` left at a base model, or at that of a model with a head; no search."""
    found: Enabled | None = getattr(getattr(model, "base_model", model), "longrope", None)
    return found


# ------------------------------------------------------------------------------------------- hook


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of the base model: checks the cache, and hands on pinned sets."""
    enabled = enabled_of(module)
    if enabled is None:
        return None
    settings = enabled.settings
    if not torch.compiler.is_compiling():
        enabled.memory.forget()
    _check_implementation(module.config)
    given = kwargs
    if args:
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = given.get("past_key_values")
    if cache is not None:
        _check_cache(cache)
    if settings.policy != "pin" or not settings.chooses:
        return None
    if cache is None:
        use_cache = given.get("use_cache")
        if not (module.config.use_cache if use_cache is None else use_cache):  # type: ignore[union-attr]
            return None
        if len(args) > 3:
            raise ValueError("past_key_values: expected as a keyword under policy 'pin'")
        cache = kwargs["past_key_values"] = DynamicCache(config=module.config)
    return args, {**kwargs, _PINNED: _pinned_sets(cache, given, settings.rope)}


def _check_implementation(config: Any) -> None:
    """With another attention function nobody would rotate."""
    if config._attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation: expected {NAME!r}, which enable(model) has set, got "
            f"{config._attn_implementation!r}; disable(model) before choosing another, or "
            "enable(model, cache='rotated'), which goes with any"
        )


def _check_cache(cache: Any) -> None:
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise ValueError(
            f"past_key_values: expected a DynamicCache or StaticCache, got {type(cache).__name__}"
        )
    for layer in layers:
        if type(layer) not in _CACHE_LAYERS:
            raise ValueError(
                "past_key_values: expected layers of type "
                f"{', '.join(t.__name__ for t in _CACHE_LAYERS)}, got {type(layer).__name__}; "
                "enable(model, cache='rotated') takes it"
            )


def _pinned_sets(cache: Any, given: dict[str, Any], rope: Rope) -> torch.Tensor:
    """(batch,) int32: the sets of the first forward that filled this cache."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    batch = tokens.shape[0]
    sets = getattr(cache, _PINNED, None)
    if sets is None or _is_empty(cache):
        lengths = _lengths(given, tokens, cache)
        sets = sets_of_lengths(lengths, rope.tables(lengths.device).max_length).to(torch.int32)
        setattr(cache, _PINNED, sets)
    if sets.shape[0] != batch:
        raise ValueError(
            f"past_key_values: expected {sets.shape[0]} sequences as when it was filled, got "
            f"{batch}; the sets of policy 'pin' belong to them"
        )
    return sets


def _is_empty(cache: Any) -> bool:
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor):  # of a static cache
        return readable(length) and int(length) == 0
    return bool(length == 0)


def _lengths(given: dict[str, Any], tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """What chooses the set of each sequence, as in `attention.call_of`: (batch,) int64."""
    batch, queries = tokens.shape[:2]
    positions: torch.Tensor | None = given.get("position_ids")
    if positions is None:
        positions = torch.arange(queries, device=tokens.device)[None] + cache.get_seq_length()
    mask, behind = given.get("attention_mask"), None
    if isinstance(mask, dict):  # of each kind of layer, as ``generate()`` prepares them
        mask = mask["full_attention"]
    if mask is not None and mask.dim() == 2:
        behind = mask.to(torch.uint8).flip(1).argmax(1)
    elif mask is not None:
        behind = mask[:, 0, 0, 2] - mask[:, 0, 0, 1]
    return (last_positions(positions, behind, batch) + 1).clamp(min=0)


# --------------------------------------------------------------------------------------- generate


def install_preparation(model: type) -> None:
    """Let a class's ``prepare_inputs_for_generation`` know enabled models; it stays."""
    original = model.prepare_inputs_for_generation  # type: ignore[attr-defined]
    if getattr(original, "dispatches_longrope", False):
        return

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        enabled = enabled_of(self)
        if enabled is None:
            return original(self, *args, **kwargs)
        settings = enabled.settings
        bound = inspect.signature(GenerationMixin.prepare_inputs_for_generation).bind(
            self, *args, **kwargs
        )
        arguments = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        if arguments.get("past_key_values") is not None:
            _check_cache(arguments["past_key_values"])  # before a mask is made for it
        if settings.policy == "recompute" and settings.chooses and _crosses(arguments, settings):
            _empty(arguments["past_key_values"])
            arguments["next_sequence_length"] = None
        return GenerationMixin.prepare_inputs_for_generation(**arguments)

    prepare_inputs_for_generation.__doc__ = original.__doc__
    prepare_inputs_for_generation.dispatches_longrope = True  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = prepare_inputs_for_generation  # type: ignore[attr-defined]


def _empty(cache: Any) -> None:
    """Drop what the cache holds."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):  # before transformers 5.18 reset() zeroes
            layer.keys = layer.values = None
            layer.is_initialized = False
        layer.reset()


def _crosses(arguments: dict[str, Any], settings: Settings) -> bool:
    """Whether a sequence has tokens in the cache that were made under another set."""
    cache, tokens = arguments.get("past_key_values"), arguments["input_ids"]
    if cache is None or not int(cache.get_seq_length()):
        return False
    new = tokens.shape[1] - int(cache.get_seq_length())
    mask = arguments.get("attention_mask")
    if mask is None:
        lengths: Sequence[int] = [tokens.shape[1]]
    else:
        lengths = mask.sum(-1).tolist()  # waits for the device: the host must know
    rope = settings.rope
    return any(
        length > new and rope.set_index(length) != rope.set_index(length - new)
        for length in lengths
    )
