"""Skipped windows: which text and which positions they have, and what they are worth."""

from __future__ import annotations

import math

import pytest
import torch
from model_cases import tokens
from test_search_fitness import CLOSE, NEEDLE, documents, losses, rope, transformers_losses

from longrope_kernels.search.coarse import Coarse
from longrope_kernels.search.documents import Document
from longrope_kernels.search.fitness import hide
from longrope_kernels.search.needles import Needle
from longrope_kernels.search.settings import Options
from longrope_kernels.search.skipped import SkippedNeedles, SkippedPerplexity, skipped_needles

__all__ = ["losses"]
ENCODE = lambda text: list(text.encode())  # noqa: E731


def numbered(length: int, first: int = 0) -> Document:
    return Document(f"from {first}", torch.arange(first, first + length))


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_windows_are_text_in_one_piece_at_positions_over_the_whole_length(chunks):
    coarse = Coarse(chunks=chunks, windows=3)
    texts = [numbered(300), numbered(500, 1000)]
    fitness = SkippedPerplexity(None, texts, 256, 30, coarse)
    assert [len(windows) for windows in fitness.windows] == [3, 3]
    for text, windows in zip(texts, fitness.windows, strict=True):
        assert len({int(window.tokens[0]) for window in windows}) == 3
        for window in windows:
            assert torch.equal(window.tokens.diff(), torch.ones(29, dtype=torch.int64))
            assert {*window.tokens.tolist()} <= {*text.tokens.tolist()}
            places = window.positions
            assert (places[0], places[-1]) == (0, 255)
            jumps = places.diff()
            borders = [30 // chunks * (i + 1) - 1 for i in range(chunks - 1)]
            assert all(jumps[i] == 1 for i in range(29) if i not in borders)
            assert all(jumps[i] >= 1 for i in borders)
            assert window.last == 30 - 30 // chunks  # behind the first jump
    again = SkippedPerplexity(None, texts, 256, 30, coarse)
    for windows, others in zip(fitness.windows, again.windows, strict=True):
        for one, two in zip(windows, others, strict=True):
            assert torch.equal(one.tokens, two.tokens)
            assert torch.equal(one.positions, two.positions)
    assert SkippedPerplexity(None, texts, 256, 30, coarse, last=9).windows[0][0].last == 9


def test_its_perplexity_is_that_of_transformers_under_a_causal_mask(losses):
    fitness = SkippedPerplexity(losses, documents((60, 50)), 100, 24, Coarse(windows=2))
    parts = [
        transformers_losses(rope(4.0, 1.2), w.tokens[None], w.positions[None])[0, -12:]
        for windows in fitness.windows
        for w in windows
    ]
    assert fitness(rope(4.0, 1.2)) == pytest.approx(math.exp(torch.cat(parts).mean()), rel=CLOSE)


@pytest.mark.parametrize("depths", [(0.0, 0.0), (0.0, 1.0), (0.1, 0.12), (0.3, 0.9), (1.0, 1.0)])
@pytest.mark.parametrize("length", [90, 256])
def test_each_needle_lies_in_one_chunk_and_the_questions_in_the_last(depths, length):
    needles = [NEEDLE, Needle((3, 4), (6,), (7,))]
    window = skipped_needles(needles, numbered(200, 20), length, 45, depths)
    ids, places = window.tokens.tolist(), window.positions
    assert (places[0], places[-1], window.last) == (0, length - 1, 5)
    assert bool((places.diff() >= 1).all())
    whole = hide(needles, numbered(300, 20), length, depths).tokens.tolist()
    for needle in needles:
        size = len(needle.statement)
        at = next(i for i in range(45) if tuple(ids[i : i + size]) == needle.statement)
        assert places[at : at + size].diff().tolist() == [1] * (size - 1)
        # Where it lies at the whole length, but for rounding, which may not take positions back.
        wanted = next(i for i in range(length) if tuple(whole[i : i + size]) == needle.statement)
        assert abs(int(places[at]) - wanted) <= 1
    assert places[-7:].diff().tolist() == [1] * 6
    assert ids[-7:] == whole[-7:]
    assert [one for one in ids[:-7] if one >= 20] == list(range(20, 20 + 45 - 7 - 6))


def test_needles_count_the_answers_alone(losses):
    texts, needles = documents((60, 50)), [NEEDLE, Needle((5, 5), (6,), (7,))]
    fitness = SkippedNeedles(losses, texts, needles, 100, 30, depths=(0.2, 0.8))
    assert [[w.last for w in windows] for windows in fitness.windows] == [[5], [5]]
    parts = [
        transformers_losses(rope(4.0), w.tokens[None], w.positions[None])[0, -5:][w.mask]
        for (w,) in fitness.windows
    ]
    assert fitness(rope(4.0)) == pytest.approx(math.exp(torch.cat(parts).mean()), rel=CLOSE)


def test_what_does_not_fit_is_named():
    texts = [numbered(300), numbered(29)]
    for make in (
        lambda length: SkippedPerplexity(None, texts, length, 30, Coarse()),
        lambda length: SkippedNeedles(None, texts, [NEEDLE], length, 30, depths=(0.5,)),
    ):
        with pytest.raises(ValueError, match="from 0: expected at least 30 tokens, one window"):
            make(60)
        with pytest.raises(ValueError, match="length: expected at least 60 tokens, two windows"):
            make(59)


def test_options_choose_windows():
    texts = [Document("text", tokens(1, 3000)[0])]

    def made(length: int, **changes):
        return Options(**changes).measure_first(None, texts, length, ENCODE)

    assert made(256) is None
    assert made(2048, coarse=Coarse("off")) is None
    assert [len(w.tokens) for w in made(2048).windows[0]] == [512]
    assert made(2048, last=100).windows[0][0].last == 100
    needles = made(8192, fitness="needle", coarse=Coarse(windows=4))
    assert [len(w.tokens) for w in needles.windows[0]] == [2048]
    assert made(2048, fitness="needle") is None  # 512 tokens have no room for needles in text
    with pytest.raises(ValueError, match="length: expected at least the"):
        made(512, fitness="needle", coarse=Coarse("on", tokens=60))
