"""Searches over sequences that ranks share, on gloo: what one process finds."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import ranks
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from cases import factors
from model_cases import SHARED, family_model, tokens
from ranks import Ranks, check_survivors
from search_cases import SMALL, flags, make_model, make_texts, one_thread
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from longrope_kernels import FactorSet, Rope, cli
from longrope_kernels.search import own_tokens as own_tokens_module
from longrope_kernels.search import sharding
from longrope_kernels.search import tune as tune_module
from longrope_kernels.search.documents import Document
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import Needle
from longrope_kernels.search.tune import TuneSettings, tune

LENGTH = 96
__all__ = ["one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_model(folder / "model")
    make_texts(folder / "texts", length=400)
    return folder


def all_of(pool: Ranks, function: Any, *args: Any) -> list[Any]:
    found = pool("spread", function, *args)
    for rank, answer in enumerate(found):
        if isinstance(answer, Exception):
            raise AssertionError(f"rank {rank}: {answer}")
    return found


# ------------------------------------------------------------------------------------------- losses


def ropes() -> list[Rope]:
    return [Rope((FactorSet(factors(16, 2.0), n, 1.1),)) for n in (0, 9)]


def losses_of(size: int) -> Any:
    """Of all tokens, of the last ones, at positions that jump, and answers about a text."""
    if size and dist.get_rank() >= size:
        return None
    group = ranks.GROUPS[size] if size else None
    losses = TransformersLosses(family_model("llama"), batch_tokens=64, group=group)
    ids = tokens(2, 25)
    jumps = torch.arange(25).expand(2, -1) * 3
    found = [losses(ropes(), ids), losses(ropes()[0], ids, last=1)]
    found.append(losses(ropes(), ids, last=7, positions=jumps))
    needles = [Needle((), (1, 2, 3), (4, 5)), Needle((), tuple(range(20)), (6,))]
    answers = losses.answers(ropes()[1], ids[0], needles, length=50)
    return found + [one.losses for one in answers], [one.likeliest.tolist() for one in answers]


@pytest.mark.parametrize("size", [2, 3])
def test_losses_are_those_of_one_process(size: int, four: Ranks, monkeypatch: Any) -> None:
    expected, likeliest = losses_of(0)
    found = all_of(four, losses_of, size)[:size]
    for values, told in found:
        assert told == likeliest
        for value, one, first in zip(values, expected, found[0][0], strict=True):
            torch.testing.assert_close(value, one, rtol=1e-5, atol=1e-5)
            assert torch.equal(value, first)  # the ranks of a race agree


# ----------------------------------------------------------------------------------------- commands


def run(arguments: list[str]) -> Any:
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.stdout, result.stderr


def command(work: Path, name: str, out: Path, *more: str, **settings: Any) -> list[str]:
    given = flags(documents=work / "texts", tokenizer="bytes", samples=2, out=out, **settings)
    return [name, str(work / "model"), *given, *more]


def journal(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    return sorted(rows, key=lambda row: (row["iteration"], row["stage"], row["place"]))


@pytest.mark.parametrize("more", [{}, {"hours": 0.5}], ids=["plain", "hours"])
def test_two_times_two_ranks_decide_as_one_process(
    more: dict[str, Any], work: Path, four: Ranks, tmp_path: Path
) -> None:
    """Candidates and sequences are shared out; the same candidates come, in the same order."""
    settings = {"length": LENGTH, **SMALL, **more}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    # As many at a time: a race sees the same best ones.
    assert run(command(work, "search", alone, **settings, batch=2))[0] == 0
    found = all_of(
        four, run, command(work, "search", shared, **{"context-parallel": 2}, **settings)
    )
    for status, _, errors in found:
        assert status == 0, errors
    assert [output.count("LongRoPE") for _, output, _ in found] == [1, 0, 0, 0]
    assert Rope.load(shared) == Rope.load(alone)
    rows, expected = journal(shared), journal(alone)
    assert len(rows) == len(expected)
    for row, one in zip(rows, expected, strict=True):
        assert row.pop("fitness") == pytest.approx(one.pop("fitness"), rel=1e-5)
        for measured in ("seconds", "details"):
            del row[measured], one[measured]
        assert row == one


def test_evaluate_shares_out_what_it_measures(work: Path, four: Ranks, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    Rope((FactorSet(factors(8, 2.0), 0, 1.1),)).save(tmp_path / "other.json")
    arguments = ["--length", "320", "--retrieval", "--no-baselines"]
    arguments += ["--rope", str(tmp_path / "other.json")]
    assert run(command(work, "evaluate", alone, *arguments, length=48))[0] == 0
    arguments += ["--context-parallel", "2"]
    found = all_of(four, run, command(work, "evaluate", shared, *arguments, length=48))
    for status, _, errors in found:
        assert status == 0, errors
    assert [output.count("the model's own") for _, output, _ in found] == [3, 0, 0, 0]
    one, same = (json.loads((x / "evaluation.json").read_text()) for x in (alone, shared))
    for kind, rows in one["retrieval"].items():
        for name, by_length in rows.items():
            for length, values in by_length.items():
                of_shared = same["retrieval"][kind][name][length]
                assert of_shared.pop("by_depth") == values.pop("by_depth")
                assert of_shared == pytest.approx(values, rel=1e-5)
    assert list(same["perplexity"]) == list(one["perplexity"])
    for name, values in one["perplexity"].items():
        assert same["perplexity"][name] == pytest.approx(values, rel=1e-5)


def test_ranks_that_are_not_divided_are_named(work: Path, four: Ranks, tmp_path: Path) -> None:
    for name in ("search", "evaluate"):
        arguments = command(work, name, tmp_path / name, length=LENGTH)
        for status, _, errors in all_of(four, run, [*arguments, "--context-parallel", "3"]):
            assert status == 1
            assert "--context-parallel: expected a number that divides the 4 processes" in errors


def test_layers_that_mix_tokens_are_refused_first(work: Path, four: Ranks, tmp_path: Path) -> None:
    kinds = ["conv", "full_attention"]
    config = AutoConfig.for_model(
        "lfm2", **SHARED | {"layer_types": kinds, "vocab_size": 256, "max_position_embeddings": 32}
    )
    model = tmp_path / "lfm2"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    for name, more in {
        "evaluate": ["--length", str(LENGTH)],
        "search": ["--length", str(LENGTH)],
        "extend": ["--stage", f"{LENGTH}:1", "--train", str(work / "texts")],
    }.items():
        arguments = command(work, name, tmp_path / name, *more, "--context-parallel", "2")
        arguments[1] = str(model)
        for status, output, errors in all_of(four, run, arguments):
            assert status == 1
            assert f"longrope {name}: group: expected None for Lfm2Model, got one: its" in errors
            assert not output
        assert not [one for one in (tmp_path / name).rglob("*") if one.suffix == ".jsonl"]


# -------------------------------------------------------------------------------------- fine-tuning

TUNING = TuneSettings(rate=0.01, warmup=0, rows=2)


def as_torchrun() -> None:
    """What accelerate reads; a group is there already."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked


