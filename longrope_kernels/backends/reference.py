"""The specification in PyTorch: the formula of the paper, with float64 angles, and its gradient.

Everything else in this package is tested against this file. It uses no kernel and no custom op, so
PyTorch differentiates it by itself, to any order. Devices without float64 (Apple's) take the steps
of the phase accumulator for the same angles.
"""

from __future__ import annotations

import math

import torch

from ..calls.caches import FLOAT8
from ..calls.masks import sequence_of_token
from ..calls.records import AppendCall, AttentionCall, DecodeCall, Keys, RotaryCall, Selection
from ..rope.tables import Tables, sets_of_lengths


def dtype_of_sums(x: torch.Tensor) -> torch.dtype:
    """What attention of such tensors is worked out in, here and wherever this is what it equals."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def token_sets(tables: Tables, selection: Selection, positions: torch.Tensor) -> torch.Tensor:
    """The factor set of each token: (B, S) int64.

    A sequence takes ``sets`` where given, else the set of its length, else the first. Packed tokens
    (B = 1) find their sequence by its borders.
    """
    batch, seq = positions.shape
    if selection.sets is not None:
        of_sequence = selection.sets.long().clamp(0, tables.max_length.shape[0] - 1)
    elif selection.lengths is not None:
        of_sequence = sets_of_lengths(selection.lengths, tables.max_length)
    else:
        return torch.zeros((batch, seq), dtype=torch.int64, device=positions.device)
    if selection.borders is None:
        return of_sequence[:, None].expand(batch, seq)
    return of_sequence[sequence_of_token(selection.borders, seq)][None, :]


def query_sets(tables: Tables, selection: Selection, tokens: torch.Tensor) -> torch.Tensor:
    """The factor set of each query of `decode`: (B, q_len) int64, or (B, 1) for all of a sequence.

    ``sets`` (B,) or ``lengths`` (B,) where given serve all queries of a sequence, ``lengths``
    (B, q_len) one each. Without either, a query takes the set of ``tokens`` (B, q_len), those that
    the sequence had with this query and none after it.
    """
    if tables.max_length.shape[0] == 1:
        return torch.zeros_like(tokens[:, :1])
    if selection.sets is not None:
        return selection.sets.long().clamp(0, tables.max_length.shape[0] - 1)[:, None]
    lengths = tokens if selection.lengths is None else selection.lengths
    return sets_of_lengths(lengths if lengths.dim() == 2 else lengths[:, None], tables.max_length)


def cos_sin(
    tables: Tables, selection: Selection, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``a cos(angle)`` and ``a sin(angle)`` of each token and pair: two (B, S, P) float64.

    float32 on a device without float64; the angle is within 3e-7 then.
    """
    token_set = token_sets(tables, selection, positions)
    n = positions.long()
    n_hat = tables.n_hat[token_set]
    original = (n_hat > 0) & (n < n_hat)
    row = (~original).long()
    if tables.inv_freq.dtype == torch.float64:
        angle = n[..., None].double() * tables.inv_freq[token_set, row]
    else:  # turns, of which the product keeps the fraction, in units of 2**-64
        phase = n[..., None] * tables.steps[token_set, row]
        angle = (phase >> 32).to(torch.float32) * (2 * math.pi / 2**32)
    a = torch.where(original, 1.0, tables.attention_factor[token_set])[..., None]
    return a * angle.cos(), a * angle.sin()


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate the first 2P dimensions of x (B, S, H, D) by cos and sin (B, S, P), in their dtype."""
    pairs = cos.shape[-1]
    rotated, rest = x[..., : 2 * pairs].to(cos.dtype), x[..., 2 * pairs :]
    if interleaved:
        x_i, x_j = rotated[..., 0::2], rotated[..., 1::2]
    else:
        x_i, x_j = rotated[..., :pairs], rotated[..., pairs:]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    y_i, y_j = x_i * cos - x_j * sin, x_i * sin + x_j * cos
    y = torch.stack((y_i, y_j), -1).flatten(-2) if interleaved else torch.cat((y_i, y_j), -1)
    return torch.cat((y.to(x.dtype), rest), -1)


def rotary(call: RotaryCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k of any floating dtype, into two new tensors.

    float64 inputs are rotated in float64, all others in float32.
    """
    q, k, positions, tables, selection, conjugate = call
    cos, sin = cos_sin(tables, selection, positions)
    if conjugate:
        sin = -sin
    if q.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    return rotate(q, cos, sin, tables.interleaved), rotate(k, cos, sin, tables.interleaved)


