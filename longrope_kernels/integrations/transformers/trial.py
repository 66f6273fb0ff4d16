"""A trial of the contacts with transformers, once for each architecture in a process.

A model of one layer must give enabled what it gave before. So another transformers than those that
were tested is found out here, in a fraction of a second, and not by its results.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig
from transformers.cache_utils import Cache

from ...rope import Rope
from .architectures import Architecture
from .contacts import missing
from .parts import Slot, slots_of
from .rotary import ExactRotaryEmbedding
from .settings import CACHES, Settings

_SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}


@cache
def check_contacts(architecture: Architecture) -> None:
    """Raise `missing` where a contact is not what it was."""
    with (
        torch.random.fork_rng(devices=()),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture.package, **_SIZES)
        base = getattr(architecture.module, f"{architecture.prefix}Model")(config).float().eval()
        (slot,) = slots_of(base)
        expected, _ = _run(base)
        for kind in CACHES:
            _try(slot, kind, expected)


def _try(slot: Slot, kind: Any, expected: torch.Tensor) -> None:
    settings = Settings(Rope.from_config(slot.base.config), kind, None, 0)
    slot.put(ExactRotaryEmbedding(slot.module, slot.architecture, settings))
    try:
        actual, marked = _run(slot.base)
    except Exception as error:
        raise missing(f"{slot.architecture.package}: {error}") from error
    finally:
        slots_of(slot.base)[0].take_back()
    if not marked:
        raise missing(f"{slot.architecture.package}: attention modules are not given the cache")
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3):
        raise missing(f"{slot.architecture.package}: an enabled model gives other results")


def _run(base: Any) -> tuple[torch.Tensor, bool]:
    """Hidden states of the real tokens of two rows, and whether the cache was seen."""
    ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    out = base(ids, attention_mask=mask, use_cache=True)
    caches = [value for value in out.values() if isinstance(value, Cache)]
    marked = any(hasattr(cache, "longrope_keys") for cache in caches)
    return out.last_hidden_state[mask.bool()], marked
