"""`apply_rotary` and its op: check, choose a backend, rotate.

A rotation is linear and orthogonal up to its scale, so its gradient is the same op with the sine
negated (``conjugate``), for every backend and to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch

from ..backends import choose, reference
from ..calls import arguments, autocast, schema, values
from ..calls.kinds import by_kind
from ..calls.memory import device_type, overlap, overlaps_itself
from ..calls.records import RotaryCall
from ..rope.value import Rope
from ..torch_private import (
    applied,
    below_autograd,
    below_function,
    dual_of,
    primal_of,
    tangent_of,
    transformed,
    unwatched,
    unwritable,
)
from . import library
from .factors import resolve

# Whether what a rotation reads was read with the call that it is a part of.
_read = ContextVar("longrope_read", default=False)


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None = None,
    *,
    base: float | None = None,
    interleaved: bool = False,
    attention_factor: float | None = None,
    layout: arguments.Layout = "bshd",
    lengths: torch.Tensor | None = None,
    sets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate q and k by LongRoPE (arXiv 2402.13753, equation 1), exactly at any position.

    Pair ``i`` of a token at position ``n`` turns by ``n * base**(-i / P) / factors[i]``, or by
    ``n * base**(-i / P)`` where ``n < n_hat``; tokens of the first kind are also multiplied by
    ``attention_factor``. Dimensions from ``2P`` on pass through. Angles are within 5e-7 rad of
    the formula at every position below 2**31; there is no cos/sin table.

    Args:
        q: (batch, seq, heads, dim), or as ``layout`` says; float32, bfloat16 or float16, and
            float64 in the reference backend. Any strides with a unit last one.
        k: like q with its own number of heads, or None.
        positions: (seq,) or (batch, seq), for packed tokens (tokens,); int32 or int64, any order,
            from -2**31 to 2**31 - 1.
        factors: (P,) floating tensor or sequence, one factor per pair, or a `Rope`, which holds
            what ``n_hat``, ``base``, ``interleaved`` and ``attention_factor`` would say. Make a
            `Rope` once for code that runs often.
        n_hat: tokens below this position keep the original embedding; 0 for no threshold.
        base: ``b`` in ``theta_i = b**(-2i / R)``, ``R = 2P``; 10000 by default.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
        attention_factor: multiplies the rotated dimensions of q and k; 1 by default.
        layout: "bshd", "bhsd" (batch, heads, seq, dim; transformers) or "thd"
            (tokens, heads, dim; packed).
        lengths: (batch,) int32 or int64, the total length of each sequence (cached tokens and
            new ones): each takes the factor set of its own length, chosen on the device.
        sets: (batch,) int32, the factor set of each sequence; wins over ``lengths``. A `Rope` of
            several sets needs one of the two. On a device, an index out of range is clamped.
        cu_seqlens: (sequences + 1,) int32 or int64, where packed sequences begin, with the token
            count last; ``lengths`` and ``sets`` are then (sequences,).
        inplace: write into q and k and return them. Refused where autograd is on and would not have
            it (a leaf that requires grad or a view of one, outputs of unbind, split and chunk), and
            on memory that q and k share (not detected under ``torch.compile``).
        backend: "reference", "native" (CPU), "triton" or "cuda" (CUDA), or None for the fastest
            that can serve (``longrope info`` prints the table). A named backend runs or raises.

    Returns:
        The rotated q and k (None where k is), of the shapes and dtypes given.

    Autocast changes nothing, but that q and k may differ in dtype under it.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected. Values of
            tensors on a device are checked only under ``LONGROPE_CHECK=1``.
        RuntimeError: the named backend is not available.
    """
    arguments.check_flag("inplace", inplace)
    arguments.check_tensor("q", q)
    tables = resolve(factors, n_hat, base, interleaved, attention_factor, q)
    if k is None:
        differ = False
    else:
        arguments.check_tensor("k", k)
        differ = q.dtype != k.dtype and None not in (autocast.dtype_of(q), autocast.dtype_of(k))
    of_tensors = q, k, positions, lengths, sets, cu_seqlens, tables.steps
    count, name = _check_kind(*of_tensors, layout, differ, backend)
    q4, k4 = q, k
    if layout != "bshd":
        q4 = arguments.as_bshd(q, layout)
        k4 = None if k is None else arguments.as_bshd(k, layout)
    if k4 is None:
        k4 = no_heads(q4)
    batch, seq, _, _ = q4.shape
    positions = arguments.as_rows(positions, batch, seq)
    if count == 1:
        cu_seqlens = None  # borders make no difference where all sequences take one set
    selection = arguments.select(count, lengths, sets, cu_seqlens)
    call = RotaryCall(q4, k4, positions, tables, selection)
    if inplace:
        check_writable("q", q)
        if k is not None:
            check_writable("k", k)
            if overlap(q, k):
                raise ValueError("inplace: q and k overlap in memory; expected separate elements")
        rotate_(call, name)
        return q, k
    q_out, k_out = rotate(call, name)
    if layout == "bshd" and k is not None:
        return q_out, k_out
    return (
        arguments.from_bshd(q_out, layout),
        None if k is None else arguments.from_bshd(k_out, layout),
    )


