"""Searches that judge coarsely first, and within hours, from the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from search_cases import (
    LENGTH,
    ORIGINAL,
    SMALL,
    flags,
    make_model,
    make_texts,
    measured,
    one_thread,
    run,
    search,
    work,
)
from transformers import AutoModelForCausalLM

from longrope_kernels import Rope
from longrope_kernels.search import find as find_module
from longrope_kernels.search.documents import encoder, read_documents
from longrope_kernels.search.fitness import Documents, NeedlePerplexity
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import key_values

__all__ = ["one_thread", "work"]
pytestmark = pytest.mark.usefixtures("one_thread")


COARSE = flags(**{"coarse": "on", "coarse-tokens": 24, "coarse-share": 0.4})


@pytest.fixture
def windows(monkeypatch):
    """As for a model whose caches hold what can't be rotated anew."""
    monkeypatch.setattr(TransformersLosses, "keeps", False)


@pytest.fixture(params=["prefix", "windows"])
def kind(request):
    """Of the coarse fitness."""
    if request.param == "windows":
        request.getfixturevalue("windows")
    return request.param


def test_a_search_that_judges_coarsely_first(work, tmp_path, kind):
    result = search(work, tmp_path, *COARSE, attention="searched")
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    rows = [json.loads(s) for s in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    stages = [row["stage"] for row in rows]
    assert [row["formula"] for row in rows[:4]] == ["no scaling", "PI", "NTK", "YaRN"]
    assert stages.count("coarse") == 6 + 2 * 5
    assert stages.count("full") == content["evaluations"] < 16
    windows = {"tokens": 24, "chunks": 2, "windows": 1, "attention": 100}
    prefix = {"behind": "a prefix", "tokens": 24}
    assert content["windows"] == (windows if kind == "windows" else prefix)
    assert content["coarse"] is True
    assert len(rows[stages.index("coarse")]["details"]["losses"]) == 2
    by_factors: dict[str, set[float]] = {}
    for row in rows:
        if row["stage"] == "coarse":
            by_factors.setdefault(str((row["factors"], row["n_hat"])), set()).add(row["fitness"])
    assert len(by_factors) < stages.count("coarse")
    # By windows whatever the attention factor: that takes all keys.
    assert all(len(found) == 1 for found in by_factors.values()) == (kind == "windows")
    best = content["best"]["fitness"]
    assert best == min(row["fitness"] for row in rows if row["stage"] == "full" and row["complete"])
    assert best == pytest.approx(measured(work, Rope.load(tmp_path)), rel=1e-5)
    assert "YaRN, best attention factor" in content["others"]
    assert content["descent"]["formula"] in ("PI", "NTK", "YaRN")
    assert f"from {content['descent']['formula']}, factors changed by" in result.stdout
    assert "rank correlation" in result.stderr or content["correlation"] is None
    assert "YaRN, best attention factor" in result.stdout
    batches = search(work, tmp_path / "batches", *COARSE, "--batch", 3, attention="searched")
    assert batches.exit_code == 0, batches.stderr
    assert Rope.load(tmp_path / "batches") == Rope.load(tmp_path)


def test_needles_first(work, tmp_path, kind):
    """Each statement in a chunk, the questions in the last; with batches as without."""
    windows = {"coarse": "on", "coarse-tokens": 620, "coarse-share": 0.4, "fitness": "needle"}
    (tmp_path / "model").symlink_to(work / "model")
    make_texts(tmp_path / "texts", length=1240)
    for out, more in ((tmp_path / "one", []), (tmp_path / "three", ["--batch", 3])):
        result = search(tmp_path, out, *more, length=1240, **windows)
        assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "one" / "result.json").read_text())
    assert content["coarse"] is True
    assert content["judged"] == 4 + 16
    assert content["evaluations"] < 16
    losses = TransformersLosses(AutoModelForCausalLM.from_pretrained(work / "model"))
    texts = read_documents([tmp_path / "texts"], encoder("bytes"), 1240)
    needles = key_values(encoder("bytes"), seed=1)
    fitness = NeedlePerplexity(losses, texts, needles, 1240)
    tokens = 620 if kind == "windows" else fitness.windows[0][0].last
    assert content["windows"]["tokens"] == tokens
    best = fitness(Rope.load(tmp_path / "one"))
    assert content["best"]["fitness"] == pytest.approx(best, rel=1e-5)
    assert Rope.load(tmp_path / "one") == Rope.load(tmp_path / "three")


