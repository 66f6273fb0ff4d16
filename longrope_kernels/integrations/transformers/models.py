"""`enable`, `disable` and `set_rope`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation import GenerationMixin

from ...backends import choose as backends
from ...cache.rows import POLICIES, Policy
from ...rope.hf_config import rope_type
from ...rope.value import Rope
from .architectures import SUPPORTED, Architecture, by_rotary_class, head_dim
from .attention import NAME, Enabled, Memory, longrope_attention
from .generation import before_forward, install_preparation
from .masks import slots_of_mask
from .rotary import ExactRotaryEmbedding
from .settings import CACHES, Cache, Settings

Model = TypeVar("Model", bound=nn.Module)

AttentionInterface.register(NAME, longrope_attention)
AttentionMaskInterface.register(NAME, slots_of_mask)


def enable(
    model: Model,
    *,
    rope: Rope | None = None,
    cache: Cache = "unrotated",
    policy: Policy | None = None,
    backend: str | None = None,
) -> Model:
    """Give a model of transformers LongRoPE's rotation, attention and cache.

    Its attention becomes `attention` and `decode`, exact at any position, its cache (any
    DynamicCache or StaticCache, also that of ``generate()``) holds unrotated keys, and each
    sequence of a batch takes the factor set of its own length. The weights, the config that
    ``save_pretrained`` writes and the names in ``state_dict()`` stay as they are.

    Args:
        model: any module that contains models of the families phi3, phimoe, llama, mistral, qwen2
            or qwen3 of transformers >= 5.6, with whatever head. Changed in place. On a model
            enabled before, the arguments given now hold.
        rope: the embedding; None reads it from the model's config. A threshold, which the
            published configs have no field for: ``Rope.from_config(model.config, n_hat=...)``.
        cache: "unrotated", or "rotated": only the rotation is replaced, transformers' own attention
            and cache stay, and one factor set serves the whole batch, that of its largest position
            plus one, as without `enable`.
        policy: what a sequence does that grows into the next of several sets: "switch" (all its
            cached keys take the new set from the next token on; free; the default), "pin" (it stays
            on the set of its prompt) or "recompute" (the cache is emptied and filled again, as
            transformers does for Phi-3). For an unrotated cache only.
        backend: as in `attention` and `decode`, None for the fastest; "native" is "composed" where
            it is about `attention`. A named one must serve the device the model is on now.

    Returns:
        The same model.

    Raises:
        ValueError: naming the argument: no model that is supported; a config whose rotation this
            package does not know, or that needs a length (dynamic NTK); a rope that rotates more
            dimensions than a head has; an unknown cache, policy or backend, or one that does not
            serve the model's device or dtype. Nothing is changed then.
        TypeError: ``rope`` is not a `Rope`.
        RuntimeError: the named backend is not available.
    """
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope or None, got {type(rope).__name__}")
    _check_choice("cache", cache, CACHES)
    if policy is not None:
        _check_choice("policy", policy, POLICIES)
        if cache == "rotated":
            raise ValueError(f"policy: expected None with cache='rotated', got {policy!r}")
    elif cache == "unrotated":
        policy = "switch"
    slots = _rotary_slots(model)
    if not slots:
        raise ValueError(f"model: expected {SUPPORTED}, got {type(model).__name__}")

    replacements = []
    for parent, _, module, architecture in slots:
        replaced = isinstance(module, ExactRotaryEmbedding)
        original = module.original if replaced else module
        own = _rope_of(original.config) if rope is None else rope
        settings = Settings(own, cache, policy, backend)
        _check(settings, parent, original.config)
        replacements.append(ExactRotaryEmbedding(original, architecture, settings))
    disable(model)
    configs = [parent.config for parent, *_ in slots]
    for (parent, name, _, architecture), replacement, config in zip(
        slots, replacements, configs, strict=True
    ):
        setattr(parent, name, replacement)
        if cache == "unrotated":
            replacement.former_config = config
            if parent.config is config:  # not that of a base model before
                _replace_config(model, config, _own_config(config))
            _take_over(parent, architecture, replacement.settings)
    if cache == "unrotated":
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                install_preparation(type(module))
    return model


def disable(model: Model) -> Model:
    """Put back what `enable` replaced, the very same objects.

    Args:
        model: one that was enabled; on any other nothing happens.

    Returns:
        The same model.
    """
    for parent, name, module, architecture in _rotary_slots(model):
        if isinstance(module, ExactRotaryEmbedding):
            if module.former_config is not None:
                _give_back(parent, architecture)
                if parent.config is not module.former_config:
                    _restore_config(parent.config, module.former_config)
                    _replace_config(model, parent.config, module.former_config)
            setattr(parent, name, module.original)
    return model


def set_rope(model: Model, rope: Rope) -> Model:
    """Exchange the rope of an enabled model; nothing else is made anew, so that it costs nothing.

    Cache, policy and backend stay. An unrotated cache may go on: its keys take the new rope from
    the next token on; a rotated one, and one of policy "pin", must not. A graph of
    ``torch.compile`` is compiled again.

    Args:
        model: one that was enabled, changed in place.
        rope: of any number of sets.

    Returns:
        The same model.

    Raises:
        ValueError: the model was not enabled; the rope rotates more dimensions than a head has.
            Nothing is changed then.
        TypeError: ``rope`` is not a `Rope`.
    """
    if not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
    slots = [slot for slot in _rotary_slots(model) if isinstance(slot[2], ExactRotaryEmbedding)]
    if not slots:
        raise ValueError(
            f"model: expected one that enable(model) was called on, got {type(model).__name__}"
        )
    for parent, _, module, _ in slots:
        _check(dataclasses.replace(module.settings, rope=rope), parent, module.original.config)
    for parent, _, module, architecture in slots:
        settings = dataclasses.replace(module.settings, rope=rope)
        module.use(settings)
        if settings.cache == "unrotated":
            for part in (parent, *_attentions(parent, architecture)):
                part.longrope = part.longrope._replace(settings=settings)
    return model


def _rotary_slots(model: nn.Module) -> list[tuple[Any, str, Any, Architecture]]:
    """(parent, attribute, module, architecture) of each rotary module, replaced or not."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {SUPPORTED}, got {type(model).__name__}")
    found: list[tuple[Any, str, Any, Architecture]] = []
    for parent in model.modules():
        if isinstance(parent, ExactRotaryEmbedding):
            continue
        for name, module in parent.named_children():
            if isinstance(module, ExactRotaryEmbedding):
                found.append((parent, name, module, module.architecture))
            elif type(module) in by_rotary_class():
                found.append((parent, name, module, by_rotary_class()[type(module)]))
    return found


