"""The attention function of an enabled model: rotates, attends, and reads unrotated caches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...backends import choose
from ...calls.records import FEW_QUERIES, AttentionCall, Keys, Scores, Selection
from ...calls.values import readable
from ...ops.attention import attention as attend
from ...ops.decode import decode
from ...ops.rotary import apply_rotary
from ...rope.value import Rope
from ...torch_private import in_backward, requires_grad
from .masks import ANY_MASK, is_slots
from .ropes import still
from .sequences import MEMORY, Call, in_a_row
from .settings import Settings
from .spread import ARGUMENT as SPREAD
from .spread import Spread
from .spread import attend as attend_spread

NAME = "longrope"  # among transformers' attention implementations
# What some layers hand over that changes their scores, by name.
_MORE_SCORES = ("sinks", "position_bias", "attention_bias", "indices")
# What a base model is told for all its layers, some of which keep it from their attention.
_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "longrope_sets", SPREAD)


class Enabled(NamedTuple):
    """What `enable` leaves at a base model and its attention modules, as ``module.longrope``."""

    settings: Settings
    reads_window: bool = False  # of the config: layers do not hand theirs to this function


def longrope_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    longrope_sets: torch.Tensor | None = None,
    longrope_spread: Spread | None = None,
    output_attentions: bool = False,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer.

    Args:
        module: the attention module.
        query: (batch, heads, queries, dim), unrotated.
        key: (batch, kv_heads, slots, dim), unrotated, those of a cache.
        value: like key.
        attention_mask: what `masks.slots_of_mask` made.
        scaling: the softmax scale.
        dropout: must be 0.
        sliding_window: in tokens.
        softcap: of the scores.
        s_aux: (heads,), sinks: logits that join each softmax and have no value.
        position_ids: (1 or batch, queries).
        cu_seq_lens_q: (sequences + 1,) where packed sequences begin in all tokens of the batch,
            their count last; they win over the mask.
        cu_seq_lens_k: the same.
        longrope_sets: (batch,) int32, the factor set of each sequence whatever its length, as a
            search tries several ropes in one batch.
        longrope_spread: where a group of ranks shares a sequence; attention_mask and the borders
            are of the whole then, and so are the positions in it.
        output_attentions: must be False: the weights are never in memory.
        is_causal: must not be False; None: as the module says, if it does.
        others: what attention functions of transformers read; biases are refused, and sinks of
            each query.

    Returns:
        (batch, queries, heads, dim), and None for the weights.

    Raises:
        ValueError: naming the argument that is not served.
    """
    enabled = getattr(module, "longrope", None)
    if enabled is None:
        raise ValueError(
            f"module: expected a model that longrope_kernels' enable was called on, got a "
            f"{type(module).__name__} without, whose attention implementation is {NAME!r}; if it "
            "shares its config object with an enabled model, build it from a copy, and call its "
            "set_attn_implementation('sdpa') where the copy says the same"
        )
    if output_attentions:
        raise ValueError(
            "output_attentions: expected False, since fused attention has no weights to show; "
            "disable(model), and choose attn_implementation 'eager'"
        )
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise ValueError(
            f"is_causal: expected True, got False for {type(module).__name__}; disable(model), or "
            "enable(model, cache='rotated')"
        )
    for name in _MORE_SCORES:
        if others.get(name) is not None:
            raise ValueError(
                f"{name}: not served beside keys that lie unrotated; enable(model, cache='rotated')"
            )
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"value: {value.shape[-1]} dimensions of a head, where keys have {key.shape[-1]}, are "
            "not served beside keys that lie unrotated; enable(model, cache='rotated')"
        )
    if dropout:
        raise ValueError(
            f"attention_dropout: expected 0 in training, got {dropout}; set config."
            "attention_dropout = 0, or enable(model, cache='rotated')"
        )
    rope, positions, keywords = MEMORY.take()
    if keywords is not None:
        handed: Any = cu_seq_lens_q, cu_seq_lens_k, longrope_sets, longrope_spread
        cu_seq_lens_q, cu_seq_lens_k, longrope_sets, longrope_spread = (
            keywords.get(name) if one is None else one
            for name, one in zip(_KEYWORDS, handed, strict=True)
        )
    if longrope_spread is not None and not longrope_spread.masked:
        attention_mask = None
    if attention_mask is not None and not is_slots(attention_mask):
        raise ValueError(
            "attention_mask: expected the padding mask (batch, tokens), got an attention bias of "
            f"shape {tuple(attention_mask.shape)}, {attention_mask.dtype}; {ANY_MASK}"
        )
    if longrope_spread is not None:
        positions = longrope_spread.positions
    if positions is not None:
        position_ids = positions
    if position_ids is None:  # some layers keep them from their attention
        raise ValueError("position_ids: expected them from the decoder layer, got None")
    settings: Settings = enabled.settings
    rope = still(query.shape[-1]) if rope is None else rope
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if longrope_spread is not None:
        queries, keys = position_ids.shape[-1], longrope_spread.total
    else:
        check_positions(position_ids, batch, queries)
        _check_not_again(position_ids, queries, keys)
    if cu_seq_lens_q is not None:
        _check_borders(cu_seq_lens_q, cu_seq_lens_k, batch * queries)
    call = MEMORY.call(settings.chooses, position_ids, attention_mask, batch, keys, cu_seq_lens_q)
    rest: dict[str, Any] = {
        "softmax_scale": scaling,
        "window": _window(module, enabled, sliding_window),
        "softcap": softcap,
        "sets": longrope_sets,
    }
    q, k, v = (in_a_row(x).transpose(1, 2) for x in (query, key, value))
    if longrope_spread is not None:
        if s_aux is not None:
            raise ValueError("s_aux: not served over the ranks of a group; enable without group=")
        return attend_spread(q, k, v, call, rope, settings, longrope_spread, rest), None
    rest["sinks"] = s_aux
    differentiable = (x for x in (query, key, value, s_aux) if x is not None)
    recorded = torch.is_grad_enabled() and any(map(requires_grad, differentiable))
    few = queries <= FEW_QUERIES
    if call.cache_lens is not None and not recorded and (few or _decodes_chunks(settings, q)):
        out: Any = decode(
            *(q, k, v, call.cache_lens, rope),
            lengths=call.query_lengths if few else call.lengths,
            kv_start=call.kv_start,
            key_positions=call.key_positions,
            backend=settings.decode_backend,
            **rest,
        )
        return out.contiguous(), None
    if call.cache_lens is not None and call.filled is None:
        return _attend_to_mask(q, k, v, call, rope, rest).contiguous(), None
    k, v = k[:, : call.filled], v[:, : call.filled]
    if call.cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        rest |= {"layout": "thd", "cu_seqlens": call.cu_seqlens}
    elif call.cache_lens is not None:
        rest["key_positions"] = _key_positions(call, k)
    backend = settings.attention_backend
    if backend is None and module.training and q.device.type == "cpu" and q.dtype != torch.float64:
        # What a checkpoint reads without gradients, it reads again with them: by the same backend.
        backend = "composed" if rest["softcap"] is None else "reference"
    rest |= {"kv_start": call.kv_start, "backend": backend}
    each = call.query_lengths
    if each is not None and 1 < queries <= FEW_QUERIES and longrope_sets is None:
        # As `decode` does, which has no gradient: each by the set of its own length.
        key_positions, outs = rest.pop("key_positions"), []
        for i, end in enumerate(range(k.shape[1] - queries + 1, k.shape[1] + 1)):
            out = attend(
                *(q[:, i : i + 1], k[:, :end], v[:, :end], call.positions[:, i : i + 1], rope),
                lengths=each[:, i],
                key_positions=key_positions[:, :end],
                **rest,
            )
            outs.append(out)
        return torch.cat(outs, 1), None
    out = attend(*(q, k, v, call.positions, rope), lengths=call.lengths, **rest)
    if call.cu_seqlens is not None:
        out = out.unflatten(0, (batch, queries))
    return out.contiguous(), None  # as transformers' own do, which some layers take a view of


