"""The coarse fitness without a prefix: short windows at positions spread over the whole length.

A window is cut into chunks, and the positions jump from one to the next, so that far fewer tokens
have distances of the whole length between them (as PoSE, arXiv 2309.10400, does in training). It
is one sequence all the same. Such windows tell bad candidates from good ones, good ones hardly from
one another, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from random import Random

import torch

from .coarse import Coarse
from .documents import Document
from .fitness import Documents, Window, check_documents, hide
from .model import Losses
from .needles import DEPTHS, Needle, in_turn, questions, starts

_SEED = 0  # of where windows lie: all searches of the same documents have the same


class SkippedPerplexity(Documents):
    """Of the tokens behind the first jump, over windows of the documents."""

    def __init__(
        self,
        losses: Losses,
        documents: Sequence[Document],
        length: int,
        tokens: int,
        coarse: Coarse,
        *,
        last: int | None = None,
    ) -> None:
        """Cut the windows, which lie anywhere in the documents.

        Args:
            losses: the model.
            documents: each of at least ``tokens`` tokens.
            length: whose positions windows are spread over.
            tokens: of a window, at most half of ``length``.
            coarse: how many windows, and of how many chunks.
            last: as in `Perplexity`: fewer tokens count where that is less.

        Raises:
            ValueError: an argument is out of range, or a document is too short, by name.
        """
        _check(documents, length, tokens)
        rng = Random(_SEED)
        first = tokens // coarse.chunks
        scored = min(tokens - first, tokens if last is None else last)

        def window(document: Document) -> Window:
            start = rng.randint(0, len(document.tokens) - tokens)
            text = document.tokens[start : start + tokens]
            inner = (rng.randint(0, length - tokens) for _ in range(coarse.chunks - 2))
            jumps = [0, *sorted(inner), length - tokens]
            sizes = [first] * (coarse.chunks - 1)
            return Window(text, scored, _spread(jumps, [*sizes, tokens - sum(sizes)]))

        super().__init__(losses, [[window(d) for _ in range(coarse.windows)] for d in documents])


class SkippedNeedles(Documents):
    """Of the answers alone: each statement has a chunk of its own, the questions the last one."""

    def __init__(
        self,
        losses: Losses,
        documents: Sequence[Document],
        needles: Sequence[Needle],
        length: int,
        tokens: int,
        *,
        depths: Sequence[float] = DEPTHS,
    ) -> None:
        """Hide a needle at each depth of each document, the needles in turn.

        Args:
            losses: the model.
            documents: each of at least ``tokens`` tokens.
            needles: as in `NeedlePerplexity`.
            length: whose positions windows are spread over.
            tokens: of a window, at most half of ``length``, with room for the needles.
            depths: shares of ``length``, where the statements' positions are.

        Raises:
            ValueError: an argument is out of range, or a document is too short, by name.
        """
        _check(documents, length, tokens)
        pairs = in_turn(documents, needles, depths, together=True)
        super().__init__(
            losses, [[skipped_needles(of, one, length, tokens, depths)] for one, of in pairs]
        )


def skipped_needles(
    needles: Sequence[Needle],
    document: Document,
    length: int,
    tokens: int,
    depths: Sequence[float],
) -> Window:
    """A window with the beginning, each statement within text, and text before the questions.

    Positions of statements are those at ``length`` tokens. Chunks meet halfway between statements.
    """
    asked = len(questions(needles)[0])
    begins = starts(needles, tokens, depths, asked)
    ends = [at + len(needle.statement) for at, needle in zip(begins, needles, strict=True)]
    cuts = [(a + b) // 2 for a, b in zip([0, *ends], [*begins, tokens - asked], strict=True)]
    sizes = [b - a for a, b in pairwise([0, *cuts, tokens])]
    whole = starts(needles, length, depths, asked)
    jumps = accumulate((b - a for a, b in zip(begins, whole, strict=True)), max)
    positions = _spread([0, *jumps, length - tokens], sizes)
    return hide(needles, document, tokens, depths)._replace(positions=positions)


def _spread(jumps: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Positions of chunks of some sizes, each so far beyond those of a text in one piece."""
    shift = torch.tensor(jumps).repeat_interleave(torch.tensor(sizes))
    return torch.arange(sum(sizes)) + shift


def _check(documents: Sequence[Document], length: int, tokens: int) -> None:
    if length < 2 * tokens:
        raise ValueError(
            f"length: expected at least {2 * tokens} tokens, two windows of {tokens}, got {length}"
        )
    check_documents(documents, tokens, "one window")
