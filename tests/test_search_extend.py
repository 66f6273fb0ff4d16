"""The progressive extension on a tiny model: its steps, its resume, the fine-tuning."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_cases import ORIGINAL, SMALL, make_model, make_texts, one_thread
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from longrope_kernels import FactorSet, Rope, cli
from longrope_kernels.integrations.transformers import enable
from longrope_kernels.search import extend as extend_module
from longrope_kernels.search import tune as tune_module
from longrope_kernels.search.coarse import Coarse
from longrope_kernels.search.documents import Document
from longrope_kernels.search.extend import ExtendPlan, Extension, Stage
from longrope_kernels.search.readjust import with_short_sets
from longrope_kernels.search.settings import Options
from longrope_kernels.search.source import open_source
from longrope_kernels.search.tune import TuneSettings, tune

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = Options(**{**SMALL, "iterations": 2})
TUNING = TuneSettings(rate=1e-2, warmup=1, rows=2, every=2)
STEPS = ["1-search-64", "2-tune-64", "3-search-128", "4-readjust", "model"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_model(folder / "model")
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    make_texts(folder / "texts")
    return folder


def plan(work: Path, **changes: Any) -> ExtendPlan:
    made = ExtendPlan(
        model=str(work / "model"),
        documents=(str(work / "texts"),),
        stages=(Stage(64, 5), Stage(128)),
        training=(str(work / "texts"),),
        short=(16, ORIGINAL),
        samples=2,
        tokenizer="bytes",
        options=OPTIONS,
        tuning=TUNING,
    )
    return replace(made, **changes)


def say_nothing(line: str) -> None:
    assert line


@pytest.fixture(scope="module")
def extended(work: Path) -> Path:
    Extension(plan(work), work / "extended").run(say=say_nothing)
    return work / "extended"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------- the plan


def test_the_steps_and_their_results(work, extended):
    assert sorted(p.name for p in extended.iterdir()) == sorted([*STEPS, "plan.json"])
    first, second = (Rope.load(extended / STEPS[i]).sets[0] for i in (0, 2))
    ratios = [b / a for a, b in zip(first.factors, second.factors, strict=True)]
    assert all(0.999 < ratio < 1.25 * 2 + 1e-9 for ratio in ratios)  # composed
    result = json.loads((extended / STEPS[2] / "result.json").read_text())
    assert result["space"]["stage"] == list(first.factors)
    searched = [x / 100 for x in result["best"]["factors"]]
    assert ratios == pytest.approx(searched)
    rope = Rope.load(extended / "model")
    assert rope.sets[-1] == second
    readjusted = json.loads((extended / "4-readjust" / "done.json").read_text())
    assert [s.max_length for s in rope.sets] == [*readjusted["taken"], None]
    for length in ("16", "32"):
        better = readjusted["after"][length] < readjusted["before"][length]
        assert better == (int(length) in readjusted["taken"])
    assert not equal(weights(extended / "2-tune-64"), weights(work / "model"))
    assert equal(weights(extended / "2-tune-64"), weights(extended / "model"))
    files = {p.name for p in (extended / "model").iterdir()}
    assert {"longrope.json", "config.json", "tokenizer_config.json", "done.json"} <= files
    assert "tuning.jsonl" not in files
    assert not list((extended / "2-tune-64").glob("checkpoint-*"))


def test_the_second_search_measures_the_model_that_was_tuned(extended):
    contexts = [
        json.loads((extended / name / "state.json").read_text())["config"]["context"]["weights"]
        for name in (STEPS[0], STEPS[2], "4-readjust/32")
    ]
    assert contexts[0] != contexts[1] == contexts[2]


def test_finished_steps_are_not_repeated(work, extended, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in extended.rglob("*") if path.is_file()}
    for name in ("find", "tune", "readjust", "load_model", "write_config"):
        monkeypatch.setattr(extend_module, name, None)
    said: list[str] = []
    rope = Extension(plan(work), extended).run(say=said.append)
    assert rope == Rope.load(extended / "model")
    assert said == [f"{name}: done before" for name in STEPS]
    assert {path: path.stat().st_mtime_ns for path in before} == before


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(("kind", "count"), [("search", 4), ("tune", 1), ("tune", 3)])
def test_a_step_that_is_stopped_goes_on_to_the_same_result(work, extended, tmp_path, kind, count):
    calls: list[int] = []

    def watch(of: str, name: str, total: int) -> Any:
        assert name in STEPS
        assert total == (5 if of == "tune" else 0)

        def progress(*_: Any) -> None:
            calls.extend([1] if of == kind else [])
            if len(calls) == count:
                raise StoppedError

        return progress

    short = plan(work, stages=(Stage(64, 5),), short=())
    with pytest.raises(StoppedError):
        Extension(short, tmp_path).run(watch, say_nothing)
    said: list[str] = []
    Extension(short, tmp_path).run(watch, said.append)
    assert said[0] == f"1-search-64: {'begins, or goes on' if kind == 'search' else 'done before'}"
    assert Rope.load(tmp_path / "model") == Rope.load(extended / STEPS[0])
    assert equal(weights(tmp_path / "model"), weights(extended / "2-tune-64"))
    rows = (tmp_path / "2-tune-64" / "tuning.jsonl").read_text().splitlines()
    whole = (extended / "2-tune-64" / "tuning.jsonl").read_text().splitlines()
    losses = [
        [json.loads(row)[k] for row in part for k in ("step", "loss")] for part in (rows, whole)
    ]
    assert losses[0] == losses[1]


def test_searches_with_windows_where_there_is_room(work, tmp_path):
    """Stopped within the windows, it goes on; a length of 16 has no room for two of them."""
    made = plan(
        work,
        stages=(Stage(64),),
        training=(),
        options=replace(OPTIONS, coarse=Coarse(tokens=16, share=0.5)),
    )
    whole = Extension(made, tmp_path / "whole").run(say=say_nothing)

    def watch(*_: Any) -> Any:
        def progress(search: Any) -> None:
            if search.stage == "coarse" and search.judged > 6:
                raise StoppedError

        return progress

    with pytest.raises(StoppedError):
        Extension(made, tmp_path / "stopped").run(watch, say_nothing)
    assert Extension(made, tmp_path / "stopped").run(say=say_nothing) == whole
    for folder, tokens in (("1-search-64", 16), ("2-readjust/16", None), ("2-readjust/32", 16)):
        content = json.loads((tmp_path / "whole" / folder / "result.json").read_text())
        assert (content["windows"] or {"tokens": None})["tokens"] == tokens
        lines = (tmp_path / "whole" / folder / "evaluations.jsonl").read_text().splitlines()
        assert any(json.loads(line)["stage"] == "coarse" for line in lines) == (tokens is not None)


def test_what_trained_short_windows_serves_short_sequences(work, tmp_path):
    tuning = replace(TUNING, short_share=0.5)
    made = plan(work, stages=(Stage(64, 2), Stage(96)), short=(), tuning=tuning)
    rope = Extension(made, tmp_path / "out").run(say=say_nothing)
    assert rope.sets[0] == FactorSet((1.0,) * 8, max_length=ORIGINAL)
    assert rope.sets[1:] == Rope.load(tmp_path / "out/3-search-96").sets
    assert Rope.load(tmp_path / "out/model") == rope
    config = json.loads((tmp_path / "out/model/config.json").read_text())["rope_parameters"]
    assert config["short_factor"] == [1.0] * 8
    again = replace(made, short=(ORIGINAL,))
    Extension(again, tmp_path / "again").run(say=say_nothing)
    context = json.loads((tmp_path / "again/4-readjust/32/state.json").read_text())["config"]
    assert context["context"]["before"][0] == [ORIGINAL, 0, 1.0, [1.0] * 8]


def test_one_extension_at_a_time_has_a_folder(work, tmp_path):
    made = plan(work, stages=(Stage(64, 2),), short=())

    def watch(kind: str, *_: Any) -> Any:
        def progress(*_: Any) -> None:
            if kind == "tune":
                with pytest.raises(RuntimeError, match="another extension has this folder open"):
                    Extension(made, tmp_path)
                raise StoppedError

        return progress

    first, second = Extension(made, tmp_path), Extension(made, tmp_path)
    with pytest.raises(StoppedError):
        first.run(watch, say_nothing)
    second.run(say=say_nothing)


def test_another_plan_in_the_folder_is_refused(work, extended):
    with pytest.raises(ValueError, match=r"another plan: options\.seed is 0 there and 1 here"):
        Extension(plan(work, options=replace(OPTIONS, seed=1)), extended)
    with pytest.raises(ValueError, match='another plan: dtype is "float32" there and "bfloat16"'):
        Extension(plan(work), extended, dtype="bfloat16")
    Extension(plan(work), extended, dtype="float32")  # what auto is on a CPU


def test_other_texts_or_another_model_under_the_same_paths_are_refused(work, tmp_path):
    for name in ("documents", "training"):
        make_texts(tmp_path / name)
    shutil.copytree(work / "model", tmp_path / "model")
    paths = {name: (str(tmp_path / name),) for name in ("documents", "training")}
    made, out = plan(work, model=str(tmp_path / "model"), **paths), tmp_path / "out"
    Extension(made, out)
    for name in ("documents", "training"):
        text = tmp_path / name / "0.txt"
        was = text.read_text()
        text.write_text(was[::-1])
        with pytest.raises(ValueError, match=rf"another plan: digests\.{name} is "):
            Extension(made, out)
        text.write_text(was)
    Extension(made, out)
    weights = tmp_path / "model/model.safetensors"
    was = weights.read_bytes()
    weights.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"another plan: digests\.model is "):
        Extension(made, out)
    content = json.loads((out / "plan.json").read_text())
    del content["digests"], content["dtype"]  # as an earlier version wrote it
    (out / "plan.json").write_text(json.dumps(content))
    Extension(made, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, r"stages: expected ascending lengths, got \[\]"),
        ({"stages": (Stage(64), Stage(64))}, "stages: expected ascending lengths"),
        ({"stages": (Stage(64, -1),)}, "stages: expected 0 or more steps, got -1"),
        ({"training": ()}, r"training: expected texts \(--train\) for the stages"),
        ({"short": (128,)}, r"short: expected ascending lengths below 128, got \[128\]"),
        ({"options": replace(OPTIONS, critical=4)}, "critical: expected one stage"),
        ({"stages": (Stage(32), Stage(64))}, "stages: expected more than 32 tokens"),
        ({"short": (100,)}, "short: expected at most the first stage's length: 100"),
        ({"options": replace(OPTIONS, last=20)}, "last: expected 1 to 15 tokens, got 20"),
        ({"options": replace(OPTIONS, n_hats=(40,))}, "n_hats: expected positions below .* = 16"),
        ({"options": replace(OPTIONS, fitness="needle")}, "length: expected at least the 520"),
        ({"upper": 0.5, "short": ()}, r"upper: expected at least 1\.0"),
        ({"upper": float("nan"), "short": ()}, r"upper: expected at least 1\.0, and finite"),
        ({"model": "nowhere"}, r"nowhere: expected the folder of a model, with a config\.json"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(work, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Extension(plan(work, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def check_steps_alone_refused(changed, out, message):
    with pytest.raises(ValueError, match=message):
        Extension(changed, out)
    assert not out.exists()
    untuned = replace(changed, stages=(Stage(64), Stage(128)))
    assert Extension(untuned, out).plan == untuned


def test_quantised_weights_are_searched_and_not_fine_tuned(work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    known = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(known))
    changed = plan(work, model=str(tmp_path / "model"))
    check_steps_alone_refused(
        changed, tmp_path / "out", r"no steps .* weights are quantised, got 5 at 64 tokens"
    )
    model = load(work)
    model.is_quantized = True
    with pytest.raises(ValueError, match="model: expected weights that training changes"):
        tune(model, rope(), documents(), 96, 1, TUNING, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_a_model_with_an_adapter_is_searched_and_not_fine_tuned(work, tmp_path):
    """Which transformers puts on, with nothing left to train."""
    shutil.copytree(work / "model", tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text("{}")
    changed = plan(work, model=str(tmp_path / "model"))
    check_steps_alone_refused(
        changed, tmp_path / "out", r"no steps .* adapter_config\.json, .* 5 at 64 tokens"
    )
    model = load(work).requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: expected weights .* got frozen ones alone"):
        tune(model, rope(), documents(), 96, 1, TUNING, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_texts_too_short_for_a_later_stage_are_refused_before_anything_runs(work, tmp_path):
    trained = make_texts(tmp_path / "trained", length=100)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"0\.txt: expected at least 1024 tokens, .* got 300"):
        Extension(plan(work, stages=(Stage(64, 5), Stage(1024))), out)
    later = plan(work, stages=(Stage(64, 5), Stage(128, 5)), training=(str(trained),))
    with pytest.raises(ValueError, match=r"training: expected a text of 128 tokens .* 100"):
        Extension(later, out)
    assert not out.exists()
    untuned = replace(later, stages=(Stage(64, 5), Stage(128)))
    Extension(untuned, out)


def test_the_command(work, extended):
    arguments = [work / "model", "--documents", work / "texts", "--train", work / "texts"]
    arguments += ["--stage", "64:5", "--stage", 128, "--short", 16, "--short", ORIGINAL]
    arguments += ["--samples", 2, "--tokenizer", "bytes", "--rate", 1e-2, "--warmup", 1]
    arguments += ["--rows", 2, "--checkpoint-every", 2, "--out", extended]
    arguments += [str(x) for k, v in {**SMALL, "iterations": 2}.items() for x in (f"--{k}", v)]
    runner = CliRunner()
    result = runner.invoke(cli.app, ["extend", *map(str, arguments)])  # the same plan: it is done
    assert result.exit_code == 0, result.stderr
    assert "1-search-64" in result.stdout
    assert "(before" in result.stdout
    assert result.stderr.count(": a text to train on, which ") == 2
    assert (extended / "3-search-128" / "history.png").exists()
    assert (extended / "model" / "factors.png").exists()
    wrong = runner.invoke(cli.app, ["extend", *map(str, arguments), "--stage", "x:1"])
    assert "--stage: expected LENGTH or LENGTH:STEPS, got 'x:1'" in wrong.stderr


@pytest.mark.parametrize("bounds", [(), (16,), (64,), (16, ORIGINAL)])
def test_the_model_can_be_extended_further(work, tmp_path, bounds):
    """Its folder has what it was trained for, and serves, whatever a config can say of the rope."""
    sets = (*(FactorSet((1.5,) * 8, max_length=n) for n in bounds), FactorSet((8.0,) * 8))
    (tmp_path / "model").mkdir()
    extension = Extension(plan(work, stages=(Stage(256),), short=()), tmp_path / "out")
    note = extension._copy(Rope(sets), work / "model", tmp_path / "model")
    assert (note is None) == (len(sets) <= 2)
    found = open_source(tmp_path / "model")
    assert (found.original, found.trained, found.rope) == (ORIGINAL, 256, Rope(sets))
    assert found.stage is not None
    assert found.stage.sets[0].factors == sets[-1].factors
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.max_position_embeddings == 256  # what others read
    config.save_pretrained(tmp_path / "model")
    assert open_source(tmp_path / "model").original == ORIGINAL


def test_short_sets_take_the_place_of_those_below_them():
    sets = tuple(FactorSet((float(i),), max_length=n) for i, n in ((1, 8), (2, 16), (3, None)))
    new = FactorSet((9.0,), max_length=8)
    rope = Rope(sets)
    assert with_short_sets(rope, {8: new}).sets == (new, *sets[1:])
    assert with_short_sets(rope, {16: new}).sets == (replace(new, max_length=16), sets[2])
    assert with_short_sets(rope, {4: new}).sets == (replace(new, max_length=4), *sets)
    assert with_short_sets(rope, {8: new, 16: new}).sets == (replace(new, max_length=16), sets[2])
    # Where nothing better was found, what was there stays.
    assert with_short_sets(rope, {4: None, 12: None, 16: None, 40: None}) == rope
    assert with_short_sets(rope, {12: None, 16: new}).sets == (
        sets[0],
        *(replace(one, max_length=n) for one, n in ((sets[1], 12), (new, 16))),
        sets[2],
    )
    assert with_short_sets(Rope(sets[2:]), {8: None, 16: new}).sets == (
        *(replace(one, max_length=n) for one, n in ((sets[2], 8), (new, 16))),
        sets[2],
    )


# --------------------------------------------------------------------------------- the fine-tuning


def documents(length: int = 200) -> list[Document]:
    generator = torch.Generator().manual_seed(2)
    return [Document("text", torch.randint(0, 256, (length,), generator=generator))]


def rope(largest: float = 2.0) -> Rope:
    return Rope((FactorSet(tuple(largest ** (i / 7) for i in range(8))),))


def load(work: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(work / "model")


def test_a_step_is_that_of_the_plain_loss(work, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_module, "CHUNK_NUMBERS", 7 * 256)
    text = documents(48)  # a single window
    tuned = tune(load(work), rope(), text, 48, 1, replace(TUNING, warmup=0), tmp_path)
    model = enable(load(work), rope=rope())
    ids = text[0].tokens[None].expand(2, -1)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(
        model.parameters(), lr=TUNING.rate, betas=(0.9, 0.95), weight_decay=0.0
    ).step()
    for a, b in zip(tuned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    (row,) = map(json.loads, (tmp_path / "tuning.jsonl").read_text().splitlines())
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert not tuned.training


def test_recomputing_and_accumulating(work, tmp_path):
    arguments = (rope(), documents(48), 48, 2)
    plain = tune(load(work), *arguments, TUNING, tmp_path / "a").state_dict()
    settings = replace(TUNING, recompute=True, accumulate=3)  # parts of one window, all the same
    other = tune(load(work), *arguments, settings, tmp_path / "b").state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


def test_short_windows_take_the_set_of_their_length(work, tmp_path, monkeypatch):
    seen: list[tuple[int, int]] = []
    forward = tune_module._Loss.forward

    def noted(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        return forward(self, tokens)

    monkeypatch.setattr(tune_module._Loss, "forward", noted)
    plain = FactorSet((1.0,) * 8, max_length=ORIGINAL)
    both = Rope((plain, *rope().sets))
    settings = replace(TUNING, short_share=0.5, every=100)
    tune(load(work), both, documents(), 96, 12, settings, tmp_path, short_length=ORIGINAL)
    assert set(seen) == {(2, 96), (6, 32)}
    with pytest.raises(ValueError, match="short_length: expected a number of tokens"):
        tune(load(work), both, documents(), 96, 1, settings, tmp_path / "none")


def test_a_checkpoint_of_another_fine_tuning_is_refused(work, tmp_path):
    text = documents()
    tune(load(work), rope(), text, 48, 2, TUNING, tmp_path)
    other = load(work)
    with torch.no_grad():
        other.lm_head.weight += 0.1
    for arguments, differs in (
        ((load(work), rope(), documents(201), 48, 2, TUNING), "documents is "),
        ((load(work), rope(3.0), text, 48, 2, TUNING), "rope is "),
        ((load(work), rope(), text, 48, 2, replace(TUNING, seed=1)), r"settings\.seed is 0 there"),
        ((other, rope(), text, 48, 2, TUNING), "weights is "),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-2: of another fine-tuning: {differs}"):
            tune(*arguments, tmp_path)
    tune(load(work), rope(), text, 48, 2, TUNING, tmp_path)


def test_what_cannot_be_trained_is_named(work, tmp_path):
    with pytest.raises(ValueError, match="text: expected at least 96 tokens to train on, got 50"):
        tune(load(work), rope(), documents(50), 96, 1, TUNING, tmp_path)
    model = load(work)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="the loss of step 1 is nan; a lower rate"):
        tune(model, rope(), documents(), 96, 1, TUNING, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    for wrong, message in (
        ({"rate": 0.0}, "rate: expected above 0, and finite, got 0"),
        ({"rate": float("inf")}, "rate: expected above 0, and finite, got inf"),
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"short_share": 1.0}, "short_share: expected a share from 0 to below 1, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TUNING, **wrong)
