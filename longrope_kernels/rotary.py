"""`apply_rotary`: check, choose a backend, call the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import arguments, backends, ops, values
from .calls import Rotation
from .memory import overlap, overlaps_itself
from .rope import Rope


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None = None,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    attention_factor: float = 1.0,
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
        base: ``b`` in ``theta_i = b**(-2i / R)``, ``R = 2P``.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).
        attention_factor: multiplies the rotated dimensions of q and k.
        layout: "bshd", "bhsd" (batch, heads, seq, dim; transformers) or "thd"
            (tokens, heads, dim; packed).
        lengths: (batch,) int32 or int64, the total length of each sequence (cached tokens and
            new ones): each takes the factor set of its own length, chosen on the device.
        sets: (batch,) int32, the factor set of each sequence; wins over ``lengths``. A `Rope` of
            several sets needs one of the two. On a device, an index out of range is clamped.
        cu_seqlens: (sequences + 1,) int32 or int64, where packed sequences begin, with the token
            count last; ``lengths`` and ``sets`` are then (sequences,).
        inplace: write into q and k and return them. Refused on a leaf that requires grad and on
            memory that q and k share (not detected under ``torch.compile``).
        backend: "reference", "native" (CPU), "triton" (CUDA), or None for the fastest that can
            serve (``longrope info`` prints the table). A named backend runs or raises.

    Returns:
        The rotated q and k (None where k is), of the shapes and dtypes given.

    Autocast changes nothing, but that q and k may differ in dtype under it.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected. Values of
            tensors on a device are checked only under ``LONGROPE_CHECK=1``.
        RuntimeError: the named backend is not available.
    """
    arguments.check_tensor("q", q)
    rotation = arguments.resolve_rope(factors, n_hat, base, interleaved, attention_factor, q)
    rotary_dim = 2 * rotation.steps.shape[-1]
    arguments.check_heads("q", q, layout, rotary_dim)
    if k is not None:
        arguments.check_heads("k", arguments.check_tensor("k", k), layout, rotary_dim)
        under_autocast = arguments.autocast_dtype(q) and arguments.autocast_dtype(k)
        free = ("heads", "dtype") if under_autocast else ("heads",)
        arguments.check_like("k", k, "q", q, layout, free)
    q4 = arguments.as_bshd(q, layout)
    k4 = ops.no_heads(q4) if k is None else arguments.as_bshd(k, layout)
    batch, seq = q4.shape[:2]
    positions = arguments.check_positions("positions", positions, batch, seq, q)
    rotation = arguments.choose_sets(rotation, q, batch, layout, lengths, sets, cu_seqlens)
    rest = (positions, rotation, cu_seqlens if rotation.chooses else None)
    name = backends.choose_rotary(backend, q.device.type, q.dtype == torch.float64)
    if inplace:
        check_writable("q", q)
        if k is not None:
            check_writable("k", k)
            # A graph being traced has no addresses yet.
            if not torch.compiler.is_compiling() and overlap(q, k):
                raise ValueError("inplace: q and k overlap in memory; expected separate elements")
        rotate_(q4, k4, *rest, name)
        return q, k
    q_out, k_out = rotated(q4, k4, *rest, name)
    return (
        arguments.from_bshd(q_out, layout),
        None if k is None else arguments.from_bshd(k_out, layout),
    )


def rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate checked q (B, S, Hq, D) and k (B, S, Hk, D), out of place, by a chosen backend."""
    if q.dtype != k.dtype:  # under autocast: a launch for each
        q_out, _ = rotated(q, ops.no_heads(q), positions, rotation, cu_seqlens, backend)
        _, k_out = rotated(ops.no_heads(k), k, positions, rotation, cu_seqlens, backend)
        return q_out, k_out
    if backend != "reference":
        rest = (*rotation[:6], cu_seqlens, rotation.interleaved, False, backend)
        return ops.rotary(q, k, positions, *rest)  # type: ignore[no-any-return]

    from .backends import reference

    values.check_values(positions, rotation, cu_seqlens)
    with arguments.without_autocast(q):
        return reference.rotary(q, k, positions, rotation, cu_seqlens)


def rotate_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
    backend: str,
) -> None:
    """Rotate checked q (B, S, Hq, D) and k (B, S, Hk, D) in place, by a chosen backend."""
    if q.dtype != k.dtype:
        rotate_(q, ops.no_heads(q), positions, rotation, cu_seqlens, backend)
        rotate_(ops.no_heads(k), k, positions, rotation, cu_seqlens, backend)
        return
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if backend != "reference" and not (recorded and torch.compiler.is_compiling()):
        rest = (*rotation[:6], cu_seqlens, rotation.interleaved, False, backend)
        ops.rotary_inplace(q, k, positions, *rest)
        return
    q_out, k_out = rotated(q, k, positions, rotation, cu_seqlens, backend)
    q.copy_(q_out)
    k.copy_(k_out)


def check_writable(name: str, x: torch.Tensor) -> None:
    """In-place rotation would be wrong on a leaf that requires grad or on shared memory."""
    if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
        raise ValueError(
            f"inplace: {name} is a leaf that requires grad; expected inplace=False, or a "
            "tensor computed from it"
        )
    if overlaps_itself(x):
        raise ValueError(
            f"inplace: elements of {name} share memory (shape {tuple(x.shape)}, strides "
            f"{x.stride()}); pass {name}.contiguous()"
        )
