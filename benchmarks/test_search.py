"""What a search costs: proposing candidates, putting them into the model, and one forward of it.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option the search is short
and the model small, and it is a check that everything runs. Wall time, on a GPU too.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from clock import HOST
from forward import plain_losses
from measure import Timed, measure
from ropes import DEVICE, WrongResultError, assert_right, not_importable
from table import Row, Table, median_of

from longrope_kernels.search import (
    Candidate,
    Evaluation,
    EvolutionarySearch,
    EvolutionSettings,
    SearchSpace,
    run_search,
)

SPACE = SearchSpace(128, 10000.0, original_length=4096, target_length=131072)
# The searched factors of one stage of Phi-3-mini, for the model.
OF_MODEL = SearchSpace(96, 10000.0, original_length=4096, target_length=131072)
IN_MEMORY, JOURNAL = "in memory", "with a journal and a state on disk"
SET, ENABLE = "set_rope", "disable and enable"
THEIRS = "transformers, a new rotary module"
PLAIN, LOSSES = "transformers, a head for the scored tokens", "the losses of a candidate"
VARIANTS = {
    "40 iterations, a free evaluator": (IN_MEMORY, JOURNAL),
    "a candidate into a model": (THEIRS, SET, ENABLE),
    "a forward, its last half scored": (PLAIN, LOSSES),
}


@cache
def missing(name: str) -> str | None:
    """Why it cannot run here, or None."""
    return not_importable("transformers") if name not in (IN_MEMORY, JOURNAL) else None


NAMES = list(itertools.chain(*VARIANTS.values()))
NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    "search overhead, medians",
    "1/s",
    1,
    "",
    "x first",
    "1/s: evaluations (candidates of 64 factors), or candidates put into a model of 32 layers",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 1.0


@pytest.mark.benchmark(timer=HOST.now, disable_gc=True)
@pytest.mark.less_important(1)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind}-{name}")
        for kind, names in VARIANTS.items()
        for name in names
        if name not in NOT_TIMED
    ],
)
def test_search(benchmark: Any, request: pytest.FixtureRequest, kind: str, name: str) -> None:
    full_size = bool(request.config.getoption("benchmark_only"))
    benchmark.group = f"search, {kind}"

    def prepare(name: str) -> Timed:
        if name in (IN_MEMORY, JOURNAL):
            return _searching(name, full_size)
        if name in (PLAIN, LOSSES):
            return _forward(name, full_size)
        return _exchanging(name, full_size)

    found = measure(
        benchmark, request, prepare, (THEIRS, PLAIN), SECONDS_A_ROW, fewest=3, clock=HOST
    )
    if found is None:
        return
    first = VARIANTS[kind][0]
    of_first = found.median if name == first else median_of(ROWS, benchmark.group, first)
    ROWS.append(Row(benchmark.group, name, found.median, found.amount, None, of_first))
    benchmark.extra_info.update(
        work="search",
        kind=kind,
        amount=found.amount,
        per_second=found.amount / found.median,
        peak_bytes=found.peak_bytes,
    )


# -------------------------------------------------------------------------------------- proposing


def _searching(name: str, full_size: bool) -> Timed:
    """A whole search, of the paper's size."""
    settings = EvolutionSettings() if full_size else EvolutionSettings(iterations=3)

    def run(folder: Any) -> EvolutionarySearch:
        with EvolutionarySearch(SPACE, settings, folder and folder.name) as search:
            run_search(search, _free, batch=settings.population)
        return search

    def arguments() -> tuple[Any]:
        return (tempfile.TemporaryDirectory() if name == JOURNAL else None,)

    search = run(*arguments())
    seen = [evaluation.candidate for evaluation in search.evaluations]
    if not len(seen) == len(set(seen)) == search.total:
        raise WrongResultError(f"{name}: {len(set(seen))} candidates, expected {search.total}")
    if search.best != min(search.evaluations, key=lambda evaluation: evaluation.fitness):
        raise WrongResultError(f"{name}: {search.best} is not the best")
    return Timed(run, arguments, None, search.total)