def _take_over(base: Any, architecture: Architecture, settings: Settings) -> None:
    """Attention and caches of a base model."""
    memory = Memory()
    base.longrope = Enabled(settings, memory)
    window = None if architecture.hands_on_window else base.config.sliding_window
    for module in _attentions(base, architecture):
        module.longrope = Enabled(settings, memory, window)
    base.register_forward_pre_hook(before_forward, with_kwargs=True)


def _give_back(base: Any, architecture: Architecture) -> None:
    del base.longrope
    for module in _attentions(base, architecture):
        del module.longrope
    for key, hook in list(base._forward_pre_hooks.items()):
        if hook is before_forward:
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)


def _attentions(base: nn.Module, architecture: Architecture) -> list[Any]:
    return [module for module in base.modules() if isinstance(module, architecture.attention)]


def _own_config(config: Any) -> Any:
    """A copy, since models that were built from the same object must go on without us."""
    own = copy.copy(config)
    own._attn_implementation = NAME
    return own


def _restore_config(own: Any, former: Any) -> None:
    """What the caller changed in our copy stays, except the attention that only we serve."""
    own._attn_implementation = former._attn_implementation
    vars(former).update(vars(own))


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    """In all modules that hold it: heads, base model, layers."""
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new


def _rope_of(config: Any) -> Rope:
    if rope_type(config) == "dynamic":
        raise ValueError(
            "model: its rope type 'dynamic' has other factors at each length; give "
            "rope=Rope.from_config(model.config, length=...) for the longest sequence to come"
        )
    return Rope.from_config(config)


def _check(settings: Settings, base: Any, config: Any) -> None:
    dim, rope = head_dim(config), settings.rope
    if rope.rotary_dim > dim:
        raise ValueError(
            f"rope: expected at most {dim} rotary dimensions, the model's head_dim, "
            f"got {rope.rotary_dim}"
        )
    weight = next(base.parameters())
    device, dtype = weight.device.type, weight.dtype
    if settings.cache == "rotated":
        if settings.backend is not None:
            backends.choose_rotary(settings.backend, device, dtype == torch.float64)
        return
    if not getattr(config, "is_causal", True):
        raise ValueError("model: expected causal attention, got a config with is_causal=False")
    if settings.attention_backend is not None:
        backends.choose_attention(settings.attention_backend, device, dtype, dim, "masked")
    if settings.decode_backend is not None:
        backends.choose_decode(settings.decode_backend, device, dtype, dtype, dim)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        shown = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: expected one of {shown}, got {value!r}")
