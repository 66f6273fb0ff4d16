"""The attention function of an enabled model: rotates, attends, and reads unrotated caches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...calls import masks
from ...calls.values import readable
from ...ops import attention as attend
from ...ops import decode
from ...ops.decode import MAX_QUERIES
from ...ops.rotary import apply_rotary
from .masks import ANY_MASK, is_slots
from .settings import Settings

NAME = "longrope"  # among transformers' attention implementations


class Call(NamedTuple):
    """What all layers of a forward have in common; B sequences, N slots of the cache."""

    positions: torch.Tensor  # (1 or B, queries)
    key_positions: torch.Tensor | None  # (B, N); None: those of the queries, or j - kv_start
    lengths: torch.Tensor | None  # (B,), what chooses the set
    kv_start: torch.Tensor | None  # (B,)
    cache_lens: torch.Tensor | None  # (B,), the slots that are filled; None: the keys are queries
    filled: int | None  # the same as a number, alike for all rows; None: not known to the host


def call_of(
    settings: Settings,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    batch: int,
    keys: int,
) -> Call:
    """Derive a `Call`. Tokens of a sequence stand side by side in its slots.

    positions: (1 or B, queries), of any values where there is padding. slots: of
    `masks.slots_of_mask`. keys: N.
    """
    queries = positions.shape[1]
    if slots is None and queries == keys:
        lengths = last_positions(positions, None, batch) + 1 if settings.chooses else None
        return Call(positions, None, lengths, None, None, keys)
    start = behind = None
    end: torch.Tensor | int = keys
    filled = torch.full((batch,), keys, dtype=torch.int64, device=positions.device)
    if slots is not None:
        start, end, filled = slots[:, 0, 0].unbind(1)
        behind = filled - end
    last = last_positions(positions, behind, batch)
    lengths = (last + 1).clamp(min=0) if settings.chooses else None
    if queries == keys:
        return Call(positions, None, lengths, start, None, keys)
    count: int | None = None
    if slots is None:
        count = keys
    elif queries > MAX_QUERIES and not torch.compiler.is_compiling():
        count = int(filled[0])  # on a device this waits for it, once in a long chunk
    shift = last + 1 - end
    key_positions = None
    if not (readable(shift) and bool((shift == (0 if start is None else -start)).all())):
        key_positions = shift[:, None] + torch.arange(keys, device=positions.device)
    return Call(positions, key_positions, lengths, start, filled, count)


def last_positions(
    positions: torch.Tensor, behind: torch.Tensor | None, batch: int
) -> torch.Tensor:
    """The position of the last real token of each sequence: (batch,) int64.

    positions: (1 or batch, queries). behind: (batch,), how many slots of padding follow it, which
    may be more than there are queries.
    """
    if behind is None:
        return positions[:, -1].expand(batch)
    query = positions.shape[1] - 1 - behind
    at = query.clamp(min=0)[:, None]
    return positions.expand(batch, -1).gather(1, at)[:, 0] + query.clamp(max=0)


class Memory:
    """The `Call` of the forward that is going on, derived once for all layers of a kind."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin a new forward: its positions may lie in the tensor of the last one."""
        self._held: tuple[Any, list[tuple[Any, int, int, Call]]] = (None, [])

    def call(
        self,
        settings: Settings,
        positions: torch.Tensor,
        slots: torch.Tensor | None,
        batch: int,
        keys: int,
    ) -> Call:
        """As `call_of`."""
        # A traced graph finds by itself what repeats, and must not leave its tensors here.
        if torch.compiler.is_compiling():
            return call_of(settings, positions, slots, batch, keys)
        of, calls = self._held
        if of is not positions:
            calls = []
            self._held = positions, calls
        for its_slots, its_batch, its_keys, call in calls:
            if its_slots is slots and (its_batch, its_keys) == (batch, keys):
                return call
        call = call_of(settings, positions, slots, batch, keys)
        calls.append((slots, batch, keys, call))
        return call

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()  # a copy of a model is not in the middle of a forward


