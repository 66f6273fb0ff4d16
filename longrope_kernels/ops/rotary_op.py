"""torch.library ops: schemas, fakes and autograd. What ``torch.compile`` and autograd see.

``rotary`` and ``rotary_`` take canonical arguments: q (B, S, Hq, D) and k (B, S, Hk, D) with a
unit last stride, Hk = 0 for "no k", positions (B, S). A rotation is linear and orthogonal up to
its scale, so its gradient is the same op with the sine negated (``conjugate``), for every backend
and to any order.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backends import choose as backends
from ..calls.records import Rotation
from ..rope import phase
from ..rope.value import FactorSet, Rope

_NAMESPACE = "longrope_kernels"
_TABLES = (
    "Tensor positions, Tensor steps, Tensor n_hat, Tensor attention_factor, Tensor max_length, "
    "Tensor? lengths, Tensor? sets, Tensor? cu_seqlens, "
    "bool interleaved, bool conjugate, str backend"
)
_library = torch.library.Library(_NAMESPACE, "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_library.define(f"rotary(Tensor q, Tensor k, {_TABLES}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"rotary_(Tensor(a!) q, Tensor(b!) k, {_TABLES}) -> ()", tags=_TAGS)
_library.define("frequencies(Tensor factors, float base) -> (Tensor, Tensor)", tags=_TAGS)

frequencies = torch.ops.longrope_kernels.frequencies.default
rotary = torch.ops.longrope_kernels.rotary.default
rotary_ = torch.ops.longrope_kernels.rotary_.default


# -------------------------------------------------------------------------------------- rotation


def _run_rotary(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = _fake_rotary(q, k)
    _rotate_into(q, k, out, rest)
    return out


def _run_rotary_(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    _rotate_into(q, k, (q, k), rest)


def _rotate_into(
    q: torch.Tensor,
    k: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    rest: tuple[Any, ...],
) -> None:
    positions, steps, n_hat, attention_factor, max_length, lengths, sets = rest[:7]
    cu_seqlens, interleaved, conjugate, backend = rest[7:]
    rotation = Rotation(steps, n_hat, attention_factor, max_length, lengths, sets, interleaved)
    backends.run_rotary(q, k, *out, positions, rotation, cu_seqlens, conjugate, backend)


def _fake_rotary(q: torch.Tensor, k: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


for _key in ("CPU", "CUDA"):
    _library.impl("rotary", _run_rotary, _key)
    _library.impl("rotary_", _run_rotary_, _key)
torch.library.register_fake(f"{_NAMESPACE}::rotary", _fake_rotary, lib=_library)
torch.library.register_fake(f"{_NAMESPACE}::rotary_", lambda *_: None, lib=_library)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out = rotary(*arguments)
        _save(ctx, arguments[2:])
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_q: Any, grad_k: Any) -> tuple[Any, ...]:
        return (*_rotate_back(ctx, grad_q, grad_k), *(None,) * 11)


class _RotaryInplace(torch.autograd.Function):
    """One tensor at a time: autograd lets a function that writes into a view return one output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            rotary_(x, no_heads(x), *rest)
        ctx.mark_dirty(x)
        _save(ctx, rest)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (_rotate_back(ctx, grads[0], None)[0], *(None,) * 11)


def _save(ctx: Any, rest: tuple[Any, ...]) -> None:
    *tensors, interleaved, conjugate, backend = rest
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.flags = interleaved, not conjugate, backend


def _rotate_back(ctx: Any, grad_q: Any, grad_k: Any) -> tuple[Any, Any]:
    """The gradients of both inputs by one launch; None where the incoming one is None."""
    grads = [None if g is None else _unit_last_stride(g) for g in (grad_q, grad_k)]
    one = grads[0] if grads[0] is not None else grads[1]
    if one is None:
        return None, None
    full = [no_heads(one) if g is None else g for g in grads]
    back = rotary(*full, *ctx.saved_tensors, *ctx.flags)
    return tuple(None if g is None else b for g, b in zip(grads, back, strict=True))  # type: ignore[return-value]


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def no_heads(x: torch.Tensor) -> torch.Tensor:
    """A stand-in for an absent q or k: that of x with no heads."""
    return x.new_empty((x.shape[0], x.shape[1], 0, x.shape[3]))


def _differentiable_rotary(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.is_grad_enabled() and (arguments[0].requires_grad or arguments[1].requires_grad):
        return _Rotary.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return rotary(*arguments)  # type: ignore[no-any-return]


def _versioned_rotary_(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    with torch._C._AutoDispatchBelowAutograd():
        rotary_(q, k, *rest)
    torch.autograd.graph.increment_version((q, k))


_library.impl("rotary", _differentiable_rotary, "Autograd")
_library.impl("rotary_", _versioned_rotary_, "Autograd")


def rotary_inplace(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
    """`rotary_`, recorded by autograd where q or k requires grad (then one launch for each)."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        for x in (q, k):
            _RotaryInplace.apply(x, *rest)  # type: ignore[no-untyped-call]
    else:
        rotary_(q, k, *rest)


# ----------------------------------------------------------------------------------- frequencies


def _host_frequencies(factors: torch.Tensor, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    tables = Rope((FactorSet(tuple(factors.tolist())),), base).tables(torch.device("cpu"))
    assert tables.inv_freq is not None
    return tables.inv_freq.clone(), tables.steps.clone()


def _device_frequencies(factors: torch.Tensor, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    original = phase.frequencies_on_device(base, torch.ones_like(factors))
    scaled = phase.frequencies_on_device(base, factors)
    inv_freq = torch.stack((original, scaled))[None]
    return inv_freq, phase.fixed_point_steps_on_device(inv_freq)


def _fake_frequencies(factors: torch.Tensor, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, 2, factors.shape[0])
    return (
        factors.new_empty(shape, dtype=torch.float64),
        factors.new_empty(shape, dtype=torch.int64),
    )


_library.impl("frequencies", _host_frequencies, "CPU")
_library.impl("frequencies", _device_frequencies, "CUDA")
torch.library.register_fake(f"{_NAMESPACE}::frequencies", _fake_frequencies, lib=_library)
