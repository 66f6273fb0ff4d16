"""A search within some hours: what is chosen, kept, and said; and the bar that shows it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from space_cases import SMALL, measure, small_space

from longrope_kernels.search import Evaluation, EvolutionarySearch, EvolutionSettings
from longrope_kernels.search.bar import SearchBar
from longrope_kernels.search.budget import BUDGET, Costs, fitted, planned, seconds_of
from longrope_kernels.search.coarse import ENOUGH, Sieve

PAPER, SIEVE = EvolutionSettings(), Sieve(0.125)


def taken(chosen: dict[str, int], share: float, costs: Costs) -> float:
    """Seconds of a search of these numbers, without races."""
    children = chosen["mutants"] + chosen["crossovers"]
    count = chosen["population"] + (chosen["iterations"] - 1) * children
    each = costs.full if costs.coarse is None else costs.coarse + share * costs.full
    return costs.formulas * costs.full + count * each


@pytest.mark.parametrize("hours", [0.2, 0.5, 1, 2, 3, 5, 8])
@pytest.mark.parametrize(("coarse", "share"), [(None, 0.125), (3.0, 0.125), (3.0, 0.5)])
def test_what_is_chosen_fits_into_the_time_and_uses_it(
    hours: float, coarse: float | None, share: float
) -> None:
    costs = Costs(30.0, coarse, 4)
    chosen = fitted(PAPER, hours, costs, share)
    if EvolutionSettings(**chosen) == PAPER:  # there is time for more than that
        assert taken(chosen, share, costs) <= 3600 * hours
        return
    assert 0.75 * 3600 * hours < taken(chosen, share, costs) <= 3600 * hours
    # As many children to the first population as the paper has, and half of it are parents.
    assert chosen["parents"] == pytest.approx(chosen["population"] / 2, abs=1)
    assert chosen["mutants"] == pytest.approx(chosen["population"] / 4, abs=1)


def test_more_time_has_more_candidates_up_to_those_asked_for() -> None:
    costs = Costs(10.0, 1.0, 4)
    every = [EvolutionSettings(**fitted(PAPER, n, costs, 0.125)) for n in (0.2, 0.5, 0.8, 1, 100)]
    counts = [one.candidates for one in every]
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2]
    assert every[-1] == every[-2] == PAPER
    half = EvolutionSettings(**fitted(PAPER, 0.5, costs, 0.5))
    assert half.candidates < counts[1] / 2


def test_too_few_hours_are_refused() -> None:
    costs = Costs(60.0, 5.0, 4)
    with pytest.raises(ValueError, match=r"hours: expected at least 0\.12, .* takes 60 s .* got 0"):
        fitted(PAPER, 0.05, costs, 0.125)
    assert taken(fitted(PAPER, 0.13, costs, 0.125), 0.125, costs) <= 0.13 * 3600


def test_what_was_chosen_is_kept(tmp_path: Path) -> None:
    told: dict[str, Any] = {"hours": 1.0, "n_hats": (0, 4)}
    measured = []

    def costs() -> Costs:
        measured.append(1)
        return Costs(10.0 * len(measured), 1.0, 4)

    first = planned(tmp_path, told, PAPER, SIEVE, 1.0, costs)
    assert planned(tmp_path, told, PAPER, SIEVE, 1.0, costs) == first
    assert len(measured) == 1
    settings, sieve, text = first
    # As many in full as the time has room for, were all of it theirs, and those of the beginning.
    most = math.ceil(settings.candidates * (0.125 + 1.0 / 10.0)) + ENOUGH
    assert sieve == Sieve(0.125, most=most)
    assert f"in {settings.iterations} iterations (1 s each), 0.125 of them at the full" in text
    with pytest.raises(ValueError, match=r"other options: hours is 1\.0 there and 2\.0 here"):
        planned(tmp_path, told | {"hours": 2.0}, PAPER, SIEVE, 2.0, costs)
    assert (tmp_path / BUDGET).exists()
    assert not list(tmp_path.glob("*.new"))


def test_hours_that_another_process_shares_out_meanwhile_stand(tmp_path: Path) -> None:
    def costs() -> Costs:
        planned(tmp_path, {}, PAPER, SIEVE, 1.0, lambda: Costs(10.0, 1.0, 4))
        return Costs(20.0, 1.0, 4)

    first = planned(tmp_path, {}, PAPER, SIEVE, 1.0, costs)
    assert planned(tmp_path, {}, PAPER, SIEVE, 1.0, costs) == first
    assert "(10 s each)" in first[2]


def test_hours_are_not_shared_out_under_a_running_search(tmp_path: Path) -> None:
    with (
        EvolutionarySearch(small_space(), SMALL, tmp_path),
        pytest.raises(RuntimeError, match="another search has this folder open"),
    ):
        planned(tmp_path, {}, PAPER, SIEVE, 1.0, lambda: Costs(10.0, 1.0, 4))
    assert not (tmp_path / BUDGET).exists()


def test_too_few_hours_leave_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hours: expected at least"):
        planned(tmp_path / "out", {}, PAPER, SIEVE, 0.05, lambda: Costs(60.0, 5.0, 4))
    assert not (tmp_path / "out").exists()


def test_short_work_is_timed_once_more() -> None:
    calls = []
    assert 0 <= seconds_of(lambda: calls.append(1)) < 1
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------ bar


def shown(search: EvolutionarySearch, bar: SearchBar) -> str:
    bar.show(search)
    bar.refresh()
    text: str = bar.fp.getvalue().split("\r")[-1]
    return text


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch) -> SearchBar:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    return SearchBar("search")


def test_the_bar_shows_formulas_candidates_and_both_bests(bar: SearchBar) -> None:
    space = small_space(attention="searched")
    search = EvolutionarySearch(space, SMALL, None, {}, ("PI", "YaRN"), Sieve())
    pi, yarn = search.ask()
    assert "0/46" in shown(search, bar)
    search.tell(Evaluation(pi, 9.25))
    assert "1/46" in shown(search, bar)
    assert "PI 9.25" in shown(search, bar)
    search.tell(Evaluation(yarn, 4.5))
    search.tell(measure(search.ask()))
    assert search.stage == "full"
    search.tell(measure(search.ask()))
    assert search.best is not None
    text = shown(search, bar)
    assert "14/46" in text
    assert f"best {search.best.fitness:.4g}, YaRN 4.5, 8 at the full length" in text
    assert "rank correlation 1.00" in text
    assert " a minute" in text


def test_what_an_earlier_run_has_done_is_no_speed(bar: SearchBar) -> None:
    search = EvolutionarySearch(small_space(), SMALL)
    search.tell(measure(search.ask()))
    assert "12/44" in shown(search, bar)
    assert ", ..." in shown(search, bar)
    search.tell(measure(search.ask()[:1]))
    assert " a minute" in shown(search, bar)
    assert math.isfinite(bar.format_dict["rate"])
    other = EvolutionarySearch(small_space(), SMALL)
    assert "0/44" in shown(other, bar)
