"""Tables of ropes beside one another: which cells are marked, and what they say."""

from __future__ import annotations

import math

import pytest

from longrope_kernels.search.compare import (
    of_perplexity,
    of_retrieval,
    perplexity_cells,
    retrieval_cells,
)
from longrope_kernels.search.fitness import Measured
from longrope_kernels.search.retrieval import Retrieved


def measured(*losses: float) -> Measured:
    return Measured(tuple(2 * loss for loss in losses), (2,) * len(losses))


def test_the_best_and_those_as_good() -> None:
    rows = {
        "odd": {8: measured(math.nan, math.nan)},
        "near": {8: measured(1.0, 3.5)},  # 0.25 behind, which is the error of that difference
        "best": {8: measured(1.0, 3.0)},
        "far": {8: measured(1.2, 3.2)},  # 0.2 behind in both
        "endless": {8: measured(math.inf, 1.0)},
        "the same": {8: measured(1.0, 3.0)},
    }
    cells = dict(perplexity_cells(rows))
    assert cells["best"] == f"{math.exp(2):.4g} ± {math.exp(2):.2g}  "
    assert [name for name, cell in cells.items() if cell.endswith("=")] == ["near", "the same"]
    assert of_perplexity(rows)["losses"]["far"] == {8: [1.2, 3.2]}


def test_shares_and_losses_of_answers() -> None:
    one = Retrieved(((True, False), (True, True)), measured(0.5, 1.5))
    assert retrieval_cells({"a": {8: one}}) == [["a", "75 ± 25%; 1 ± 0.5"]]
    assert of_retrieval({"a": {8: one}})["a"][8] == {
        "found": 0.75,
        "found_error": pytest.approx(0.25),
        "by_depth": [1.0, 0.5],
        "loss": 1.0,
        "loss_error": pytest.approx(0.5),
    }
    alone = Retrieved(((True, False),), measured(0.5))
    assert retrieval_cells({"a": {8: alone}}) == [["a", "50%; 0.5"]]
