"""A trial of the contacts with transformers, once for each family and kind of config in a process.

A tiny model of the same config, with as many layers as show each kind of them, must give enabled
what it gave before. So another transformers than those that were tested, or a config that asks for
what no test had, is found out here, in a fraction of a second, and not by its results.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from ...rope.hf_config import N_HAT_KEY
from ...rope.scaling import FactorWarning
from .architectures import Architecture
from .contacts import MissingError
from .parts import Slot, slots_of
from .probe import TOKENS, UnmadeError, on_one_line, on_the_cpu, tiny
from .settings import Settings

_MOST = 1e-3  # of hidden states of about 1
passed: set[tuple[type, str, str]] = set()


def check_contacts(architecture: Architecture, base: type, config: Any, cache: Any) -> None:
    """Raise `MissingError` where a contact is not what it was."""
    config = _known(config)
    key = base, repr(config), cache
    if key in passed:
        return
    try:
        model = tiny(base, config)
    except UnmadeError:
        raise
    except Exception as error:
        raise MissingError(f"{architecture.name}: a tiny {base.__name__} fails: {error}") from error
    with on_the_cpu():
        expected, _ = _run(model)
        (slot,) = slots_of(model, probing=True)
        _try(slot, cache, expected)
    passed.add(key)


def _known(config: Any) -> Any:
    """A copy without what untouched models know nothing of: thresholds, a factor for each set."""
    config = copy.copy(config)
    vars(config).pop(N_HAT_KEY, None)
    if config.model_type != "phimoe" and getattr(config, "rope_parameters", None):
        config.rope_parameters = _without_mscales(config.rope_parameters)
    return config


def _without_mscales(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_mscales(value) if isinstance(value, Mapping) else value
        for name, value in parameters.items()
        if name not in ("short_mscale", "long_mscale")
    }


def _try(slot: Slot, cache: Any, expected: torch.Tensor) -> None:
    name = slot.architecture.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FactorWarning)  # a caller hears of the model's own
        ropes = slot.own_ropes(TOKENS)
    slot.put(Settings(ropes, cache, None, 0))
    try:
        actual, marked = _run(slot.base)
    except ValueError as error:  # which says what is not served
        raise MissingError(f"{name}: {error}") from error
    except Exception as error:
        raise MissingError(f"{name}: its layers fail enabled: {on_one_line(error)}") from error
    finally:
        slots_of(slot.base)[0].take_back()
    if not marked:
        raise MissingError(f"{name}: attention modules are not given the cache")
    scale = float(expected.abs().max())
    if not torch.allclose(actual, expected, rtol=_MOST, atol=_MOST * max(1.0, scale)):
        raise MissingError(
            f"{name}: an enabled model gives other results, as where something (a norm) stands "
            "between rotation and attention"
        )


def _run(base: Any) -> tuple[torch.Tensor, bool]:
    """Hidden states of the real tokens of two rows, and whether the cache was seen."""
    ids = torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    caches = [value for value in out.values() if isinstance(value, Cache)]
    marked = not caches or any(hasattr(cache, "longrope_keys") for cache in caches)
    return out.last_hidden_state[mask.bool()], marked
