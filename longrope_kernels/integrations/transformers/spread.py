"""One sequence over the ranks of a group: a model is told all of it and computes its own tokens.

All ranks give a model the same inputs, whole, so that each knows positions, padding, borders and
lengths of the whole without asking. Hooks of the base model keep the tokens of this rank before
they are embedded; every layer then works on these, and attention goes over the ranks.
"""

from __future__ import annotations

import inspect
import zlib
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from ...calls.records import FEW_QUERIES
from ...calls.values import readable
from ...distributed import attention, decode, shard
from ...distributed.ranks import Ranks, agree, ranks_of, telling
from ...distributed.shards import gathered
from ...distributed.sums import whole_sum
from ...rope.value import Rope
from .masks import slots_of_mask
from .sequences import Call
from .settings import Settings
from .spread_cache import held_in

ARGUMENT = "longrope_spread"  # which layers pass on to the attention function
INPUTS = ("input_ids", "inputs_embeds")


class Spread(NamedTuple):
    """What the attention function of a layer is told of a forward.

    A step is of a few tokens, or of some behind a spread cache: every rank computes all of them.
    """

    masked: bool  # whether there is more to the mask than its dimensions
    total: int  # keys on all ranks
    positions: torch.Tensor  # of the whole: layers are given those of the tokens they have
    key_slots: torch.Tensor | None = None  # in a step, (keys here,) int64, the new ones included


def put_hooks(base: Any) -> list[Any]:
    """The hooks of a base model, to be removed by `disable`."""
    return [
        base.register_forward_pre_hook(_before, with_kwargs=True),
        base.register_forward_hook(_after, with_kwargs=True),
    ]


