"""The first day on a GPU, rehearsed: whatever a step does, the later ones run and a page tells."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark_modules as modules
import pytest
from gpu_day import ROOT, canaries, compiles, goals, many, page, schedule
from gpu_day import __main__ as program
from gpu_day.calls import calls
from gpu_day.measured import HEADLINES
from gpu_day.schedule import Step, kept, run_all

from longrope_kernels.kernels.launch import Launch

PASSES = "import sys; open(sys.argv[1], 'a').write('{\"ran\": true}\\n')"
# What may go wrong in a process: its code, and what is told of it.
INJURIES = {
    "crash": ("import os; os.abort()", "crashed", "it ended by signal 6"),
    "illegal exit": ("import os; os._exit(77)", "failed", "it ended with 77"),
    "exception": ("raise RuntimeError('wrong result')", "failed", "it ended with 1"),
    "hang": ("import time; time.sleep(60)", "stopped", "it took longer than the 3 s it had"),
    "deaf": (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
        "stopped",
        "it took longer than the 3 s it had",
    ),
    "nonsense": (f"{PASSES}; open(sys.argv[1], 'a').write('not JSON')", "passed", ""),
}


def step(name: str, code: str = PASSES, importance: int = 1, least: float = 2.0) -> Step:
    return Step(name, importance, least, 3.0, ("-c", code, "{into}"))


def run(steps: list[Step], state: Path, seconds: float = 60.0) -> list[Any]:
    saved: list[int] = []
    results = run_all(steps, state, time.monotonic() + seconds, lambda x: saved.append(len(x)), {})
    assert saved == list(range(1, len(steps) + 1))
    return results


def unpadded(page: str) -> str:
    """Tables whose cells have no more spaces than they need."""
    return re.sub(" +", " ", page)


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("injury", INJURIES)
def test_later_steps_run_whatever_one_does(tmp_path: Path, injury: str) -> None:
    code, outcome, why = INJURIES[injury]
    steps = [step("first"), step("injured", code), step("last")]
    first, injured, last = run(steps, tmp_path)
    assert (first["outcome"], last["outcome"]) == ("passed", "passed")
    assert (first["entries"], last["entries"]) == ([{"ran": True}], [{"ran": True}])
    assert (injured["outcome"], injured["why"]) == (outcome, why)
    if injury == "nonsense":
        assert injured["entries"][0] == {"ran": True}
        assert injured["entries"][1]["why"] == "no JSON: not JSON"
    text = page.render(1, [first, injured, last], {}, False)
    assert f"| injured | {outcome} |" in unpadded(text)
    assert why in text


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_crash_of_every_other_step_of_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, first: int
) -> None:
    """By the command itself, with its own list of steps."""
    codes = itertools.cycle([INJURIES["crash"][0], PASSES][:: -1 if first else 1])
    steps = [
        x._replace(needs="", before=(), files={}, command=("-c", code, "{into}"))
        for x, code in zip(calls(True)[number], codes, strict=False)
    ]
    names = [x.name for x in steps]
    crashing = names[first::2]
    monkeypatch.setattr(program, "calls", lambda small: {number: steps})
    monkeypatch.setattr(program, "_commit", lambda: "abc")
    assert program.main(["--rehearse", "--call", str(number), "--state", str(tmp_path)]) == 1
    results = json.loads((tmp_path / f"results/call-{number}.json").read_text())["results"]
    outcomes = {x["step"]: x["outcome"] for x in results}
    assert outcomes == {name: "crashed" if name in crashing else "passed" for name in names}
    text = unpadded((tmp_path / f"results/call-{number}.md").read_text())
    assert all(f"| {name} | crashed |" in text for name in crashing)


def test_what_a_stopped_step_started_is_stopped_too(tmp_path: Path) -> None:
    """In a session of its own, and of a parent that is gone."""
    beats = tmp_path / "beats"
    grandchild = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.05)"
    child = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True)\n"
    )
    code = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
    for ending in ("time.sleep(60)", "time.sleep(1)"):
        run([step("leaves", code + ending)], tmp_path)
        assert beats.exists()
        size = beats.stat().st_size
        time.sleep(0.3)
        assert beats.stat().st_size == size


def test_a_program_that_is_not_there_is_told_by_name(tmp_path: Path) -> None:
    missing = step("profile")._replace(needs="no-such-profiler", before=("no-such-profiler",))
    told, last = run([missing, step("last")], tmp_path)
    assert (told["outcome"], told["why"]) == ("missing", "there is no no-such-profiler here")
    assert last["outcome"] == "passed"


def test_a_program_around_python_runs_it(tmp_path: Path) -> None:
    (told,) = run([step("around")._replace(before=("env", "A=1"))], tmp_path)
    assert (told["outcome"], told["entries"]) == ("passed", [{"ran": True}])


# ----------------------------------------------------------------------------------------- budget


def test_a_budget_too_short_drops_the_least_important() -> None:
    steps = [step("a", importance=1), step("b", importance=3), step("c", importance=2)]
    names = [[x.name for x in kept(steps, seconds)] for seconds in (12, 11, 8, 7, 3)]
    assert names == [["a", "b", "c"], ["b", "c"], ["b", "c"], ["b"], []]


def test_what_was_dropped_is_told_and_the_others_run(tmp_path: Path) -> None:
    steps = [
        step("unimportant", importance=1, least=30),
        step("important", importance=2, least=30),
    ]
    first, second = run(steps, tmp_path, seconds=40)
    assert (first["outcome"], second["outcome"]) == ("dropped", "passed")
    assert first["why"].startswith("needs 30 s, and 40 s were left")


def test_a_step_that_hangs_leaves_the_time_of_what_comes_after(tmp_path: Path) -> None:
    hangs = step("hangs", INJURIES["hang"][0], importance=1, least=1)._replace(most=50)
    first, second = run([hangs, step("last", importance=2, least=8)], tmp_path, seconds=14)
    assert first["outcome"] == "stopped"
    assert first["seconds"] < 5
    assert second["outcome"] == "passed"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_step_fits_into_a_call_of_nine_minutes(number: int) -> None:
    steps = calls(False)[number]
    assert kept(steps, program.BUDGET) == steps
    assert program.BUDGET + program.LATE < 9 * 60
    assert len({x.name for x in steps}) == len(steps)


@pytest.mark.parametrize("outcome", ["dropped", "missing"])
def test_the_command_says_what_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    last = step("b", least=1000) if outcome == "dropped" else step("b")._replace(needs="no-such")
    monkeypatch.setattr(program, "calls", lambda small: {1: [step("a", importance=2), last]})
    assert program.main(["--rehearse", "--call", "1", "--state", str(tmp_path)]) == 2
    text = (tmp_path / "results/call-1.md").read_text()
    assert f"| b | {outcome} |" in unpadded(text)


def test_a_call_ends_though_a_step_cannot_be_stopped(tmp_path: Path) -> None:
    """A process that the driver holds: here one whose end is never seen."""
    code = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.gpu_day import __main__ as program, schedule\n"
        "from benchmarks.gpu_day.schedule import Step\n"
        "program.LATE = 1.0\n"
        "program._commit = lambda: None  # which would import torch, on the budget\n"
        "program.calls = lambda small: {1: [Step('good', 1, 0, 9, ('-c', 'pass')),\n"
        "                                   Step('held', 1, 0, 9, ('-c', 'pass'))]}\n"
        "of_all = schedule.run\n"
        "schedule.run = lambda step, *rest: (\n"
        "    time.sleep(60) if step.name == 'held' else of_all(step, *rest))\n"
        f"state = {str(tmp_path)!r}\n"
        "program.main(['--rehearse', '--call', '1', '--budget', '8', '--state', state])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 1
    results = json.loads((tmp_path / "results/call-1.json").read_text())["results"]
    assert [x["outcome"] for x in results] == ["passed", "stopped"]
    assert "it could not be stopped" in results[1]["why"]


# ------------------------------------------------------------------------------- state and results


def test_steps_that_passed_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [step("good"), step("bad", "raise SystemExit(3)")]
    monkeypatch.setattr(program, "calls", lambda small: {1: steps})
    monkeypatch.setattr(program, "_commit", lambda: "abc")
    arguments = ["--rehearse", "--call", "1", "--state", str(tmp_path)]
    for commit, earlier in (("abc", False), ("abc", True), ("def", False)):
        monkeypatch.setattr(program, "_commit", lambda commit=commit: commit)
        assert program.main(arguments) == 1
        good, bad = json.loads((tmp_path / "call-1.json").read_text())["results"]
        assert (good.get("earlier", False), bad.get("earlier", False)) == (earlier, False)


def test_results_are_few_flat_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loud = "print('x' * 3_000_000)"
    for number, steps in calls(False).items():
        steps = [x._replace(needs="", before=(), command=("-c", loud)) for x in steps]
        monkeypatch.setattr(program, "calls", lambda small, steps=steps, n=number: {n: steps})
        (tmp_path / "report").mkdir(exist_ok=True)
        for name in ("report.md", "results.json"):
            (tmp_path / "report" / name).write_text(name)
        out = tmp_path / f"out-{number}"
        arguments = ["--rehearse", "--call", str(number), "--state", str(tmp_path)]
        assert program.main([*arguments, "--out", str(out)]) == 0
        files = list(out.iterdir())
        assert len(files) <= 8
        assert all(file.is_file() and file.stat().st_size < 16 * 10**6 for file in files)
        expected = {f"call-{number}.{kind}" for kind in ("json", "md", "log")}
        expected |= {f"call-2-{x}" for x in ("report.md", "results.json")} if number == 2 else set()
        assert {file.name for file in files} == expected


def test_without_a_gpu_it_says_how_to_rehearse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "_has_gpu", lambda: False)
    with pytest.raises(SystemExit):
        program.main(["--call", "1", "--state", str(tmp_path)])
    assert "needs a CUDA device, torch finds none; --rehearse" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ goals


def test_goals_are_told_with_their_file_or_as_not_measured() -> None:
    def row(median: float, **info: float) -> dict[str, Any]:
        return {"median": median, "info": info, "file": "call-1.json"}

    rows = {
        (goals.BATCH, "triton"): row(190e-6),
        (goals.LONG, "triton"): row(1.0, copy_fraction=0.8),
        (goals.PREFILL, goals.CUDNN): row(0.97),
        (goals.PREFILL, "composed"): row(1.0),
        (goals.PREFILL, goals.K_ALONE): row(1.0),
        (goals.PREFILL, "triton prepass"): row(1.0),
        (goals.HOST, "triton, apply_rotary in place"): row(3e-3),
        (goals.HOST, "triton, decode and append"): row(4e-3),
    }
    told = {goal.what: goal.told(rows) for goal in goals.GOALS}
    batch, cuda, long, rotation, prefill, keys, *rest, host = told.values()
    assert batch == ("190 us", "yes", "call-1.json")
    assert cuda[0] == f"not measured: no row {goals.BATCH} / cuda"
    assert long == ("0.8 of a copy", "no", "call-1.json")
    assert rotation[0].startswith("not measured: no row forward, S = 8192")
    assert prefill == ("0.97 of cuDNN without rotation", "yes", "call-1.json")
    assert keys == ("0.97 of cuDNN without rotation", "no", "call-1.json")
    assert [x[0].partition(":")[0] for x in rest] == ["not measured"] * len(rest)
    assert host == ("2.24 ms", "yes", "call-1.json")
    text = page.render(1, [], rows, False)
    assert "| at most 200 us | 190 us | yes | call-1.json |" in unpadded(text)


def test_goals_and_headlines_are_rows_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ids and groups that pytest collects where there is a GPU."""
    monkeypatch.setattr(modules.attentions, "DTYPE", modules.parameters.bf16)
    prompt = modules.attentions.Shape(8192, 128, True)
    for name in ("composed", "triton prepass", goals.CUDNN, goals.K_ALONE):
        assert name in modules.attentions.NAMES
        assert modules.attentions.serves(name, prompt, "forward")
    assert modules.host_rows.CALLS == goals.HOST_CALLS
    batch, long = (
        modules.decodes.Shape(lengths, modules.parameters.bf16)
        for lengths in ((4096,) * 32, (131072,))
    )
    assert f"attention forward, {prompt}" == goals.PREFILL
    assert [f"decode, {shape}" for shape in (batch, long)] == [goals.BATCH, goals.LONG]
    ids = {
        f"{way}-{prompt}-{x}" for way in ("forward", "backward") for x in modules.attentions.NAMES
    }
    ids |= {f"{shape}-{x}" for shape in (batch, long) for x in modules.decodes.NAMES}
    for way, names in modules.rotations.VARIANTS.items():
        ids |= {f"{way}-S8192-bfloat16-{name}" for name in names}
    ids |= {f"append-8192-{name}" for name in modules.append_rows.ROWS_OF}
    assert len(set(HEADLINES)) == 14
    assert set(HEADLINES) <= ids