@by_kind
def _check_kind(
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    steps: torch.Tensor,
    layout: str,
    differ: bool,
    backend: str | None,
) -> tuple[int, str]:
    """All of a call but values; steps: of the tables. differ: whether q and k may in dtype.

    Returns how many factor sets there are, and the backend.
    """
    count, _, pairs = steps.shape
    arguments.check_heads("q", q, layout, 2 * pairs)
    if k is not None:
        arguments.check_heads("k", k, layout, 2 * pairs)
        arguments.check_like("k", k, "q", q, layout, ("heads", "dtype") if differ else ("heads",))
    batch, seq = arguments.as_bshd(q, layout).shape[:2]
    arguments.check_positions("positions", positions, batch, seq, q)
    arguments.check_selection(count, q, batch, layout, lengths, sets, cu_seqlens)
    return count, choose.choose_rotary(backend, device_type(q), q.dtype == torch.float64)


def rotate(call: RotaryCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of a checked call, rotated by a chosen backend into new tensors."""
    q, k = call.q, call.k
    if q.dtype != k.dtype:  # under autocast: a launch for each
        q_out, _ = rotate(call._replace(k=no_heads(q)), backend)
        _, k_out = rotate(call._replace(q=no_heads(k)), backend)
        return q_out, k_out
    if backend == "reference":
        _check(call)
        with autocast.off(q):
            return reference.rotary(call)
    if unwatched(q, k):
        return _run(call, backend)
    return _rotary(*schema.flatten(call), backend)  # type: ignore[no-any-return]


def rotate_read(call: RotaryCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` for a call that has read the index tensors: they are not read again."""
    token = _read.set(True)
    try:
        return rotate(call, backend)
    finally:
        _read.reset(token)


def rotate_(call: RotaryCall, backend: str) -> None:
    """Rotate q and k of a checked call in place, by a chosen backend."""
    q, k = call.q, call.k
    if q.dtype != k.dtype:
        rotate_(call._replace(k=no_heads(q)), backend)
        rotate_(call._replace(q=no_heads(k)), backend)
        return
    if backend != "reference" and unwatched(q, k):
        _run_inplace(call, backend)
        torch.autograd.graph.increment_version((q, k))
        return
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    dual = transformed() or tangent_of(q) is not None or tangent_of(k) is not None
    traced = torch.compiler.is_compiling()
    negated = not traced and (q.is_neg() or k.is_neg())  # torch hands no op such memory to write
    if backend == "reference" or dual or negated or (recorded and traced):
        q_out, k_out = rotate(call, backend)
        q.copy_(q_out)
        k.copy_(k_out)
    elif recorded:
        # One tensor at a time: autograd lets a function that writes into a view return one output.
        for x in (q, k):
            one = call._replace(q=x, k=no_heads(x))
            if x.requires_grad:
                _RotaryInplace.apply(*schema.flatten(one), backend)  # type: ignore[no-untyped-call]
            else:
                rotate_(one, backend)
    else:
        _rotary_(*schema.flatten(call), backend)


def no_heads(x: torch.Tensor) -> torch.Tensor:
    """A stand-in for an absent q or k: that of x with no heads."""
    return x.new_empty((x.shape[0], x.shape[1], 0, x.shape[3]))


def check_writable(name: str, x: torch.Tensor) -> None:
    """In-place rotation would be wrong where autograd refuses it, and on shared memory."""
    if (what := unwritable(x)) is not None:
        raise ValueError(
            f"inplace: {name} is {what}; expected inplace=False, {name}.clone() or torch.no_grad()"
        )
    if overlaps_itself(x):
        raise ValueError(
            f"inplace: elements of {name} share memory (shape {tuple(x.shape)}, strides "
            f"{x.stride()}); pass {name}.contiguous()"
        )


# -------------------------------------------------------------------------------------------- op


def _run(call: RotaryCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    out = _fake(call, backend)
    _check(call)
    choose.part(backend, "rotary").rotary(call, *out)
    return out


def _run_inplace(call: RotaryCall, backend: str) -> None:
    values.check_rotary(call)
    choose.part(backend, "rotary").rotary(call, call.q, call.k)


def _check(call: RotaryCall) -> None:
    if torch.compiler.is_compiling() or not _read.get():
        values.check_rotary(call)


def _fake(call: RotaryCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return library.made_like(call.q), library.made_like(call.k)


_rotary = library.define("rotary", RotaryCall, "(Tensor, Tensor)", _run, _fake)
_rotary_ = library.define(
    "rotary_", RotaryCall, "()", _run_inplace, lambda *_: None, mutable=("q", "k")
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with below_function():
            out = _rotary(*flat)
        library.save(ctx, flat[2:])
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_q: Any, grad_k: Any) -> tuple[Any, ...]:
        back = _rotate_back(grad_q, grad_k, library.saved(ctx))
        return *back, *(None,) * (len(ctx.needs_input_grad) - 2)


class _RotaryInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        with below_autograd():
            _rotary_(x, k, *rest)
        ctx.mark_dirty(x)
        library.save(ctx, rest)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        back = _rotate_back(grad, None, library.saved(ctx))
        return back[0], *(None,) * (len(ctx.needs_input_grad) - 1)


def _rotate_back(
    grad_q: torch.Tensor | None, grad_k: torch.Tensor | None, rest: list[Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of both inputs by one launch; None where the incoming one is None."""
    one = grad_k if grad_q is None else grad_q
    if one is None:
        return None, None
    grads = [no_heads(one) if g is None else g for g in (grad_q, grad_k)]
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
    *rest, backend = rest
    call = schema.build(RotaryCall, (*grads, *rest))
    back = _rotary(*schema.flatten(call._replace(conjugate=not call.conjugate)), backend)
    return None if grad_q is None else back[0], None if grad_k is None else back[1]


def _differentiable(*flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tangents = [tangent_of(x) for x in flat[:2]]
    if tangents != [None, None]:
        return _with_tangents(flat, tangents)
    if torch.is_grad_enabled() and (flat[0].requires_grad or flat[1].requires_grad):
        return applied(_Rotary, *flat)  # type: ignore[no-any-return]
    with below_autograd():
        return _rotary(*flat)  # type: ignore[no-any-return]


def _with_tangents(
    flat: tuple[Any, ...], tangents: list[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward mode: the rotation is linear, so that tangents are rotated as what they belong to."""
    primals = [primal_of(x) for x in flat[:2]]
    found = _rotary(*primals, *flat[2:])
    turned = [
        x.new_zeros(x.shape) if t is None else t.contiguous()
        for x, t in zip(primals, tangents, strict=True)
    ]
    of_found = _rotary(*turned, *flat[2:])
    q, k = (dual_of(*pair) for pair in zip(found, of_found, strict=True))
    return q, k


library.LIBRARY.impl("rotary", _differentiable, "Autograd")
library.without_derivatives(_rotary_)
