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
from .spread import ARGUMENT, Spread

_MOST = 1e-3  # of hidden states of about 1
passed: set[tuple[type, str, str, bool]] = set()


def check_contacts(
    architecture: Architecture, base: type, config: Any, cache: Any, *, spread: bool = False
) -> None:
    """Raise `MissingError` where a contact is not what it was.

    spread: whether ranks are to share the tokens; a ValueError where layers can't have some alone.
    """
    config = _known(config)
    key = base, repr(config), cache, spread
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
        if spread:
            _try_spread(slot)
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
    slot.put(_settings(slot, cache))
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


def _try_spread(slot: Slot) -> None:
    """Refuse layers that don't give the tokens of a rank what they give them within the whole.

    In place of attention each token reads itself alone, so that whatever else goes over tokens
    (convolutions, states) shows.
    """
    base, some = slot.base, slice(TOKENS // 4, 3 * TOKENS // 4)  # as a rank of two has them
    slot.put(_settings(slot, "unrotated"))
    try:
        expected = _run_spread(base, slice(None))[:, some]
        actual = _run_spread(base, some)
    except ValueError as error:
        reason = str(error)
    except Exception as error:
        reason = f"its layers fail on some of the tokens: {on_one_line(error)}"
    else:
        scale = max(1.0, float(expected.abs().max()))
        if torch.allclose(actual, expected, rtol=_MOST, atol=_MOST * scale):
            return
        reason = (
            "its layers mix tokens outside of attention, as convolutions and states do, where a "
            "rank has its own alone"
        )
    finally:
        slots_of(base)[0].take_back()
    raise ValueError(f"group: expected None for {type(base).__name__}, got one: {reason}")


def _run_spread(base: Any, some: slice) -> torch.Tensor:
    """Hidden states of some tokens, given to layers as a forward over ranks gives them."""
    slots = torch.arange(TOKENS)[None]
    hidden: torch.Tensor = base(
        input_ids=3 + slots[:, some],
        attention_mask=torch.zeros((1, 1, 1, 1)),
        position_ids=slots[:, some],
        use_cache=False,
        **{ARGUMENT: Spread(False, TOKENS, slots)},
    ).last_hidden_state
    return hidden


def _settings(slot: Slot, cache: Any) -> Settings:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FactorWarning)  # a caller hears of the model's own
        return Settings(slot.own_ropes(TOKENS), cache, None, 0)


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
