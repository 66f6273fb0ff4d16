"""Needles: statements to hide in documents, and the questions about them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch

from .documents import Document, Encode

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where needles are hidden, as shares of a document
# As many as five documents with five needles each need.
KEYS = (
    "anchor", "basket", "candle", "desert", "engine", "feather", "garden", "hammer", "island",
    "jacket", "kettle", "ladder", "mirror", "nettle", "orchard", "pepper", "quarry", "ribbon",
    "saddle", "temple", "umbrella", "valley", "window", "yogurt", "zipper",
)  # fmt: skip


class Needle(NamedTuple):
    """A statement to hide in a document, the question that ends it, and the answer, as ids."""

    statement: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


def key_value(encode: Encode, key: str, number: int) -> Needle:
    """The number that belongs to a key, as in RULER (arXiv 2404.06654): there may be other keys.

    Args:
        encode: of `documents.encoder`.
        key: a word, that the statement and the question name.
        number: the value, 10000 to 99999.

    Raises:
        ValueError: the tokens of the question are others where a number follows.
    """
    question = f"\nWhat is the number of the {key}? The number of the {key} is"
    # The answer is what is left of the whole: some tokenizers split a number by what is before it.
    ids, whole = encode(question), encode(f"{question} {number}")
    if whole[: len(ids)] != ids:
        raise ValueError(
            "tokenizer: a number after the question changes the tokens of the question"
        )
    statement = encode(f"\nThe number of the {key} is {number}.\n")
    return Needle(tuple(statement), tuple(ids), tuple(whole[len(ids) :]))


def key_values(encode: Encode, seed: int = 0) -> list[Needle]:
    """A needle for each of `KEYS`.

    Args:
        encode: as in `key_value`.
        seed: of the numbers: what a search hides is not what its result is judged by.
    """
    numbers = Random(seed).sample(range(10_000, 100_000), len(KEYS))
    return [key_value(encode, key, number) for key, number in zip(KEYS, numbers, strict=True)]


def in_turn(
    documents: Sequence[Document],
    needles: Sequence[Needle],
    depths: Sequence[float],
    *,
    together: bool,
) -> list[tuple[Document, tuple[Needle, ...]]]:
    """Documents, each with needles for all depths, which are taken in turn.

    Args:
        documents: to hide needles in.
        needles: at least one.
        depths: shares of a document.
        together: whether one text has them all, so that each needs a key of its own.

    Raises:
        ValueError: there are too few needles, or no depths.
    """
    for name, values in (("needles", needles), ("depths", depths)):
        if not values:
            raise ValueError(f"{name}: expected at least one, got none")
    if together and len(needles) < len(depths):
        raise ValueError(
            f"needles: expected {len(depths)} or more, one for each depth, got {len(needles)}"
        )
    endless = itertools.cycle(needles)
    return [(document, tuple(itertools.islice(endless, len(depths)))) for document in documents]


def questions(needles: Sequence[Needle]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of all with their answers, one after another.

    Returns:
        Their ids, (tokens,) int64, and which of them are of answers, (tokens,) bool.
    """
    ids = [part for needle in needles for part in (needle.question, needle.answer)]
    answers = torch.tensor([False, True] * len(needles))
    return (
        torch.tensor([one for part in ids for one in part], dtype=torch.int64),
        answers.repeat_interleave(torch.tensor([len(part) for part in ids])),
    )


def haystack(
    needles: Sequence[Needle],
    document: Document,
    length: int,
    depths: Sequence[float],
    asked: int | None = None,
) -> torch.Tensor:
    """The first tokens of a document with statements in them.

    Args:
        needles: whose statements to hide.
        document: of at least ``length`` tokens.
        length: of the result with what is asked behind it, in tokens.
        depths: of each needle, ascending: 0 for the beginning and 1 for just before the question.
        asked: tokens of what is asked; None for the longest question with its answer.

    Returns:
        (tokens,) int64.

    Raises:
        ValueError: a depth is no share, or the needles are longer than ``length``.
    """
    pieces, begin, hidden = [], 0, 0
    for needle, start in zip(needles, starts(needles, length, depths, asked), strict=True):
        pieces += [document.tokens[begin : start - hidden], torch.tensor(needle.statement).long()]
        begin = start - hidden
        hidden += len(needle.statement)
    end = length - hidden - (longest(needles) if asked is None else asked)
    return torch.cat([*pieces, document.tokens[begin:end]])


def starts(
    needles: Sequence[Needle], length: int, depths: Sequence[float], asked: int | None = None
) -> list[int]:
    """Where the statements begin in a `haystack`, which has the arguments and errors."""
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth: expected a share from 0 to 1, got {depth}")
    hidden = list(itertools.accumulate((len(n.statement) for n in needles), initial=0))
    room = length - hidden[-1] - (longest(needles) if asked is None else asked)
    if room < 0:
        raise ValueError(
            f"length: expected at least the {length - room} tokens of needles, questions and "
            f"answers, got {length}"
        )
    return [round(d * room) + before for d, before in zip(depths, hidden[:-1], strict=True)]


def longest(needles: Sequence[Needle]) -> int:
    """Tokens of the longest question with its answer."""
    return max(len(needle.question) + len(needle.answer) for needle in needles)
