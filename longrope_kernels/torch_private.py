"""What this package takes of torch that is not public, each with its reason and its own test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch._C import _functorch
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack,
    temporarily_pop_interpreter_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function

Function = TypeVar("Function", bound=Callable[..., Any])
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NO_LEVEL = -1
_LEVEL = 0  # of forward-mode differentiation: torch has no other
_forward_ad = torch.autograd.forward_ad
_peek_transforms = _functorch.peek_interpreter_stack
_count_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_profiler_enabled = torch._C._autograd._profiler_enabled
_creation_of = torch._C._autograd._get_creation_meta
_WRITABLE = torch._C._autograd.CreationMeta.DEFAULT


def below_autograd() -> Any:
    """A context in which ops do not come to their autograd rule: inside that rule."""
    return torch._C._AutoDispatchBelowAutograd()


def below_function() -> AbstractContextManager[object]:
    """`below_autograd` in the forward pass of a Function that `applied` calls.

    torch records no gradients there, which is meant for one transform and not for those around it.
    """
    return below_autograd() if _peek_transforms() is None else _below_one_of_many()


@contextmanager
def _below_one_of_many() -> Iterator[None]:
    with below_autograd(), torch.enable_grad(), _forward_ad._set_fwd_grad_enabled(True):
        yield


def expect(condition: torch.Tensor, message: str) -> None:
    """An error where () bool ``condition`` is False, without waiting for a device, in graphs too.

    On the CPU a RuntimeError with the message; on a GPU the assertion of the device, which
    whoever next waits for it meets.
    """
    torch._assert_async(condition, message)


def constant_in_graphs(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo.

    That one takes a second, which everybody who imports this package would wait for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def static_in_graphs(x: torch.Tensor) -> None:
    """What ``torch._dynamo.mark_static`` does, without its import.

    Else a graph with dynamic shapes takes a batch of two and two factor sets for one symbol.
    """
    x._dynamo_static_indices = set(range(x.dim()))  # type: ignore[attr-defined]


def fake_mode_of(x: torch.Tensor) -> Any:
    """The mode that a fake tensor belongs to, or None for any other tensor."""
    return getattr(x, "fake_mode", None)


def is_plain(x: torch.Tensor) -> bool:
    """Whether x is torch's own class, which has data, and no stand-in such as a fake tensor.

    What `torch.vmap` hands on stands for many tensors, and has no values that can be read.
    """
    return type(x) in _PLAIN and (
        torch.compiler.is_compiling()
        or _peek_transforms() is None
        or not any(map(_functorch.is_batchedtensor, _wrapped(x)))
    )


def runs_now(*tensors: torch.Tensor) -> bool:
    """Whether a library that knows of no more than torch's own autograd can be called with these.

    Nothing traces or vectorises, differentiates forward, or puts a mode in between.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:  # a generator takes longer, here and below
        if type(x) not in _PLAIN:
            return False
    return _nothing_between()