# ---------------------------------------------------------------------------------------- canaries


def test_eighty_launches_are_of_all_head_dims() -> None:
    every = compiles.launches(90)
    assert len(every) > 80

    def kinds(found: list[tuple[Any, Any]]) -> set[tuple[str, int]]:
        return {(compile_case.__module__, case.dim) for compile_case, case in found}

    assert kinds(every[:80]) == kinds(every)


def test_there_are_31_canaries_and_racecheck_sees_those_without_wgmma() -> None:
    found = canaries.all_of_them()
    assert len(found) == 31
    assert {"dq", "dk", "dv", "rotary graph", "decode graph"} < set(found)
    for what in ("append", "decode append"):
        assert {what, f"{what} graph", f"{what} cuda"} < set(found)
    assert {name for name, canary in found.items() if not canary.wgmma} == {
        name for name in found if name.startswith(("rotary", "decode", "append"))
    } | {"prefill cuda"}


def small(name: str, code: str) -> many.Small:
    return many.Small({"canary": name}, (sys.executable, "-c", code), last="right")


def test_one_of_many_that_crashes_or_hangs_ends_alone(tmp_path: Path) -> None:
    processes = [
        small("good", "print('right')"),
        small("silent", "import os; os._exit(0)"),
        small("wrong", "raise AssertionError('worst element at (0, 3)')"),
        small("crash", "import os; os.abort()"),
        small("hang", "import time; time.sleep(60)"),
    ]
    told = {x["canary"]: x for x in many.each(processes, tmp_path, 4, 3, time.monotonic() + 60)}
    assert told["good"]["outcome"] == "passed"
    assert {x for x in told if told[x]["outcome"] == "failed"} == set(told) - {"good"}
    assert "worst element at (0, 3)" in told["wrong"]["why"]
    assert "signal 6" in told["crash"]["why"]
    assert "longer than the 4 s" in told["hang"]["why"]
    late = list(many.each(processes[:1], tmp_path, 4, 1, time.monotonic()))
    assert (late[0]["outcome"], late[0]["why"]) == ("dropped", "no time was left")