def _before(
    base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Derive what the whole says, and keep the tokens of this rank."""
    given = by_name(base, args, kwargs)
    inputs = [n for n in INPUTS if given.get(n) is not None]
    if len(inputs) != 1:
        return None  # transformers' own error comes
    (name,) = inputs
    settings: Settings = base.longrope.settings
    ranks, device = ranks_of(settings.group), given[name].device
    caches = caches_in(given)
    past = caches[0].get_seq_length() if caches else 0
    with telling(ranks, device):
        fields = {x: digest(x, given.get(x)) for x in (name, "attention_mask", "position_ids")}
    fields["output_router_logits"] = given.get("output_router_logits")
    agree(ranks, fields | {"past_key_values": past, "order": settings.order}, device)
    with telling(ranks, device):  # where the others attend by now
        return (), _shared(base, given, name, caches, past)


def _shared(
    base: Any, given: dict[str, Any], name: str, caches: list[Cache], past: int
) -> dict[str, Any]:
    """What a base model is given in place of the whole."""
    whole = given[name]
    (batch, tokens), device = whole.shape[:2], whole.device
    settings: Settings = base.longrope.settings
    ranks = ranks_of(settings.group)
    positions, padding = given.get("position_ids"), given.get("attention_mask")
    packed = False
    if positions is None:
        positions = torch.arange(past, past + tokens, device=device)[None]
    elif positions.shape[-1] != tokens:
        raise ValueError(
            f"position_ids: expected those of all {tokens} tokens on each rank, got "
            f"{tuple(positions.shape)}"
        )
    elif padding is None and not caches:  # transformers takes them for packed sequences
        packed = bool((positions.diff() != 1).any())
    if padding is not None:
        padding = padding.to(device, torch.bool)
    total = past + tokens
    mask = slots_of_mask(batch, tokens, total, past, 0, padding, not packed, device)
    if torch.is_grad_enabled():
        # The caller may write those of the next forward there before a backward pass.
        positions = positions.clone()
    spread = Spread(mask is not None, total, positions)
    # transformers hands a mask of four dimensions on as it is, and looks for nothing of its own.
    given["attention_mask"] = torch.zeros((1, 1, 1, 1), device=device) if mask is None else mask
    given["position_ids"] = positions
    held = held_in(caches[0], base, ranks, device, past) if caches else None
    step = is_step(caches, tokens)
    if not step and tokens < 2 * ranks.size:  # layers of transformers take no fewer than one token
        raise ValueError(f"{name}: expected at least two tokens a rank, got {tokens}")
    if held is not None:
        held.begin(tokens, whole=step)
        if step:
            given[ARGUMENT] = spread._replace(key_slots=held.slots)
            return given
    else:
        given["use_cache"] = False
    given[ARGUMENT] = spread
    given[name] = shard(whole, settings.group, order=settings.order)
    given["position_ids"] = shard(positions, settings.group, -1, order=settings.order)
    return given


def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What all ranks get of the whole.

    The logits of routers, of which a head makes a loss of its own; of a prompt in a cache the last
    token, from which the next one is chosen.
    """
    spread: Spread | None = kwargs.get(ARGUMENT)
    if spread is None or spread.key_slots is not None:
        return None
    settings: Settings = base.longrope.settings
    ranks = ranks_of(settings.group)
    routers = getattr(output, "router_logits", None)
    if routers:  # a tuple, which is empty where no layer has one
        slots = torch.arange(spread.total, device=spread.positions.device)
        own = shard(slots, settings.group, 0, order=settings.order)
        output.router_logits = tuple(_of_all(x, own, spread.total, ranks) for x in routers)
    if not caches_in(kwargs):
        return None
    last = output.last_hidden_state[None, :, -1:]
    owner = 0 if settings.order == "balanced" else -1
    output.last_hidden_state = gathered(ranks.ring, gathered(ranks.heads, last))[owner]
    return output


def _of_all(routed: torch.Tensor, own: torch.Tensor, total: int, ranks: Ranks) -> torch.Tensor:
    """The logits of a router, (batch * tokens, experts), of those of the tokens that are here."""
    here = routed.unflatten(0, (-1, len(own)))
    whole = here.new_zeros((here.shape[0], total, here.shape[2]))
    return whole_sum(whole.index_copy(1, own.to(here.device), here), ranks).flatten(0, 1)


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward."""
    names = inspect.signature(module.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


def caches_in(given: dict[str, Any]) -> list[Cache]:
    """Found by their type alone, as `before_attention` does."""
    return [x for x in given.values() if isinstance(x, Cache)]


def is_step(caches: list[Cache], tokens: int) -> bool:
    """Whether all ranks compute all tokens: a few in a cache, or some behind others there."""
    return bool(caches) and (tokens <= FEW_QUERIES or caches[0].get_seq_length() > 0)


def digest(name: str, x: torch.Tensor | None) -> object:
    """What ranks compare: the values where reading is free, else the shape."""
    if x is None:
        return None
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor or None with group=, got {type(x).__name__}")
    if not readable(x):
        return tuple(x.shape)
    return tuple(x.shape), zlib.crc32(x.detach().contiguous().view(torch.uint8).numpy().tobytes())


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    rope: Rope,
    settings: Settings,
    spread: Spread,
    rest: dict[str, Any],
) -> torch.Tensor:
    """Attention over the ranks: q, k and v (batch, tokens here, heads, dim), a `Call` of the whole.

    rest: softmax_scale, window, softcap and sets.
    """
    group = settings.group
    batch, tokens = q.shape[0], call.positions.shape[-1]
    if group is None:  # a trial of what layers do beside attention: a token reads itself alone
        return q + (k + v).repeat_interleave(q.shape[2] // k.shape[2], 2)
    if spread.key_slots is not None:
        if call.key_positions is not None and readable(call.key_positions):
            raise ValueError(
                "position_ids: expected those of the tokens in their order, from 0, behind a "
                "spread cache, got others"
            )
        lengths = call.lengths
        if tokens <= FEW_QUERIES and call.query_lengths is not None:
            lengths = call.query_lengths
        return _attend_step(q, k, v, call.kv_start, lengths, rope, settings, spread, rest)
    if call.cu_seqlens is not None:
        if batch > 1:
            raise ValueError(
                f"position_ids: expected packed sequences in one row with group=, got {batch} rows"
            )
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        rest = rest | {"layout": "thd", "cu_seqlens": call.cu_seqlens}
    out = attention(
        *(q, k, v, shard(call.positions, group, -1, order=settings.order), rope),
        group=group,
        tokens=tokens,
        order=settings.order,
        lengths=call.lengths,
        kv_start=call.kv_start,
        backend=settings.attention_backend,
        **rest,
    )
    assert isinstance(out, torch.Tensor)
    return out[None] if call.cu_seqlens is not None else out


def _attend_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_start: torch.Tensor | None,
    lengths: torch.Tensor | None,
    rope: Rope,
    settings: Settings,
    spread: Spread,
    rest: dict[str, Any],
) -> torch.Tensor:
    """All queries on each rank, as many at a time as `decode` takes."""
    batch, queries = q.shape[:2]
    slots = spread.key_slots
    assert slots is not None
    parts = []
    for at in range(0, queries, FEW_QUERIES):
        some = slice(at, min(at + FEW_QUERIES, queries))
        total = spread.total - (queries - some.stop)
        whole = q.new_full((batch,), total, dtype=torch.int64)
        of_some = lengths[:, some] if lengths is not None and lengths.dim() == 2 else lengths
        out = decode(
            *(q[:, some], k, v, (slots < total).sum().expand(batch), rope),
            key_slots=slots.expand(batch, -1),
            total_lens=whole,
            lengths=of_some,
            kv_start=kv_start,
            group=settings.group,
            backend=settings.decode_backend,
            **rest,
        )
        assert isinstance(out, torch.Tensor)
        parts.append(out)
    return torch.cat(parts, 1)
