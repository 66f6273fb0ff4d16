"""Losses and fitness of a search, against transformers' own forward and plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import VOCABULARY, family_config, family_model, tokens
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
)

from longrope_kernels import FactorSet, Rope
from longrope_kernels.integrations.transformers import disable, enable, set_rope
from longrope_kernels.integrations.transformers.shrunk import shrunk
from longrope_kernels.search import Candidate, SearchSpace
from longrope_kernels.search import model as search_model
from longrope_kernels.search.documents import Document
from longrope_kernels.search.evaluator import Evaluator
from longrope_kernels.search.fitness import (
    Measured,
    NeedlePerplexity,
    Perplexity,
    Race,
    hide,
)
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import Needle

CLOSE = 2e-5
PAIRS = 16  # of the small models
NEEDLE = Needle((5, 6, 7, 8), (9, 10), (11, 12, 13))


def rope(largest: float, attention_factor: float = 1.0) -> Rope:
    factors = tuple(largest ** (i / (PAIRS - 1)) for i in range(PAIRS))
    return Rope((FactorSet(factors, 0, attention_factor),))


def documents(lengths: tuple[int, ...] = (40, 40), seed: int = 3) -> list[Document]:
    rows = (tokens(1, n, seed + i)[0] for i, n in enumerate(lengths))
    return [Document(f"text {i}", row) for i, row in enumerate(rows)]


@torch.no_grad()
def transformers_losses(
    of: Rope, ids: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """(rows, length - 1): by transformers alone, with a config of type longrope.

    Positions that jump are one sequence there only under a whole causal mask.
    """
    factors, a = list(of.sets[0].factors), of.sets[0].attention_factor
    model = AutoModelForCausalLM.from_config(
        family_config(
            "llama",
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": 32,
                "attention_factor": a,
            },
        )
    ).eval()
    model.load_state_dict(family_model("llama").state_dict())
    more = {}
    if positions is not None:
        causal = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        more = {"position_ids": positions, "attention_mask": causal}
    logits = model(ids, use_cache=False, **more).logits.double()
    return -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def losses() -> TransformersLosses:
    return TransformersLosses(family_model("llama"))


# ---------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("batch_tokens", [None, 24 * 2, 10**6])
@pytest.mark.parametrize("last", [None, 1, 7])
def test_losses_are_those_of_transformers_for_each_row(losses, monkeypatch, batch_tokens, last):
    ids, ropes = tokens(3), [rope(4.0, 1.2), rope(2.0), rope(4.0, 1.2)]
    monkeypatch.setattr(losses, "_batch_tokens", batch_tokens or 1)
    monkeypatch.setattr(search_model, "CHUNK_NUMBERS", 5 * VOCABULARY)
    got = losses(ropes, ids, last=last)
    assert got.dtype == torch.float32
    expected = torch.cat([transformers_losses(r, ids[i : i + 1]) for i, r in enumerate(ropes)])
    expected = expected if last is None else expected[:, -last:]
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["phi3 partial", "phimoe sliding", "mistral sliding", "qwen3"])
@torch.no_grad()
def test_losses_of_other_families_are_those_of_transformers(name):
    ids = tokens(1)
    logits = family_model(name)(ids, use_cache=False).logits.double()
    expected = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    losses = TransformersLosses(family_model(name))
    assert (losses(losses.rope, ids) - expected).abs().max() < CLOSE


def test_the_ropes_differ_by_more_than_the_tolerance(losses):
    ids = tokens(1)
    assert (losses(rope(4.0), ids) - losses(rope(2.0), ids)).abs().max() > 100 * CLOSE


def test_a_rope_of_several_sets_serves_by_the_length(losses):
    short, long = rope(1.0).sets[0], rope(4.0).sets[0]
    both = Rope((FactorSet(short.factors, max_length=23), long))
    for length, single in ((23, short), (24, long)):
        ids = tokens(1, length)
        assert torch.equal(losses(both, ids), losses(Rope((single,)), ids))


@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_positions_that_jump_are_one_sequence(losses, monkeypatch, batch_tokens):
    """Each row with jumps of its own, and under its own rope."""
    monkeypatch.setattr(losses, "_batch_tokens", batch_tokens)
    ids, ropes = tokens(3), [rope(4.0, 1.2), rope(2.0), rope(4.0)]
    places = torch.arange(24).repeat(3, 1)
    for row, (at, jump) in enumerate(((12, 90), (5, 1), (20, 60))):
        places[row, at:] += jump
    got = losses(ropes, ids, last=15, positions=places)
    rows = [(r, ids[i : i + 1], places[i : i + 1]) for i, r in enumerate(ropes)]
    expected = torch.cat([transformers_losses(*row) for row in rows])[:, -15:]
    assert (got - expected).abs().max() < CLOSE
    # Packed or in one piece they would be something else.
    apart = torch.cat([transformers_losses(r, ids[:, 12:]) for r, ids, _ in rows[:1]])
    assert (got[0, 4:] - apart[0]).abs().max() > 100 * CLOSE
    assert (got - losses(ropes, ids, last=15)).abs().max() > 100 * CLOSE


def test_the_last_position_chooses_the_set(losses):
    short, long = rope(1.0).sets[0], rope(4.0).sets[0]
    both = Rope((FactorSet(short.factors, max_length=100), long))
    ids, places = tokens(1), torch.arange(24)[None].clone()
    for end, single in ((99, short), (100, long)):
        places[:, 12:] = torch.arange(end - 11, end + 1)
        assert torch.equal(
            losses(both, ids, positions=places), losses(Rope((single,)), ids, positions=places)
        )
    for wrong in (places[0], places.int(), places.flip(1), places - 1):
        with pytest.raises(ValueError, match="positions: expected"):
            losses(both, ids, positions=wrong)


def test_a_rope_is_put_in_without_making_anything_anew(losses):
    before = {name: id(module) for name, module in losses.model.named_modules()}
    parameters = [p.data_ptr() for p in losses.model.parameters()]
    config = losses.model.config
    for largest in (1.5, 3.0):
        losses(rope(largest), tokens(1))
    assert {name: id(module) for name, module in losses.model.named_modules()} == before
    assert [p.data_ptr() for p in losses.model.parameters()] == parameters
    assert losses.model.config is config


def test_what_does_not_fit_into_memory_is_halved(losses, monkeypatch):
    sizes: list[int] = []
    forward = losses._forward

    def limited(ropes: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return forward(ropes, ids, *rest)

    ids, ropes = tokens(3), [rope(x) for x in (1.0, 2.0, 3.0)]
    expected = losses(ropes, ids)
    monkeypatch.setattr(losses, "_batch_tokens", 10**6)
    monkeypatch.setattr(losses, "_forward", limited)
    assert torch.equal(losses(ropes, ids), expected)
    assert sizes == [3, 1, 2, 1, 1]
    losses(ropes, ids)
    assert sizes[5:] == [1, 1, 1]  # it remembers
    monkeypatch.setattr(losses, "_forward", lambda *_: limited(None, torch.zeros(2, 1)))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        losses(ropes[:1], ids[:1])


@pytest.mark.parametrize(
    ("ropes", "ids", "last", "message"),
    [
        (Rope.plain(8), tokens(1), None, "rope: expected rotary_dim = 32 as in the model, got 8"),
        (Rope.plain(32, base=5e5), tokens(1), None, "rope: expected base = 10000.0 as in the mod"),
        (Rope.plain(32, interleaved=True), tokens(1), None, "rope: expected interleaved = False"),
        ([rope(1.0)], tokens(2), None, "ropes: expected one, or one for each of 2 rows: 1"),
        (rope(1.0), tokens(1)[0], None, r"tokens: expected \(rows, length\) int64, got \(24,\)"),
        (rope(1.0), tokens(1).int(), None, "tokens: expected .* int64, got .*int32"),
        (rope(1.0), tokens(1), 24, "last: expected 1 to 23, .* got 24"),
        (rope(1.0), tokens(1), 0, "last: expected 1 to 23, .* got 0"),
        (rope(1.0), tokens(1, 1), None, "last: expected 1 to 0"),
    ],
)
def test_wrong_arguments_are_named(losses, ropes, ids, last, message):
    with pytest.raises(ValueError, match=message):
        losses(ropes, ids, last=last)
    with pytest.raises(TypeError, match="rope: expected a Rope, got float"):
        losses([1.0], tokens(1))


def test_models_that_cannot_be_measured_are_refused():
    gptj = GPTJConfig(n_embd=32, n_head=2, n_layer=1, vocab_size=8, rotary_dim=8)
    with pytest.raises(ValueError, match=r"model: expected .*decoder.*, got GPTJForCausalLM"):
        TransformersLosses(GPTJForCausalLM(gptj))
    with pytest.raises(ValueError, match=r"model: expected one rope for all layers.*sliding_att"):
        TransformersLosses(Gemma3ForCausalLM(shrunk(Gemma3TextConfig())))
    with pytest.raises(ValueError, match=r"model: expected one with a language-model head.*Llama"):
        TransformersLosses(family_model("llama").model)
    with pytest.raises(ValueError, match="batch_tokens: expected at least 1, got 0"):
        TransformersLosses(family_model("llama"), batch_tokens=0)


# ----------------------------------------------------------------------------------------- set_rope


def test_models_of_interleaved_pairs_are_measured():
    """A candidate is a rope with the pairs of the model's code."""
    model = HeliumForCausalLM(shrunk(HeliumConfig())).eval()
    ids = torch.arange(4, 44).reshape(1, 40)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    losses = TransformersLosses(model)
    assert losses.rope.interleaved
    assert torch.allclose(losses(losses.rope, ids), expected, atol=1e-4)


