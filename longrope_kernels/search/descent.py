"""What a winner owes to the formula it descends from, and what to its attention factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Search
from .candidate import Evaluation
from .space import GRID

YARN = "YaRN"


def descent(search: Search) -> dict[str, Any] | None:
    """The origin of the best candidate so far, as JSON values; None where there is none.

    Returns:
        "formula": its name. "largest_change": of a factor since, as a ratio, and the "pair" where
        it is. "fitness": that of the formula on the grid, with its own attention factor, and
        "with_attention": with the winner's; None as long as these are not measured. What the
        attention factor alone contributes is the difference between the two.
    """
    best = search.best
    start = None if best is None else search.space.start_of(best.candidate)
    if best is None or start is None:
        return None
    changes = [
        max(a / b, b / a) for a, b in zip(best.candidate.factors, start.factors, strict=True)
    ]
    by_factors = _like(search, start.origin)
    known = {(one.candidate.n_hat, one.candidate.attention): one.fitness for one in by_factors}
    return {
        "formula": start.origin,
        "largest_change": max(changes),
        "pair": changes.index(max(changes)) + search.space.pairs - search.space.genes,
        "fitness": known.get((start.n_hat, start.attention)),
        "with_attention": known.get((start.n_hat, best.candidate.attention)),
    }


def in_words(content: Mapping[str, Any]) -> str:
    """A line on what `descent` gives."""
    change = f"factors changed by {content['largest_change'] - 1:.1%} at most"
    text = f"from {content['formula']}, {change} (pair {content['pair']})"
    before, after = content["fitness"], content["with_attention"]
    if before is not None and after is not None and before != after:
        text += f"; its attention factor alone: {before:.4g} to {after:.4g}"
    return text


def best_attention(search: Search, name: str = YARN) -> tuple[float, float] | None:
    """A formula's lowest fitness over the attention factors that were measured, and that factor.

    None where the attention factor is not searched, or none was measured.
    """
    found = [one for one in _like(search, name) if one.candidate.attention is not None]
    if not found:
        return None
    best = min(found, key=lambda one: one.fitness)
    assert best.candidate.attention is not None
    return best.fitness, best.candidate.attention / GRID


def _like(search: Search, name: str) -> list[Evaluation]:
    """The complete and finite evaluations of candidates with the very factors of a formula."""
    starts = {(one.factors, one.n_hat) for one in search.space.starts() if one.origin == name}
    return [
        one
        for one in search.evaluations
        if one.rank[0] == 0 and (one.candidate.factors, one.candidate.n_hat) in starts
    ]
