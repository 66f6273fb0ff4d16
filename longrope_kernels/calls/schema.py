"""torch.library schemas of call records, and their flat arguments, made from the records' fields.

torch.library knows tensors and numbers alone: an op takes each of them by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeVar, get_type_hints

import torch

Record = TypeVar("Record", bound=tuple[Any, ...])

_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    str | None: "str?",
}


@cache
def fields(record: type[tuple[Any, ...]]) -> tuple[tuple[str, str], ...]:
    """Name and schema type of each flat argument; a record in a record gives its name first."""
    found: list[tuple[str, str]] = []
    for name, hint in get_type_hints(record).items():
        if hint in _TYPES:
            found.append((name, _TYPES[hint]))
        else:
            found += ((f"{name}_{inner}", kind) for inner, kind in fields(hint))
    return tuple(found)


def arguments(record: type[tuple[Any, ...]], mutable: Sequence[str] = ()) -> str:
    """The arguments of an op's schema; ``mutable`` names the tensors that it writes into."""
    written = {name: f"Tensor({letter}!)" for name, letter in zip(mutable, "abc", strict=False)}
    return ", ".join(f"{written.get(name, kind)} {name}" for name, kind in fields(record))


def flatten(call: tuple[Any, ...]) -> list[Any]:
    """The flat arguments of a call."""
    flat: list[Any] = []
    for value in call:
        if isinstance(value, tuple):
            flat += flatten(value)
        else:
            flat.append(value)
    return flat


def build(record: type[Record], flat: Sequence[Any]) -> Record:
    """The call that `flatten` took apart; what follows its arguments in ``flat`` is not read."""
    return _build(record, iter(flat))


def _build(record: type[Record], flat: Iterator[Any]) -> Record:
    return record(*(next(flat) if part is None else _build(part, flat) for part in _parts(record)))


@cache
def _parts(record: type[tuple[Any, ...]]) -> tuple[Any, ...]:
    """For each field its record, or None for a flat argument."""
    return tuple(None if hint in _TYPES else hint for hint in get_type_hints(record).values())
