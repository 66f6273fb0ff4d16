"""How to search and what to minimise, as `find`, `readjust` and `extend` are told it: `Options`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Annotated, Any

import typer

from ..rope.value import Rope
from .behind import BehindPrefix
from .coarse import BEHIND, IN_WINDOWS, Coarse
from .documents import Document, Encode
from .evolution import EvolutionSettings
from .fitness import Documents, NeedlePerplexity, Perplexity
from .model import Losses
from .needles import DEPTHS, Needle, in_turn, key_values
from .options import Last, Read, Stride, ascending
from .skipped import SkippedNeedles, SkippedPerplexity
from .space import SearchSpace

OPTIMIZERS = ("evolution", "cmaes")
FITNESSES = ("perplexity", "needle")


def _thresholds(numbers: list[int] | None) -> tuple[int, ...] | None:
    return ascending(numbers) or None


def _attention(text: str) -> float | str | None:
    if text in ("fixed", "searched"):
        return None if text == "fixed" else text
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--attention: expected fixed, searched or a number, got {text!r}"
        ) from None


@dataclass(frozen=True)
class Options(EvolutionSettings):
    """How to search and what to minimise; the paper's numbers by default.

    Attributes:
        optimizer: "evolution", LongRoPE's, or "cmaes", which evaluates as many, to compare with.
        monotone, n_hats, attention, critical: as in `SearchSpace`.
        fitness: "perplexity", or "needle": of the answers about needles in the documents.
        last, stride: as in `Perplexity`.
        race: give up on candidates that have lost for certain; the result is the same.
        margin: as in `Race`; the result may differ.
        batch: candidates that are measured together; on a GPU with short documents it is faster.
        coarse: how candidates are judged before that fitness, and which of them get it.
        hours: the time for a search, from which population, iterations and so on are chosen; those
            given are the most.

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    optimizer: Annotated[
        str, typer.Option(help="evolution (LongRoPE's) or cmaes, to compare with.")
    ] = "evolution"
    monotone: Annotated[
        bool, typer.Option(help="Whether factors must not fall from one pair to the next.")
    ] = True
    n_hats: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            "--n-hat",
            help="Threshold to try; repeat for several. [default: the paper's fourteen]",
        ),
        Read(list[int] | None, _thresholds),
    ] = None
    attention: Annotated[
        float | str | None,
        typer.Option(help="Attention factor: fixed (the paper's formula), searched, or a number."),
        Read(str, _attention, "fixed"),
    ] = None
    critical: int | None = None
    fitness: Annotated[
        str,
        typer.Option(help="perplexity, or needle: that of the answers about hidden numbers alone."),
    ] = "perplexity"
    last: Last = None
    stride: Stride = None
    race: Annotated[
        bool, typer.Option(help="Give up on candidates that have lost for certain: same result.")
    ] = True
    margin: Annotated[
        float | None,
        typer.Option(
            help="Also give up on candidates so many nats per token behind; may change the result."
        ),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Candidates to measure in one forward.")] = 1
    coarse: Coarse = field(default_factory=Coarse)
    hours: Annotated[
        float | None,
        typer.Option(
            help="Time for each search: chooses population, iterations, mutants, crossovers and "
            "parents, no more than the numbers above."
        ),
    ] = None

    def __post_init__(self) -> None:
        for name, served in (("optimizer", OPTIMIZERS), ("fitness", FITNESSES)):
            if getattr(self, name) not in served:
                raise ValueError(
                    f"{name}: expected one of {', '.join(served)}, got {getattr(self, name)!r}"
                )
        if self.margin is not None and not self.margin >= 0:
            raise ValueError(f"margin: expected 0 or more nats per token, got {self.margin}")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise ValueError(f"hours: expected a time above 0, got {self.hours}")
        if self.fitness == "needle" and (self.last, self.stride) != (None, None):
            raise ValueError("last, stride: expected none with fitness needle: answers are scored")
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")
        super().__post_init__()

    @property
    def evolution(self) -> EvolutionSettings:
        """Those of the evolutionary search."""
        names = (field.name for field in fields(EvolutionSettings))
        return EvolutionSettings(**{name: getattr(self, name) for name in names})

    def space(self, rope: Rope, original: int, length: int, **arguments: Any) -> SearchSpace:
        """The `SearchSpace` of these options from the original length to a target.

        ``rope`` says dimensions, base and pairing; ``arguments`` the rest, or what goes first.
        """
        given = {"dim": rope.rotary_dim, "base": rope.base, "interleaved": rope.interleaved}
        given |= {"original_length": original, "target_length": length}
        given |= {n: getattr(self, n) for n in ("monotone", "n_hats", "attention", "critical")}
        return SearchSpace(**(given | arguments))

    def measure(
        self, losses: Losses, documents: Sequence[Document], length: int, encode: Encode | None
    ) -> Perplexity | NeedlePerplexity:
        """The fitness at a length; ``encode`` is what "needle" makes its text with."""
        if self.fitness == "perplexity":
            return Perplexity(losses, documents, length, last=self.last, stride=self.stride)
        return NeedlePerplexity(losses, documents, _needles(encode), length)

    def measure_first(
        self, losses: Losses, documents: Sequence[Document], length: int, encode: Encode | None
    ) -> Documents | None:
        """The coarse fitness for a length; None where there is none (`Coarse.window`).

        It is `BehindPrefix` where the model has it, and else of skipped windows.
        """
        keeps = getattr(losses, "keeps", False)  # callables of other libraries may have no such
        tokens = self.coarse.window(length, BEHIND if keeps else IN_WINDOWS)
        if tokens is None:
            return None
        if keeps:
            last = min(tokens, length - 2, self.last or tokens)
            chosen = replace(self, stride=None, last=last) if self.fitness == "perplexity" else self
            return BehindPrefix(losses, chosen.measure(losses, documents, length, encode).windows)
        if self.fitness == "perplexity":
            return SkippedPerplexity(losses, documents, length, tokens, self.coarse, last=self.last)
        needles = _needles(encode)
        pairs = in_turn(documents, needles, DEPTHS, together=True)
        room = max(sum(map(len, chain(*of))) for _, of in pairs)
        if self.coarse.mode == "auto" and tokens < 2 * room:
            return None
        return SkippedNeedles(losses, documents, needles, length, tokens)


def _needles(encode: Encode | None) -> list[Needle]:
    if encode is None:
        raise ValueError("encode: expected one for fitness 'needle', got None")
    return key_values(encode, seed=1)  # other numbers than `evaluate --retrieval` hides
