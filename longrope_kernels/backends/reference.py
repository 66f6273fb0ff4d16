"""The specification in PyTorch: the formula of the paper, with float64 angles, and its gradient.

Everything else in this package is tested against this file. It uses no kernel, no custom op and
no phase accumulator, so PyTorch differentiates it by itself, to any order.
"""

from __future__ import annotations

import torch

from .. import masks
from ..calls import CacheTensors, Rotation, Scoring
from ..rope import sets_of_lengths


def token_sets(
    rotation: Rotation, positions: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The factor set of each token: (B, S) int64.

    A sequence takes ``sets`` where given, else the set of its length, else the first. Packed tokens
    (B = 1) find their sequence in ``cu_seqlens``.
    """
    batch, seq = positions.shape
    if rotation.sets is not None:
        of_sequence = rotation.sets.long().clamp(0, rotation.max_length.shape[0] - 1)
    elif rotation.lengths is not None:
        of_sequence = sets_of_lengths(rotation.lengths, rotation.max_length)
    else:
        return torch.zeros((batch, seq), dtype=torch.int64, device=positions.device)
    if cu_seqlens is None:
        return of_sequence[:, None].expand(batch, seq)
    return of_sequence[masks.sequence_of_token(cu_seqlens, seq)][None, :]


def query_sets(rotation: Rotation, tokens: torch.Tensor) -> torch.Tensor:
    """The factor set of each query of `decode`: (B, q_len) int64, or (B, 1) for all of a sequence.

    ``sets`` (B,) or ``lengths`` (B,) where given serve all queries of a sequence, ``lengths``
    (B, q_len) one each. Without either, a query takes the set of ``tokens`` (B, q_len), those that
    the sequence had with this query and none after it.
    """
    count = rotation.max_length.shape[0]
    if count == 1:
        return torch.zeros_like(tokens[:, :1])
    if rotation.sets is not None:
        return rotation.sets.long().clamp(0, count - 1)[:, None]
    lengths = tokens if rotation.lengths is None else rotation.lengths
    if lengths.dim() == 1:
        lengths = lengths[:, None]
    return sets_of_lengths(lengths.flatten(), rotation.max_length).view(lengths.shape)


def cos_sin(
    rotation: Rotation, positions: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``a cos(angle)`` and ``a sin(angle)`` of each token and pair: two (B, S, P) float64."""
    assert rotation.inv_freq is not None
    token_set = token_sets(rotation, positions, cu_seqlens)
    n = positions.long()
    n_hat = rotation.n_hat[token_set]
    original = (n_hat > 0) & (n < n_hat)
    angle = n[..., None].double() * rotation.inv_freq[token_set, (~original).long()]
    a = torch.where(original, 1.0, rotation.attention_factor[token_set])[..., None]
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


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k.

    Args:
        q, k: (B, S, Hq, D) and (B, S, Hk, D), any floating dtype.
        positions: (B, S) int32 or int64.
        rotation: how each sequence is rotated; its ``inv_freq`` is read, the steps are not.
        cu_seqlens: (sequences + 1,) or None; with it B = 1 and S counts all tokens.

    Returns:
        Two new tensors. float64 inputs are rotated in float64, all others in float32.
    """
    cos, sin = cos_sin(rotation, positions, cu_seqlens)
    if q.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    return rotate(q, cos, sin, rotation.interleaved), rotate(k, cos, sin, rotation.interleaved)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, then exact softmax attention; the scores of all pairs lie in memory.

    Args:
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, D); Hq a multiple of Hk.
        scoring: how queries score keys.

    Returns:
        out (B, Sq, Hq, D) of the dtype of q, and the log-sum-exp of the scores, base e,
        (B, Hq, Sq) float32 (float64 for float64). A query that sees no key gets 0 and -inf.
    """
    positions, key_positions, rotation, mask, softmax_scale, softcap = scoring
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    turned = []
    for x, n, borders in ((q, positions, mask.cu_seqlens), (k, key_positions, mask.cu_seqlens_k)):
        cos, sin = (t.to(compute) for t in cos_sin(rotation, n, borders))
        turned.append(rotate(x.to(compute), cos, sin, rotation.interleaved).transpose(1, 2))
    groups = q.shape[2] // k.shape[2]
    q_rot, k_rot = turned[0], turned[1].repeat_interleave(groups, dim=1)
    values = v.to(compute).transpose(1, 2).repeat_interleave(groups, dim=1)

    scores = q_rot @ k_rot.transpose(-1, -2) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    seen = mask.visible(q.shape[0], q.shape[1], k.shape[1], q.device)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    # Finite stand-ins keep rows that see nothing out of NaN, in the gradient too. The column of
    # -inf is for no keys at all.
    top = torch.nn.functional.pad(scores.detach(), (0, 1), value=-torch.inf).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    some = total > 0
    total = torch.where(some, total, 1.0)
    out = (weights / total) @ values
    lse = torch.where(some, total.log() + top, -torch.inf).squeeze(-1)
    return out.transpose(1, 2).to(q.dtype), lse


def decode(
    q: torch.Tensor,
    cache: CacheTensors,
    rotation: Rotation,
    softmax_scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and all keys of a cache, then exact softmax attention to those that are there.

    Each query meets keys that are rotated by its own factor set.

    Args:
        q: (B, q_len, Hq, D).
        cache: its tensors.
        rotation: as in `rotary`; ``lengths`` may be of queries, see `query_sets`.
        softmax_scale: multiplies the scores.
        window: how many slots back a query sees; 0 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0.0 for none.

    Returns:
        As `attention`.
    """
    batch, queries = q.shape[:2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    block_table, kv_start = cache.block_table, cache.kv_start
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
        # Slots that hold no key may hold anything, and 0 times NaN is NaN.
        exists = torch.arange(x.shape[1], device=x.device) < cache.lens[:, None]
        caches.append(torch.where(exists[:, :, None, None], x, 0.0))
    k, v = caches

    slot = cache.lens[:, None].long() - queries + torch.arange(queries, device=q.device)
    if cache.key_positions is None:
        start = 0 if kv_start is None else kv_start[:, None]
        positions = slot - start
        key_positions = torch.arange(k.shape[1], device=q.device).expand(batch, -1) - start
    else:
        # A query before the first slot sees nothing; any position serves it, also where none is.
        key_positions = torch.nn.functional.pad(cache.key_positions, (0, 1))
        positions = key_positions.gather(1, slot.clamp(min=0))
        missing = k.shape[1] - key_positions.shape[1]
        key_positions = torch.nn.functional.pad(key_positions, (0, missing))
    mask = masks.Mask(True, window or None, kv_start, cache_lens=cache.lens)
    scoring = Scoring(positions, key_positions, rotation, mask, softmax_scale, softcap)
    start = 0 if kv_start is None else kv_start[:, None]
    chosen = query_sets(rotation, (slot + 1 - start).clamp(min=0))
    if chosen.shape[1] == 1:
        passes = [chosen[:, 0]]
    else:  # all queries under every set, of which each keeps its own
        passes = [torch.full_like(chosen[:, 0], i) for i in range(rotation.max_length.shape[0])]
    out = torch.zeros_like(q, dtype=compute)
    lse = out.new_zeros(batch, q.shape[2], queries)
    for sets in passes:
        pinned = scoring._replace(rotation=rotation._replace(lengths=None, sets=sets))
        out_one, lse_one = attention(q.to(compute), k, v, pinned)
        own = chosen == sets[:, None]
        out = torch.where(own[:, :, None, None], out_one, out)
        lse = torch.where(own[:, None, :], lse_one, lse)
    return out.to(q.dtype), lse