class StoppedError(Exception):
    pass


def tuned(
    work: Path,
    folder: Path,
    size: int,
    length: int,
    settings: TuneSettings,
    shard: bool = True,
    *,
    steps: int = 2,
    stop: int = -1,
) -> Any:
    """Weights after some steps on a text of so many tokens, what was logged, and numbers held.

    size: how many processes share a window; 0: this one is alone.
    """
    if size:
        as_torchrun()
    group = dist.new_subgroups(size)[0] if size > 1 else None
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    generator = torch.Generator().manual_seed(2)
    text = Document("text", torch.randint(0, 256, (length,), generator=generator))
    rope = Rope((FactorSet(factors(8, 2.0)),))
    held = Held(model)

    def progress(done: int, loss: float) -> None:
        if done == stop:
            raise StoppedError(f"{loss}")

    with held:
        model = tune(
            *(model, rope, [text], 48, steps, settings, folder),
            group=group,
            shard=shard,
            progress=progress,
        )
    rows = (folder / "tuning.jsonl").read_text().splitlines()
    weights = {name: whole_of(x) for name, x in model.state_dict().items()}
    return weights, [json.loads(row)["loss"] for row in rows], held.shares()


def whole_of(x: Any) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Held:
    """What a process holds of the numbers of a model, at most, while a layer trains; of AdamW."""

    def __init__(self, model: Any) -> None:
        self.model, self.most = model, 0
        self.whole = sum(x.numel() for x in model.parameters())
        self.optimizers: list[Any] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        if self.model.training:  # before that its head is tried
            self.most = max(self.most, sum(own_count(x) for x in self.model.parameters()))

    def __enter__(self) -> None:
        self.made = torch.optim.AdamW

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.optimizers.append(self.made(*args, **kwargs))
            return self.optimizers[-1]

        torch.optim.AdamW = noted  # type: ignore[assignment,misc]

    def __exit__(self, *_: Any) -> None:
        torch.optim.AdamW = self.made  # type: ignore[misc]

    def shares(self) -> tuple[float, float, float]:
        """Of the weights in a layer and between steps, and of what AdamW keeps of each."""
        moments = [x for state in self.optimizers[0].state.values() for x in state.values()]
        counts = self.most, sum(own_count(x) for x in self.model.parameters())
        counts += (sum(own_count(x) for x in moments if x.dim()) // 2,)
        return tuple(count / self.whole for count in counts)  # type: ignore[return-value]


def own_count(x: torch.Tensor) -> int:
    return (x.to_local() if isinstance(x, DTensor) else x).numel()


def check_tuned(found: list[Any], expected: Any) -> None:
    weights, losses, _ = expected
    for own, logged, _ in found:
        assert logged == pytest.approx(losses, rel=1e-5)
        assert list(own) == list(weights)
        for name, value in weights.items():
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4)


