"""What follows from the kind of a call, worked out once for each.

The kind of a tensor is all but its values and where it lies: dtype, shape, strides, device, whether
16 divides its address, and which other argument it is. Numbers and text are their own kind. The
extension reads it all in less time than Python reads one shape; without it nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

try:
    from .._native import filled as filled
    from .._native import kind_of as _kind_of
except ImportError:
    filled = _kind_of = None  # type: ignore[assignment]

Result = TypeVar("Result")
Form = tuple[Any, ...]
# So many kinds are kept of a function.
MOST = 4096
_NOTHING = object()
_kept: list[dict[bytes, Any]] = []  # of all functions


def kind_of(*arguments: Any) -> bytes | None:
    """The kind of tensors, numbers, text and tuples of these; None where one is of no kind.

    No kind has what torch traces or wraps, what has no memory, and any other object.
    """
    # What else is traced than by dynamo is of no class that has a kind.
    if torch.compiler.is_dynamo_compiling() or _kind_of is None:
        return None
    return _kind_of(arguments)


def by_kind(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, called once for each kind of arguments: its result must follow from that.

    It takes arguments by position and reads no values, and no state but which backends there are,
    which stays. What it returns holds no tensor. An error is raised anew by each call.
    """
    kept: dict[bytes, Any] = {}
    _kept.append(kept)

    @wraps(function)
    def once(*arguments: Any) -> Result:
        kind = kind_of(*arguments)
        if kind is None:
            return function(*arguments)
        found = kept.get(kind, _NOTHING)
        if found is _NOTHING:
            found = function(*arguments)
            if len(kept) >= MOST:
                kept.clear()
            kept[kind] = found
        return found  # type: ignore[no-any-return]

    once.kept = kept  # type: ignore[attr-defined]
    return once


def forget() -> None:
    """Work out all anew, for who changes which backends there are."""
    for kept in _kept:
        kept.clear()


def form_of(made: tuple[Any, ...], arguments: tuple[Any, ...]) -> Form | None:
    """What was made of arguments, without their tensors; None where it holds another tensor.

    ``filled`` makes of it and of arguments of the same kind what would be made of these.
    """
    places = {id(x): bytes([i]) for i, x in reversed([*enumerate(_tensors(arguments))])}
    form: Form = _form(made, places)
    return None if _tensors(form) else form


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, tuple):
        return [y for part in x for y in _tensors(part)]
    return [x] if isinstance(x, torch.Tensor) else []


def _form(x: Any, places: dict[int, bytes]) -> Any:
    if type(x) is tuple:
        return tuple(_form(y, places) for y in x)
    return places.get(id(x), x)
