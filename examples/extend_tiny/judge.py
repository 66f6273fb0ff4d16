"""What is measured of a model on texts that no training saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from text import ANSWER, Corpus, key_line, question_line
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import enable
from longrope_kernels.search.documents import Document
from longrope_kernels.search.fitness import Perplexity
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import Needle
from longrope_kernels.search.retrieval import retrieval, single_key

SEARCH_FILES = 4  # of the held-out ones; the others are for the tables


def slices(corpus: Corpus, length: int, most: int, *, of_search: bool) -> list[Document]:
    """Pieces of held-out files, at most ``most``, from all files in turn."""
    names = list(corpus.held_out)
    names = names[:SEARCH_FILES] if of_search else names[SEARCH_FILES:]
    found = []
    for piece in range(max(len(text) for text in corpus.held_out.values()) // length):
        for name in names:
            tokens = corpus.held_out[name][piece * length : (piece + 1) * length]
            if len(tokens) == length and len(found) < most:
                found.append(Document(f"{name}:{piece}", tokens.long()))
    return found


def needles(count: int) -> list[Needle]:
    """Keys to remember, in the words of the training windows."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        number = int(torch.randint(10_000, 100_000, (), generator=generator))
        statement, question = (
            key_line(chr(65 + index % 26), number),
            question_line(chr(65 + index % 26), number),
        )
        cut = len(question) - ANSWER - 1  # the line's end
        found.append(
            Needle(tuple(statement), tuple(question[:cut]), tuple(question[cut : cut + ANSWER]))
        )
    return found


class Judge:
    """A model's perplexity and memory under any rope."""

    def __init__(self, model: Any, documents: Sequence[Document], last: int) -> None:
        self.losses = TransformersLosses(model)
        self.documents, self.last = documents, last

    def perplexity(self, rope: Rope, length: int) -> float:
        """Of the same tokens at every length: the last ones, after more or less of the text."""
        return Perplexity(self.losses, self._ends(length), length, last=self.last)(rope)

    def half(self, rope: Rope, length: int) -> float:
        """Of the second half of each document, which is what a search minimises on others."""
        return Perplexity(self.losses, self._ends(length), length, last=length // 2)(rope)

    def perplexities(self, rope: Rope, lengths: Sequence[int]) -> dict[str, float]:
        return {str(length): self.perplexity(rope, length) for length in lengths}

    def memory(self, rope: Rope, length: int) -> dict[str, float]:
        """Of keys hidden at five depths: the share that is told right, and the perplexity."""
        documents = self._ends(length)
        texts = single_key(documents, needles(len(documents)), length)
        told = retrieval(self.losses, rope, texts, length)
        return {"accuracy": told.share, "perplexity": told.measured.perplexity}

    def _ends(self, length: int) -> list[Document]:
        return [Document(d.name, d.tokens[-length:]) for d in self.documents]


@torch.no_grad()
def policies(
    model: Any, rope: Rope, documents: Sequence[Document], length: int
) -> dict[str, dict[str, float]]:
    """What each policy costs where sequences grow out of their short set.

    A text is read up to the bound of the short set and goes on from there token by token, which a
    forward of all the rest over the cache gives at once: it has the same cache and the same set.

    Args:
        model: to enable.
        rope: of two sets or more; the crossing is that of the last but one.
        documents: each of at least ``length`` tokens.
        length: where the texts end, in tokens.

    Returns:
        For each policy the perplexity by distance from the crossing, ``"1-32"`` and so on.
    """
    bound = rope.sets[-2].max_length
    assert bound is not None
    short, long = (Rope((replace(one, max_length=None),), rope.base) for one in rope.sets[-2:])
    losses: dict[str, list[torch.Tensor]] = {"switch": [], "pin": [], "recompute": []}
    for document in documents:
        tokens = document.tokens[None, :length].to(model.device)
        enable(model, rope=rope)
        cache = DynamicCache(config=model.config)
        first = model(tokens[:, :bound], past_key_values=cache).logits[:, -1:]
        rest = model(tokens[:, bound:], past_key_values=cache).logits
        losses["switch"].append(_losses(torch.cat([first, rest[:, :-1]], 1), tokens[:, bound:]))
        for name, one in (("pin", short), ("recompute", long)):
            enable(model, rope=one)
            logits = model(tokens, use_cache=False).logits[:, bound - 1 : -1]
            losses[name].append(_losses(logits, tokens[:, bound:]))
    edges = [0, *(edge for edge in (32, 256, 1024) if edge < length - bound), length - bound]
    return {
        name: {
            f"{a + 1}-{b}": math.exp(torch.stack(found)[:, a:b].mean().item())
            for a, b in itertools.pairwise(edges)
        }
        for name, found in losses.items()
    }


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[0].double(), targets[0], reduction="none").cpu()
