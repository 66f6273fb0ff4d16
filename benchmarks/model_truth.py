"""What a model of `models` must say, in float64: by its weights and the reference backend.

No cache, no kernel and no rotation of the rows is asked: keys stay unrotated, angles are float64,
and each part of a text is told the length that chooses its factor set.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from models import NAMES, NEW, ids, model, switch, switches
from ropes import DEVICE

from longrope_kernels import Rope, attention

CHUNK = 256  # queries whose scores lie in memory at once


class Past(NamedTuple):
    """Keys, unrotated, and values of some tokens: two (1, tokens, heads, dim) for each layer."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def count(self) -> int:
        return self.layers[0][0].shape[1] if self.layers else 0


def logits(name: str, tokens: torch.Tensor, first: int, full_size: bool) -> torch.Tensor:
    """Of tokens (1, count) from ``first`` on, (1, count - first, vocab).

    Those up to the switch come by the short factors, the others by the long ones, as if there had
    been no cache. Under "switch" the others see keys and values that the short ones left.

    Args:
        name: of the row.
        tokens: those before ``first`` are `models.ids`.
        first: the first whose logits are wanted.
        full_size: of `models.model`.
    """
    short, long = switch(full_size), switch(full_size) + 1  # lengths, one for each set
    count, border = tokens.shape[1], min(short, tokens.shape[1])
    common = min(first, short - NEW // 2 - 1)
    past, found = extend(
        _prefix(common, short, full_size), tokens[:, common:border], short, full_size
    )
    parts = [found[:, first - common :]]
    if count > border:
        if not switches(name):
            past = _prefix(common, long, full_size)
        _, found = extend(past, tokens[:, past.count :], long, full_size)
        parts.append(found[:, border - count :])
    return torch.cat(parts, 1)


@torch.no_grad()
def extend(
    past: Past, tokens: torch.Tensor, length: int, full_size: bool, *, wanted: bool = True
) -> tuple[Past, torch.Tensor]:
    """Some more tokens, which take the set of a sequence of ``length``, and their logits.

    The logits are not made where they are not ``wanted``, which saves most of the last layer.
    """
    of = model(NAMES[0], full_size)
    x = of.model.embed_tokens(tokens).double()
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, in_dtype in enumerate(of.model.layers):
        layer = copy.deepcopy(in_dtype).double()
        q, k, v = _heads(layer.self_attn.qkv_proj(_norm(x, layer.input_layernorm)), of.config)
        if past.layers:
            k, v = (torch.cat(both, 1) for both in zip(past.layers[i], (k, v), strict=True))
        layers.append((k, v))
        if i + 1 == len(of.model.layers) and not wanted:
            return Past(tuple(layers)), x[:, :0]
        chunks = []
        for a in range(0, x.shape[1], CHUNK):
            end = min(a + CHUNK, x.shape[1])
            seen = past.count + end
            out = _attend(q[:, a:end], k[:, :seen], v[:, :seen], length, of.config)
            y = x[:, a:end] + layer.self_attn.o_proj(out.flatten(2))
            chunks.append(y + layer.mlp(_norm(y, layer.post_attention_layernorm)))
        x = torch.cat(chunks, 1)
    head = copy.deepcopy(of.lm_head).double()
    return Past(tuple(layers)), head(_norm(x, of.model.norm))


@lru_cache(maxsize=2)
def _prefix(count: int, length: int, full_size: bool) -> Past:
    """What the first tokens leave by the set of a sequence of ``length``."""
    if count == 0:
        return Past()
    return extend(Past(), ids(count), length, full_size, wanted=False)[0]


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    """Phi3RMSNorm, which takes float32 whatever comes."""
    mean = x.square().mean(-1, keepdim=True)
    return x * (mean + module.variance_epsilon).rsqrt() * module.weight.double()


def _heads(qkv: torch.Tensor, config: Any) -> tuple[torch.Tensor, ...]:
    """q, k and v, (1, tokens, heads, dim) each."""
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    return qkv.unflatten(-1, (sum(counts), -1)).split(counts, 2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, config: Any
) -> torch.Tensor:
    """Of the last queries to all keys."""
    positions = torch.arange(k.shape[1], device=DEVICE)
    out = attention(
        *(q, k, v, positions[-q.shape[1] :], Rope.from_config(config)),
        key_positions=positions,
        lengths=torch.full((1,), length, device=DEVICE),
        backend="reference",
    )
    assert isinstance(out, torch.Tensor)
    return out
