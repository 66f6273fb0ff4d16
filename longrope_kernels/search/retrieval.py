"""Retrieval: what a model finds of the statements in a long text.

With a single key each needle lies in a text of its own, at one depth. With several keys (as in
RULER, arXiv 2404.06654) a text holds one at each depth, and is asked for all of them, each question
alone: a model has to tell keys apart that look alike. It reads each text once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..rope.value import Rope
from .documents import Document
from .fitness import Measured, check_documents, standard_error
from .model import Losses
from .needles import DEPTHS, Needle, haystack, in_turn, longest


class Haystack(NamedTuple):
    """A text, and the needles in it, which are asked for one by one."""

    text: torch.Tensor  # (tokens,) int64
    needles: tuple[Needle, ...]


class Retrieved(NamedTuple):
    """What was found, and what the answers cost.

    Attributes:
        found: by document, and within it by depth: whether greedy decoding gives the whole answer.
        measured: the losses of the answers' tokens, by document.
    """

    found: tuple[tuple[bool, ...], ...]
    measured: Measured

    def as_json(self) -> dict[str, Any]:
        """JSON values, of which `from_json` makes the same again."""
        return {"found": self.found, **self.measured._asdict()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Retrieved:
        """What `as_json` told."""
        return cls(tuple(map(tuple, content["found"])), Measured.from_json(content))

    @property
    def share(self) -> float:
        """Of the answers, that are found."""
        return sum(map(sum, self.found)) / sum(map(len, self.found))

    @property
    def error(self) -> float:
        """The standard error of the share over documents."""
        return standard_error([sum(of) for of in self.found], [len(of) for of in self.found])

    def shares(self) -> list[float]:
        """The same by depth."""
        return [sum(of) / len(of) for of in zip(*self.found, strict=True)]


def single_key(
    documents: Sequence[Document],
    needles: Sequence[Needle],
    length: int,
    depths: Sequence[float] = DEPTHS,
) -> list[list[Haystack]]:
    """A text for each depth of each document, with one needle, the needles in turn.

    Args:
        documents: each of at least ``length`` tokens.
        needles: at least one; of `needles.key_values`, or of one's own.
        length: of a text with its longest question and answer, in tokens.
        depths: shares of the document.

    Raises:
        ValueError: an argument is out of range, or a document is too short, by name.
    """
    check_documents(documents, length)

    return [
        [
            Haystack(haystack([needle], document, length, [depth]), (needle,))
            for needle, depth in zip(of, depths, strict=True)
        ]
        for document, of in in_turn(documents, needles, depths, together=False)
    ]


def several_keys(
    documents: Sequence[Document],
    needles: Sequence[Needle],
    length: int,
    depths: Sequence[float] = DEPTHS,
) -> list[list[Haystack]]:
    """A text for each document, with a needle at each depth, the needles in turn.

    Args:
        documents: as in `single_key`; so are ``length`` and ``depths``, ascending here.
        needles: as many as there are depths, or more, each with a key of its own.

    Raises:
        ValueError: as `single_key`, and there are too few needles.
    """
    check_documents(documents, length)
    return [
        [Haystack(haystack(of, document, length, depths), of)]
        for document, of in in_turn(documents, needles, depths, together=True)
    ]


KINDS = {"one key": single_key, "several keys": several_keys}


def room_for(needles: Sequence[Needle], depths: Sequence[float] = DEPTHS) -> int:
    """The fewest tokens that each kind of text takes, whatever needles share it."""
    return len(depths) * max(len(needle.statement) for needle in needles) + longest(needles)


def retrieval(
    losses: Losses, rope: Rope, texts: Sequence[Sequence[Haystack]], length: int
) -> Retrieved:
    """Ask a model about texts.

    Args:
        losses: the model.
        rope: under which to ask it; of several sets, that of ``length``.
        texts: by document, of `single_key` or `several_keys`.
        length: that these were made for.
    """
    found, sums, counts = [], [], []
    for of_document in texts:
        answers = [
            answer
            for text, needles in of_document
            for answer in losses.answers(rope, text, needles, length=length)
        ]
        found.append(tuple(answer.found for answer in answers))
        told = torch.cat([answer.losses for answer in answers])
        sums.append(told.double().sum().item())
        counts.append(len(told))
    return Retrieved(tuple(found), Measured(tuple(sums), tuple(counts)))