@pytest.mark.parametrize("cache", ["unrotated", "rotated"])
def test_set_rope_is_enabling_anew(cache):
    ids = tokens()
    model = enable(family_model("mistral"), rope=rope(4.0), cache=cache)
    with torch.no_grad():
        set_rope(model, rope(2.0))
        got = model(ids, use_cache=False).logits
        expected = enable(family_model("mistral"), rope=rope(2.0), cache=cache)(ids).logits
    assert torch.equal(got, expected)
    disable(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, family_model("mistral")(ids).logits)


def test_set_rope_refuses_and_changes_nothing():
    model = enable(family_model("llama"), rope=rope(4.0))
    before = repr(model)
    for wrong, kind in ((Rope.plain(64), ValueError), (1.0, TypeError)):
        with pytest.raises(kind, match="rope: expected"):
            set_rope(model, wrong)
    assert repr(model) == before
    with pytest.raises(ValueError, match="model: expected one that enable"):
        set_rope(disable(model), rope(2.0))


# --------------------------------------------------------------------------------------- perplexity


def perplexity(parts: list[torch.Tensor]) -> float:
    return math.exp(torch.cat([part.flatten() for part in parts]).mean())


@pytest.mark.parametrize("last", [None, 9])
def test_perplexity_of_one_window_is_the_plain_mean(losses, last):
    texts = documents((40, 33))
    got = Perplexity(losses, texts, 32, last=last)(rope(4.0, 1.2))
    parts = [transformers_losses(rope(4.0, 1.2), d.tokens[None, :32]) for d in texts]
    parts = [part[:, -(last or 31) :] for part in parts]
    assert got == pytest.approx(perplexity(parts), rel=CLOSE)