def attention(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, then exact softmax attention; the scores of all pairs lie in memory.

    Returns:
        out (B, Sq, Hq, D) of the dtype of q, and the log-sum-exp of the scores, base e,
        (B, Hq, Sq) float32 (float64 for float64). A query that sees no key gets 0, and -inf or its
        sink.
    """
    q, positions, keys, tables, selection, how, sinks = call
    assert keys.positions is not None
    compute = dtype_of_sums(q)
    of_keys = selection._replace(borders=keys.borders)
    visible = call.visible()
    # Where nobody looks there may be anything, and 0 times NaN is NaN.
    seen = visible.any(1)[:, :, None, None]
    k, v = (torch.where(seen, x.to(compute), 0.0) for x in (keys.k, keys.v))
    turned = []
    for x, n, chosen in ((q, positions, selection), (k, keys.positions, of_keys)):
        cos, sin = (t.to(compute) for t in cos_sin(tables, chosen, n))
        turned.append(rotate(x.to(compute), cos, sin, tables.interleaved).transpose(1, 2))
    q_rot, k_rot = turned[0], turned[1].repeat_interleave(call.groups, dim=1)
    values = v.transpose(1, 2).repeat_interleave(call.groups, dim=1)

    scores = q_rot @ k_rot.transpose(-1, -2) * how.scale
    if how.cap:
        scores = how.cap * torch.tanh(scores / how.cap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    # Finite stand-ins keep rows that see nothing out of NaN, in the gradient too. The column of
    # -inf is for no keys at all.
    top = torch.nn.functional.pad(scores.detach(), (0, 1), value=-torch.inf).amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(compute)[:, None, None]
        top = torch.maximum(top, sinks.detach())
    top = torch.where(top.isfinite(), top, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:  # one more weight, of a value of 0
        total = total + torch.exp(sinks - top)
    none = total == 0  # which NaN is not
    total = torch.where(none, 1.0, total)
    out = (weights / total) @ values
    lse = torch.where(none, -torch.inf, total.log() + top).squeeze(-1)
    return out.transpose(1, 2).to(q.dtype), lse


def append(call: AppendCall) -> None:
    """Write new keys and values into a cache, those for a float8 one divided by its scales."""
    k, v, cache, _ = call
    if k.numel() == 0 or cache.empty:
        return
    # A token that is dropped stands for one that is not, and where all are, for what is there:
    # nobody waits for a device to say which.
    address = call.addresses().flatten()
    kept = address >= 0
    source = torch.where(kept, torch.arange(len(kept), device=kept.device), kept.int().argmax())
    address = address[source].clamp(min=0)
    slots = cache.k.shape[1]
    places = address // slots, address % slots
    for x, stored, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        new = (quantised(x, scale) if stored.dtype == FLOAT8 else x).flatten(0, 1)[source]
        old = as_bytes(stored)[places]
        as_bytes(stored).index_put_(places, torch.where(kept.any(), as_bytes(new), old))


def quantised(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x (..., heads, dim) over the scale of each head, clamped to 448, rounded to float8."""
    x = x.float() if scale is None else x.float() / scale[:, None]
    # Beyond the largest float8 number older torch casts to NaN.
    bound = torch.finfo(FLOAT8).max
    return x.clamp(-bound, bound).to(FLOAT8)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A float8 tensor as uint8, which has all operations that move data; others as they are."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x


def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and all keys of a cache, then exact softmax attention to those that are there.

    Each query meets keys that are rotated by its own factor set.

    Returns:
        out (B, q_len, Hq, D) of the dtype of q, and the log-sum-exp of the scores, base e,
        (B, Hq, q_len) float32 (float64 for float64). A query that sees no key gets 0, and -inf or
        its sink.
    """
    q, cache, tables, selection, scores, sinks = call
    lens, start = cache.lens, cache.start
    assert lens is not None
    batch, queries = q.shape[:2]
    compute = dtype_of_sums(q)
    block_table = cache.block_table
    if block_table is not None and not cache.k.shape[0]:
        block_table = block_table[:, :0]  # no blocks, and none that an entry could mean
    caches = []
    for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        if block_table is not None:
            blocks = x[block_table.long().clamp(0, max(x.shape[0] - 1, 0))]
            x = blocks.flatten(1, 2)
        x = x.to(compute)
        if scale is not None:
            x = x * scale.to(compute)[:, None]
        caches.append(x)
    k, v = caches

    slot = lens[:, None].long() - queries + torch.arange(queries, device=q.device)
    first = 0 if start is None else start[:, None]
    if cache.positions is None:
        positions = slot - first
        key_positions = torch.arange(k.shape[1], device=q.device).expand(batch, -1) - first
    else:
        # A query before the first slot sees nothing; any position serves it, also where none is.
        key_positions = torch.nn.functional.pad(cache.positions, (0, 1))
        positions = key_positions.gather(1, slot.clamp(min=0))
        missing = k.shape[1] - key_positions.shape[1]
        key_positions = torch.nn.functional.pad(key_positions, (0, missing))
    keys = Keys(k, v, key_positions, start, lens=lens)
    chosen = query_sets(tables, selection, (slot + 1 - first).clamp(min=0))
    if chosen.shape[1] == 1:
        passes = [chosen[:, 0]]
    else:  # all queries under every set, of which each keeps its own
        passes = [torch.full_like(chosen[:, 0], i) for i in range(tables.max_length.shape[0])]
    out = torch.zeros_like(q, dtype=compute)
    lse = out.new_zeros(batch, q.shape[2], queries)
    for sets in passes:
        pinned = Selection(sets=sets)
        out_one, lse_one = attention(
            AttentionCall(q.to(compute), positions, keys, tables, pinned, scores, sinks)
        )
        own = chosen == sets[:, None]
        out = torch.where(own[:, :, None, None], out_one, out)
        lse = torch.where(own[:, None, :], lse_one, lse)
    return out.to(q.dtype), lse
