"""The specification in PyTorch: the formula of the paper, with float64 angles, and its gradient.

Everything else in this package is tested against this file. It uses no kernel, no custom op and
no phase accumulator, so PyTorch differentiates it by itself, to any order.
"""

from __future__ import annotations

import torch

from .. import masks
from ..rope import RopeTables


def token_sets(
    tables: RopeTables,
    positions: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """The factor set of each token: (B, S) int64.

    A sequence takes ``sets`` where given, else the first set whose ``max_length`` is not below its
    length, else the last. Packed tokens (B = 1) find their sequence in ``cu_seqlens``.
    """
    batch, seq = positions.shape
    count = tables.max_length.shape[0]
    if sets is not None:
        of_sequence = sets.long().clamp(0, count - 1)
    elif lengths is not None:
        too_long = lengths.long()[:, None] > tables.max_length[None, :]
        of_sequence = too_long.sum(dim=1).clamp(max=count - 1)
    else:
        return torch.zeros((batch, seq), dtype=torch.int64, device=positions.device)
    if cu_seqlens is None:
        return of_sequence[:, None].expand(batch, seq)
    return of_sequence[masks.sequence_of_token(cu_seqlens, seq)][None, :]


def cos_sin(
    tables: RopeTables,
    positions: torch.Tensor,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``a cos(angle)`` and ``a sin(angle)`` of each token and pair: two (B, S, P) float64."""
    token_set = token_sets(tables, positions, lengths, sets, cu_seqlens)
    n = positions.long()
    n_hat = tables.n_hat[token_set]
    original = (n_hat > 0) & (n < n_hat)
    inv_freq = tables.inv_freq[token_set, (~original).long()]
    angle = n[..., None].double() * inv_freq
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


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    tables: RopeTables,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k.

    Args:
        q, k: (B, S, Hq, D) and (B, S, Hk, D), any floating dtype.
        positions: (B, S) int32 or int64.
        tables: of the `Rope`, on the device of q.
        lengths, sets: (sequences,) or None; ``sets`` wins.
        cu_seqlens: (sequences + 1,) or None; with it B = 1 and S counts all tokens.
        interleaved: as in `Rope`.

    Returns:
        Two new tensors. float64 inputs are rotated in float64, all others in float32.
    """
    cos, sin = cos_sin(tables, positions, lengths, sets, cu_seqlens)
    if q.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    tables: RopeTables,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    interleaved: bool,
    mask: masks.Mask,
    softmax_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, then exact softmax attention; the scores of all pairs lie in memory.

    Args:
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, D); Hq a multiple of Hk.
        positions, key_positions: (B, Sq) and (B, Sk).
        tables, lengths, sets, interleaved: as in `rotary`.
        mask: which keys a query sees.
        softmax_scale, softcap: as in `longrope_kernels.attention`.

    Returns:
        out (B, Sq, Hq, D) of the dtype of q, and the log-sum-exp of the scores, base e,
        (B, Hq, Sq) float32 (float64 for float64). A query that sees no key gets 0 and -inf.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    turned = []
    for x, n, borders in ((q, positions, mask.cu_seqlens), (k, key_positions, mask.cu_seqlens_k)):
        cos, sin = (t.to(compute) for t in cos_sin(tables, n, lengths, sets, borders))
        turned.append(rotate(x.to(compute), cos, sin, interleaved).transpose(1, 2))
    groups = q.shape[2] // k.shape[2]
    q_rot, k_rot = turned[0], turned[1].repeat_interleave(groups, dim=1)
    values = v.to(compute).transpose(1, 2).repeat_interleave(groups, dim=1)

    scores = q_rot @ k_rot.transpose(-1, -2) * softmax_scale
    if softcap is not None:
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
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    tables: RopeTables,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    interleaved: bool,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and all keys of a cache, then exact softmax attention to those that are there.

    Args:
        q: (B, q_len, Hq, D).
        k_cache, v_cache: (B, capacity, Hk, D), or (blocks, block_size, Hk, D) with ``block_table``
            (B, max_blocks); unrotated, of the dtype of q or float8.
        cache_lens: (B,), how many keys each sequence has.
        key_positions: (B, slots) or None: slot j stands at position j - kv_start.
        k_scale, v_scale: (Hk,) float32 or None, multiply the cached numbers.
        tables, lengths, sets, interleaved: as in `rotary`.
        kv_start: (B,) or None; keys at slots below it are hidden.
        softmax_scale, window, softcap: as in `longrope_kernels.decode`.

    Returns:
        As `attention`.
    """
    batch, queries = q.shape[:2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if block_table is not None and not k_cache.shape[0]:
        block_table = block_table[:, :0]  # no blocks, and none that an entry could mean
    caches = []
    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
        x = cache
        if block_table is not None:
            blocks = cache[block_table.long().clamp(0, max(cache.shape[0] - 1, 0))]
            x = blocks.flatten(1, 2)
        x = x.to(compute)
        if scale is not None:
            x = x * scale.to(compute)[:, None]
        # Slots that hold no key may hold anything, and 0 times NaN is NaN.
        exists = torch.arange(x.shape[1], device=x.device) < cache_lens[:, None]
        caches.append(torch.where(exists[:, :, None, None], x, 0.0))
    k, v = caches

    slot = cache_lens[:, None].long() - queries + torch.arange(queries, device=q.device)
    if key_positions is None:
        start = 0 if kv_start is None else kv_start[:, None]
        positions = slot - start
        key_positions = torch.arange(k.shape[1], device=q.device).expand(batch, -1) - start
    else:
        # A query before the first slot sees nothing; any position serves it, also where none is.
        key_positions = torch.nn.functional.pad(key_positions, (0, 1))
        positions = key_positions.gather(1, slot.clamp(min=0))
        missing = k.shape[1] - key_positions.shape[1]
        key_positions = torch.nn.functional.pad(key_positions, (0, missing))
    mask = masks.Mask(True, window, kv_start, cache_lens=cache_lens)
    rest = (tables, lengths, sets, interleaved, mask, softmax_scale, softcap)
    out, lse = attention(q.to(compute), k, v, positions, key_positions, *rest)
    return out.to(q.dtype), lse