def test_a_failing_canary_is_tried_again_with_what_may_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"Triton's": "/a/ptxas", "nvcc's": "/b/ptxas", "a wheel's": "/c/ptxas"}
    monkeypatch.setattr(canaries, "assemblers", lambda: found)
    code = (
        "import os, sys\n"
        "right = sys.argv[1] == 'good' or os.environ.get('TRITON_PTXAS_PATH') == '/b/ptxas'\n"
        "print('right' if right else 'wrong')\n"
        "sys.exit(not right)\n"
    )
    monkeypatch.setattr(
        canaries, "_command", lambda name, *options: (sys.executable, "-c", code, name, *options)
    )
    into = tmp_path / "canaries.jsonl"
    assert canaries.fly(["good", "bad"], into, 60, 2) == 1
    entries = schedule.read(into)
    assert {(x["canary"], x["outcome"]) for x in entries if "again" not in x} == {
        *(("good", "passed"), ("bad", "failed"))
    }
    again = {x["again"]: x["outcome"] for x in entries if "again" in x}
    assert again == {
        **{f"ptxas: {name}": "passed" if name == "nvcc's" else "failed" for name in found},
        **dict.fromkeys(("without optimisation", "one stage"), "failed"),
    }
    result = {"step": "canaries", "outcome": "failed", "why": "", "entries": entries}
    text = page.render(1, [result], {}, False)
    assert "- passed: bad: ptxas: nvcc's\n" in text
    assert "- failed: bad: one stage: " in text