@pytest.mark.parametrize(
    ("coarse", "tokens"), [("auto", None), ("off", None), ("on", 8)], ids=["auto", "off", "on"]
)
def test_short_lengths_have_windows_only_where_told(work, tmp_path, coarse, tokens):
    extended = tmp_path / "extended"
    make_model(extended, max_position_embeddings=LENGTH)
    Rope.longrope((2.0,) * 8, (2.0,) * 8, ORIGINAL, LENGTH).save(extended)
    given = flags(documents=work / "texts", tokenizer="bytes", samples=2, coarse=coarse, **SMALL)
    more = [] if tokens is None else ["--coarse-tokens", tokens]
    out = tmp_path / "out"
    result = run("readjust", extended, *given, *more, "--length", ORIGINAL, "--out", out)
    assert result.exit_code == 0, result.stderr
    content = json.loads((out / "32" / "result.json").read_text())
    judged = [json.loads(s) for s in (out / "32" / "evaluations.jsonl").read_text().splitlines()]
    stages = {row["stage"] for row in judged}
    assert stages == {"formulas", "full"} | ({"coarse"} if tokens else set())
    assert content["windows"] == ({"behind": "a prefix", "tokens": tokens} if tokens else None)
    rope, before = Rope.load(out), Rope.load(extended)
    assert measured(work, rope, ORIGINAL) <= measured(work, before, ORIGINAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coarse-share": 0}, "coarse-share: expected above 0 and up to 1, got 0.0"),
        ({"coarse-share": 1.5}, "coarse-share: expected above 0 and up to 1, got 1.5"),
        ({"coarse": "maybe"}, "coarse: expected one of auto, on, off, got 'maybe'"),
        ({"coarse-tokens": 49}, "coarse-tokens: expected at most 48, since 96 tokens need room"),
    ],
)
def test_what_windows_cannot_be_is_named(work, tmp_path, changes, message):
    result = search(work, tmp_path / "out", **{"coarse": "on", **changes})
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("windows")
def test_a_search_within_hours_goes_on_with_what_was_chosen(work, tmp_path, monkeypatch):
    seconds = iter([1.0, 10.0])  # of a candidate: by windows, and at the full length
    monkeypatch.setattr(find_module, "seconds_of", lambda work: next(seconds))
    more = ["--hours", 0.05, *COARSE]
    stopped = []

    def stop(self: Any, ropes: Any, **rest: Any) -> Any:
        stopped.append(1)
        if len(stopped) == 9:
            raise KeyboardInterrupt
        return measure(self, ropes, **rest)

    measure = Documents.measure
    monkeypatch.setattr(Documents, "measure", stop)
    sizes = {"population": 64, "iterations": 40, "mutants": 16, "crossovers": 16, "parents": 32}
    first = search(work, tmp_path, *more, **sizes)
    assert first.exit_code == 130
    assert "0.05 hours: 28 candidates in 6 iterations (1 s each), 0.4 of them" in first.stderr
    monkeypatch.setattr(Documents, "measure", measure)
    result = search(work, tmp_path, *more, **sizes)
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["options"]["population"] == 8
    assert content["options"]["coarse"]["share"] == 0.4
    assert content["judged"] == 4 + 28
    refused = search(work, tmp_path, *more[2:], "--hours", 0.06, **sizes)
    assert "hours is 0.05 there and 0.06 here" in refused.stderr
    wrong = search(work, tmp_path / "none", "--hours", 0)
    assert "hours: expected a time above 0, got 0" in wrong.stderr
