"""`attention` and its op: check, choose a backend, rotate and attend."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..backends import choose, reference
from ..calls import arguments, autocast, schema, values
from ..calls.kinds import by_kind
from ..calls.memory import device_type
from ..calls.records import AttentionCall, Keys, RotaryCall, Scores, Selection
from ..rope.value import Rope
from ..torch_private import (
    applied,
    below_autograd,
    below_function,
    has_nested_gradients,
    has_tangent,
    requires_grad,
    runs_now,
    unwatched,
)
from . import library
from .factors import resolve
from .rotary import no_heads, rotate, rotate_read


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
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    base: float | None = None,
    interleaved: bool = False,
    attention_factor: float | None = None,
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
        factors: (P,), one for each pair of dimensions, or a `Rope`, which holds what ``n_hat``,
            ``base``, ``interleaved`` and ``attention_factor`` would say.
        n_hat: tokens below this position keep the original embedding; 0 for no threshold.
        causal: a query sees keys with ``j <= s``.
        softmax_scale: multiplies the scores; dim**-0.5 by default.
        window: a query sees keys with ``s - j < window`` (not causal: ``|s - j| < window``).
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: (heads,), any floating dtype: a logit of each head of q that joins the sum of its
            softmax and has no value.
        cu_seqlens: (sequences + 1,) int32 or int64, where packed sequences begin in q, with the
            token count last; layout "thd".
        cu_seqlens_k: the same for k and v; ``cu_seqlens`` by default.
        kv_start: (batch,) or (sequences,) int32 or int64; keys at slots below it are hidden (left
            padding).
        key_positions: like positions, of the keys; by default the positions of the queries, which
            needs as many keys as queries.
        lengths: (batch,) or (sequences,), the total length of each sequence, which chooses its
            factor set, on the device.
        sets: the factor set of each sequence, int32; wins over ``lengths``.
        base: ``b`` in ``theta_i = b**(-2i / R)``, ``R = 2P``; 10000 by default.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
        attention_factor: multiplies the rotated dimensions of q and k; 1 by default.
        layout: "bshd", "bhsd" or "thd".
        k_rotation: where backend "triton" rotates k: "prepass" (once, into a scratch), "registers"
            (in the loop over keys, for few queries), or None for its own rule.
        return_lse: also return the log-sum-exp of the scores, and of the sink, base e.
        backend: "reference", "composed" (our rotation, then torch's scaled_dot_product_attention),
            "native" (CPU; causal, each query at its own key, without gradients; float32 too),
            "triton" or "cuda" (CUDA; the rotation fused; bfloat16 and float16; "cuda" without
            Triton, up to a head dim of 128, and without gradients),
            "flash-attn-2", "flash-attn-3" or "flash-attn-4" (our rotation, then that library where
            installed), or None for the first that can serve in `longrope info`'s table. A named
            backend runs or raises.

    Returns:
        The attention output, of the shape and dtype of q; with ``return_lse`` also the log-sum-exp,
        (batch, heads, Sq) or (heads, tokens), float32 (float64 for float64). A query that sees no
        key gets 0, and -inf or its sink.

    Under autocast q, k and v are cast to its dtype first, as torch does for its own attention
    (float64 is left alone); the output has that dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
        RuntimeError: the named backend is not available.
        NotImplementedError: a named one that has no forward-mode derivative, beside tangents.
    """
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        arguments.check_flag(name, flag)
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments.check_tensor(name, x)
    if autocast.dtype_of(q) or not q.dtype == k.dtype == v.dtype:
        q, k, v = map(autocast.cast, (q, k, v))
    tables = resolve(factors, n_hat, base, interleaved, attention_factor, q)
    given = (q, k, v) if sinks is None else (q, k, v, arguments.check_tensor("sinks", sinks))
    direct = unwatched(*given)
    beyond = not direct and (any(map(has_tangent, given)) or has_nested_gradients(*given))
    if beyond and backend is None:
        backend = "reference"
    recorded = not direct and any(map(requires_grad, given))
    scores, count, name = _check_kind(
        *(q, k, v, positions, key_positions, cu_seqlens, cu_seqlens_k, kv_start, lengths, sets),
        *(sinks, tables.steps, layout, causal, softmax_scale, window, softcap, return_lse),
        *(backend, k_rotation, recorded and torch.is_grad_enabled()),
        backend is None and (direct or runs_now(*given)),
    )
    if beyond and name not in ("reference", "composed"):  # torch's own says what it lacks
        arguments.check_first_order(f"backend {name!r}", q=q, k=k, v=v, sinks=sinks)
    if layout != "bshd":
        q, k, v = (arguments.as_bshd(x, layout) for x in (q, k, v))
    selection = arguments.select(count, lengths, sets, cu_seqlens)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    batch, queries, _, _ = q.shape
    positions = arguments.as_rows(positions, batch, queries)
    if key_positions is None:
        key_positions = positions
    else:
        key_positions = arguments.as_rows(key_positions, batch, k.shape[1])

    keys = Keys(k, v, key_positions, kv_start, cu_seqlens_k)
    call = AttentionCall(q, positions, keys, tables, selection, scores, sinks)
    out, lse = _attend(call, name, k_rotation, return_lse, direct)
    out = arguments.from_bshd(out, layout)
    if lse is None or not return_lse:
        return out
    return out, lse.squeeze(0) if layout == "thd" else lse