def test_a_sliding_window_counts_each_token_once(losses):
    texts, stride, length = documents((40, 24)), 7, 24
    fitness = Perplexity(losses, texts, length, stride=stride)
    assert fitness.measure([rope(4.0)])[0].counts == (39, 23)
    parts = []
    for document in texts:
        ids = document.tokens[None]
        parts.append(transformers_losses(rope(4.0), ids[:, :length]))
        for end in range(length + 1, ids.shape[1] + 1):  # by token: the window it is scored in
            within = min(-(-(end - length) // stride) * stride + length, ids.shape[1])
            window = ids[:, within - length : within]
            parts.append(transformers_losses(rope(4.0), window)[:, end - within - 1, None])
    assert fitness(rope(4.0)) == pytest.approx(perplexity(parts), rel=CLOSE)


def test_errors_are_those_over_documents():
    # Means of documents of equal size, so that textbook formulas hold.
    one, other = Measured((3.0, 6.0, 12.0), (3, 3, 3)), Measured((4.5, 6.0, 15.0), (3, 3, 3))
    assert one.loss == pytest.approx(7 / 3)
    assert one.error == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std() / 3**0.5)
    assert other.distance_error(one) == pytest.approx(torch.tensor([0.5, 0, 1]).std() / 3**0.5)
    assert math.isnan(Measured((3.0,), (3,)).error)
    # Where documents differ in size: by leaving out none, and drawing them many times.
    drawn = torch.randint(0, 3, (200_000, 3), generator=torch.Generator().manual_seed(0))
    sums, counts = torch.tensor([30.0, 42.0, 31.0]), torch.tensor([20, 22, 18])
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    got = Measured(tuple(sums.tolist()), tuple(counts.tolist())).error
    assert got == pytest.approx((means.std() * (3 / 2) ** 0.5).item(), rel=0.1)


def test_several_ropes_share_batches_and_keep_their_own_results(losses, monkeypatch):
    fitness = Perplexity(losses, documents(), 24, stride=8)
    ropes = [rope(x) for x in (1.0, 2.0, 4.0)]
    alone = [fitness(r) for r in ropes]
    monkeypatch.setattr(losses, "_batch_tokens", 10**6)
    together = [m.perplexity for m in fitness.measure(ropes)]
    assert together == pytest.approx(alone, rel=CLOSE)
    assert len(set(alone)) == 3


def test_arguments_of_perplexity_are_checked(losses):
    good = {"losses": losses, "documents": documents((40, 33)), "length": 32}
    for wrong, message in (
        ({"last": 32}, "last: expected 1 to 31 tokens, got 32"),
        ({"stride": 0}, "stride: expected 1 to 31 tokens, got 0"),
        ({"last": 3, "stride": 3}, "stride: expected None where last is given"),
        ({"length": 1}, "length: expected at least 2 tokens, got 1"),
        ({"length": 34}, "text 1: expected at least 34 tokens, the length to measure at, got 33"),
        ({"documents": []}, "documents: expected at least one, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            Perplexity(**good | wrong)


# ------------------------------------------------------------------------------------------- racing


class Counted:
    """Losses that are given: of document d (its first token) under a rope, the factor times d."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def __call__(self, ropes: Any, ids: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        rows = []
        for of, row in zip(ropes, ids, strict=True):
            self.asked.append((of.sets[0].factors[-1], int(row[0])))
            rows.append(of.sets[0].factors[-1] * float(row[0]))
        return torch.tensor(rows)[:, None].expand(-1, last)


def flat_documents(levels: tuple[int, ...]) -> list[Document]:
    return [Document(f"{x}", torch.full((4,), x)) for x in levels]


def test_a_race_gives_up_what_has_lost_for_certain():
    counted = Counted()
    fitness = Perplexity(counted, flat_documents((3, 1, 2)), 4)
    race = Race(math.exp(2.0))
    fine, near, bad = fitness.measure([rope(x) for x in (1.0, 1.1, 2.5)], race=race)
    assert [m.stopped for m in (fine, near, bad)] == [False, False, True]
    assert [m.loss for m in (fine, near)] == pytest.approx([2.0, 2.2])
    # 7.5 of the first of three documents: 2.5 nats a token at least, all of them together.
    assert bad.sums == pytest.approx((3 * 7.5,))
    assert bad.loss == pytest.approx(2.5)
    assert counted.asked.count((2.5, 1)) == 0
    assert fitness(rope(2.5), race=race) == pytest.approx(math.exp(2.5))


def test_a_race_with_a_margin_compares_the_same_documents():
    counted = Counted()
    fitness = Perplexity(counted, flat_documents((3, 1, 2)), 4)
    (best,) = fitness.measure([rope(1.0)])
    counted.asked.clear()
    # Allowed: 0.2 nats behind by the threshold and 0.3 by the margin. 1.1 is 0.3 behind after the
    # first document, which is harder than the mean; 1.2 is 0.6 behind.
    race = Race(math.exp(2.2), 0.3, best)
    better, near, worse = fitness.measure([rope(x) for x in (0.9, 1.1, 1.2)], race=race)
    assert [m.stopped for m in (better, near, worse)] == [False, False, True]
    assert len(counted.asked) == 3 + 3 + 1
    assert not fitness.measure([rope(1.2)], race=Race(math.exp(2.2)))[0].stopped
    with pytest.raises(ValueError, match="stop_above: expected a perplexity above 0, got 0"):
        fitness.measure([rope(1.2)], race=Race(0.0))


def test_an_evaluator_races_against_the_best_it_has_seen():
    space = SearchSpace(4, 10000.0, 2, 4, n_hats=(0,), attention=1.0)
    counted = Counted()
    evaluator = Evaluator(space, Perplexity(counted, flat_documents((3, 1, 2)), 4), margin=0.3)
    good, better, worse = (Candidate((100, x)) for x in (100, 105, 120))
    (one,) = evaluator([good])
    assert (one.candidate, one.complete) == (good, True)
    assert one.fitness == pytest.approx(math.exp(2.0))
    assert one.details == {"losses": pytest.approx([3.0, 1.0, 2.0])}
    found = evaluator([better, worse], math.exp(2.2))
    assert [e.complete for e in found] == [True, False]
    assert found[1].fitness == pytest.approx(math.exp(3.6 / 3))  # what is certain
    assert found[1].details == {"losses": pytest.approx([3.6])}


def test_without_a_race_every_document_is_measured():
    (measured,) = Perplexity(Counted(), flat_documents((3, 1)), 4).measure([rope(50.0)])
    assert not measured.stopped
    assert len(measured.sums) == 2


def test_a_loss_that_is_no_number_stays_one_and_loses_the_race():
    fitness = Perplexity(Counted(), flat_documents((3, 1)), 4)
    (good,) = fitness.measure([rope(1.0)])
    fitness.losses = lambda ropes, ids, last=None: torch.full((len(ids), last), math.nan)
    assert math.isnan(fitness(rope(1.0)))
    (raced,) = fitness.measure([rope(1.0)], race=Race(good.perplexity))
    assert raced.stopped
    assert math.isnan(raced.perplexity)
    fitness.losses = lambda ropes, ids, last=None: torch.full((len(ids), last), 1e30)
    assert fitness(rope(1.0)) == math.inf


# ------------------------------------------------------------------------------------------ needles


def test_needles_stand_at_their_depths_and_all_questions_at_the_end():
    text, two = Document("text", torch.arange(20, 120)), [NEEDLE, Needle((5, 5), (6,), (7,))]
    asked = (*NEEDLE.question, *NEEDLE.answer, 6, 7)
    for depths, (first, second) in (
        ((0.0, 1.0), (0, 4 + 17)),
        ((0.5, 0.5), (8, 12)),
        ((0.2, 0.9), (3, 4 + 15)),
    ):
        window = hide(two, text, 30, depths)
        got = window.tokens.tolist()
        assert len(got) == 30
        assert tuple(got[first : first + 4]) == NEEDLE.statement
        assert got[second : second + 2] == [5, 5]
        assert tuple(got[-7:]) == asked
        assert window.last == 5  # from the first answer on
        assert window.mask.tolist() == [True] * 3 + [False, True]
        assert [one for one in got[:-7] if one >= 20] == list(range(20, 37))
    with pytest.raises(ValueError, match="depth: expected a share from 0 to 1, got 2"):
        hide(two, text, 30, (0.5, 2))
    with pytest.raises(ValueError, match=r"length: expected at least the 13 tokens .* got 12"):
        hide(two, text, 12, (0.5, 0.5))


def test_needle_perplexity_counts_the_answers_alone(losses):
    texts, depths = documents(), (0.0, 0.4)
    needles = [NEEDLE, Needle((5, 5), (6,), (7,)), Needle((5, 6), (6, 5), (8,))]
    fitness = NeedlePerplexity(losses, texts, needles, 30, depths=depths)
    parts = []
    for index, document in enumerate(texts):
        first, second = (needles[(2 * index + at) % 3] for at in range(2))
        ids = hide([first, second], document, 30, depths).tokens[None]
        found, a, b = transformers_losses(rope(4.0), ids), len(first.answer), len(second.answer)
        end = found.shape[1] - b - len(second.question)
        parts += [found[:, end - a : end], found[:, -b:]]
        assert tuple(ids[0, -b:].tolist()) == second.answer
        assert tuple(ids[0, end - a + 1 : end + 1].tolist()) == first.answer
    assert fitness(rope(4.0)) == pytest.approx(perplexity(parts), rel=CLOSE)
    measured = fitness.measure([rope(4.0), rope(2.0)])
    assert measured[0].counts == tuple(sum(p.numel() for p in parts[at : at + 2]) for at in (0, 2))
    assert measured[1].loss == pytest.approx(math.log(fitness(rope(2.0))), rel=CLOSE)
    for some, wanted in (([], "at least one, got none"), ([NEEDLE], "2 or more, one for each")):
        with pytest.raises(ValueError, match=f"needles: expected {wanted}"):
            NeedlePerplexity(losses, texts, some, 30, depths=depths)
    with pytest.raises(ValueError, match="depths: expected at least one, got none"):
        NeedlePerplexity(losses, texts, needles, 30, depths=())


def test_a_question_that_costs_infinitely_much_is_not_counted():
    """A loss that does not count is left out, and not multiplied by nothing."""
    two = [Needle((5,), (6,), (7,)), Needle((8,), (9,), (3,))]

    def losses(ropes: Any, ids: torch.Tensor, *, last: int) -> torch.Tensor:
        return torch.tensor([[1.0, math.inf, 2.0]]).expand(len(ids), last)

    fitness = NeedlePerplexity(losses, documents()[:1], two, 30, depths=(0.1, 0.5))
    assert fitness.measure([rope(1.0)])[0].loss == 1.5
