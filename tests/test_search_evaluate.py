"""`longrope evaluate` on a tiny model, held to transformers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from search_cases import (
    ORIGINAL,
    flags,
    given,
    make_model,
    measured,
    one_thread,
    pictures,
    run,
    searched,
    work,
)
from transformers import AutoConfig, AutoModelForCausalLM

from longrope_kernels import Rope
from longrope_kernels.search.documents import Document, encoder, read_documents, tails
from longrope_kernels.search.fitness import Perplexity
from longrope_kernels.search.needles import key_values
from longrope_kernels.search.retrieval import KINDS

__all__ = ["one_thread", "searched", "work"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluate_compares_ropes_and_formulas(work, searched, tmp_path):
    lengths = flags(length=ORIGINAL, rope=searched) + flags(length=280)
    result = run("evaluate", *given(work), *lengths, "--same-start", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "evaluation.json").read_text())
    rows = content["perplexity"]
    names = ["the model's own", "no scaling", "PI", "NTK", "YaRN", "searched", "dynamic NTK"]
    assert list(rows) == names
    assert rows["searched"]["280"] == pytest.approx(
        measured(work, Rope.load(searched), 280), rel=1e-5
    )
    # Nothing is scaled up to the original length.
    assert rows["dynamic NTK"]["32"] == rows["no scaling"]["32"] == rows["the model's own"]["32"]
    assert rows["dynamic NTK"]["280"] == pytest.approx(rows["NTK"]["280"])
    assert content["retrieval"] is None
    assert content["last"] is None
    assert pictures(tmp_path) == ["perplexity.png"]
    assert result.stdout.count("dynamic NTK") == 1


def test_each_rope_has_a_row_whatever_it_is_called(work, searched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("a/s", "s", "YaRN", "dynamic NTK")
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Rope.load(searched).save(name)
    more = [part for name in names for part in ("--rope", name)]
    result = run("evaluate", *given(work), *flags(length=280), "--out", tmp_path / "out", *more)
    assert result.exit_code == 0, result.stderr
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["perplexity"]
    assert list(rows)[5:] == ["s", "s (2)", "YaRN (2)", "dynamic NTK (2)", "dynamic NTK"]
    assert len({rows[name]["280"] for name in list(rows)[5:9]}) == 1
    assert rows["YaRN"] != rows["YaRN (2)"]
    assert rows["dynamic NTK"] == rows["NTK"]


def test_what_was_measured_is_not_measured_again(work, searched, tmp_path, monkeypatch):
    """Of a command that was killed, in the middle of a line too; of other texts it is."""
    measured: list[int] = []
    measure = Perplexity.measure

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        measured.append(1)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(self, *arguments, **keywords)

    monkeypatch.setattr(Perplexity, "measure", counted)
    command = ["evaluate", *given(work), *flags(length=280, rope=searched), "--retrieval"]
    assert run(*command, "--out", tmp_path).exit_code == 130
    (file,) = tmp_path.glob("measured-*")
    file.write_bytes(file.read_bytes()[:-9])
    done = run(*command, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    # Two were whole; dynamic NTK is NTK at this length.
    assert len(measured) == 4 + 4
    content = (tmp_path / "evaluation.json").read_bytes()
    assert run(*command, "--out", tmp_path).exit_code == 0
    assert len(measured) == 8
    assert (tmp_path / "evaluation.json").read_bytes() == content
    assert run(*command, "--out", tmp_path / "fresh").exit_code == 0
    assert json.loads((tmp_path / "fresh/evaluation.json").read_bytes()) == json.loads(content)
    before = len(measured)
    assert run(*command, "--out", tmp_path, "--last", 100).exit_code == 0
    assert len(measured) > before
    # A config decides what the same weights say.
    command[1] = make_model(tmp_path / "other", rms_norm_eps=0.1)
    assert run(*command, "--out", tmp_path).exit_code == 0
    own = "the model's own"
    now = json.loads((tmp_path / "evaluation.json").read_bytes())["perplexity"][own]
    assert now != json.loads(content)["perplexity"][own]


def evaluated(work: Path, out: Path, *more: Any) -> tuple[dict[str, Any], str]:
    lengths = flags(length=40) + flags(length=ORIGINAL) + flags(length=280)
    result = run("evaluate", *given(work), *lengths, "--out", out, *more)
    assert result.exit_code == 0, result.stderr
    return json.loads((out / "evaluation.json").read_text()), result.stdout


@torch.no_grad()
def plain_losses(work: Path, ids: torch.Tensor, last: int, **scaling: Any) -> torch.Tensor:
    """(last,) nats by transformers alone; ``scaling``: of its rope, none by default."""
    config = AutoConfig.from_pretrained(work / "model")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **scaling}
    model = AutoModelForCausalLM.from_pretrained(work / "model", config=config)
    logits = model(ids[None], use_cache=False).logits[0].double()
    return -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[-last:, 0]


def of_bytes(work: Path) -> list[torch.Tensor]:
    files = sorted((work / "texts").iterdir())
    return [torch.tensor(list(file.read_bytes())) for file in files]


PI_TO_280 = {"rope_type": "linear", "factor": 280 / ORIGINAL}


def test_evaluate_scores_the_same_tokens_at_each_length(work, tmp_path):
    content, shown = evaluated(work, tmp_path)
    assert content["last"] == ORIGINAL // 2  # half of the shortest length
    assert shown.splitlines()[0].split() == ["perplexity,", "last", "16", "32", "40", "280"]
    assert content["same_tokens"] is True
    for name, scaling in (("no scaling", {}), ("PI", PI_TO_280)):
        for length in (ORIGINAL, 40, 280):
            rows = [
                plain_losses(work, x[280 - length : 280], 16, **scaling) for x in of_bytes(work)
            ]
            means = torch.stack(rows).mean(1)
            perplexity, key = means.mean().exp().item(), str(length)
            assert content["perplexity"][name][key] == pytest.approx(perplexity, rel=1e-5)
            assert content["losses"][name][key] == pytest.approx(means.tolist(), rel=1e-5)
            error = perplexity * means.std().item() / 2**0.5
            assert content["errors"][name][key] == pytest.approx(error, rel=1e-3)
    last, _ = evaluated(work, tmp_path, "--last", 3)
    expected = [plain_losses(work, x[240:280], 3) for x in of_bytes(work)]
    expected = torch.cat(expected).mean().exp().item()
    assert last["perplexity"]["no scaling"]["40"] == pytest.approx(expected, rel=1e-5)
    failed = run("evaluate", *given(work), *flags(length=40), "--out", tmp_path / "perplexity.png")
    assert failed.exit_code == 2
    assert "Invalid value for '--out'" in failed.stderr
    failed = run("evaluate", *given(work), *flags(length=40), "--length", 9, "--last", 9)
    assert "last: expected 1 to 8 tokens, got 9" in failed.stderr


def test_each_length_from_the_beginning_has_other_tokens(work, tmp_path):
    content, _ = evaluated(work, tmp_path, "--same-start", "--last", 3)
    expected = torch.cat([plain_losses(work, x[:40], 3) for x in of_bytes(work)]).mean().exp()
    assert content["perplexity"]["no scaling"]["40"] == pytest.approx(expected.item(), rel=1e-5)
    assert content["same_tokens"] is False


def test_the_tokens_that_begin_a_document_stay_in_front():
    whole = [Document("text", torch.tensor([0, 0, *range(10, 40)]))]
    assert tails(whole, 30, 10, 2)[0].tokens.tolist() == [0, 0, *range(30, 38)]
    assert tails(whole, 30, 30, 2)[0].tokens.tolist() == [0, 0, *range(10, 38)]
    assert tails(whole, 30, 10)[0].tokens.tolist() == list(range(28, 38))


def test_what_differs_by_less_than_its_error_is_marked(work, tmp_path):
    content, shown = evaluated(work, tmp_path)
    assert "±: the standard error over 2 documents; =: as good as the best" in shown
    lines = {line[:15].strip(): line[15:] for line in shown.splitlines()}
    for column, length in enumerate(("32", "40", "280")):
        of = {name: torch.tensor(row[length]) for name, row in content["losses"].items()}
        best = min(of, key=lambda name: of[name].mean().item())
        for name, losses in of.items():
            behind = losses - of[best]
            tied = name != best and behind.mean() <= behind.std() / 2**0.5
            cells = re.findall(r"[\d.e+]+ ± [\d.e+-]+ ?=?", lines[name])
            number, error = content["perplexity"][name][length], content["errors"][name][length]
            assert cells[column].rstrip("= ") == f"{number:.4g} ± {error:.2g}"
            assert cells[column].endswith("=") == tied
    _, alone = evaluated(work, tmp_path / "one", "--samples", 1)
    assert "one document: no standard errors" in alone
    assert "±" not in alone


def test_evaluate_finds_hidden_numbers(work, tmp_path):
    content, shown = evaluated(work, tmp_path, "--retrieval")
    assert shown.count("found, ") == 2
    texts = read_documents([work / "texts"], encoder("bytes"), 280)
    needles = key_values(encoder("bytes"))
    for kind, hidden in KINDS.items():
        rows = content["retrieval"][kind]
        assert list(rows["PI"]) == ["280"]  # 40 tokens have no room for five needles
        right, losses = [], []
        for of in hidden(texts, needles, 280):
            for text, asked in of:
                for _, question, answer in asked:
                    ids = torch.cat([text, torch.tensor([*question, *answer])])
                    told = plain_losses(work, ids, len(answer), **PI_TO_280)
                    losses.append(told)
                    right.append(bool((told < 0.5).all()))
        assert rows["PI"]["280"]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
        assert rows["PI"]["280"]["found"] == sum(right) / len(right) == 0
        assert rows["PI"]["280"]["by_depth"] == [0.0] * 5
    short = run("evaluate", *given(work), "--length", 100, "--retrieval")
    assert "--retrieval: expected a length of" in short.stderr
