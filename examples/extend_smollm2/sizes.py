"""What the experiment does, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The main table's.

    Attributes:
        original: tokens that the model was trained for.
        lengths: columns of the table, in tokens.
        target: what each row is made for, in tokens.
        last: tokens that count in each text, the same at every length.
        longest: tokens of a text; their ends are what is measured.
        searched, judged: texts, as `fetch.documents` names them.
        asked: how many of the judged texts hide several keys; the first one also hides one.
        attentions: factors tried beside YaRN's own.
        uniform: lambdas of one number for all pairs, beside PI's.
        n_hats: thresholds tried with the factors that the first search found.
        scored: tokens that count in a search.
        population, iterations: of a search, at most.
        hours, short_hours: of a search, and of each readjustment.
        seeds: of searches.
        layers: the first ones alone; None for all.
        dtype: of the model; bfloat16 as published, or float32.
    """

    original: int = 8192
    lengths: tuple[int, ...] = (4096, 8192, 16384)
    target: int = 16384
    last: int = 1024
    longest: int = 32768
    searched: tuple[str, ...] = ("prose: Genesis",)
    judged: tuple[str, ...] = (
        "prose: Jeremiah",
        "drama: king-lear",
        "code: turtle.py",
        "prose: Isaiah",
        "drama: othello",
    )
    asked: int = 3
    attentions: tuple[float, ...] = (1.0, 1.02, 1.04, 1.1)
    uniform: tuple[float, ...] = (1.25, 1.5)
    n_hats: tuple[int, ...] = (0, 16, 64, 256)
    scored: int = 2048
    population: int = 32
    iterations: int = 6
    hours: float = 0.5
    short_hours: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int | None = None
    dtype: str = "bfloat16"


FULL = Sizes(
    lengths=(4096, 8192, 16384, 32768),
    searched=("prose: Genesis", "drama: hamlet", "code: _pydecimal.py"),
    asked=5,
    population=64,
    iterations=40,
    hours=8,
    short_hours=2,
)
SMALL = Sizes(
    original=512,
    lengths=(256, 512, 1024),
    target=1024,
    last=64,
    longest=1024,
    judged=("prose: Jeremiah", "code: turtle.py"),
    asked=1,
    attentions=(1.0,),
    uniform=(1.5,),
    n_hats=(0, 16),
    scored=64,
    population=4,
    iterations=1,
    hours=1,
    short_hours=1,
    seeds=(0,),
    layers=4,
    dtype="float32",  # the check compares with a loop of its own, which rounding would blur
)