def _free(candidates: list[Candidate]) -> list[Evaluation]:
    """The distance from factors that rise evenly to 16."""
    aim = [100 + 1500 * i // SPACE.pairs for i in range(SPACE.pairs)]
    return [
        Evaluation(c, float(sum(abs(a - b) for a, b in zip(c.factors, aim, strict=True))))
        for c in candidates
    ]


# ------------------------------------------------------------------------------------- exchanging


def _exchanging(name: str, full_size: bool) -> Timed:
    """One candidate into the model that holds another: its rope, and the rope's tables."""
    ropes = _ropes()
    of = _model(name, full_size)
    put = _putting(name, of)
    ids = torch.arange(40, device=DEVICE)[None]
    with torch.no_grad():
        for candidate in itertools.islice(ropes, 2):
            put(candidate)
            found, right = of(ids).logits, _logits(candidate, full_size, ids)
            assert_right(name, "logits", found, right, 256 * torch.finfo(found.dtype).eps)
    return Timed(put, lambda: (next(ropes),), None, 1)


def _ropes() -> Iterator[Candidate]:
    """Candidates, all of them different."""
    for i in itertools.count(1):
        yield Candidate(tuple(100 + i + 20 * pair for pair in range(OF_MODEL.pairs)))


def _putting(name: str, of: Any) -> Callable[[Candidate], Any]:
    from longrope_kernels.integrations.transformers import disable, enable, set_rope

    if name == SET:
        return lambda candidate: set_rope(of, OF_MODEL.rope(candidate))
    if name == ENABLE:
        return lambda candidate: enable(disable(of), rope=OF_MODEL.rope(candidate))

    def theirs(candidate: Candidate) -> None:
        """What one does without this package: a config with the factors, and a module of it."""
        rope = OF_MODEL.rope(candidate)
        (one,) = rope.sets
        scaling = {**of.config.rope_parameters, "attention_factor": one.attention_factor}
        scaling |= {key: list(one.factors) for key in ("short_factor", "long_factor")}
        of.config.rope_parameters = scaling
        of.model.rotary_emb = type(of.model.rotary_emb)(of.config).to(DEVICE)

    return theirs


# ---------------------------------------------------------------------------------------- forwards


def _forward(name: str, full_size: bool) -> Timed:
    """The losses of the last half of a text, under the rope that the model has."""
    from longrope_kernels.search.model import TransformersLosses

    of = _model(PLAIN, full_size)
    length = 2048 if full_size else 64
    ids, last = torch.arange(length)[None] % 64, length // 2

    def plain(ids: torch.Tensor) -> torch.Tensor:
        return plain_losses(of, ids, last)

    if name == PLAIN:
        return Timed(plain, lambda: (ids,), None, 1)
    losses = TransformersLosses(copy.deepcopy(_untouched(full_size)))

    def ours(ids: torch.Tensor) -> torch.Tensor:
        return losses(losses.rope, ids, last=last)

    found, right = ours(ids), plain(ids)
    assert_right(name, "losses", found, right, 1e-3)
    return Timed(ours, lambda: (ids,), None, 1)


@lru_cache(maxsize=1)
def _untouched(full_size: bool) -> Any:
    """Phi-3-mini's layers, narrow: what an exchange costs does not depend on their width."""
    from transformers import Phi3ForCausalLM

    from longrope_kernels.demo.peers import phi3_config

    sizes = {"hidden_size": 2 * 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    layers = 32 if full_size else 2
    sizes |= {"intermediate_size": 64, "num_hidden_layers": layers, "vocab_size": 64}
    torch.manual_seed(0)
    return Phi3ForCausalLM(phi3_config("phi-3-mini-128k", **sizes)).to(DEVICE).eval()


@lru_cache(maxsize=3)
def _model(name: str, full_size: bool) -> Any:
    """One for each row."""
    from longrope_kernels.integrations.transformers import enable

    of = copy.deepcopy(_untouched(full_size))
    return of if name in (THEIRS, PLAIN) else enable(of, rope=OF_MODEL.rope(next(_ropes())))


def _logits(candidate: Candidate, full_size: bool, ids: torch.Tensor) -> torch.Tensor:
    """Of a model that was enabled with this candidate from the beginning, in float64."""
    from longrope_kernels.integrations.transformers import enable

    of = copy.deepcopy(_untouched(full_size)).double()
    return enable(of, rope=OF_MODEL.rope(candidate), backend="reference")(ids).logits
