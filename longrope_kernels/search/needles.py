"""Needles: statements to hide in documents, and the questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch

from .documents import Document, Encode

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where needles are hidden, as shares of a document
# What `key_value` asks for, as many as five documents with five needles each need.
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


def pass_key(encode: Encode, number: int) -> Needle:
    """A number of five digits to remember.

    Args:
        encode: of `documents.encoder`.
        number: 10000 to 99999.

    Raises:
        ValueError: the tokens of the question are others where a number follows.
    """
    statement = f"\nThe pass key is {number}. Remember it. {number} is the pass key.\n"
    return _asked(encode, statement, "\nWhat is the pass key? The pass key is", number)


def key_value(encode: Encode, key: str, number: int) -> Needle:
    """The number that belongs to a key, as in RULER (arXiv 2404.06654): there may be other keys.

    Args:
        encode: as in `pass_key`.
        key: a word, that the statement and the question name.
        number: the value.

    Raises:
        ValueError: as `pass_key`.
    """
    statement = f"\nThe number of the {key} is {number}.\n"
    question = f"\nWhat is the number of the {key}? The number of the {key} is"
    return _asked(encode, statement, question, number)


def key_values(encode: Encode) -> list[Needle]:
    """A needle for each of `KEYS`, whose numbers are always the same.

    Args:
        encode: as in `pass_key`.
    """
    numbers = Random(0).sample(range(10_000, 100_000), len(KEYS))
    return [key_value(encode, key, number) for key, number in zip(KEYS, numbers, strict=True)]


def _asked(encode: Encode, statement: str, question: str, number: int) -> Needle:
    # The answer is what is left of the whole: some tokenizers split a number by what is before it.
    ids, whole = encode(question), encode(f"{question} {number}")
    if whole[: len(ids)] != ids:
        raise ValueError(
            "tokenizer: a number after the question changes the tokens of the question"
        )
    return Needle(tuple(encode(statement)), tuple(ids), tuple(whole[len(ids) :]))


def haystack(
    needles: Sequence[Needle], document: Document, length: int, depths: Sequence[float]
) -> torch.Tensor:
    """The first tokens of a document with statements in them.

    Args:
        needles: whose statements to hide.
        document: of at least ``length`` tokens.
        length: of the result with the longest question and answer behind it, in tokens.
        depths: of each needle, ascending: 0 for the beginning and 1 for just before the question.

    Returns:
        (tokens,) int64.

    Raises:
        ValueError: a depth is no share, or the needles are longer than ``length``.
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth: expected a share from 0 to 1, got {depth}")
    room = length - tokens_of(needles)
    if room < 0:
        raise ValueError(
            f"length: expected at least the {length - room} tokens of a needle with its question "
            f"and answer, got {length}"
        )
    pieces, begin = [], 0
    for needle, depth in zip(needles, depths, strict=True):
        at = round(depth * room)
        pieces += [document.tokens[begin:at], torch.tensor(needle.statement, dtype=torch.int64)]
        begin = at
    return torch.cat([*pieces, document.tokens[begin:room]])


def tokens_of(needles: Sequence[Needle]) -> int:
    """Of the statements of all, and the longest question with its answer."""
    asked = max(len(needle.question) + len(needle.answer) for needle in needles)
    return sum(len(needle.statement) for needle in needles) + asked
