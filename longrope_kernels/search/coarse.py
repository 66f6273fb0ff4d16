"""Which candidates of an iteration are judged by the full fitness, after a coarse one saw all.

The coarse fitness orders, and nothing else: parents and the winner are chosen by the full one. How
well it orders is measured while the search runs, on the candidates that got both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .candidate import Evaluation

# Of an iteration's candidates in full, by default.
SHARE = 0.125
# Rank correlations: `auto` doubles the share below the first, and takes all below the second.
GOOD, LEAST = 0.75, 0.7
# So many candidates with both before a correlation means anything.
ENOUGH = 8

# Tokens by default: an eighth of the length behind a prefix, a quarter in a window, but not more
# than so many; where a quarter comes to fewer than the last, `auto` has no coarse fitness.
BEHIND, IN_WINDOWS = 8, 4
_MOST, _FEWEST = 4096, 128
MODES = ("auto", "on", "off")

Both = tuple[Evaluation, Evaluation]


@dataclass(frozen=True)
class Coarse:
    """How candidates are judged before the full fitness: behind a prefix, or by skipped windows.

    Attributes:
        mode: "on"; "off"; or "auto", which is off where windows would be short, judges more
            candidates in full where the two fitnesses rank them differently (`Sieve.adapts`), and
            no more by windows where they contradict one another.
        share: of an iteration's candidates, that are judged in full.
        tokens: behind a prefix, None for an eighth of the length, up to 4096; or of a window, None
            for a quarter, up to 4096.
        chunks: 2 to 4, into which a window is cut; of needles' there is one for each, and two.
        windows: of each document; one with needles.

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    mode: Annotated[
        str,
        typer.Option(
            "--coarse",
            help="Judge candidates by the last tokens behind a prefix first, or by short windows "
            "at far positions: on, off, or auto, as long as that ranks them as the full length "
            "does.",
        ),
    ] = "auto"
    share: Annotated[
        float, typer.Option("--coarse-share", help="Of them, to be judged at the full length.")
    ] = SHARE
    tokens: Annotated[
        int | None,
        typer.Option(
            "--coarse-tokens",
            help="To judge by. [default: an eighth of the length behind a prefix, a quarter in "
            "windows, up to 4096]",
        ),
    ] = None
    chunks: Annotated[
        int, typer.Option("--coarse-chunks", min=2, max=4, help="Into which a short window is cut.")
    ] = 2
    windows: Annotated[int, typer.Option("--coarse-windows", min=1, help="Of each document.")] = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"coarse: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"coarse-share: expected above 0 and up to 1, got {self.share}")
        for name, value, least, most in (
            ("chunks", self.chunks, 2, 4),
            ("tokens", self.tokens, 2 * self.chunks, math.inf),
            ("windows", self.windows, 1, math.inf),
        ):
            if value is not None and not least <= value <= most:
                end = f"to {most}" if most < math.inf else "or more"
                raise ValueError(f"coarse-{name}: expected {least} {end}, got {value}")

    def window(self, length: int, part: int = IN_WINDOWS) -> int | None:
        """The tokens to judge by for sequences of a length, or None for no coarse fitness.

        Args:
            length: in tokens.
            part: of the length, by default; `BEHIND` or `IN_WINDOWS`.

        Raises:
            ValueError: it is on, and the length has no room for two windows.
        """
        tokens = self.tokens
        if tokens is None:
            tokens = min(max(length // part, min(length // IN_WINDOWS, _FEWEST)), _MOST)
        if self.mode == "off" or (self.mode == "auto" and tokens < _FEWEST and not self.tokens):
            return None
        tokens = max(tokens, 2 * self.chunks)
        if length < 2 * tokens:
            if self.mode == "auto":
                return None
            raise ValueError(
                f"coarse-tokens: expected at most {length // 2}, since {length} tokens need room "
                f"for two windows, got {tokens}"
            )
        return tokens

    def describe(self, length: int) -> dict[str, Any]:
        """The windows for sequences of a length, as JSON values."""
        return {"tokens": self.window(length), "chunks": self.chunks, "windows": self.windows}

    @property
    def sieve(self) -> Sieve:
        """What is judged in full."""
        return Sieve(self.share, self.mode == "auto")


@dataclass(frozen=True)
class Sieve:
    """How many of an iteration's candidates are judged by the full fitness.

    Attributes:
        share: of the candidates; above 0, up to 1.
        adapts: more of them where the two fitnesses rank candidates differently: twice the share
            below a rank correlation of 0.75; below 0.7 all of them, twice as many at a time, and no
            coarse fitness in iterations that begin so.
        most: evaluations by the full fitness, after which no iteration begins; None for no end.

    Raises:
        ValueError: a share out of range.
    """

    share: float = SHARE
    adapts: bool = True
    most: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected above 0 and up to 1, got {self.share}")

    def misleads(self, correlation: float | None) -> bool:
        """Whether the coarse fitness is of no use."""
        return self.adapts and correlation is not None and not correlation >= LEAST

    def spent(self, evaluated: int) -> bool:
        """Whether so many evaluations by the full fitness are all that there is time for."""
        return self.most is not None and evaluated >= self.most

    def wanted(self, count: int, correlation: float | None) -> int:
        """How many of ``count`` candidates to judge in full, at least 1.

        Where it adapts and there is no correlation yet, so many that there is one.

        Args:
            count: of the iteration.
            correlation: of `correlation`, over all candidates so far.
        """
        share = self.share
        if self.misleads(correlation):
            share = 1.0
        elif self.adapts and correlation is not None and correlation < GOOD:
            share = min(2 * share, 1.0)
        least = ENOUGH if self.adapts and correlation is None else 1
        return min(max(math.ceil(share * count - 1e-9), least), count)

    def order(self, judged: Sequence[Evaluation]) -> list[Evaluation]:
        """The candidates of an iteration, the one to judge first in front.

        They are in the order of their coarse fitness, but for the one in the middle, which comes
        third: it stands for those that are not judged (`standing`).
        """
        ranked = sorted(judged, key=lambda one: one.rank)
        if len(ranked) > 4:
            ranked.insert(2, ranked.pop(len(ranked) // 2))
        return ranked


def standing(judged: Sequence[bool]) -> list[float]:
    """For how many candidates of an iteration each of those stands that are judged in full.

    The best are all judged, and stand for themselves; the others for those between them too. The
    best are alike, and ranks among them are mostly noise: they alone would say little of whether
    the coarse fitness tells good candidates from bad ones.

    Args:
        judged: whether each is, in the order of the coarse fitness.

    Returns:
        The number for each of those that are, in the same order.
    """
    best = next((at for at, one in enumerate(judged) if not one), len(judged))
    others = sum(judged[best:])
    return [1.0] * best + [(len(judged) - best) / others] * others if others else [1.0] * best


def correlation(both: Sequence[Both], weights: Sequence[float]) -> float | None:
    """Spearman's rank correlation of coarse and full fitness, over what candidates stand for.

    Those that a race gave up share the place behind all others. None where there are too few
    candidates, or one of the two fitnesses has the same rank for all.

    Args:
        both: the coarse and the full evaluation of each candidate.
        weights: for how many candidates it stands (`standing`).
    """
    if len(both) < ENOUGH:
        return None
    coarse = _ranks([one.rank for one, _ in both], weights)
    full = _ranks([one.rank if one.complete else (1, 0.0) for _, one in both], weights)
    total = math.fsum(weights)

    def product(a: Sequence[float], b: Sequence[float]) -> float:
        return math.fsum(w * x * y for w, x, y in zip(weights, a, b, strict=True))

    a, b = ([rank - total / 2 for rank in ranks] for ranks in (coarse, full))
    spread = math.sqrt(product(a, a) * product(b, b))
    return product(a, b) / spread if spread else None


def _ranks(values: Sequence[tuple[int, float]], weights: Sequence[float]) -> list[float]:
    """The weight below each, and half of that at the same value."""
    at: dict[tuple[int, float], float] = {}
    for value, weight in zip(values, weights, strict=True):
        at[value] = at.get(value, 0.0) + weight
    below, found = 0.0, dict[tuple[int, float], float]()
    for value in sorted(at):
        found[value] = below + at[value] / 2
        below += at[value]
    return [found[value] for value in values]
