"""Questions about needles: what they ask, and the answers beside forwards of transformers alone."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import family_model, tokens
from test_search_fitness import CLOSE, NEEDLE, documents, losses, rope, transformers_losses

from longrope_kernels import Rope
from longrope_kernels.search.documents import Document
from longrope_kernels.search.fitness import NeedlePerplexity
from longrope_kernels.search.model import Answer, TransformersLosses
from longrope_kernels.search.needles import KEYS, Needle, haystack, key_values
from longrope_kernels.search.retrieval import KINDS, retrieval, room_for, several_keys, single_key

__all__ = ["losses"]
OTHERS = [NEEDLE, Needle((5, 5), (6, 7, 8, 9), (7,)), Needle((15, 14, 13), (1,), (2, 3, 4, 5, 6))]
DEPTHS = (0.0, 0.4, 1.0)


def asked(text: torch.Tensor, needle: Needle) -> torch.Tensor:
    """(1, tokens): the text, the question and the answer."""
    return torch.cat([text, torch.tensor([*needle.question, *needle.answer])])[None]


# -------------------------------------------------------------------------------------- the answers


def test_answers_are_those_of_a_forward_of_text_question_and_answer(losses):
    text, one = tokens(1, 30)[0], rope(4.0, 1.2)
    for needle, answer in zip(OTHERS, losses.answers(one, text, OTHERS, length=40), strict=True):
        expected = transformers_losses(one, asked(text, needle))[0, -len(needle.answer) :]
        assert answer.losses.dtype == torch.float32
        assert answer.losses.shape == answer.likeliest.shape == expected.shape
        assert (answer.losses - expected).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["phi3 partial", "phimoe sliding", "mistral sliding", "qwen3"])
@torch.no_grad()
def test_answers_of_other_families(name):
    text = tokens(1, 28)[0]  # of the short set, where there are two, and the answers are not
    reads = TransformersLosses(family_model(name))
    told = reads.answers(reads.rope, text, OTHERS, length=50)
    long = replace(reads.rope.sets[reads.rope.set_index(50)], max_length=None)
    one = Rope((long,), reads.rope.base)
    whole = TransformersLosses(family_model(name))
    for needle, answer in zip(OTHERS, told, strict=True):
        ids, count = asked(text, needle), len(needle.answer)
        assert (answer.losses - whole(one, ids, last=count)[0]).abs().max() < CLOSE


def test_the_likeliest_tokens_are_found(losses):
    text, question = tokens(1, 20)[0], (3, 4)
    with torch.no_grad():
        losses(rope(2.0), text[None])  # puts the rope in
        ids = torch.cat([text, torch.tensor(question)])
        greedy = losses.model.generate(ids[None], max_new_tokens=3, do_sample=False)[0, -3:]
    right, wrong = tuple(greedy.tolist()), (*greedy[:2].tolist(), int(greedy[2]) ^ 1)
    needles = [Needle((), question, right), Needle((), question, wrong)]
    first, second = losses.answers(rope(2.0), text, needles, length=30)
    assert first.found
    assert second.likeliest.tolist() == [True, True, False]
    assert not second.found


def test_a_text_is_read_once(losses, monkeypatch):
    read = []
    forward = type(losses.model.base_model).forward

    @functools.wraps(forward)
    def counted(self: Any, **given: Any) -> Any:
        read.append(given["input_ids"].shape[1])
        return forward(self, **given)

    monkeypatch.setattr(type(losses.model.base_model), "forward", counted)
    losses.answers(rope(2.0), tokens(1, 30)[0], OTHERS, length=40)
    assert read == [30, *(len(n.question) + len(n.answer) - 1 for n in OTHERS)]


@pytest.mark.parametrize(
    ("text", "needle", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), NEEDLE, r"text: expected \(tokens,\) int64"),
        (torch.zeros(3), NEEDLE, r"text: expected \(tokens,\) int64"),
        (torch.zeros(3, dtype=torch.int64), Needle((1,), (), (2,)), "expected a question and an"),
        (torch.zeros(9, dtype=torch.int64), NEEDLE, "length: expected at least 14 tokens, got 12"),
    ],
)
def test_what_cannot_be_asked_is_named(losses, text, needle, message):
    with pytest.raises(ValueError, match=message):
        losses.answers(rope(2.0), text, [needle], length=12)


# ---------------------------------------------------------------------------------------- the texts


def test_needles_stand_at_their_depths():
    text = Document("text", torch.arange(20, 120))
    got = haystack(OTHERS, text, 40, DEPTHS).tolist()
    room = 40 - (4 + 2 + 3) - 6  # statements, and the longest question with its answer
    assert got[:4] == [5, 6, 7, 8]
    assert got[-3:] == [15, 14, 13]
    at = 4 + round(0.4 * room)
    assert got[at : at + 2] == [5, 5]
    assert [x for x in got if x >= 20] == list(range(20, 20 + room))


def test_one_key_is_in_a_text_of_its_own_and_several_share_one():
    texts = documents((60, 60))
    alone = single_key(texts, OTHERS, 40, DEPTHS)
    assert [[len(x.needles) for x in of] for of in alone] == [[1, 1, 1]] * 2
    together = several_keys(texts, OTHERS, 40, DEPTHS)
    assert [[x.needles for x in of] for of in together] == [[tuple(OTHERS)]] * 2
    assert torch.equal(together[0][0].text, haystack(OTHERS, texts[0], 40, DEPTHS))
    with pytest.raises(ValueError, match="needles: expected 3 or more, one for each depth, got 2"):
        several_keys(texts, OTHERS[:2], 40, DEPTHS)
    with pytest.raises(ValueError, match="text 0: expected at least 61 tokens"):
        single_key(texts, OTHERS, 61, DEPTHS)


def test_numbers_belong_to_keys_and_fit_into_what_room_says():
    def encode(text: str) -> list[int]:
        return list(text.encode())

    needles = key_values(encode)
    assert len({needle.answer for needle in needles}) == len(KEYS) == len(set(KEYS))
    others = {needle.answer for needle in key_values(encode, seed=1)}
    assert len(others) == len(KEYS)
    assert not others & {needle.answer for needle in needles}
    with pytest.raises(ValueError, match="a number after the question changes the tokens"):
        key_values(lambda text: [len(text)])
    for key, needle in zip(KEYS, needles, strict=True):
        statement, question, answer = (bytes(part).decode() for part in needle)
        assert statement == f"\nThe number of the {key} is{answer}.\n"
        assert question.endswith(f"The number of the {key} is")
        assert 10_000 <= int(answer) < 100_000
    texts, least = documents((400,) * 5), room_for(needles)
    for hidden in KINDS.values():
        for of in hidden(texts, needles, least):
            assert all(len(one.text) <= least for one in of)


# ------------------------------------------------------------------------------------ what is found


def test_one_key_costs_what_the_needle_fitness_says(losses):
    texts = documents()
    fitness = NeedlePerplexity(losses, texts, [NEEDLE], 30, depths=[0.4]).measure([rope(4.0)])[0]
    told = retrieval(losses, rope(4.0), single_key(texts, [NEEDLE], 30, [0.4]), 30)
    assert told.measured.counts == fitness.counts
    assert told.measured.sums == pytest.approx(fitness.sums, rel=CLOSE)


def test_shares_by_depth_and_their_error():
    class Knows:
        """Knows the answers of the first half of the needles, and in odd documents all."""

        def answers(
            self, _: Rope, text: torch.Tensor, needles: Any, *, length: int
        ) -> list[Answer]:
            assert length == 40
            right = [int(text.max()) == 21 or needle is OTHERS[0] for needle in needles]
            return [
                Answer(torch.full((len(n.answer),), 2.0 - ok), torch.tensor([True, ok]))
                for n, ok in zip(needles, right, strict=True)
            ]

    texts = [Document(f"{x}", torch.full((60,), x)) for x in (20, 21)]
    told = retrieval(Knows(), rope(1.0), several_keys(texts, OTHERS, 40, DEPTHS), 40)
    assert told.found == ((True, False, False), (True, True, True))
    assert told.shares() == [1.0, 0.5, 0.5]
    assert told.share == pytest.approx(4 / 6)
    assert told.error == pytest.approx((1 - 1 / 3) / 2)  # of two: half of their distance
    assert told.measured.counts == (9, 9)
    assert told.measured.loss == pytest.approx((3 * 1 + 6 * 2 + 9 * 1) / 18)
    one = retrieval(Knows(), rope(1.0), several_keys(texts[:1], OTHERS, 40, DEPTHS), 40)
    assert math.isnan(one.error)
