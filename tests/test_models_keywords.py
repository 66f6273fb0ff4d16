"""What an enabled model is told for all layers, where these hand no keywords to their attention."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cases import factors
from model_cases import KEEPING, SWITCH, family_model, keeping_model, logits, max_diff, tokens
from test_models_training import checkpoint

from longrope_kernels import FactorSet, Rope
from longrope_kernels.integrations.transformers import disable, enable
from longrope_kernels.search.model import TransformersLosses

CLOSE = 2e-5
LENGTHS = (SWITCH + 8, 10, 1, SWITCH)
BORDERS = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0, dtype=torch.int32)
OTHERS = torch.tensor([0, 5, sum(LENGTHS)], dtype=torch.int32)
PACKED = tokens(1, sum(LENGTHS))
both = pytest.mark.parametrize("name", KEEPING)


def of_two_sets(name: str) -> Any:
    model = keeping_model(name)
    pairs = enable(model).model.rotary_emb.rope.pairs
    short, long = factors(pairs, 1.25), factors(pairs, 2.0)
    return enable(model, rope=Rope((FactorSet(short, max_length=SWITCH), FactorSet(long, 6, 1.2))))


def packed(model: Any, borders: torch.Tensor | None = BORDERS, **more: Any) -> Any:
    return model(PACKED, cu_seq_lens_q=borders, cu_seq_lens_k=borders, use_cache=False, **more)


@torch.no_grad()
def each_alone(model: Any, borders: torch.Tensor = BORDERS) -> torch.Tensor:
    rows = PACKED.split(borders.diff().tolist(), 1)
    return torch.cat([model(row, use_cache=False).logits for row in rows], 1)


@both
def test_borders(name: str) -> None:
    """And none in the next forward, nor in an untouched model."""
    model = of_two_sets(name)
    expected = logits(model, ids=PACKED)
    with torch.no_grad():
        assert max_diff(packed(model).logits, each_alone(model)) < CLOSE
    assert torch.equal(logits(model, ids=PACKED), expected)
    assert max_diff(expected, each_alone(model)) > 100 * CLOSE
    assert not disable(model).base_model._forward_pre_hooks


@both
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_that_runs_layers_again(name: str, use_reentrant: bool) -> None:
    """Each by what its own forward was told, whatever came between."""
    found = []
    for checkpointed in (False, True):
        model = of_two_sets(name).train()
        if checkpointed:
            checkpoint(model, use_reentrant=use_reentrant)
        loss = torch.zeros(())
        for borders in (BORDERS, OTHERS, None):
            loss = loss + packed(model, borders, labels=PACKED).loss
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, e in zip(*found, strict=True):
        assert torch.equal(a, e)


def test_a_graph() -> None:
    torch.compiler.reset()
    model = of_two_sets("stablelm")
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for borders in (BORDERS, OTHERS):
        with torch.no_grad():
            out = step(PACKED, cu_seq_lens_q=borders, cu_seq_lens_k=borders, use_cache=False)
        assert max_diff(out.logits, each_alone(model, borders)) < CLOSE


@torch.no_grad()
def test_nothing_goes_to_who_comes_around_the_hooks() -> None:
    model = enable(family_model("llama"))
    expected = model.model.forward(PACKED, use_cache=False).last_hidden_state
    packed(model)
    assert torch.equal(model.model.forward(PACKED, use_cache=False).last_hidden_state, expected)


@both
def test_two_threads(name: str) -> None:
    """The second from beginning to end between two layers of the first."""
    model, found = of_two_sets(name), []
    expected = [each_alone(model, borders) for borders in (BORDERS, OTHERS)]

    @torch.no_grad()
    def other() -> None:
        found.append(packed(model, OTHERS).logits)

    def between(*_: Any) -> None:
        hook.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(between)
    with torch.no_grad():
        found.insert(0, packed(model).logits)
    for a, e in zip(found, expected, strict=True):
        assert max_diff(a, e) < CLOSE


@both
def test_ropes_of_a_search_in_one_forward(name: str) -> None:
    losses = TransformersLosses(keeping_model(name), batch_tokens=10**6)
    pairs, ids = losses.rope.pairs, tokens(1)
    ropes = [Rope((FactorSet(factors(pairs, scale)),), losses.rope.base) for scale in (1.1, 2.0, 4)]
    found = losses(ropes, ids.expand(3, -1))
    alone = torch.cat([losses(rope, ids) for rope in ropes])
    assert max_diff(found, alone) < CLOSE
    assert max_diff(alone[0], alone[1]) > 100 * CLOSE
