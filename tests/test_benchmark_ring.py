"""benchmarks/ring.py: the simulated timeline, and the formula of the page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from benchmark_modules import ring

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("kv_heads", [2, 16])
def test_the_simulation_finds_the_formula(backward: bool, ranks: int, kv_heads: int) -> None:
    rest = {"ranks": ranks, "heads": 16, "kv_heads": kv_heads}
    make = partial(ring.Ring, link=2e9, speed=3e12, backward=backward, **rest)
    # Of two ranks the gradients go when no keys do, 4 bytes in place of 2 and 4.
    part = 4 / 6 if backward and ranks == 2 else 1.0
    assert ring.hidden_from(make) == pytest.approx(part * make(2).formula(), rel=0.01)


def test_a_slow_link_is_waited_for() -> None:
    slow = ring.Ring(2048, ring.LINKS["InfiniBand NDR"], ring.FORWARD)
    total, computed = slow.seconds()
    assert total == pytest.approx(slow.computing(0, 7) + 7 * slow.sending(2))
    assert total > 2 * computed
    assert replace(slow, link=1e15).seconds()[0] == pytest.approx(computed)


def test_balanced_ranks_end_together_and_contiguous_ones_wait() -> None:
    fast = ring.Ring(4096, 1e15, ring.BACKWARD)
    works = [sum(fast.computing(rank, step) for step in range(8)) for rank in range(8)]
    assert works == pytest.approx([works[0]] * 8)
    assert replace(fast, order="contiguous").seconds()[1] == pytest.approx(15 / 8 * works[0])


def test_the_page_has_these_numbers() -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    table = {line.split()[1]: line.split("|") for line in lines if " GB/s |" in line}
    for link, what, formula, simulated in ring.rows(8, 32, 8, 128):
        cell = table[link.split()[0]][-3 if what == "forward" else -2]
        assert cell.strip() == f"{formula:.0f}"
        assert simulated == pytest.approx(formula, rel=0.01)
