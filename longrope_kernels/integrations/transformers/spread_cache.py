"""A cache of transformers whose tokens are spread over ranks: each holds some in every layer."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...distributed.ranks import Ranks
from ...distributed.shards import Order, Spans, count, spans_of


class Held:
    """Which slots of a cache each rank has, and those of this one on the device, ascending."""

    def __init__(self, ranks: Ranks, order: Order, device: torch.device) -> None:
        self.ranks, self.order = ranks, order
        self.spans: list[Spans] = [()] * ranks.size
        self.slots = torch.empty(0, dtype=torch.int64, device=device)
        self.new = 0  # tokens of this forward, on all ranks
        self.keeps = True  # whether this rank keeps what its layers make in this forward

    def begin(self, tokens: int, *, whole: bool) -> None:
        """New tokens: a prompt as `shard` cuts it, or ``whole`` where the fewest are."""
        size, rank = self.ranks.size, self.ranks.rank
        counts = [count(spans) for spans in self.spans]
        total = sum(counts)
        new: list[Spans]
        if whole:
            owner = counts.index(min(counts))
            new = [((total, total + tokens),) if i == owner else () for i in range(size)]
        else:
            new = [spans_of(tokens, i, size, self.order) for i in range(size)]
        self.new, self.keeps = tokens, bool(new[rank])
        own = [torch.arange(*span, device=self.slots.device) for span in new[rank]]
        self.slots = torch.cat([self.slots, *own])
        self.spans = [old + more for old, more in zip(self.spans, new, strict=True)]

    def crop(self, total: int) -> None:
        """Keep the first so many tokens of all ranks."""
        self.spans = [
            tuple((start, min(stop, total)) for start, stop in spans if start < total)
            for spans in self.spans
        ]
        self.slots = self.slots[: count(self.spans[self.ranks.rank])]


class SpreadLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of a layer that this rank holds; its length is that of all ranks."""

    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held = held
        self.total = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new ones where they belong to this rank; all that it has."""
        self.total += self.held.new
        count = key_states.shape[2] if self.held.keeps else 0
        if count or not self.is_initialized:
            super().update(key_states[:, :, :count], value_states[:, :, :count])
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """How many tokens all ranks hold."""
        return self.total

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        self.total = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of all ranks, given as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove: expected how many tokens to drop, negative, got "
                f"{tokens_to_remove}"
            )
        self.total += tokens_to_remove
        self.held.crop(self.total)
        kept = len(self.held.slots)
        self.keys: torch.Tensor = self.keys[:, :, :kept]
        self.values: torch.Tensor = self.values[:, :, :kept]


def held_in(cache: Any, base: Any, ranks: Ranks, device: torch.device, past: int) -> Held:
    """What a cache holds here; an empty one becomes a spread one, in the order of the model."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()):
        raise ValueError(
            "past_key_values: expected None where gradients are recorded, since a spread cache has "
            "none; call the model under torch.no_grad()"
        )
    layers = cache.layers
    if past:
        first = layers[0]
        if isinstance(first, SpreadLayer) and first.held.ranks == ranks:
            return first.held
        raise ValueError(
            "past_key_values: expected an empty DynamicCache, or one that this model has filled, "
            f"got {past} tokens in {type(cache).__name__}"
        )
    if type(cache) is not DynamicCache or cache.offloading:
        raise ValueError(
            "past_key_values: expected a DynamicCache that offloads nothing, got "
            f"{type(cache).__name__}"
        )
    held = Held(ranks, base.longrope.settings.order, device)
    count_of_layers = base.config.get_text_config().num_hidden_layers
    cache.layers = [SpreadLayer(held) for _ in range(count_of_layers)]
    cache.layer_class_to_replicate = None
    return held
