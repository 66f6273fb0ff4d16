"""`attention`: check, choose a backend, rotate and attend."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from . import arguments, attention_ops, backends, ops, values
from .calls import Rotation, Scoring
from .masks import Mask
from .rope import Rope
from .rotary import rotated


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    attention_factor: float = 1.0,
    layout: arguments.Layout = "bshd",
    k_rotation: str | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of q and k rotated by LongRoPE; both come unrotated.

    Masks go by slots, never by positions: query i of Sq against Sk keys has slot
    ``s = i + Sk - Sq`` (the last query stands at the last key), key j has slot j.

    Args:
        q: (batch, Sq, heads, dim), or as ``layout`` says; float32, bfloat16 or float16, and
            float64 in the reference backend. A unit last stride, any others.
        k: (batch, Sk, kv_heads, dim); heads is a multiple of kv_heads.
        v: like k.
        positions: of the queries, (Sq,) or (batch, Sq), for packed tokens (tokens,); int32 or
            int64.
        factors: as in `apply_rotary`, or a `Rope`, which holds what ``n_hat``, ``base``,
            ``interleaved`` and ``attention_factor`` would say.
        n_hat: as in `apply_rotary`.
        causal: a query sees keys with ``j <= s``.
        softmax_scale: multiplies the scores; dim**-0.5 by default.
        window: a query sees keys with ``s - j < window`` (not causal: ``|s - j| < window``).
        softcap: scores become ``softcap * tanh(score / softcap)``.
        cu_seqlens: (sequences + 1,) int32 or int64, where packed sequences begin in q, with the
            token count last; layout "thd".
        cu_seqlens_k: the same for k and v; ``cu_seqlens`` by default.
        kv_start: (batch,) or (sequences,) int32 or int64; keys at slots below it are hidden (left
            padding).
        key_positions: like positions, of the keys; by default the positions of the queries, which
            needs as many keys as queries.
        lengths: (batch,) or (sequences,), the total length of each sequence, which chooses its
            factor set, as in `apply_rotary`.
        sets: the factor set of each sequence, int32; wins over ``lengths``.
        base: as in `apply_rotary`.
        interleaved: as in `apply_rotary`.
        attention_factor: as in `apply_rotary`.
        layout: "bshd", "bhsd" or "thd".
        k_rotation: where backend "triton" rotates k: "prepass" (once, into a scratch), "registers"
            (in the loop over keys, for few queries), or None for its own rule.
        return_lse: also return the log-sum-exp of the scores, base e.
        backend: "reference", "composed" (our rotation, then torch's scaled_dot_product_attention),
            "triton" or "cuda" (CUDA; the rotation fused; bfloat16 and float16; "cuda" without
            Triton, up to a head dim of 128, with gradients by PyTorch's products),
            "flash-attn-2", "flash-attn-3" or "flash-attn-4" (our rotation, then that library where
            installed), or None for the first that can serve in `longrope info`'s table. A named
            backend runs or raises.

    Returns:
        The attention output, of the shape and dtype of q; with ``return_lse`` also the log-sum-exp,
        (batch, heads, Sq) or (heads, tokens), float32 (float64 for float64). A query that sees no
        key gets 0 and -inf.

    Under autocast q, k and v are cast to its dtype first, as torch does for its own attention
    (float64 is left alone); the output has that dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
        RuntimeError: the named backend is not available.
    """
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {flag!r}")
    q, k, v = (
        arguments.autocast(arguments.check_tensor(name, x))
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    rotation = arguments.resolve_rope(factors, n_hat, base, interleaved, attention_factor, q)
    rotary_dim = 2 * rotation.steps.shape[-1]
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments.check_heads(name, x, layout, rotary_dim)
    arguments.check_like("k", k, "q", q, layout, free=("heads", "seq", "tokens"))
    arguments.check_like("v", v, "k", k, layout, free=())
    q4, k4, v4 = (arguments.as_bshd(x, layout) for x in (q, k, v))
    (batch, queries, heads, dim), (keys, kv_heads) = q4.shape, k4.shape[1:3]
    if heads % max(kv_heads, 1) or (heads and not kv_heads):
        raise ValueError(f"k: expected heads that divide the {heads} of q, got {kv_heads}")
    softmax_scale = arguments.check_scores(softmax_scale, window, softcap, dim)

    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    mask = _check_mask(causal, window, kv_start, cu_seqlens, cu_seqlens_k, q4, k4, layout)
    rotation = arguments.choose_sets(rotation, q, batch, layout, lengths, sets, cu_seqlens)
    positions = arguments.check_positions("positions", positions, batch, queries, q)
    if key_positions is not None:
        key_positions = arguments.check_positions("key_positions", key_positions, batch, keys, q)
    elif queries != keys or cu_seqlens_k is not cu_seqlens:
        raise ValueError(
            f"key_positions: expected them where keys are not those of the queries ({keys} keys, "
            f"{queries} queries), got None"
        )

    name = _choose(backend, k_rotation, q, mask, softcap is not None or return_lse)
    of_keys = positions
    if key_positions is not None:
        of_keys = key_positions
        values.check_positions("key_positions", key_positions)
    lse: torch.Tensor | None
    if name == "reference":
        from .backends import reference

        values.check_values(positions, rotation, None)
        scoring = Scoring(positions, of_keys, rotation, mask, softmax_scale, softcap or 0.0)
        with arguments.without_autocast(q):
            out, lse = reference.attention(q4, k4, v4, scoring)
    elif name == "composed":
        from .backends import composed

        q4, k4 = _rotate(q4, k4, positions, key_positions, rotation, mask)
        with arguments.without_autocast(q):
            out, lse = composed.attend(q4, k4, v4, mask, softmax_scale), None
    elif name in backends.FLASH_BACKENDS:
        from .backends import flash_attention

        q4, k4 = _rotate(q4, k4, positions, key_positions, rotation, mask)
        with arguments.without_autocast(q):
            out, lse = flash_attention.attend(
                name, q4, k4, v4, mask, softmax_scale, softcap, return_lse
            )
    else:
        out, lse = attention_ops.attention(
            q4,
            k4,
            v4,
            positions,
            of_keys,
            *rotation[:6],
            mask.cu_seqlens,
            mask.cu_seqlens_k,
            mask.kv_start,
            rotation.interleaved,
            causal,
            softmax_scale,
            window or 0,
            softcap or 0.0,
            k_rotation,
            name,
        )
    out = arguments.from_bshd(out, layout)
    if lse is None or not return_lse:
        return out
    return out, lse.squeeze(0) if layout == "thd" else lse


def _choose(
    backend: str | None, k_rotation: str | None, q: torch.Tensor, mask: Mask, scored: bool
) -> str:
    if k_rotation not in (None, "prepass", "registers"):
        raise ValueError(f"k_rotation: expected 'prepass', 'registers' or None, got {k_rotation!r}")
    if k_rotation is not None and backend != "triton":
        raise ValueError(f"k_rotation: expected backend='triton' beside it, got {backend!r}")
    masked = any(x is not None for x in (mask.window, mask.kv_start, mask.cu_seqlens))
    asks = "scored" if scored else "masked" if masked else "plain"
    dim = operator.index(q.shape[-1])  # a constant, also where a graph is traced with dynamic sizes
    return backends.choose_attention(backend, q.device.type, q.dtype, dim, asks)


def _rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    key_positions: torch.Tensor | None,
    rotation: Rotation,
    mask: Mask,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k by the fastest rotation there is: one launch where they stand at the same places."""
    name = backends.choose_rotary(None, q.device.type, q.dtype == torch.float64)
    borders = borders_k = None
    if rotation.chooses:
        borders, borders_k = mask.cu_seqlens, mask.cu_seqlens_k
    if key_positions is None:
        return rotated(q, k, positions, rotation, borders, name)
    no_q, no_k = ops.no_heads(k), ops.no_heads(q)
    q, _ = rotated(q, no_k, positions, rotation, borders, name)
    _, k = rotated(no_q, k, key_positions, rotation, borders_k, name)
    return q, k


def _check_mask(
    causal: bool,
    window: int | None,
    kv_start: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    layout: str,
) -> Mask:
    """The mask of q (B, Sq, ...) and k (B, Sk, ...), its tensors checked."""
    sequences = q.shape[0]
    if cu_seqlens is not None and cu_seqlens_k is not None:
        sequences = arguments.check_borders("cu_seqlens", cu_seqlens, q, layout)
        if arguments.check_borders("cu_seqlens_k", cu_seqlens_k, q, layout) != sequences:
            raise ValueError(
                f"cu_seqlens_k: expected {sequences} sequences as in cu_seqlens, "
                f"got shape {tuple(cu_seqlens_k.shape)}"
            )
        values.check_borders("cu_seqlens", cu_seqlens, q.shape[1])
        values.check_borders("cu_seqlens_k", cu_seqlens_k, k.shape[1])
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens: expected beside cu_seqlens_k, got None")
    if kv_start is not None:
        arguments.check_per_sequence("kv_start", kv_start, sequences, q)
        values.check_kv_start(kv_start)
    return Mask(causal, window, kv_start, cu_seqlens, cu_seqlens_k)
