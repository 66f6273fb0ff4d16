"""The commands of the search on a tiny model: their files, their resume, their errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_cases import (
    LENGTH,
    ONE_THREAD,
    ORIGINAL,
    SMALL,
    flags,
    given,
    make_model,
    make_texts,
    measured,
    one_thread,
    pictures,
    run,
    search,
    searched,
    work,
)
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from longrope_kernels import FactorSet, Rope
from longrope_kernels.search import commands, find, plots
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.source import open_source

__all__ = ["one_thread", "searched", "work"]
pytestmark = pytest.mark.usefixtures("one_thread")


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
    for change in ({"length": 64}, {"seed": 1}, {"samples": 1}, {"last": 8}, {"dtype": "bfloat16"}):
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


@pytest.mark.parametrize(
    ("kind", "fields", "original", "trained"),
    [
        ("linear", {}, None, 128),
        ("linear", {}, 8, 32),  # whose maximum has the factor
        ("yarn", {}, None, 128),
        ("yarn", {"original_max_position_embeddings": 16}, None, 64),
        ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, None, 32),
    ],
)
def test_a_scaled_model_serves_what_its_factor_says(tmp_path, kind, fields, original, trained):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **fields}
    source = open_source(make_model(tmp_path, rope_parameters=parameters), original)
    assert source.trained == trained
    assert source.stage is not None


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
    (tmp_path / "model").symlink_to(work / "model")
    make_texts(tmp_path / "texts", length=640)
    result = search(tmp_path, tmp_path / "out", *wanted, length=640, optimizer="cmaes")
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert content["space"]["n_hats"] == [0, 4]
    assert content["space"]["attention"] == 1.0
    assert content["space"]["monotone"] is False
    assert Rope.load(tmp_path / "out").sets[0].attention_factor == 1.0


@pytest.mark.parametrize("best", [1.0, 1e9])
def test_a_search_that_finds_nothing_better_than_a_formula_says_so(
    work, tmp_path, monkeypatch, best
):
    def with_formulas(*arguments: Any, **more: Any) -> find.Found:
        return replace(find.find(*arguments, **more), others={"PI": 1e9, "YaRN": best})

    monkeypatch.setattr(commands, "find", with_formulas)
    told = search(work, tmp_path).stdout
    assert ("found nothing better than YaRN, which is a formula" in told) == (best == 1.0)


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
    wrong = run(*command[:-4], "--length", LENGTH, "--out", tmp_path / "none")
    assert "--length: expected less than the 96 tokens that the rope is for, got 96" in wrong.stderr


def test_readjust_writes_the_length_of_the_rope_it_is_given(work, tmp_path):
    Rope((FactorSet((3.0,) * 8),)).save(tmp_path / "long.json")
    texts = flags(documents=work / "texts", tokenizer="bytes", samples=2, length=16, **SMALL)
    command = ["readjust", work / "model", *texts, "--rope", tmp_path / "long.json"]
    wrong = run(*command, "--out", tmp_path / "none")
    assert "--rope-length: expected the tokens that --rope is for" in wrong.stderr
    wrong = run(*command[:-2], "--rope-length", LENGTH, "--out", tmp_path / "none")
    assert "--rope-length: expected none without --rope, got 96" in wrong.stderr
    result = run(*command, "--rope-length", LENGTH, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    written = open_source(tmp_path / "out")
    assert written.trained == LENGTH


def other_files(folder: Path) -> Path:
    """Of other programs, under the names of this one's."""
    for name, text in (
        ("evaluation.json", '{"perplexity": 3}'),
        ("longrope.json", "{}"),
        ("a/result.json", "[]"),
        ("a/inner/result.json", "{}"),
        ("b/result.json", "{"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_pictures_are_of_a_commands_own_files_and_never_cost_its_result(
    work, tmp_path, monkeypatch
):
    out = other_files(tmp_path)
    monkeypatch.setattr(plots, "draw_history", None)  # fails, as a font that is not there
    result = search(work, out)
    assert result.exit_code == 0, result.stderr
    assert "LongRoPE" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"{out}/result.json: no picture of it: ")
    assert [path.name for path in out.rglob("*.png")] == ["factors.png"]


def test_plot_draws_again(searched, tmp_path):
    for picture in searched.glob("*.png"):
        picture.unlink()
    assert run("plot", searched).exit_code == 0
    assert pictures(searched) == ["factors.png", "history.png"]
    foreign = other_files(tmp_path / "foreign")
    shutil.copytree(searched, foreign / "own")
    (foreign / "own/factors.png").unlink()
    result = run("plot", foreign)
    assert result.exit_code == 0
    told = [line.split(": no picture of it: ")[0] for line in result.stderr.splitlines()]
    assert told == [
        str(foreign / name) for name in ("evaluation.json", "longrope.json", "b/result.json")
    ]
    assert [path.parent.name for path in foreign.rglob("*.png")] == ["own", "own"]
    for folder, message in (
        (foreign / "b", "expected result.json"),
        (tmp_path / "no", "no such folder"),
        (foreign / "a", "expected result.json"),
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
    "needle": (
        {},
        {"fitness": "needle", "last": 9, "length": 200},
        "last, stride: expected none with fitness needle",
    ),
    "optimizer": ({}, {"optimizer": "adam"}, "optimizer: expected one of evolution, cmaes"),
    "no tokenizer": ({}, {"tokenizer": "model"}, "tokenizer: found none in"),
    "dtype": ({}, {"dtype": "int8"}, "dtype: expected one of auto, float32"),
    "device": ({}, {"device": "cuda:99"}, "device: expected one that is here, got 'cuda:99'"),
    "original": ({}, {"original-length": 64}, "original length: expected 2 to 32 tokens"),
    "no start": ({}, {"start-length": 64}, "--start-length: expected none without --start, got 64"),
    "start of nothing": (
        {},
        {"start": "model", "start-length": 0},
        "--start-length: expected the tokens that --start is for, got 0",
    ),
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


def test_broken_files_are_one_line_too(work, searched, tmp_path):
    """Weights cut short, a tokenizer of more tokens, a state without a part, and other files."""
    cut, small, started = tmp_path / "cut", tmp_path / "small", tmp_path / "started"
    shutil.copytree(work / "model", cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    headless = tmp_path / "headless"
    AutoModelForCausalLM.from_pretrained(work / "model").model.save_pretrained(headless)
    make_model(small, vocab_size=64)
    other_sizes, no_config = (tmp_path / name for name in ("other sizes", "no config"))
    for folder, text in (
        (other_sizes, (small / "config.json").read_text().replace('": 64', '": 128')),
        (no_config, "null"),
    ):
        shutil.copytree(work / "model", folder)
        (folder / "config.json").write_text(text)
    other = make_model(tmp_path / "other model", rms_norm_eps=0.1)  # of the same weights
    shutil.copytree(searched, tmp_path / "searched")
    shutil.copytree(searched, started)
    state = json.loads((started / "state.json").read_text())
    del state["config_hash"]
    (started / "state.json").write_text(json.dumps(state))
    texts = flags(documents=work / "texts", tokenizer="bytes", samples=2, length=LENGTH, **SMALL)
    out = tmp_path / "out"
    for model, folder, message in (
        (cut, out, "expected whole weights"),
        (headless, out, "expected whole weights, got none for lm_head.weight"),
        (small, out, "--tokenizer: expected ids below 64, which the model knows"),
        (other_sizes, out, f"{other_sizes}: "),
        (no_config, out, "config.json: expected an object, got None"),
        (work / "model", started, "expected config, config_hash and state"),
        (other, tmp_path / "searched", "the folder is another run's: context.config is "),
        (work / "model", work / "model", "--out: expected another folder than that of the model"),
    ):
        result = run("search", model, *texts, *flags(out=folder))
        assert result.exit_code == 1
        assert message in result.stderr.strip().splitlines()[-1]
    assert not out.exists()


def test_weights_that_are_not_finite_are_found_by_the_search(work, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    model.lm_head.weight.data[5, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    texts = flags(documents=work / "texts", tokenizer="bytes", samples=2, length=LENGTH, **SMALL)
    result = run("search", tmp_path / "model", *texts, *flags(out=tmp_path / "out"))
    assert "no candidate has a finite loss" in result.stderr


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


def test_help_teaches():
    for command in ("search", "extend", "readjust", "evaluate", "plot"):
        text = run(command, "--help").stdout
        assert f"longrope {command} " in text
