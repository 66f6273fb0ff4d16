"""The coarse fitness behind a prefix, beside the full one and forwards one after another."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import family_model
from test_search_fitness import CLOSE, NEEDLE, documents, rope
from transformers import DynamicCache

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import set_rope
from longrope_kernels.search.behind import BehindPrefix
from longrope_kernels.search.coarse import Coarse
from longrope_kernels.search.fitness import Documents, NeedlePerplexity, Perplexity
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import Needle
from longrope_kernels.search.settings import Options
from longrope_kernels.search.skipped import SkippedPerplexity

LENGTH = 40
NEEDLES = [NEEDLE, Needle((5, 5), (6,), (7,))]
FULL = {
    "perplexity": lambda losses: Perplexity(losses, documents((60, 50)), LENGTH, last=9),
    "needles": lambda losses: NeedlePerplexity(
        losses, documents((60, 50)), NEEDLES, LENGTH, depths=(0.1, 0.8)
    ),
}
both = pytest.mark.parametrize("make", FULL.values(), ids=FULL.keys())


@pytest.fixture(scope="module", params=["llama", "mistral sliding", "qwen3"])
def losses(request) -> TransformersLosses:
    return TransformersLosses(family_model(request.param))


@both
def test_under_its_own_rope_it_is_the_full_fitness(losses, make):
    full = make(losses)
    fitness = BehindPrefix(losses, full.windows)
    for one in (rope(4.0, 1.2), rope(2.0), rope(4.0, 1.2)):
        fitness.under(one)
        (found,), (expected,) = fitness.measure([one]), full.measure([one])
        assert found.counts == expected.counts
        assert found.sums == pytest.approx(expected.sums, rel=CLOSE)


@both
@torch.no_grad()
def test_another_rope_turns_the_keys_of_the_prefix(losses, make):
    fitness, model = BehindPrefix(losses, make(losses).windows), losses.model
    read, ropes = rope(2.0), [rope(4.0, 1.2), rope(3.0)]
    fitness.under(read)
    for one, found in zip(ropes, fitness.measure(ropes), strict=True):
        for (window,), total in zip(fitness.windows, found.sums, strict=True):
            ids, cache = window.tokens[None], DynamicCache()
            begin = LENGTH - window.last - 1
            set_rope(model, read)
            model(ids[:, :begin], past_key_values=cache)
            set_rope(model, one)
            logits = model(ids[:, begin:-1], past_key_values=cache).logits[0].float()
            of_all = torch.nn.functional.cross_entropy(
                logits, ids[0, begin + 1 :], reduction="none"
            )
            assert total == pytest.approx(float(of_all[window.mask].double().sum()), rel=CLOSE)
    assert fitness.measure(ropes) == fitness.measure(ropes)  # a text is as it was


class Watched:
    """Losses that count what is read, of a device with room for so many texts."""

    keeps = True

    def __init__(self, room: float = math.inf) -> None:
        self.room, self.held, self.reads = room, [], []

    def read(self, reference: Rope, text: torch.Tensor, *, length: int) -> Any:
        gc.collect()
        self.held = [one for one in self.held if one() is not None]
        if len(self.held) >= self.room:
            raise torch.OutOfMemoryError("no room")
        self.reads.append((reference, len(text)))
        made = Text()
        self.held.append(weakref.ref(made))
        return made

    def behind(self, one: Rope, text: Any, tokens: torch.Tensor, *, length: int) -> torch.Tensor:
        assert isinstance(text, Text)
        return torch.full((len(tokens) - 1,), one.sets[0].factors[-1])


class Text:
    """Keys and values."""


def test_a_text_is_read_once_under_each_reference():
    watched = Watched()
    fitness = BehindPrefix(watched, FULL["perplexity"](watched).windows)
    for reference in (rope(2.0), rope(2.0), rope(3.0)):
        fitness.under(reference)
        for ropes in ([rope(4.0)], [rope(5.0), rope(6.0)]):
            found = [one.loss for one in fitness.measure(ropes)]
            assert found == [one.sets[0].factors[-1] for one in ropes]
    assert watched.reads == [(rope(2.0), 30)] * 2 + [(rope(3.0), 30)] * 2


def test_texts_take_turns_where_there_is_room_for_one():
    watched = Watched(room=1)
    fitness = BehindPrefix(watched, FULL["perplexity"](watched).windows)
    fitness.under(rope(2.0))
    for _ in range(2):
        assert fitness(rope(4.0)) == pytest.approx(math.exp(4.0))
    assert len(watched.reads) == 4
    watched.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        fitness(rope(4.0))


WHERE = {
    "keys": {},
    "rotated keys": {"_row_by_row": True},
    "keys over ranks": {"_group": object()},
    "states": {},
}


@pytest.mark.parametrize("where", WHERE)
def test_windows_where_caches_hold_nothing_to_rotate(where, monkeypatch):
    losses = TransformersLosses(family_model("llama"))
    for name, value in WHERE[where].items():
        monkeypatch.setattr(losses, name, value)
    if where == "states":
        losses.model.config.layer_types = ["linear_attention"] * 2
    kind: type[Documents] = BehindPrefix if where == "keys" else SkippedPerplexity
    assert losses.keeps == (where == "keys")
    for options in (Options(last=12), Options(stride=5), Options()):
        chosen = replace(options, coarse=Coarse("on", tokens=10))
        made = chosen.measure_first(losses, documents((60, 50)), LENGTH, None)
        assert type(made) is kind
        assert [len(of) for of in made.windows] == [1, 1]
        assert where != "keys" or {w.last for of in made.windows for w in of} == {10}
