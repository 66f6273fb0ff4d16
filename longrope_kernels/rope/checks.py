"""What is odd about a factor set, though it is valid: loaders warn, and never refuse."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

from .published import published_configs

# LongRoPE (arXiv 2402.13753) searches lambda_i in [1, 1.25 s].
_RANGE = 1.25


class FactorWarning(UserWarning):
    """Factors that a search for LongRoPE would not give; the message says what was seen."""


def warn_about(
    sets: Sequence[Sequence[float]], factor: float | None = None, *, where: str = ""
) -> None:
    """Warn where a set is not monotone, beyond ``1.25 * factor``, or above a longer one's.

    Valid sets are all of that: some of the published ones, where stages were composed. So nothing
    is said about the sets that come with the package (`published_configs`), as they were published.

    Args:
        sets: factors of each set, by ascending length.
        factor: the extension ratio ``s``; None where nobody knows it, then beyond is not checked.
        where: the file they are from, for the message.

    The warning points at the caller of the caller: of the public function that loads.
    """
    for message in _findings(sets, factor):
        text = f"{where}: {message}" if where else message
        warnings.warn(text, FactorWarning, stacklevel=3)


def _findings(sets: Sequence[Sequence[float]], factor: float | None) -> list[str]:
    names = ["short_factor", "long_factor"]
    if len(sets) != 2:
        names = [f"factors of set {i}" for i in range(len(sets))] if len(sets) > 1 else ["factors"]
    lists = [tuple(float(value) for value in values) for values in sets]
    known = [values in _published_lists() for values in lists]
    messages = []
    for name, values, skip in zip(names, lists, known, strict=True):
        if not skip:
            messages += _not_monotone(name, values) + _beyond(name, values, factor)
    for i in range(len(lists) - 1):
        if not (known[i] and known[i + 1]):
            messages += _short_above_long(names[i : i + 2], lists[i], lists[i + 1])
    return messages


def _not_monotone(name: str, values: Sequence[float]) -> list[str]:
    falls = [i for i in range(1, len(values)) if values[i] < values[i - 1]]
    if not falls:
        return []
    i = falls[0]
    return [
        f"{name}: not monotone, falls from {values[i - 1]} for pair {i - 1} to {values[i]} for "
        f"pair {i}{_more(falls)}; LongRoPE's search imposes that factors never fall"
    ]


def _beyond(name: str, values: Sequence[float], factor: float | None) -> list[str]:
    if factor is None:
        return []
    beyond = [i for i, value in enumerate(values) if value > _RANGE * factor]
    if not beyond:
        return []
    i = max(beyond, key=lambda i: values[i])
    return [
        f"{name}: {values[i]} for pair {i}{_more(beyond)} is beyond {_RANGE} s = "
        f"{_RANGE * factor:g}, s = {factor:g} the extension ratio: LongRoPE's search ends there"
    ]


def _short_above_long(
    names: Sequence[str], short: Sequence[float], long: Sequence[float]
) -> list[str]:
    above = [i for i, (one, other) in enumerate(zip(short, long, strict=True)) if one > other]
    if not above:
        return []
    i = above[0]
    return [
        f"{names[0]}: {short[i]} for pair {i} is larger than the {long[i]} of {names[1]}"
        f"{_more(above)}; the set of longer sequences usually has the larger factors"
    ]


def _more(pairs: Sequence[int]) -> str:
    return f" (and {len(pairs) - 1} more)" if len(pairs) > 1 else ""


@cache
def _published_lists() -> frozenset[tuple[float, ...]]:
    scalings = [config["rope_scaling"] for config in published_configs().values()]
    return frozenset(
        tuple(float(value) for value in scaling[name])
        for scaling in scalings
        for name in ("short_factor", "long_factor")
    )
