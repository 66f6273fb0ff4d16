"""Ropes beside one another, by length: as JSON, and as the cells of a table with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .fitness import Measured
from .retrieval import Retrieved

One = TypeVar("One")
Rows = Mapping[str, Mapping[int, One]]  # by rope and length


def of_perplexity(rows: Rows[Measured]) -> dict[str, Any]:
    """Perplexities, their standard errors, and the loss of each document in nats per token."""

    def losses(one: Measured) -> list[float]:
        return [total / count for total, count in zip(one.sums, one.counts, strict=True)]

    return {
        "perplexity": _each(rows, lambda one: one.perplexity),
        "errors": _each(rows, lambda one: one.perplexity * one.error),
        "losses": _each(rows, losses),
    }


def of_retrieval(rows: Rows[Retrieved]) -> dict[str, Any]:
    """The share of answers found, in all and by depth, their loss in nats per token, and errors."""
    return _each(
        rows,
        lambda one: {
            "found": one.share,
            "found_error": one.error,
            "by_depth": one.shares(),
            "loss": one.measured.loss,
            "loss_error": one.measured.error,
        },
    )


def perplexity_cells(rows: Rows[Measured]) -> list[list[str]]:
    """A line for each rope, with `legend` below."""
    best: dict[int, Measured] = {}
    for row in rows.values():
        for length, one in row.items():
            if length not in best or one.loss < best[length].loss or math.isnan(best[length].loss):
                best[length] = one

    def cell(one: Measured, best: Measured) -> str:
        shown = with_error(one.perplexity, one.perplexity * one.error)
        # Of two that are equal the one that came first is the best one.
        tied = one is not best and one.loss - best.loss <= one.distance_error(best)
        return f"{shown} {'=' if tied else ' '}"

    return [
        [name, *(cell(one, best[length]) for length, one in row.items())]
        for name, row in rows.items()
    ]


def retrieval_cells(rows: Rows[Retrieved]) -> list[list[str]]:
    """A line for each rope: the share, and the loss of the answers."""
    return [
        [
            name,
            *(
                f"{with_error(100 * one.share, 100 * one.error)}%; "
                f"{with_error(one.measured.loss, one.measured.error)}"
                for one in row.values()
            ),
        ]
        for name, row in rows.items()
    ]


def with_error(value: float, error: float) -> str:
    """A number, and its standard error where there is one."""
    return f"{value:.4g}" if math.isnan(error) else f"{value:.4g} \u00b1 {error:.2g}"


def legend(documents: int) -> str:
    """What the marks of the table mean."""
    if documents == 1:
        return "one document: no standard errors, and no telling which differences mean anything"
    return (
        f"\u00b1: the standard error over {documents} documents; =: as good as the best of its "
        "column, the difference is no larger than its own standard error over them"
    )


def _each(rows: Rows[One], of: Callable[[One], Any]) -> dict[str, Any]:
    return {name: {length: of(one) for length, one in row.items()} for name, row in rows.items()}