# Groups of two, or processes that share nothing, have windows of their own, which in a text of one
# window are the same; one group of four has those of one process.
@pytest.mark.parametrize(
    ("size", "length", "recompute", "shard"),
    [(2, 48, True, True), (2, 48, False, False), (4, 200, False, True)],
    ids=["two", "two-whole", "four"],
)
def test_a_window_is_shared_as_if_it_were_whole(
    size: int, length: int, recompute: bool, shard: bool, work: Path, four: Ranks, tmp_path: Path
) -> None:
    settings = replace(TUNING, recompute=recompute)
    expected = tuned(work, tmp_path / "alone", 0, length, settings)
    found = all_of(four, tuned, work, tmp_path / "shared", size, length, settings, shard)
    check_tuned(found, expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_weights_and_what_the_optimiser_keeps_are_shared(
    processes: int, four: Ranks, tmp_path: Path
) -> None:
    """Of eight layers with a tied head, one at a time is whole, and what is around them."""
    make_model(tmp_path / "model", num_hidden_layers=8, vocab_size=300, tie_word_embeddings=True)
    expected = tuned(tmp_path, tmp_path / "alone", 0, 48, TUNING)
    assert expected[2] == (1, 1, 1)
    pool = four if processes == 4 else Ranks(processes)
    try:
        found = all_of(pool, tuned, tmp_path, tmp_path / "shared", 1, 48, TUNING)
    finally:
        if pool is not four:
            pool.close()
    check_tuned(found, expected)
    for _, _, (in_a_layer, between, moments) in found:
        assert between == moments == pytest.approx(1 / processes, rel=0.02)
        assert in_a_layer < 1 / processes + 0.3


def tuned_further(work: Path, folder: Path, stop: int = -1, size: int = 4) -> Any:
    return tuned(work, folder, size, 200, replace(TUNING, every=2), steps=4, stop=stop)


def test_sharded_training_goes_on_to_the_same_result(
    work: Path, four: Ranks, tmp_path: Path
) -> None:
    """Stopped in the third of four steps, after a checkpoint of the second."""
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    expected = all_of(four, tuned_further, work, whole)
    for answer in four("stop", tuned_further, work, stopped, 3):
        assert str(answer).startswith("StoppedError")
    (checkpoint,) = stopped.glob("checkpoint-*")
    assert len(list(checkpoint.glob("*.distcp"))) == 4  # each process wrote its part
    shutil.copytree(stopped, alone)
    for (weights, losses, _), (own, logged, _) in zip(
        expected, all_of(four, tuned_further, work, stopped), strict=True
    ):
        assert logged == losses
        assert all(torch.equal(own[name], x) for name, x in weights.items())
    check_tuned([tuned_further(work, alone, size=0)], expected[0])  # by one process


def saved(folder: Path) -> None:
    """A tied model of which each process has a part, as `extend` writes it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    sharding.share_weights(model, "cpu")
    model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    whole = sharding.whole_weights(model.to(torch.bfloat16))
    assert bool(whole) == (dist.get_rank() == 0)
    if whole:
        model.save_pretrained(folder / "shared", state_dict=whole)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_weights_are_saved_as_one_process_saves_them(
    tied: bool, four: Ranks, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "alone")
    all_of(four, saved, tmp_path)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes(), path.name


def tuned_as_on_a_gpu(work: Path, folder: Path, size: int, shard: bool = True) -> Any:
    """The forward in bfloat16, the weights in float32."""
    AcceleratorState._reset_state()  # which other tests have left
    made = accelerate.Accelerator
    accelerate.Accelerator = lambda cpu, mixed_precision: made(cpu=cpu, mixed_precision="bf16")
    try:
        return tuned(work, folder, size, 48, TUNING, shard)
    finally:
        accelerate.Accelerator = made
        AcceleratorState._reset_state()


def test_sharded_weights_are_rounded_in_the_forward_alone(
    work: Path, four: Ranks, tmp_path: Path
) -> None:
    weights, losses, _ = tuned_as_on_a_gpu(work, tmp_path / "alone", 0)
    assert losses != pytest.approx(tuned(work, tmp_path / "exact", 0, 48, TUNING)[1], rel=1e-5)
    for own, logged, _ in all_of(four, tuned_as_on_a_gpu, work, tmp_path / "shared", 1):
        assert logged == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            assert own[name].dtype == torch.float32
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4)


def other_settings(work: Path, folder: Path) -> None:
    tuned(work, folder, 1, 48, replace(TUNING, rate=0.1 * (1 + dist.get_rank())))


def test_other_settings_on_a_rank_end_all(work: Path, four: Ranks, tmp_path: Path) -> None:
    for answer in four("settings", other_settings, work, tmp_path):
        assert str(answer).startswith("ValueError: settings: expected the same on all ranks, got")
    assert not list(tmp_path.iterdir())


def dying(work: Path, folder: Path, kind: str) -> None:
    """Rank 1 dies in its second measurement of a search, or in the second step of fine-tuning."""
    owner, name = {
        "search": (TransformersLosses, "__call__"),
        "tune": (tune_module._Loss, "forward"),
    }[kind]
    original, count = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if dist.get_rank() == 1 and count == 2:
            os._exit(7)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    if kind == "tune":
        tuned(work, folder, 4, 200, TUNING)
    settings = {"length": LENGTH, "context-parallel": 2, **SMALL}
    raise RuntimeError(run(command(work, "search", folder, **settings))[2])


@pytest.mark.parametrize("kind", ["search", "tune"])
def test_a_dead_rank_ends_the_others_by_name(kind: str, work: Path, tmp_path: Path) -> None:
    pool = Ranks(4, timeout=3)
    found = pool("die", dying, work, tmp_path / "out", kind)
    pool.close()
    check_survivors([found[0], found[1]] if kind == "search" else found)
    if kind == "search":  # the other two share no sequence with it
        assert all("another rank died or did not answer" in str(x) for x in found[2:])


def no_layers() -> None:
    sharding.share_weights(torch.nn.Linear(2, 2), "cpu")


def test_a_model_without_layers_is_not_sharded(four: Ranks) -> None:
    for answer in four("none", no_layers):
        assert "model: expected decoder layers of transformers' GradientCheck" in str(answer)


def run_as_torchrun(arguments: list[str]) -> Any:
    as_torchrun()
    return run(arguments)


@pytest.mark.full
def test_an_extension_over_four_ranks(work: Path, four: Ranks, tmp_path: Path) -> None:
    """Four share each sequence, so that they search and train on what one process does."""
    settings = {"train": work / "texts", "stage": "64:2", "short": 48, **SMALL}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    status, _, errors = run(command(work, "extend", alone, **settings))
    assert status == 0, errors
    arguments = command(work, "extend", shared, "--context-parallel", "4", **settings)
    for status, _, errors in all_of(four, run_as_torchrun, arguments):
        assert status == 0, errors
    assert Rope.load(shared / "model") == Rope.load(alone / "model")
    models = [AutoModelForCausalLM.from_pretrained(x / "model") for x in (alone, shared)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_scored_token_has_one_rank(four: Ranks) -> None:
    for length, last in ((9, 8), (9, 1), (30, 4)):
        found = all_of(four, scored, length, last)
        assert sorted(slot for own in found for slot in own) == list(range(last))


def scored(length: int, last: int) -> list[int]:
    own = own_tokens_module.OwnTokens(ranks.GROUPS[4], length, last)
    return own._place.tolist()
