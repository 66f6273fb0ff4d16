"""Attention composed of our rotation, made before, and torch's scaled_dot_product_attention."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from ..calls.records import AttentionCall, Keys, Selection


def attend(call: AttentionCall) -> torch.Tensor:
    """Softmax attention of q and k that are rotated already.

    Returns:
        (B, Sq, Hq, D) of the dtype of q. A query that sees no key gets 0.

    Where there are sinks, torch gets one more token before all others: see `_with_sinks`.
    """
    borders, borders_k = call.selection.borders, call.keys.borders
    if borders is None or borders_k is None:
        return _dense(call)
    if borders.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading the borders would wait for the device: one mask over all tokens instead.
        return _masked(call)
    begins, begins_k = borders.tolist(), borders_k.tolist()
    parts = []
    for i in range(len(begins) - 1):
        queries, slots = slice(begins[i], begins[i + 1]), slice(begins_k[i], begins_k[i + 1])
        start = None if call.keys.start is None else call.keys.start[i : i + 1]
        keys = Keys(call.keys.k[:, slots], call.keys.v[:, slots], start=start)
        parts.append(_dense(call._replace(q=call.q[:, queries], keys=keys, selection=Selection())))
    return torch.cat(parts, dim=1)


def _dense(call: AttentionCall) -> torch.Tensor:
    """The call that lets torch take its fastest kernel; a mask in memory only where none fits."""
    queries, slots = call.q.shape[1], call.keys.k.shape[1]
    plain = not call.scores.window and call.keys.start is None and call.keys.lens is None
    if plain and not call.scores.causal:
        return _sdpa(call)
    if plain and queries == slots:
        return _sdpa(call, is_causal=True)
    if plain and queries < slots and not torch.compiler.is_compiling():  # a graph break
        first = int(call.sinks is not None)
        return _sdpa(call, causal_lower_right(queries + first, slots + first))
    return _masked(call)


def _masked(call: AttentionCall) -> torch.Tensor:
    mask = call.visible()[:, None]
    return _sdpa(call, mask if call.sinks is None else F.pad(mask, (1, 0, 1, 0), value=True))


def _sdpa(
    call: AttentionCall, attn_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.keys.k, call.keys.v))
    if call.sinks is not None:
        q, k, v = _with_sinks(q, k, v, call.sinks, call.scores.scale)
    if k.shape[2] == 0:  # nothing to see; torch gives NaN. The empty sums keep the gradients.
        out = torch.zeros_like(q) + (q[..., :0].sum() + k.sum() + v.sum())
    else:
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=call.scores.scale,
            # Constants, also where a graph is traced with dynamic sizes: torch wants a plain bool.
            enable_gqa=operator.index(q.shape[1]) != operator.index(k.shape[1]),
        )
    if call.sinks is not None:
        out = out[:, :, 1:, : call.q.shape[3]]
    return out.transpose(1, 2)


def _with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """q, k and v (B, H, S, D) with a first token, whose key scores the sinks and has a value of 0.

    The scores come from two of 8 more dimensions, as many as keep rows aligned: the sink of each
    head in q, rounded, and the rest of it, against a power of two in that key and 0 in all others.
    The first query is nobody's; it keeps as many queries before all keys as there were.
    """
    power = 2.0 ** min(max(-round(math.log2(scale)), -15), 15)  # float16 has no larger one
    # An infinite one would make NaN of the 0 in other keys, as one that float16 has not.
    sink = (sinks.float() / (scale * power)).clamp(-3e4, 3e4)
    sink = sink[None, :, None].expand(*q.shape[:2], q.shape[2] + 1)
    rounded = sink.to(q.dtype)
    of_q = torch.stack((rounded, (sink - rounded).to(q.dtype)), -1)
    of_k = F.pad(k.new_full((*k.shape[:2], 1, 2), power), (0, 0, 0, k.shape[2]))
    q, k = (
        torch.cat((F.pad(x, (0, 0, 1, 0)), F.pad(more, (0, 6))), -1)
        for x, more in ((q, of_q), (k, of_k))
    )
    return q, k, F.pad(v, (0, 8, 1, 0))