@by_kind
def _check_kind(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    key_positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    sinks: torch.Tensor | None,
    steps: torch.Tensor,
    layout: arguments.Layout,
    causal: bool,
    softmax_scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
    backend: str | None,
    k_rotation: str | None,
    trains: bool,
    libraries: bool,
) -> tuple[Scores, int, str]:
    """All of a call but the values of its tensors; steps: of the tables.

    trains, libraries: see `choose.choose_attention`. Returns what follows: the scores, how many
    factor sets there are, and the backend.
    """
    count, _, pairs = steps.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments.check_heads(name, x, layout, 2 * pairs)
    arguments.check_like("k", k, "q", q, layout, free=("heads", "seq", "tokens"))
    arguments.check_like("v", v, "k", k, layout, free=())
    (batch, queries, heads, size), (_, slots, kv_heads, _) = (
        arguments.as_bshd(x, layout).shape for x in (q, k)
    )
    arguments.check_groups("k", heads, kv_heads)
    sequences = arguments.check_selection(count, q, batch, layout, lengths, sets, cu_seqlens)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    elif cu_seqlens is None:
        raise ValueError("cu_seqlens: expected beside cu_seqlens_k, got None")
    elif arguments.check_borders("cu_seqlens_k", cu_seqlens_k, q, layout) != sequences:
        raise ValueError(
            f"cu_seqlens_k: expected {sequences} sequences as in cu_seqlens, "
            f"got shape {tuple(cu_seqlens_k.shape)}"
        )
    if kv_start is not None:
        arguments.check_per_sequence("kv_start", kv_start, sequences, q)
    if sinks is not None:
        arguments.check_sinks(sinks, heads, q)
    arguments.check_positions("positions", positions, batch, queries, q)
    if key_positions is not None:
        arguments.check_positions("key_positions", key_positions, batch, slots, q)
    elif queries != slots or cu_seqlens_k is not cu_seqlens:
        raise ValueError(
            f"key_positions: expected them where keys are not those of the queries ({slots} keys, "
            f"{queries} queries), got None"
        )
    dim = operator.index(size)  # a constant, also where a graph is traced with dynamic sizes
    scores = arguments.check_scores(causal, softmax_scale, window, softcap, dim)
    if k_rotation not in (None, "prepass", "registers"):
        raise ValueError(f"k_rotation: expected 'prepass', 'registers' or None, got {k_rotation!r}")
    if k_rotation is not None and backend != "triton":
        raise ValueError(f"k_rotation: expected backend='triton' beside it, got {backend!r}")
    more = cu_seqlens is not None, kv_start is not None, sinks is not None
    needs = _needs(scores, return_lse, *more, (queries, slots) if libraries else None, dim)
    capability = choose.capability_of(q.device) if libraries else choose.capability_now(q)
    name = choose.choose_attention(
        *(backend, device_type(q), q.dtype, dim, needs, trains),
        *(capability, libraries, sinks is not None),
        scores.causal and cu_seqlens is None and key_positions is None,
    )
    return scores, count, name


def _needs(
    scores: Scores,
    return_lse: bool,
    packed: bool,
    padded: bool,
    sinks: bool,
    sizes: tuple[int, int] | None,
    dim: int,
) -> str:
    """The column of `choose.ATTENTION_CHOICE`; sizes: how many queries and keys of a sequence.

    None where they may not be looked at: a graph with dynamic sizes would be tied to the answer.
    """
    if scores.cap or return_lse:
        return "scored"
    if padded:
        return "padded"
    if sizes and scores.window and not packed and not scores.causal:
        queries, slots = sizes
        if slots < scores.window < queries:  # see flash_attention.keywords
            return "padded"
    if scores.window or packed or sinks:
        return "masked"
    if sizes and scores.causal and sizes[0] < sizes[1]:
        return "chunk"
    return "wide" if dim > choose.WIDE else "plain"


