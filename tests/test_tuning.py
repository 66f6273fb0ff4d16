"""`longrope tune` in the interpreter, on tiny shapes and a clock that is told what to say."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention_truth
import pytest
import torch
import truth
from tolerance import assert_close
from typer.testing import CliRunner

from longrope_kernels import Rope, cli
from longrope_kernels.kernels import attention, attention_backward, attention_tiles
from longrope_kernels.kernels.attention_backward import Configs
from longrope_kernels.kernels.attention_tiles import Config
from longrope_kernels.tuning import calls as tuning_calls
from longrope_kernels.tuning import entries as tuning_entries
from longrope_kernels.tuning import search as tuning
from longrope_kernels.tuning import table as tuning_table
from longrope_kernels.tuning.entries import Entry, Task
from longrope_kernels.tuning.search import Built

PRESENT = Config(32, 32, 4, 1)  # of the interpreter
BEST, SLOW, WRONG = Config(16, 16, 4, 1), Config(16, 32, 4, 1), Config(32, 16, 4, 1)
SPILLS, LARGE, BROKEN = Config(16, 16, 8, 1), Config(16, 16, 4, 2), Config(16, 16, 4, 3)
LIST = [SLOW, BEST, WRONG, SPILLS, LARGE, BROKEN]
TINY = Task((16,), ("forward-prepass",), (True,), 20, 1, 1, budget=1e9)
EVERY_KERNEL = replace(TINY, kernels=tuple(tuning_entries.KERNELS))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class FakeMachine:
    """Runs on a GPU, or in the interpreter. A launch takes the time its configuration is given.

    ``broken``: configurations whose launches leave one element wrong. The clock goes on by a second
    for each launch compiled or run, and by what a timed launch takes.
    """

    name, device, arch, shared, workers = "fake", DEVICE, 0, 10_000, 3

    def __init__(self, takes: Callable[[Any], float], broken: Sequence[Config] = ()) -> None:
        self.takes, self.broken = takes, broken
        self.time = 0.0
        self.timed: list[Any] = []

    def now(self) -> float:
        return self.time

    def compile(self, launches: Sequence[Any]) -> list[Built]:
        self.time += len(launches)
        of = {SPILLS: Built(255, 3, 100), LARGE: Built(100, 0, 10_001), BROKEN: Built(error="no")}
        return [of.get(config_of(launch), Built(64, 0, 100)) for launch in launches]

    def run(self, launch: Any) -> None:
        self.time += 1
        launch.kernel[launch.grid](*launch.args, **launch.constants)
        if config_of(launch) in self.broken:
            place = 3 if launch.kernel is attention.attention_kernel else 6
            if not launch.constants.get("OF_K", True):
                place = 7  # of dv
            launch.args[place][0][0, -1] *= 1.5

    def seconds(self, launch: Any) -> float:
        self.timed.append(launch)
        takes = self.takes(launch)
        self.time += takes
        return takes


def config_of(launch: Any) -> Config:
    sizes = launch.constants
    return Config(sizes["BLOCK_M"], sizes.get("BLOCK_N", 0), launch.warps, launch.stages)


def takes(launch: Any) -> float:
    return {BEST: 1.0, SLOW: 3.0, PRESENT: 2.0}[config_of(launch)] + 1e-3


def search(
    task: Task, machine: FakeMachine, configs: Sequence[Config] = LIST
) -> tuple[list[tuning.Outcome], list[str]]:
    said: list[str] = []
    listed = lambda entry, arch, shared, itemsize: list(configs)  # noqa: E731
    return tuning.tune(task, machine, listed, said.append), said


def configs_of(text: str) -> list[Any]:
    """Each CONFIGS of the source, evaluated with nothing but the names that the kernels use."""
    blocks = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    names = {"Config": Config, "Configs": Configs, "__builtins__": {}}
    return [eval(ast.unparse(node.value), names) for node in blocks]


def test_the_fastest_is_found_and_shown_beside_the_present_one():
    machine = FakeMachine(takes)
    outcomes, said = search(TINY, machine, [SLOW, BEST])
    (prepass,) = outcomes
    assert prepass.best.config == BEST
    assert prepass.present.config == PRESENT
    assert [c.score for c in prepass.candidates] == pytest.approx([2.001, 3.001, 1.001])
    visible_pairs = 20 * 21 / 2
    assert prepass.best.tflops == pytest.approx([4e-12 * 16 * visible_pairs / 1.001])
    assert "with (16, 16, 4, 1); before" in said[0]
    assert "with (32, 32, 4, 1) (3 of 3 timed)" in said[0]


def test_candidates_are_timed_in_turns_and_the_slow_ones_are_left_behind():
    machine = FakeMachine(lambda launch: float(launch.constants["BLOCK_N"]))
    many = [Config(16, n, warps, 1) for n in (16, 64, 128) for warps in (1, 2, 4)]
    outcomes, _ = search(TINY, machine, many)
    configs = [config_of(launch) for launch in machine.timed]
    count = len(many) + 1
    assert (
        configs[:count] == configs[count : 2 * count] == [c.config for c in outcomes[0].candidates]
    )
    rounds = {c.config: len(c.samples[0]) for c in outcomes[0].candidates}
    assert {rounds[c] for c in many if c.block_n == 16} | {rounds[PRESENT]} == {12}
    assert {rounds[c] for c in many if c.block_n == 128} == {3}


def test_a_wrong_result_is_reported_and_never_timed():
    machine = FakeMachine(takes, broken=[WRONG])
    outcomes, said = search(EVERY_KERNEL, machine, [WRONG, BEST])
    assert len(outcomes) == 6
    for outcome in outcomes:
        wrong = next(c for c in outcome.candidates if c.config == WRONG)
        assert not wrong.samples
        assert wrong.dropped.startswith("wrong result: ")
        assert outcome.best.config == BEST
    assert WRONG not in map(config_of, machine.timed)
    assert sum("  (32, 16, 4, 1): wrong result: " in line for line in said) == len(outcomes)


def test_what_does_not_fit_is_never_run():
    class Careful(FakeMachine):
        def run(self, launch: Any) -> None:
            assert config_of(launch) not in (SPILLS, LARGE, BROKEN)
            super().run(launch)

    outcomes, _ = search(TINY, Careful(takes), [SPILLS, LARGE, BROKEN, BEST])
    for outcome in outcomes:
        reasons = {c.config: c.dropped for c in outcome.candidates}
        assert reasons[SPILLS] == "spills 3 registers"
        assert reasons[LARGE] == "needs 10001 bytes of shared memory, there are 10000"
        assert reasons[BROKEN] == "does not compile: no"
        assert outcome.best.config == BEST


def test_less_than_a_percent_is_no_reason_to_change_the_table():
    seconds = {PRESENT: 1.0, BEST: 0.995, SLOW: 2.0}
    machine = FakeMachine(lambda launch: seconds[config_of(launch)])
    outcomes, said = search(TINY, machine, [BEST, SLOW])
    assert outcomes[0].best.config == PRESENT
    assert "with (32, 32, 4, 1), as before" in said[0]
    seconds[BEST] = 0.98
    assert search(TINY, machine, [BEST, SLOW])[0][0].best.config == BEST


@pytest.mark.parametrize("budget", [0.0, 8.0, 120.0])
def test_nothing_begins_after_the_budget_is_spent(budget: float):
    class Strict(FakeMachine):
        def compile(self, launches: Sequence[Any]) -> list[Built]:
            assert self.time < budget
            return super().compile(launches)

        def seconds(self, launch: Any) -> float:
            assert self.time < budget
            return super().seconds(launch)

    machine = Strict(takes)
    task = replace(EVERY_KERNEL, budget=budget)
    outcomes, _ = search(task, machine, [BEST])
    assert [outcome.entry for outcome in outcomes] == tuning_entries.entries(task)
    # The last thing that began may end later, and so may the runs that give the right results.
    assert machine.time < budget + 20
    (forward, backward) = configs_of(tuning_table.source(outcomes, 0))
    if budget == 0:
        assert not machine.timed
        assert forward == {0: {**attention.CONFIGS[0], 16: attention.CONFIGS[0][256]}}
        assert backward == {
            0: {**attention_backward.CONFIGS[0], 16: Configs(PRESENT, None, PRESENT)}
        }


def test_one_entry_for_both_masks_takes_what_is_best_for_both():
    def by_mask(launch: Any) -> float:
        causal = launch.constants["CAUSAL"]
        return {BEST: (1.0, 4.0), SLOW: (3.0, 1.0), PRESENT: (9.0, 9.0)}[config_of(launch)][causal]

    task = replace(TINY, causal=(False, True), kernels=("forward-registers",))
    (outcome,), _ = search(task, FakeMachine(by_mask), [BEST, SLOW])
    assert outcome.best.config == SLOW
    assert outcome.best.seconds == [3.0, 1.0]
    task = replace(task, kernels=("forward-prepass",))
    outcomes, _ = search(task, FakeMachine(by_mask), [BEST, SLOW])
    assert [outcome.best.config for outcome in outcomes] == [BEST, SLOW]
    (table,) = configs_of(tuning_table.source(outcomes, 0))
    assert table[0][16] == (BEST, SLOW, PRESENT)


@pytest.mark.parametrize(("fused", "expected"), [(1.5, None), (2.5, BEST)])
def test_dk_and_dv_come_from_one_kernel_where_that_is_faster(fused: float, expected: Any):
    def by_outputs(launch: Any) -> float:
        both = launch.constants.get("OF_K") and launch.constants.get("OF_V")
        return (fused if both else 1.0) * (1.0 if config_of(launch) == BEST else 2.0)

    task = replace(TINY, kernels=("backward",))
    outcomes, _ = search(task, FakeMachine(by_outputs), [BEST])
    assert {outcome.entry.launch for outcome in outcomes} == {"dk_dv", "dk", "dv", "dq"}
    (table,) = configs_of(tuning_table.source(outcomes, 0))
    assert table[0][16] == Configs(BEST, expected, BEST)


def test_dk_and_dv_stay_as_they_are_where_time_ran_out():
    entry = [Entry(16, name, (True,)) for name in ("dk_dv", "dk", "dv", "dq")]
    best = tuning.Candidate(BEST, samples=[[1.0]], flops=[1.0])
    unknown = tuning.Outcome(entry[0], [], None)
    outcomes = [unknown, *(tuning.Outcome(e, [best], best) for e in entry[1:])]
    (table,) = configs_of(tuning_table.source(outcomes, 0))
    assert table[0][16] == Configs(PRESENT, None, BEST)


def test_the_source_has_every_entry_of_the_table_and_short_lines():
    machine = FakeMachine(lambda launch: 1e-10 * takes(launch))  # some 100 TFLOP/s
    outcomes, _ = search(EVERY_KERNEL, machine, [BEST])
    text = tuning_table.source(outcomes, 90)
    assert max(map(len, text.splitlines())) <= 100
    forward, backward = configs_of(text)
    assert forward == {90: {**attention.CONFIGS[90], 16: forward[90][16]}}
    assert backward == {90: {**attention_backward.CONFIGS[90], 16: backward[90][16]}}
    assert forward[90][16] == (attention.CONFIGS[90][64][0], BEST, BEST)
    assert type(backward[90][64]) is Configs
    assert type(forward[90][64][0]) is Config


@pytest.mark.parametrize("arch", [80, 90])
def test_the_candidates_include_the_present_table(arch: int):
    shared = {80: 99 * 1024, 90: 227 * 1024}[arch]
    for dim, (not_causal, causal, in_registers) in attention.CONFIGS[arch].items():
        for launch, config in (
            ("prepass", not_causal),
            ("prepass", causal),
            ("registers", in_registers),
        ):
            assert config in tuning_entries.list_candidates(Entry(dim, launch, ()), arch, shared, 2)
    for dim, (of_k, of_v, of_q) in attention_backward.CONFIGS[arch].items():
        of_keys = [("dk", of_k), ("dv", of_v)] if of_v else [("dk_dv", of_k)]
        for launch, config in (*of_keys, ("dq", of_q)):
            assert config in tuning_entries.list_candidates(Entry(dim, launch, ()), arch, shared, 2)


def test_candidates_that_cannot_fit_are_not_compiled():
    entry = Entry(128, "prepass", (True,))
    roomy = tuning_entries.list_candidates(entry, 90, 227 * 1024, 2)
    tight = tuning_entries.list_candidates(entry, 90, 99 * 1024, 2)
    assert set(tight) < set(roomy)
    # q, and one tile of k and v beside the one at work: 128 * 128 * 2 bytes each.
    assert tuning_entries.least_shared("prepass", Config(128, 128, 8, 2), 128, 2, 90) == 3 * 2**15
    assert Config(128, 128, 8, 2) in tight
    assert Config(128, 128, 8, 3) not in tight
    # 128 x 128 sums and 128 x 128 scores are 256 registers for each of 128 threads.
    assert Config(128, 128, 4, 2) not in roomy
    assert Config(128, 128, 4, 2) in tuning_entries.list_candidates(entry, 100, 227 * 1024, 2)


def test_a_difference_is_measured_against_what_rounding_may_make():
    right = torch.randn(1, 100, 2, 64).bfloat16()
    rounded = (right.float() * (1 + 2**-9)).bfloat16()
    assert tuning_calls.difference(rounded, right) < 1
    wrong = right.clone()
    wrong[0, 70, 1] += 0.1 * torch.randn(64)
    assert tuning_calls.difference(wrong, right) > 1
    wrong[0, 70, 1, 5] = float("nan")
    assert not tuning_calls.difference(wrong, right) <= 1
    lse = 5 + torch.rand(1, 2, 100)
    assert tuning_calls.difference(lse * (1 + 1e-6), lse) < 1
    assert tuning_calls.difference(lse + 1e-3, lse) > 1


def test_a_table_of_a_newer_architecture_is_used_where_it_belongs():
    configs = {0: "interpreter", 80: "8.0", 89: "8.9", 90: "9.0"}
    found = {
        arch: attention_tiles.table_of(configs, arch) for arch in (0, 80, 86, 89, 90, 100, 120)
    }
    assert list(found.values()) == ["interpreter", "8.0", "8.0", "8.9", "9.0", "9.0", "8.0"]
    assert attention_tiles.table_of({**configs, 120: "12.0"}, 121) == "12.0"


@pytest.mark.parametrize("launch", ["prepass", "registers"])
def test_without_pairs_the_forward_kernels_rotate_nothing(launch: str):
    """What the backward pass is tuned on, and what the codegen table compares with."""
    task = replace(TINY, heads=2, seq=37)
    call: Any = tuning_calls.make_call(48, launch, True, task, FakeMachine(takes))
    inputs = call._inputs
    rotation = inputs.scoring.rotation
    rotation = rotation._replace(steps=rotation.steps[:, :, :0])
    inputs.scoring = inputs.scoring._replace(rotation=rotation)
    FakeMachine(takes).run(call.launch(launch, PRESENT))
    out, lse = call.outputs[launch]
    # At position 0 every angle is 0.
    nowhere = torch.zeros(37, dtype=torch.int64)
    expected = attention_truth.Call(call._q, call._k, call._v, nowhere, Rope.plain(48)).expected()
    assert_close(out, expected.out)
    assert_close(lse, expected.lse, "lse")


def test_the_backward_call_gives_the_gradients_of_rotated_tensors():
    task = replace(EVERY_KERNEL, heads=2, seq=37)
    machine = FakeMachine(takes)
    call: Any = tuning_calls.make_call(32, "dq", True, task, machine)
    found = call.expected(machine)
    nowhere = torch.zeros(37, dtype=torch.int64)
    rotated = attention_truth.Call(call._q, call._k, call._v, nowhere, Rope.plain(32))
    # Turned back, as the gradients of what is rotated here: by the angles of their positions.
    cos, sin = truth.cos_sin(Rope.plain(32), torch.arange(37)[None], torch.zeros(1, 37).long())
    for name, expected in zip("qkv", rotated.expected_grads(call._d_out), strict=True):
        if name != "v":
            expected = truth.Expected(*(truth.rotate(x, cos, -sin, False) for x in expected))
        assert_close(found[f"d{name}"][0], expected, f"d{name}")


# ------------------------------------------------------------------------------------ command line


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["tune", *arguments])


def test_without_a_gpu_it_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run_command()
    assert result.exit_code == 1
    assert result.stderr == "longrope tune: needs a CUDA device, torch finds none\n"
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--head-dim", "15"), "--head-dim: expected one of"),
        (("--kernel", "decode"), "--kernel: expected one of"),
        (("--dtype", "float32"), "--dtype: expected one of"),
        (("--heads", "3", "--kv-heads", "2"), "--kv-heads: expected a divisor of 3, got 2"),
        (("--out", "/no/such/folder/x.json"), "--out: there is no folder /no/such/folder"),
    ],
)
def test_a_wrong_option_is_named(arguments: tuple[str, ...], message: str):
    result = run_command(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    from longrope_kernels.tuning import device as tuning_device

    machine = FakeMachine(takes)
    monkeypatch.setattr(tuning_device, "missing", lambda: None)
    monkeypatch.setattr(tuning_device, "CudaMachine", lambda: machine)
    monkeypatch.setattr(tuning.tune, "__defaults__", (lambda *_: [SLOW, BEST], print))
    return machine


TINY_OPTIONS = ("--head-dim", "16", "--heads", "1", "--kv-heads", "1", "--seq", "20", "--causal")


def test_the_command_prints_source_and_writes_every_timing(fake: FakeMachine, tmp_path: Path):
    out = tmp_path / "timings.json"
    result = run_command(*TINY_OPTIONS, "--kernel", "forward-prepass", "--out", str(out))
    assert result.exit_code == 0, result.output
    (table,) = configs_of(result.stdout)
    assert table[0][16] == (PRESENT, BEST, PRESENT)
    assert "head_dim 16 prepass causal" in result.stderr
    found = json.loads(out.read_text())
    assert found["task"]["dtype"] == "bfloat16"
    (entry,) = found["entries"]
    assert entry["best"] == list(BEST)
    samples = [s for c in entry["candidates"] for of_mask in c["samples"] for s in of_mask]
    assert len(samples) == len(fake.timed)
    assert list(tmp_path.iterdir()) == [out]


def test_a_search_that_stops_leaves_the_old_file(fake: FakeMachine, tmp_path: Path):
    out = tmp_path / "timings.json"
    out.write_text("old")

    def stop(launch: Any) -> float:
        assert out.read_text() == "old"
        if len(fake.timed) > 4:
            raise KeyboardInterrupt
        return 1.0

    fake.takes = stop
    result = run_command(*TINY_OPTIONS, "--kernel", "forward-prepass", "--out", str(out))
    assert result.exit_code != 0
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