def _nothing_between() -> bool:
    return not (
        _peek_transforms() is not None
        or _count_modes()
        or _forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def tangent_of(x: torch.Tensor) -> torch.Tensor | None:
    """What forward-mode differentiation carries with x; None outside of it, and as dynamo traces.

    Under the transforms of torch.func that of the innermost one alone, which is what an op's rule
    is called for; see `has_tangent`.
    """
    # A graph enters the level without a word to `forward_ad`.
    if torch.compiler.is_dynamo_compiling() or not (
        _forward_ad._current_level >= 0 or _peek_transforms() is not None
    ):
        return None
    tangent: torch.Tensor | None = _forward_ad.unpack_dual(x, level=_LEVEL).tangent
    return tangent


def primal_of(x: torch.Tensor) -> torch.Tensor:
    """x without its tangent."""
    primal: torch.Tensor = _forward_ad.unpack_dual(x, level=_LEVEL).primal
    return primal


def dual_of(primal: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """primal with a tangent, also in a graph."""
    return _forward_ad.make_dual(primal, tangent, level=_LEVEL)  # type: ignore[no-any-return]


def has_tangent(x: torch.Tensor) -> bool:
    """Whether forward-mode differentiation carries something with x, by any transform around."""
    if torch.compiler.is_compiling() or _forward_ad._current_level < 0:
        return False
    transform = _peek_transforms()
    if transform is None:
        return tangent_of(x) is not None
    if transform.key() == _functorch.TransformType.Jvp and tangent_of(x) is not None:
        return True
    if _functorch.maybe_get_level(x) == transform.level():
        x = _functorch.get_unwrapped(x)
    with temporarily_pop_interpreter_stack():
        return has_tangent(x)


def requires_grad(x: torch.Tensor) -> bool:
    """Whether x requires grad, by itself or by any transform of torch.func around."""
    if torch.compiler.is_compiling() or _peek_transforms() is None:
        return x.requires_grad
    return any(y.requires_grad for y in _wrapped(x))


def has_nested_gradients(*tensors: torch.Tensor) -> bool:
    """Whether torch.func takes the gradient of a gradient with respect to some of these."""
    if torch.compiler.is_compiling() or _peek_transforms() is None:
        return False
    wrappers = (y for x in tensors for y in _wrapped(x) if y.requires_grad)
    return len({_functorch.maybe_get_level(y) for y in wrappers} - {_NO_LEVEL}) > 1


def unwritable(x: torch.Tensor) -> str | None:
    """What x is that torch would not have written in place, in words; None where it may be.

    torch checks writes of its own before, and those of others afterwards. A graph writes nothing
    before all of it was traced, which meets torch's errors.
    """
    traced = torch.compiler.is_compiling()
    if traced or _peek_transforms() is None:
        return _unwritable(x, traced)
    return next(filter(None, map(_unwritable, _wrapped(x))), None)


def _unwritable(x: torch.Tensor, traced: bool = False) -> str | None:
    if not (x.requires_grad and torch.is_grad_enabled()):
        return None
    if x.is_leaf:
        return "a leaf that requires grad"
    if traced or not x._is_view():
        return None
    base = x._base
    if base is not None and base.is_leaf:
        return "a view of a leaf that requires grad"
    if _creation_of(x) != _WRITABLE:
        return "a view that autograd lets nobody write (of unbind, split or chunk, or of no_grad())"
    return None


def innermost(x: torch.Tensor) -> torch.Tensor:
    """What the transforms of torch.func have wrapped, whose memory it is."""
    if torch.compiler.is_compiling() or _peek_transforms() is None:
        return x
    *_, found = _wrapped(x)
    return found


def _wrapped(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """x, and one after the other what the transforms of torch.func have wrapped."""
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which wraps what is made now."""
    return not torch.compiler.is_compiling() and _peek_transforms() is not None


@contextmanager
def made_to_stay() -> Iterator[None]:
    """What is made within may be kept for any later call, with or without a backward.

    Else inference mode would mark it, and a transform of torch.func wrap it.
    """
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        yield


def applied(function: type[torch.autograd.Function], *flat: Any) -> Any:
    """``function.apply`` in an op's rule for gradients.

    A transform of torch.func has come to the rule by itself, then: one level is recorded here, and
    the op that the function calls goes on to the next.
    """
    if _peek_transforms() is None:
        return function.apply(*flat)
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*flat)  # type: ignore[misc]


def unwatched(*tensors: torch.Tensor) -> bool:
    """Whether nobody would see a call of an op on these tensors: it may be left out then.

    Nothing records gradients (backward or forward mode), traces, vectorises or profiles, no mode is
    on the stack, and the tensors are torch's own, none a view that negates what lies in memory,
    which an op is never given. An op costs some 10 us of the host beside what it does, a third of
    the rotation of one token on a CPU.
    """
    if torch.compiler.is_compiling():
        return False
    records = torch.is_grad_enabled()
    for x in tensors:
        if type(x) not in _PLAIN or x.is_neg() or (records and x.requires_grad):
            return False
    return _nothing_between() and not _profiler_enabled()


def in_backward() -> bool:
    """Whether a backward pass runs in this thread, as where a checkpoint runs layers again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@constant_in_graphs
def in_context_parallel() -> bool:
    """Whether torch's own ``context_parallel`` is in force, which puts its attention in the place.

    To ask its module would import it, which takes a second.
    """
    attends = torch.nn.functional.scaled_dot_product_attention
    return (getattr(attends, "__module__", None) or "").startswith("torch.distributed.")


def flash_attention_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What scaled_dot_product_attention takes on a CPU, with the log-sum-exp that it keeps back.

    q (B, Hq, Sq, D), k and v (B, Hk, Sk, D), none of them empty. Returns out like q, and lse
    (B, Hq, Sq) float32, base e.

    One query head of each group at a time: an op that knows of no groups reads past k.
    """
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    groups = q.shape[1] // k.shape[1]
    found = [op(q[:, g::groups], k, v, 0.0, causal, scale=scale) for g in range(groups)]
    out, lse = (torch.stack(x, 2).flatten(1, 2) for x in zip(*found, strict=True))
    return out, lse


def flash_attention_on_cpu_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of `flash_attention_on_cpu`; out and lse may be those over more keys."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    groups = q.shape[1] // k.shape[1]
    dqs, dk, dv = [], torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    for g in range(groups):
        own, *rest = (x[:, g::groups] for x in (d_out, q, out, lse))
        found = op(own, rest[0], k, v, *rest[1:], 0.0, causal, scale=scale)
        dqs.append(found[0])
        dk += found[1]
        dv += found[2]
    return torch.stack(dqs, 2).flatten(1, 2), dk, dv