def _attend(
    call: AttentionCall, backend: str, k_rotation: str | None, return_lse: bool, direct: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and the log-sum-exp where the backend has it; direct: all is `unwatched`."""
    q = call.q
    if backend in ("native", "triton", "cuda"):
        if direct:
            return _run(call, k_rotation, backend)
        return _attention(*schema.flatten(call), k_rotation, backend)  # type: ignore[no-any-return]
    values.check_attention(call)
    with autocast.off(q):
        if backend == "reference":
            return reference.attention(call)
        call = _rotated(call)
        if backend == "composed":
            from ..backends import composed  # torch's own imports take a second

            return composed.attend(call), None
        from ..backends import flash_attention

        return flash_attention.attend(backend, call, return_lse)


def _rotated(call: AttentionCall) -> AttentionCall:
    """q and k by the fastest rotation there is: one launch where they stand at the same places."""
    q, positions, keys, tables, selection, *_ = call
    assert keys.positions is not None
    name = choose.choose_rotary(None, q.device.type, q.dtype == torch.float64)
    of_q = of_k = Selection()
    if selection.lengths is not None or selection.sets is not None:  # else borders say nothing
        of_q, of_k = selection, selection._replace(borders=keys.borders)
    turn = rotate_read if values.readable(positions) else rotate  # in a graph the op reads them
    if keys.positions is positions and of_k.borders is of_q.borders:
        q, k = turn(RotaryCall(q, keys.k, positions, tables, of_q), name)
    else:
        no_q, no_k = no_heads(keys.k), no_heads(q)
        q, _ = turn(RotaryCall(q, no_k, positions, tables, of_q), name)
        _, k = turn(RotaryCall(no_q, keys.k, keys.positions, tables, of_k), name)
    return call._replace(q=q, keys=keys._replace(k=k))


# -------------------------------------------------------------------------------------------- op


def _fake(
    call: AttentionCall, k_rotation: str | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = call.q.shape
    lse = call.q.new_empty((batch, heads, queries), dtype=torch.float32)
    return library.made_like(call.q), lse


def _run(
    call: AttentionCall, k_rotation: str | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _fake(call, k_rotation, backend)
    values.check_attention(call)
    choose.part(backend, "attention").forward(call, out, lse, k_rotation)
    return out, lse


def _fake_backward(
    d_out: torch.Tensor, d_lse: Any, out: Any, lse: Any, call: AttentionCall, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (library.made_like(x) for x in (call.q, call.keys.k, call.keys.v))
    return q, k, v


def _run_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    k_rotation: str | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = _fake_backward(d_out, d_lse, out, lse, call)
    choose.part(backend, "attention").backward(call, d_out, d_lse, out, lse, *grads)
    return grads


_EXTRA = "str? k_rotation, str backend"
_attention = library.define(
    "attention", AttentionCall, "(Tensor out, Tensor lse)", _run, _fake, _EXTRA
)
_backward = library.define(
    "attention_backward",
    AttentionCall,
    "(Tensor dq, Tensor dk, Tensor dv)",
    _run_backward,
    _fake_backward,
    _EXTRA,
    before="Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse",
)
_FIELDS = [name for name, _ in schema.fields(AttentionCall)]
_GRADIENTS = tuple(map(_FIELDS.index, ("q", "keys_k", "keys_v", "sinks")))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with below_function():
            out, lse = _attention(*flat)
        library.save(ctx, (out, lse, *flat))
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Any, d_lse: Any) -> tuple[Any, ...]:
        out, lse, *flat = library.saved(ctx)
        if d_out is None:
            d_out = torch.zeros_like(out)
        elif d_out.stride(-1) != 1:
            d_out = d_out.contiguous()
        if d_lse is not None:
            d_lse = d_lse.contiguous()
        grads: list[Any] = [None] * len(flat)
        of_all = d_out, d_lse, out, lse
        sinks = flat[_GRADIENTS[-1]]
        found = *_backward(*of_all, *flat), sinks
        if sinks is not None:
            found = *found[:3], _backward_of_sinks(sinks, *of_all)
        for at, gradient in zip(_GRADIENTS, found, strict=True):
            grads[at] = gradient
        return tuple(grads)


class _AttentionBackward(torch.autograd.Function):
    """torch's own `once_differentiable` hands on constants where d_out alone has no gradient."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with below_function():
            return _backward(*flat)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise NotImplementedError(
            "backend: this one has no second derivative of attention; expected 'reference'"
        )


def _backward_of_sinks(
    sinks: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """The gradient of weights that no value has: (Hq,) of the dtype of the sinks."""
    weights = torch.where(lse > -torch.inf, torch.exp(sinks[:, None] - lse), 0.0)
    d_scores = -torch.einsum("bshd,bshd->bhs", d_out.to(lse.dtype), out.to(lse.dtype))
    if d_lse is not None:
        d_scores = d_scores + d_lse
    return (weights * d_scores).sum((0, 2)).to(sinks.dtype)


def _differentiable(*flat: Any) -> Any:
    wanted = any(flat[i] is not None and flat[i].requires_grad for i in _GRADIENTS)
    recorded = torch.is_grad_enabled() and wanted
    library.check_underivable(_attention, flat, recorded and flat[-1] in choose.WITHOUT_GRADIENTS)
    if recorded:
        return applied(_Attention, *flat)
    with below_autograd():
        return _attention(*flat)


def _once_differentiable(*flat: Any) -> Any:
    library.check_underivable(_backward, flat, gradients=False)
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in flat
    ):
        return applied(_AttentionBackward, *flat)
    with below_autograd():
        return _backward(*flat)


library.LIBRARY.impl("attention", _differentiable, "Autograd")
library.LIBRARY.impl("attention_backward", _once_differentiable, "Autograd")