def before_base(base: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a base model: its attention hears what layers may not hand on."""
    MEMORY.tell({name: kwargs[name] for name in _KEYWORDS if name in kwargs} or None)


def _decodes_chunks(settings: Settings, q: torch.Tensor) -> bool:
    """Whether a chunk goes through `native`: a short one, or where that serves whole prompts."""
    if settings.backend is not None or q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if q.shape[1] <= choose.SHORT_CHUNK and q.dtype == torch.float32 and choose.wide_vectors():
        return True
    kind = q.device.type, q.dtype, q.shape[-1], "plain"
    maker = choose.capability_of(q.device)
    return choose.choose_attention(None, *kind, capability=maker, own=True) == "native"


def _window(module: Any, enabled: Enabled, handed_on: int | None) -> int | None:
    """That of the config, read in each forward as transformers' masks do."""
    said = getattr(module.config, "sliding_window", handed_on)
    if handed_on is None:
        return said if enabled.reads_window else None
    if handed_on != said:
        raise ValueError(
            f"sliding_window: expected {handed_on} in the config, by which "
            f"{type(module).__name__} was made, got {said}; change it before the model is made, "
            "or enable(model, cache='rotated')"
        )
    return handed_on


def check_positions(positions: torch.Tensor, batch: int, queries: int) -> None:
    """Raise a ValueError where they are not of these tokens."""
    shape = positions.shape
    # "in" is false of traced sizes
    if not (shape == (batch, queries) or shape == (1, queries)):
        raise ValueError(
            f"position_ids: expected shape ({batch}, {queries}) or (1, {queries}), "
            f"got {tuple(shape)}"
        )


def _check_not_again(positions: torch.Tensor, queries: int, keys: int) -> None:
    if keys > queries and in_backward() and int(positions.max()) + 1 < keys:
        raise ValueError(
            "past_key_values: expected None where a checkpoint runs layers again in the backward "
            f"pass, got a cache of {keys} keys that this has written to a second time; call the "
            "model with use_cache=False"
        )


def _check_borders(borders: torch.Tensor, of_keys: torch.Tensor | None, tokens: int) -> None:
    if borders.dim() != 1:
        raise ValueError(
            f"cu_seq_lens_q: expected shape (sequences + 1,), got {tuple(borders.shape)}"
        )
    if readable(borders) and int(borders[-1]) != tokens:
        raise ValueError(
            f"cu_seq_lens_q: expected {tokens} last, the tokens of the batch, "
            f"got {int(borders[-1])}"
        )
    if of_keys is not None and of_keys is not borders:
        same = of_keys.shape == borders.shape
        if not same or (readable(of_keys) and not torch.equal(of_keys, borders)):
            raise ValueError(
                "cu_seq_lens_k: expected the borders of cu_seq_lens_q, got others; packed "
                "sequences are whole ones"
            )


def _attend_to_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    rope: Rope,
    rest: dict[str, Any],
) -> torch.Tensor:
    """A chunk against a cache of which a graph does not know how much is filled: all slots."""
    from ...backends import composed

    if rest["softcap"] is not None:
        raise ValueError("softcap: not served in a compiled prefill of a static cache")
    chosen = {"lengths": call.lengths, "sets": rest["sets"]}
    q, _ = apply_rotary(q, None, call.positions, rope, **chosen)
    k, _ = apply_rotary(k, None, _key_positions(call, k), rope, **chosen)
    scale = q.shape[-1] ** -0.5 if rest["softmax_scale"] is None else rest["softmax_scale"]
    keys = Keys(k, v, start=call.kv_start, lens=call.cache_lens)
    scores, tables = Scores(True, scale, rest["window"] or 0), rope.tables(q.device)
    return composed.attend(
        AttentionCall(q, call.positions, keys, tables, Selection(), scores, rest["sinks"])
    )


def _key_positions(call: Call, k: torch.Tensor) -> torch.Tensor:
    """(batch, slots) of a cache's keys."""
    if call.key_positions is not None:
        return call.key_positions[:, : k.shape[1]]
    positions = torch.arange(k.shape[1], device=k.device).expand(k.shape[0], -1)
    return positions if call.kv_start is None else positions - call.kv_start[:, None]
