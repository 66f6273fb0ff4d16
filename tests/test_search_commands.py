"""The commands of the search on a tiny model: their files, their resume, their errors."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from search_cases import ORIGINAL, SMALL, flags, make_model, make_texts, one_thread
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from longrope_kernels import Rope, cli
from longrope_kernels.search import find as find_module
from longrope_kernels.search.documents import Document, encoder, read_documents, tails
from longrope_kernels.search.fitness import Documents, NeedlePerplexity, Perplexity
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import key_values, pass_key
from longrope_kernels.search.retrieval import KINDS

LENGTH = 96
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # what makes the last bits the same
__all__ = ["one_thread"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_model(folder / "model")
    make_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def searched(work: Path) -> Path:
    """The folder of a search that was not disturbed."""
    result = search(work, work / "searched")
    assert result.exit_code == 0, result.stderr
    return work / "searched"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def given(work: Path) -> list[Any]:
    return [work / "model", *flags(documents=work / "texts", tokenizer="bytes", samples=2)]


def search(work: Path, out: Path, *more: Any, **settings: Any) -> Any:
    settings = {"length": LENGTH, "out": out, **SMALL, **settings}
    return run("search", *given(work), *flags(**settings), *more)


def measured(work: Path, rope: Rope, length: int = LENGTH, model: str = "model") -> float:
    losses = TransformersLosses(AutoModelForCausalLM.from_pretrained(work / model))
    texts = read_documents([work / "texts"], encoder("bytes"), length)
    return Perplexity(losses, texts, length)(rope)


def pictures(folder: Path) -> list[str]:
    signature = b"\x89PNG"
    found = sorted(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(signature) for path in found)
    return [path.name for path in found]


# ------------------------------------------------------------------------------------------- search


def test_a_search_writes_what_it_found(work, searched):
    rope = Rope.load(searched)
    result = json.loads((searched / "result.json").read_text())
    assert result["best"]["fitness"] == pytest.approx(measured(work, rope), rel=1e-5)
    assert result["evaluations"] == 6 + 2 * 5
    assert set(result["others"]) == {"no scaling", "PI", "NTK", "YaRN"}
    assert result["others"]["no scaling"] == pytest.approx(measured(work, Rope.plain(16)), rel=1e-5)
    assert all(1 <= x <= 1.25 * LENGTH / ORIGINAL for x in rope.sets[0].factors)
    assert pictures(searched) == ["factors.png", "history.png"]
    config = AutoConfig.from_pretrained(searched)
    assert config.max_position_embeddings == LENGTH
    assert Rope.from_config(config).sets[1] == rope.sets[0]


def test_the_table_has_the_formulas_and_the_best(work, searched):
    again = search(work, searched)  # done: nothing is evaluated, the table comes again
    rows = [line.split() for line in again.stdout.splitlines()]
    best = json.loads((searched / "result.json").read_text())["best"]["fitness"]
    assert ["LongRoPE", f"{best:.4g}"] in [row[:2] for row in rows]
    assert [row[0] for row in rows[1:5]] == ["no", "PI", "NTK", "YaRN"]


def test_a_search_that_is_killed_goes_on_to_the_same_result(work, searched, tmp_path):
    out = tmp_path / "killed"
    settings = flags(length=LENGTH, out=out, **SMALL)
    command = [sys.executable, "-m", "longrope_kernels.cli", "search", *given(work), *settings]
    process = subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.DEVNULL, env=ONE_THREAD
    )
    journal, deadline = out / "evaluations.jsonl", time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n")
    assert done < 16
    result = search(work, out)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    whole = [json.loads(s) for s in (searched / "evaluations.jsonl").read_text().splitlines()]
    for row in rows + whole:
        del row["seconds"]
    assert rows == whole
    assert Rope.load(out) == Rope.load(searched)


def test_another_search_in_the_folder_is_refused(work, searched):
    before = (searched / "evaluations.jsonl").read_bytes()
    for change in ({"length": 64}, {"seed": 1}, {"samples": 1}, {"last": 8}):
        result = search(work, searched, **change)
        assert result.exit_code == 1
        assert result.stderr.count("the folder is another run's") == 1
    assert (searched / "evaluations.jsonl").read_bytes() == before


def test_a_full_disk_leaves_what_was_saved_and_the_search_goes_on(
    work, searched, tmp_path, monkeypatch
):
    save, calls = Rope.save, []

    def full(self: Rope, path: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_text("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path)

    monkeypatch.setattr(Rope, "save", full)
    result = search(work, tmp_path)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert len(Rope.load(tmp_path).sets[0].factors) == 8
    assert not list(tmp_path.glob("*.new"))
    assert search(work, tmp_path).exit_code == 0
    assert Rope.load(tmp_path) == Rope.load(searched)


def test_racing_and_batches_change_nothing(work, searched, tmp_path):
    for name, more in (("unraced", ["--no-race"]), ("batches", ["--batch", 3])):
        assert search(work, tmp_path / name, *more).exit_code == 0
        assert Rope.load(tmp_path / name) == Rope.load(searched)


@pytest.mark.slow
def test_two_processes_share_the_candidates(work, searched, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "-m", "longrope_kernels.cli"]
    settings = flags(length=LENGTH, out=tmp_path / "out", **SMALL)
    command = [*torchrun, "search", *map(str, given(work)), *settings]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LongRoPE") == 1  # one of them tells
    assert Rope.load(tmp_path / "out") == Rope.load(searched)


def test_a_second_stage_multiplies_the_first(work, searched, tmp_path):
    start = ["--start", searched, "--start-length", LENGTH]
    result = search(work, tmp_path, *start, length=2 * LENGTH, attention="searched")
    assert result.exit_code == 0, result.stderr
    first, second = (Rope.load(path).sets[0] for path in (searched, tmp_path))
    ratios = [b / a for a, b in zip(first.factors, second.factors, strict=True)]
    assert all(0.999 < ratio < 1.25 * 2 + 1e-9 for ratio in ratios)
    best = json.loads((tmp_path / "result.json").read_text())["best"]
    assert ratios == pytest.approx([x / 100 for x in best["factors"]])
    assert second.attention_factor == best["attention"] / 100
    assert "--start-length: expected" in search(work, tmp_path, "--start", searched).stderr


@pytest.mark.filterwarnings("ignore::longrope_kernels.rope.scaling.FactorWarning")
def test_options_reach_the_space(work, tmp_path):
    wanted = [
        "--no-monotone",
        "--attention",
        1.0,
        "--n-hat",
        4,
        "--n-hat",
        0,
        "--fitness",
        "needle",
    ]
    result = search(work, tmp_path, *wanted, length=160, optimizer="cmaes")
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["space"]["n_hats"] == [0, 4]
    assert content["space"]["attention"] == 1.0
    assert content["space"]["monotone"] is False
    assert Rope.load(tmp_path).sets[0].attention_factor == 1.0


# ----------------------------------------------------------------------------------------- evaluate


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


# ----------------------------------------------------------------------------------------- readjust


def test_readjust_gives_short_lengths_sets_that_are_better(work, tmp_path):
    extended = tmp_path / "extended"
    make_model(extended, max_position_embeddings=LENGTH)
    factors = tuple(3.0 for _ in range(8))
    Rope.longrope(factors, factors, ORIGINAL, LENGTH).save(extended)
    config = json.loads((extended / "config.json").read_text())
    config["original_max_position_embeddings"] = ORIGINAL
    (extended / "config.json").write_text(json.dumps(config))
    texts = flags(documents=work / "texts", tokenizer="bytes", samples=2, **SMALL)
    command = ["readjust", extended, *texts, "--length", ORIGINAL, "--out", tmp_path / "out"]
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    rope, before = Rope.load(tmp_path / "out"), Rope.load(extended)
    found = json.loads((tmp_path / "out" / "32" / "result.json").read_text())
    better = found["best"]["fitness"] < found["others"]["before"]
    assert rope.sets[-1].factors == factors
    assert ("its own set" in result.stdout) == better == (rope.sets[0].factors != factors)
    assert measured(work, rope, ORIGINAL) <= measured(work, before, ORIGINAL)
    assert max(rope.sets[0].factors) <= max(3.0**0.5, 1.25) + 1e-9
    assert rope.sets[0].max_length == ORIGINAL
    assert Rope.from_config(AutoConfig.from_pretrained(tmp_path / "out")) == rope
    wrong = run(*command[:-4], "--length", 1, "--out", tmp_path / "none")
    assert "lengths: expected ascending numbers of tokens, got [1]" in wrong.stderr


# ------------------------------------------------------------------------------------------- others


def test_plot_draws_again(searched, tmp_path):
    for picture in searched.glob("*.png"):
        picture.unlink()
    assert run("plot", searched).exit_code == 0
    assert pictures(searched) == ["factors.png", "history.png"]
    for folder, message in (
        (tmp_path, "expected result.json"),
        (tmp_path / "no", "no such folder"),
    ):
        result = run("plot", folder)
        assert result.exit_code == 1
        assert message in result.stderr


ERRORS = {
    "no model": ({"model": "nothing"}, {}, "expected the folder of a model, with a config.json"),
    "short documents": ({}, {"length": 400}, "0.txt: expected at least 400 tokens"),
    "not longer": ({}, {"length": 32}, "--length: expected more than the 32 tokens"),
    "attention": ({}, {"attention": "much"}, "--attention: expected fixed, searched or a number"),
    "fitness": ({}, {"fitness": "luck"}, "fitness: expected one of perplexity, needle, got 'luck'"),
    "optimizer": ({}, {"optimizer": "adam"}, "optimizer: expected one of evolution, cmaes"),
    "no tokenizer": ({}, {"tokenizer": "model"}, "tokenizer: found none in"),
    "dtype": ({}, {"dtype": "int8"}, "dtype: expected one of auto, float32"),
    "original": ({}, {"original-length": 64}, "original length: expected 2 to 32 tokens"),
}


@pytest.mark.parametrize(("files", "settings", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_what_a_user_can_mend_is_one_line(work, tmp_path, monkeypatch, files, settings, message):
    monkeypatch.chdir(work)
    arguments = [files.get("model", "model"), *flags(documents="texts", tokenizer="bytes")]
    settings = {"length": LENGTH, "out": tmp_path / "out", **settings}
    result = run("search", *arguments, *flags(**settings))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("longrope search: ")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_searched_are_named(work, tmp_path):
    folder = tmp_path / "opt"
    opt = OPTConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=256, ffn_dim=32,
        word_embed_proj_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    OPTForCausalLM(opt).save_pretrained(folder)
    texts = flags(documents=work / "texts", tokenizer="bytes", length=LENGTH, out=tmp_path / "out")
    result = run("search", folder, *texts)
    assert "model: expected a model that contains a decoder of transformers" in result.stderr
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "spiral"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "proportional, got 'spiral'" in run("search", folder, *texts).stderr


def test_a_candidate_without_a_finite_loss_is_recorded_and_ranked_last(work, tmp_path, monkeypatch):
    once = TransformersLosses.__call__
    calls: list[int] = []

    def sometimes(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(len(calls))
        losses = once(self, *arguments, **keywords)
        return losses * float("nan") if len(calls) % 3 == 0 else losses

    monkeypatch.setattr(TransformersLosses, "__call__", sometimes)
    result = search(work, tmp_path, "--no-race", samples=1)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(s) for s in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    fitness = [row["fitness"] for row in rows]
    assert "nan" in fitness
    best = json.loads((tmp_path / "result.json").read_text())["best"]["fitness"]
    assert best == min(value for value in fitness if value != "nan")


def test_help_teaches_and_imports_nothing_heavy():
    for command in ("search", "extend", "readjust", "evaluate", "plot"):
        text = run(command, "--help").stdout
        assert f"longrope {command} " in text
    code = (
        "import sys, longrope_kernels.cli;"
        "assert not {'transformers', 'matplotlib', 'cmaes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------- coarse


COARSE = flags(**{"coarse": "on", "coarse-tokens": 24, "coarse-share": 0.4})


def test_a_search_that_judges_by_windows_first(work, searched, tmp_path):
    result = search(work, tmp_path, *COARSE, attention="searched")
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    rows = [json.loads(s) for s in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    stages = [row["stage"] for row in rows]
    assert [row["formula"] for row in rows[:4]] == ["no scaling", "PI", "NTK", "YaRN"]
    assert stages.count("coarse") == 6 + 2 * 5
    assert stages.count("full") == content["evaluations"] < 16
    assert content["windows"] == {"tokens": 24, "chunks": 2, "windows": 1}
    assert content["coarse"] is True
    assert len(rows[stages.index("coarse")]["details"]["losses"]) == 2
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


def test_needles_in_windows_first(work, tmp_path):
    """The statement in one chunk, the question in the last; with batches as without."""
    windows = {"coarse": "on", "coarse-tokens": 130, "coarse-share": 0.4, "fitness": "needle"}
    for out, more in ((tmp_path / "one", []), (tmp_path / "three", ["--batch", 3])):
        result = search(work, out, *more, length=280, **windows)
        assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "one" / "result.json").read_text())
    assert content["windows"]["tokens"] == 130
    assert content["coarse"] is True
    assert content["judged"] == 4 + 16
    assert content["evaluations"] < 16
    losses = TransformersLosses(AutoModelForCausalLM.from_pretrained(work / "model"))
    texts = read_documents([work / "texts"], encoder("bytes"), 280)
    needles = [pass_key(encoder("bytes"), number) for number in find_module.NEEDLES]
    best = NeedlePerplexity(losses, texts, needles, 280)(Rope.load(tmp_path / "one"))
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
    windows = {"tokens": tokens, "chunks": 2, "windows": 1} if tokens else None
    assert content["windows"] == windows
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


# ------------------------------------------------------------------------------------------- hours


def test_a_search_within_hours_goes_on_with_what_was_chosen(work, tmp_path, monkeypatch):
    seconds = iter([1.0, 10.0])  # of a candidate: by windows, and at the full length
    monkeypatch.setattr(find_module, "seconds_of", lambda work: next(seconds))
    more = ["--hours", 0.03, *COARSE]
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
    assert "0.03 hours: 28 candidates in 6 iterations (1 s each), 0.125 of them" in first.stderr
    monkeypatch.setattr(Documents, "measure", measure)
    result = search(work, tmp_path, *more, **sizes)
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["options"]["population"] == 8
    assert content["options"]["coarse"]["share"] == 0.125
    assert content["judged"] == 4 + 28
    refused = search(work, tmp_path, *more[2:], "--hours", 0.04, **sizes)
    assert "hours is 0.03 there and 0.04 here" in refused.stderr
    wrong = search(work, tmp_path / "none", "--hours", 0)
    assert "hours: expected a time above 0, got 0" in wrong.stderr
