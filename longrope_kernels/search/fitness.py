"""What a search minimises: perplexity over long documents, or of the answers about needles in them.

A fitness is called with a rope and gives a number, lower is better; `measure` takes several ropes,
which share batches. Documents are measured one after another, so a `Race` can give hopeless ropes
up after a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..rope.value import Rope
from .documents import Document
from .model import Losses
from .needles import DEPTHS, Needle, haystack, in_turn, questions


class Measured(NamedTuple):
    """The result for one rope, by document: sums of losses in nats, and how many tokens count.

    There are fewer sums than counts where a race gave the rope up.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measured:
        """Of its fields as JSON values, among others."""
        return cls(tuple(content["sums"]), tuple(content["counts"]))

    @property
    def stopped(self) -> bool:
        """Whether documents are left that were not measured."""
        return len(self.sums) < len(self.counts)

    @property
    def loss(self) -> float:
        """Nats per token, NaN or infinite where the model's were; a lower bound where stopped."""
        return math.fsum(self.sums) / sum(self.counts)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where float64 has no such number."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    @property
    def error(self) -> float:
        """The standard error of the loss over documents; NaN where there is one alone."""
        return standard_error(self.sums, self.counts)

    def distance_error(self, other: Measured) -> float:
        """The standard error of the difference of two losses, over the documents of both.

        Documents differ by far more than ropes do, and by the same under each, so it is smaller
        than the errors of the two.
        """
        return standard_error(
            [a - b for a, b in zip(self.sums, other.sums, strict=True)], self.counts
        )


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Of a mean over all tokens, where documents are drawn and not tokens; NaN of one document.

    Args:
        sums: by document.
        counts: of what was summed.
    """
    documents, tokens = len(counts), sum(counts)
    if documents < 2:
        return math.nan
    mean = math.fsum(sums) / tokens
    squares = ((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return math.sqrt(documents / (documents - 1) * math.fsum(squares)) / tokens


@dataclass(frozen=True)
class Race:
    """Gives a rope up before the last document.

    Certain: no token's loss is negative, so what is summed up already is a lower bound. A rope
    whose bound is above ``stop_above`` has lost whatever the other documents say.

    Guessed, with ``margin``: a rope is also given up where it is further behind ``against``, over
    the same documents (which differ by more than ropes), than ``stop_above`` and the margin allow.

    Attributes:
        stop_above: the perplexity above which a rope is of no interest.
        margin: in nats per token, 0 or more; None for no guesses.
        against: a complete measurement of the same documents, that of the best rope so far.
    """

    stop_above: float
    margin: float | None = None
    against: Measured | None = None

    def gives_up(self, sums: Sequence[float], counts: Sequence[int]) -> bool:
        """Whether to stop.

        Args:
            sums: of the documents measured.
            counts: of all documents.
        """
        if not self.stop_above > 0:
            raise ValueError(f"stop_above: expected a perplexity above 0, got {self.stop_above}")
        limit, total = math.log(self.stop_above), math.fsum(sums)
        # `not <=` is also true for NaN, which no further document can mend.
        if not total / sum(counts) <= limit:
            return True
        if self.margin is None or self.against is None:
            return False
        behind = (total - math.fsum(self.against.sums[: len(sums)])) / sum(counts[: len(sums)])
        return behind > limit - self.against.loss + self.margin


class Window(NamedTuple):
    """A piece of a document, of which the last tokens are scored, or some of them."""

    tokens: torch.Tensor  # (length,) int64
    last: int
    positions: torch.Tensor | None = None  # (length,) int64, ascending; None: from 0, one by one
    counted: torch.Tensor | None = None  # (last,) bool, which of the last tokens; None: all

    @property
    def mask(self) -> torch.Tensor:
        """``counted``, where None is filled in."""
        return torch.ones(self.last, dtype=torch.bool) if self.counted is None else self.counted


class Documents:
    """The loop that all fitness functions share: documents one by one, all ropes at a time."""

    def __init__(self, losses: Losses, windows: Sequence[Sequence[Window]]) -> None:
        self.losses = losses
        self.windows = windows

    def under(self, reference: Rope) -> None:
        """What stands before windows may be read under this rope; here there is no such."""

    def __call__(self, rope: Rope, *, race: Race | None = None) -> float:
        """The perplexity of one rope; a lower bound of it where a race gave it up."""
        return self.measure([rope], race=race)[0].perplexity

    def measure(self, ropes: Sequence[Rope], *, race: Race | None = None) -> list[Measured]:
        """The same of several ropes, by document.

        Args:
            ropes: to measure, in one batch as far as the model takes it.
            race: None measures every rope on every document.
        """
        sums: list[list[float]] = [[] for _ in ropes]
        counts = [sum(int(w.mask.sum()) for w in windows) for windows in self.windows]
        running = list(range(len(ropes)))
        for index, windows in enumerate(self.windows, 1):
            for which, total in zip(running, self._sums(ropes, running, windows), strict=True):
                sums[which].append(total)
            if race is not None and index < len(self.windows):
                running = [i for i in running if not race.gives_up(sums[i], counts)]
        return [Measured(tuple(of), tuple(counts)) for of in sums]

    def _sums(
        self, ropes: Sequence[Rope], running: list[int], windows: Sequence[Window]
    ) -> list[float]:
        """The loss of a document under each rope that runs."""
        totals = [0.0] * len(running)
        if not running:
            return totals
        # Windows of one shape go together, but for the last of a document that is all of them.
        shapes = dict.fromkeys((len(window.tokens), window.last) for window in windows)
        for length, last in shapes:
            alike = [w for w in windows if (len(w.tokens), w.last) == (length, last)]
            rows = torch.stack([window.tokens for window in alike])
            places = [window.positions for window in alike if window.positions is not None]
            found = self.losses(
                [ropes[i] for i in running for _ in rows],
                rows.repeat(len(running), 1),
                last=last,
                **({"positions": torch.stack(places).repeat(len(running), 1)} if places else {}),
            )
            counted = torch.stack([window.mask for window in alike]).repeat(len(running), 1)
            of_rows = found.double().where(counted, 0.0).sum(1)
            for at, part in enumerate(of_rows.view(len(running), -1).sum(1).tolist()):
                totals[at] += part
        return totals


class Perplexity(Documents):
    """Over long documents, each token counted once, all tokens alike.

    Without ``stride`` a document is its first ``length`` tokens, of which the ``last`` ones count.
    With it a window of ``length`` tokens slides over the whole document in steps of ``stride``, and
    each step scores the tokens that are new in it.
    """

    def __init__(
        self,
        losses: Losses,
        documents: Sequence[Document],
        length: int,
        *,
        last: int | None = None,
        stride: int | None = None,
    ) -> None:
        """Cut the documents.

        Args:
            losses: the model.
            documents: each of at least ``length`` tokens.
            length: of what the model sees at a time, in tokens, at least 2.
            last: how many tokens count; None for all but the first.
            stride: from 1 to ``length - 1``; not with ``last``.

        Raises:
            ValueError: an argument is out of range, or a document is too short, by name.
        """
        if length < 2:
            raise ValueError(f"length: expected at least 2 tokens, got {length}")
        for name, value in (("last", last), ("stride", stride)):
            if value is not None and not 0 < value < length:
                raise ValueError(f"{name}: expected 1 to {length - 1} tokens, got {value}")
        if last is not None and stride is not None:
            raise ValueError("stride: expected None where last is given")
        check_documents(documents, length)
        self.length, self.last, self.stride = length, last, stride
        super().__init__(losses, [self._cut(document.tokens) for document in documents])

    def _cut(self, tokens: torch.Tensor) -> list[Window]:
        first = Window(tokens[: self.length], self.last or self.length - 1)
        if self.stride is None:
            return [first]
        windows, end = [first], self.length
        while end < len(tokens):
            new = min(self.stride, len(tokens) - end)
            end += new
            windows.append(Window(tokens[end - self.length : end], new))
        return windows


def hide(
    needles: Sequence[Needle], document: Document, length: int, depths: Sequence[float]
) -> Window:
    """The first tokens of a document with needles in them, and all questions at the end.

    Args:
        needles: what to hide.
        document: of at least ``length`` tokens.
        length: of the result, in tokens.
        depths: where, as in `haystack`.

    Raises:
        ValueError: as `haystack`.
    """
    ids, answers = questions(needles)
    text = haystack(needles, document, length, depths, len(ids))
    counted = answers[len(needles[0].question) :]
    return Window(torch.cat([text, ids]), len(counted), counted=counted)


class NeedlePerplexity(Documents):
    """Of the answers alone (LongRoPE2, arXiv 2502.20082), over needles in long documents.

    Tokens that a model can guess from those nearby say little of how far it sees; the answer to a
    question about a far statement is made of tokens that it cannot. A document has a needle at each
    depth, and is read once: all questions stand at its end, one after another with their answers.
    """

    def __init__(
        self,
        losses: Losses,
        documents: Sequence[Document],
        needles: Sequence[Needle],
        length: int,
        *,
        depths: Sequence[float] = DEPTHS,
    ) -> None:
        """Hide a needle at each depth of each document, the needles in turn.

        Args:
            losses: the model.
            documents: each of at least ``length`` tokens.
            needles: as many as depths, or more; of `key_values`, or of one's own.
            length: of a document with its needles, questions and answers, in tokens.
            depths: shares of the document, ascending.

        Raises:
            ValueError: an argument is out of range, or a document is too short, by name.
        """
        check_documents(documents, length)
        pairs = in_turn(documents, needles, depths, together=True)
        super().__init__(losses, [[hide(of, one, length, depths)] for one, of in pairs])


def check_documents(
    documents: Sequence[Document], length: int, why: str = "the length to measure at"
) -> None:
    """There are documents, and each has so many tokens; why, as an error says it."""
    if not documents:
        raise ValueError("documents: expected at least one, got none")
    for document in documents:
        if len(document.tokens) < length:
            raise ValueError(
                f"{document.name}: expected at least {length} tokens, {why}, got "
                f"{len(document.tokens)}"
            )