class Enabled(NamedTuple):
    """What `enable` leaves at a base model and its attention modules, as ``module.longrope``."""

    settings: Settings
    memory: Memory
    window: int | None = None  # of layers that do not hand theirs to the attention function


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
    position_ids: torch.Tensor | None = None,
    longrope_sets: torch.Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
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
        position_ids: (1 or batch, queries).
        longrope_sets: (batch,) int32, the factor sets of policy "pin".
        output_attentions: must be False: the weights are never in memory.

    Returns:
        (batch, queries, heads, dim), and None for the weights.

    Raises:
        ValueError: naming the argument that is not served.
    """
    enabled = getattr(module, "longrope", None)
    if enabled is None:
        raise ValueError(
            f"module: expected a model that longrope_kernels' enable was called on, got a "
            f"{type(module).__name__} without; its attention implementation {NAME!r} is of no use"
        )
    if output_attentions:
        raise ValueError(
            "output_attentions: expected False, since fused attention has no weights to show; "
            "disable(model), and choose attn_implementation 'eager'"
        )
    if dropout:
        raise ValueError(
            f"attention_dropout: expected 0 in training, got {dropout}; set config."
            "attention_dropout = 0, or enable(model, cache='rotated')"
        )
    if attention_mask is not None and not is_slots(attention_mask):
        raise ValueError(
            "attention_mask: expected the padding mask (batch, tokens), got an attention bias of "
            f"shape {tuple(attention_mask.shape)}, {attention_mask.dtype}; {ANY_MASK}"
        )
    if position_ids is None:
        raise ValueError("position_ids: expected them from the decoder layer, got None")
    settings: Settings = enabled.settings
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    call = enabled.memory.call(settings, position_ids, attention_mask, batch, keys)
    selection = {"lengths": call.lengths if longrope_sets is None else None, "sets": longrope_sets}
    rest = {
        **selection,
        "kv_start": call.kv_start,
        "softmax_scale": scaling,
        "window": enabled.window if sliding_window is None else sliding_window,
        "softcap": softcap,
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    out: Any
    if call.cache_lens is not None and queries <= MAX_QUERIES and not recorded:
        out = decode(
            q,
            k,
            v,
            call.cache_lens,
            settings.rope,
            key_positions=call.key_positions,
            backend=settings.decode_backend,
            **rest,
        )
    elif call.cache_lens is None:
        out = attend(
            q, k, v, call.positions, settings.rope, backend=settings.attention_backend, **rest
        )
    else:
        out = _attend_to_cache(q, k, v, call, settings, rest)
    return out, None


def _attend_to_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    settings: Settings,
    rest: dict[str, Any],
) -> torch.Tensor:
    """A long chunk of queries against a cache, of which a static one may be filled in part."""
    assert call.cache_lens is not None
    positions = call.key_positions
    if positions is None:
        positions = torch.arange(k.shape[1], device=q.device).expand(q.shape[0], -1)
        if call.kv_start is not None:
            positions = positions - call.kv_start[:, None]
    if call.filled is not None:
        filled = call.filled
        out = attend(
            q,
            k[:, :filled],
            v[:, :filled],
            call.positions,
            settings.rope,
            key_positions=positions[:, :filled],
            backend=settings.attention_backend,
            **rest,
        )
        assert isinstance(out, torch.Tensor)
        return out
    # How much is filled is not known to a graph: a mask in memory over all slots.
    from ...backends import composed

    if rest["softcap"] is not None:
        raise ValueError("softcap: not served in a compiled prefill of a static cache")
    chosen = {"lengths": rest["lengths"], "sets": rest["sets"]}
    q, _ = apply_rotary(q, None, call.positions, settings.rope, **chosen)
    k, _ = apply_rotary(k, None, positions, settings.rope, **chosen)
    mask = masks.Mask(True, rest["window"], call.kv_start, cache_lens=call.cache_lens)
    scale = q.shape[-1] ** -0.5 if rest["softmax_scale"] is None else rest["softmax_scale"]
    return composed.attend(q, k, v, mask, scale)
