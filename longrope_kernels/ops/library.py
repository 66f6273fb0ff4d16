"""torch.library ops of call records: one definition for the schema, the body and the fake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..calls import schema
from ..torch_private import below_autograd, tangent_of

NAMESPACE = "longrope_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def define(
    name: str,
    record: type[tuple[Any, ...]],
    returns: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    extra: str = "str backend",
    before: str = "",
    mutable: Sequence[str] = (),
) -> Any:
    """An op of the fields of ``record``, on CPU and CUDA tensors.

    Args:
        name: of the op.
        record: the call it takes, field by field.
        returns: of its schema.
        run: takes the arguments in ``before``, the record, and those in ``extra``.
        fake: the same on tensors without values.
        extra: arguments that follow the record's.
        before: arguments that stand before them.
        mutable: fields that it writes into.

    Returns:
        The op; it takes flat arguments, as `schema.flatten` makes them.
    """
    first = len(before.split(",")) if before else 0
    count = first + len(schema.fields(record))

    def packed(function: Callable[..., Any]) -> Callable[..., Any]:
        def body(*flat: Any) -> Any:
            call = schema.build(record, flat[first:count])
            return function(*flat[:first], call, *flat[count:])

        return body

    parts = filter(None, (before, schema.arguments(record, mutable), extra))
    LIBRARY.define(f"{name}({', '.join(parts)}) -> {returns}", tags=TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, packed(run), key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", packed(fake), lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def check_underivable(op: Any, flat: Sequence[Any], gradients: bool = True) -> None:
    """Refuse, in the op's rule for gradients, what torch would take for constant.

    The public functions do that first, by their own names, and see all but a graph's transforms.

    Args:
        op: as `define` returns it.
        flat: its arguments.
        gradients: whether it has no gradients either, beside no forward-mode derivatives.

    Raises:
        NotImplementedError: naming the op's argument.
    """
    for argument, x in zip(op._schema.arguments, flat, strict=True):
        if not isinstance(x, torch.Tensor):
            continue
        what = "forward-mode derivative" if tangent_of(x) is not None else ""
        if gradients and torch.is_grad_enabled() and x.requires_grad:
            what = "gradient"
        if what:
            raise NotImplementedError(
                f"{argument.name}: {op._schema.name} has no {what} by this backend; expected "
                "backend='reference'"
            )


def without_derivatives(op: Any) -> None:
    """The rule for gradients of an op that has none.

    Args:
        op: as `define` returns it.
    """
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def rule(*flat: Any) -> Any:
        check_underivable(op, flat)
        with below_autograd():
            found = op(*flat)
        if written:
            torch.autograd.graph.increment_version([flat[i] for i in written])
        return found

    LIBRARY.impl(op._schema.name, rule, "Autograd")


def made_like(x: torch.Tensor) -> torch.Tensor:
    """Memory for a result like x, with a unit last stride, as all kernels take it.

    torch gives an x whose elements share memory, as windows that slide over tokens do, any order.
    """
    made = torch.empty_like(x)
    return made if made.stride(-1) == 1 else x.new_empty(x.shape)


def save(ctx: Any, flat: Sequence[Any]) -> None:
    """Keep flat arguments for a backward pass."""
    ctx.set_materialize_grads(False)
    ctx.are_tensors = [isinstance(x, torch.Tensor) for x in flat]
    ctx.save_for_backward(*(x for x in flat if isinstance(x, torch.Tensor)))
    ctx.others = [x for x in flat if not isinstance(x, torch.Tensor)]


def saved(ctx: Any) -> list[Any]:
    """What `save` kept; read once, since activation checkpointing allows no more."""
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    return [next(tensors if is_tensor else others) for is_tensor in ctx.are_tensors]