def test_one_stage_is_that_of_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "__new__", Launch.__new__)
    fields = [f"a {name}" for name in Launch._fields]
    assert [*Launch(*fields)] == fields
    canaries.one_stage()
    assert [*Launch(*fields)] == [x if x != "a stages" else 1 for x in fields]
    assert Launch(**dict(zip(Launch._fields, fields, strict=True))).stages == 1


def test_what_the_sanitizer_finds_fails_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for compute-sanitizer; graphs are not for it, and wgmma is not for racecheck."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        '#!/bin/sh\n[ "$1 $3" = "--tool --error-exitcode=9" ] || exit 3\n'
        'echo "$2 of $5"; [ "$5" != "rotary" ] || exit 9\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(canaries, "_command", lambda name, *options: ("python", name))
    for tool, left_out in (("memcheck", ()), ("racecheck", ("prefill 64", "dq"))):
        into = tmp_path / f"{tool}.jsonl"
        names = ["rotary", "decode", "rotary graph", "prefill 64", "dq"]
        arguments = ["--tool", tool, "--only", *names, "--into", str(into), "--at-once", "2"]
        assert canaries.main(arguments) == 1
        told = {x["canary"]: x for x in schedule.read(into)}
        assert set(told) == set(names) - {"rotary graph", *left_out}
        assert {x for x in told if told[x]["outcome"] == "failed"} == {"rotary"}
        assert told["rotary"]["why"] == f"it ended with 9: {tool} of rotary"
