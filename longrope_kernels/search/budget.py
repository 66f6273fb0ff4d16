"""A search that fits into a number of hours: how many candidates."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .coarse import ENOUGH, Sieve
from .evolution import EvolutionSettings
from .source import read_json, write_json
from .state import JOURNAL, differences, locked

BUDGET = "budget.json"
# With fewer candidates a search is not worth its name.
_FEWEST = 16
# A measurement of less is made again: the first one loads and compiles.
_LONG = 5.0


@dataclass(frozen=True)
class Costs:
    """Seconds of the whole machine for what a search measures.

    Attributes:
        full: of a candidate by the full fitness, without a race.
        coarse: by the coarse one; None where there is none.
        formulas: ropes that are measured in full beside the candidates.
    """

    full: float
    coarse: float | None
    formulas: int


def planned(
    folder: Path,
    told: Mapping[str, Any],
    settings: EvolutionSettings,
    sieve: Sieve,
    hours: float,
    measure: Callable[[], Costs],
) -> tuple[EvolutionSettings, Sieve | None, str]:
    """Settings that fit into the hours, the sieve of a coarse fitness, and a line on them.

    What was chosen is in the folder, and read again there.

    Args:
        folder: of the search, where `BUDGET` is written.
        told: all options, as JSON values.
        settings: the most that are chosen.
        sieve: of the coarse fitness, where there is one.
        hours: for the search.
        measure: takes some forwards.

    Raises:
        ValueError: the hours are too few; the folder's were shared out for other options.
        RuntimeError: a search runs in the folder.
    """
    path, asked = folder / BUDGET, json.loads(json.dumps(told))
    if not path.exists():
        costs = measure()
        numbers = fitted(settings, hours, costs, sieve.share)
        known: dict[str, Any] = {"options": asked, "chosen": numbers}
        known |= {"seconds": {"full": costs.full, "coarse": costs.coarse}}
        with locked(folder / JOURNAL, "search"):
            if not path.exists():  # else another process was faster, and its choice stands
                write_json(path, known)
    known = read_json(path)
    found = differences(known["options"], asked)
    if found:
        raise ValueError(
            f"{folder}: the hours were shared out for other options: {'; '.join(found)}. Name "
            "another folder, or the same settings to go on"
        )
    chosen, seconds = replace(settings, **known["chosen"]), known["seconds"]
    text = f"{hours:g} hours: {chosen.candidates} candidates in {chosen.iterations} iterations"
    if seconds["coarse"] is None:
        return chosen, None, f"{text}, {seconds['full']:.3g} s each"
    text += f" ({seconds['coarse']:.3g} s each), {sieve.share:g} of them at the full length"
    # Where more than that share are, or all of them and none coarsely, it ends earlier. The first
    # iteration has some beyond its share: each formula, and as many as a correlation takes.
    whole = sieve.share + seconds["coarse"] / seconds["full"]
    most = math.ceil(chosen.candidates * whole) + ENOUGH
    return chosen, replace(sieve, most=most), f"{text} ({seconds['full']:.3g} s each)"


def fitted(settings: EvolutionSettings, hours: float, costs: Costs, share: float) -> dict[str, int]:
    """Population, iterations and so on for some hours.

    Races make it less time than this.

    Args:
        settings: the most that are chosen; fewer candidates come in the same proportions.
        hours: for the search.
        costs: of a candidate.
        share: of them, judged in full where there is a coarse fitness.

    Raises:
        ValueError: the hours are too few for a search.
    """
    most, formulas = settings.candidates, costs.formulas * costs.full
    each = costs.full if costs.coarse is None else costs.coarse + share * costs.full
    count, fewest = min(int((3600 * hours - formulas) / each), most), min(_FEWEST, most)
    if count < fewest:
        raise ValueError(
            f"hours: expected at least {(formulas + fewest * each) / 3600:.2g}, since a candidate "
            f"takes {costs.full:.3g} s at the full length, got {hours:g}"
        )
    names = ("population", "iterations", "mutants", "crossovers", "parents")
    chosen = {name: getattr(settings, name) for name in names}
    if count < most:
        # Several generations of children, each as large to the first population as before.
        chosen["population"] = min(settings.population, max(count // 5, fewest // 2))
        part = chosen["population"] / settings.population
        for name in ("mutants", "crossovers", "parents"):
            chosen[name] = max(round(part * chosen[name]), min(chosen[name], 1))
        children = max(chosen["mutants"] + chosen["crossovers"], 1)
        iterations = 1 + (count - chosen["population"]) // children
        chosen["iterations"] = min(iterations, settings.iterations)
    return chosen


def seconds_of(work: Callable[[], Any]) -> float:
    """Of a call; of a second one where the first is short."""
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        if seconds > _LONG:
            break
    return seconds
