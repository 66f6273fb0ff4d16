"""A report in whose making something goes wrong: what is left of it is written."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from pathlib import Path
from typing import Any

import benchmark_modules  # noqa: F401  whose folder has the report
import forked
import pytest
from report import build, facts, make, page, results, runs
from report.__main__ import BUDGET, main
from report.compare import compare

BENCHMARKS = make.ROOT / "benchmarks"
ROWS = """
import os, signal, time
from pathlib import Path
import pytest
from clock import HOST
import measure as measure_module
from measure import Timed, measure
from ropes import WrongResultError

SECONDS_A_ROW = 0.001


def prepare(name):
    if name == "wrong":
        raise WrongResultError("wrong, q: error 5.0e-01, allowed 1.0e-02")
    if name in ("ours", "peer"):
        raise RuntimeError(f"no kernel for {name}")
    if name == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "amid":
        calls = iter(range(100))
        run = lambda: next(calls) > 5 and os.abort()
        return Timed(run, tuple, None, 1)
    if name == "access":
        measure_module.gpu_refuses = lambda: True
        raise RuntimeError("an illegal memory access was encountered")
    if name == "hang":
        Path(__file__).with_name("hangs").touch()
        time.sleep(600)
    return Timed(lambda: None, tuple, None, 1)


@pytest.mark.benchmark(timer=HOST.now)
@pytest.mark.parametrize(("size", "name"), NAMES)
def test_rows(benchmark, request, size, name):
    benchmark.group = f"group of {size}"
    found = measure(benchmark, request, prepare, ("peer",), SECONDS_A_ROW, clock=HOST)
    benchmark.extra_info["amount"] = found.amount
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With this repository's benchmarks, and tests/ that has none."""
    monkeypatch.setattr(runs, "subprocess", forked.processes())
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(BENCHMARKS, root / "benchmarks", ignore=ignored)
    (root / "longrope_kernels").symlink_to(make.ROOT / "longrope_kernels")
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    less_important\n")
    return root


def write(root: Path, *names: tuple[str, str], file: str = "test_rows.py") -> str:
    (root / "benchmarks" / file).write_text(ROWS.replace("NAMES", repr(list(names))))
    return f"benchmarks/{file}"


def report(root: Path, budget: float, *benchmarks: str, tests: Any = None) -> make.Written:
    options = {"tests": tests, "benchmarks": ("-p", "no:cacheprovider", *benchmarks)}
    return make.make(root / "out", budget, **options, builds=False, root=root)


def test_a_benchmark_that_failed_is_told(checkout: Path) -> None:
    names = [("1", name) for name in ("right", "wrong", "ours", "peer")]
    made = report(checkout, 100, write(checkout, *names))
    content, rows = results.load(made.folder)
    assert [row.key for row in rows] == [("group of 1", "right")]
    assert (rows[0].rounds >= 5, rows[0].info) == (True, {"amount": 1})
    wrong = "ropes.WrongResultError: wrong, q: error 5.0e-01, allowed 1.0e-02"
    assert content["failed"] == {
        "group of 1, wrong": wrong,
        "group of 1, ours": "RuntimeError: no kernel for ours",
    }
    assert content["not_measured"]["group of 1, peer"] == "RuntimeError: no kernel for peer"
    assert made.failed == 2
    text = (made.folder / "report.md").read_text("utf-8")
    assert f"\n## Failed\n\n- group of 1, wrong: {wrong}\n- group of 1, ours: " in text
    assert text.index("## Machine") < text.index("## Failed") < text.index("## Measurements")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", "it ended with -9 while this ran"),
        *(
            pytest.param(name, reason, marks=pytest.mark.full)
            for name, reason in (
                ("access", "an illegal memory access was encountered"),
                ("hang", "nothing was heard for 30 s while this ran"),
            )
        ),
    ],
)
def test_a_row_that_ends_its_process_leaves_all_others(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    """Those of its group too; what was measured before is not measured again."""
    if name == "hang":
        monkeypatch.setattr(runs, "SILENT", 30)
    ceilings = "benchmarks/test_ceilings.py"
    rows_of = [("1", "right"), ("2", "first"), ("2", name), ("2", "right"), ("3", "right")]
    made = report(checkout, 100, ceilings, write(checkout, *rows_of))
    content, rows = results.load(made.folder)
    measured = [(f"group of {size}", n) for size, n in rows_of if n != name]
    assert [row.key for row in rows] == [("ceilings", "copy"), ("ceilings", "matmul"), *measured]
    assert content["failed"] == {f"group of 2, {name}": reason}


@pytest.mark.full
def test_where_none_of_a_group_can_be_told_from_the_others_all_have_failed(checkout: Path) -> None:
    rows_of = [("1", "right"), ("2", "amid"), ("2", "right"), ("3", "right")]
    content, rows = results.load(report(checkout, 100, write(checkout, *rows_of)).folder)
    assert [row.key for row in rows] == [("group of 1", "right"), ("group of 3", "right")]
    reason = "it ended with -6 while this ran or another of its group"
    assert content["failed"] == dict.fromkeys(("group of 2, amid", "group of 2, right"), reason)


def test_a_row_that_does_not_end_is_stopped(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float | None] = []

    class Impatient(forked.Popen):  # type: ignore[misc]
        def wait(self, timeout: float | None = None) -> Any:
            waited.append(timeout)
            while timeout == runs.CEILINGS and not (checkout / "benchmarks/hangs").exists():
                time.sleep(0.1)
            return super().wait(0 if timeout == runs.CEILINGS else timeout)

    monkeypatch.setattr(runs, "subprocess", forked.processes(Impatient))
    write(checkout, ("1", "right"), ("2", "hang"), ("3", "right"))
    # With a budget that is spent; the first row is of a file whose rows are measured still.
    shutil.copy(checkout / "benchmarks" / "test_rows.py", checkout / "benchmarks/test_ceilings.py")
    made = report(checkout, 0, "benchmarks/test_ceilings.py")
    content, rows = results.load(made.folder)
    assert [row.key for row in rows] == [("group of 1", "right")]
    assert content["dropped"] == {"ceilings": {"2": 1, "3": 1}}
    assert "took much longer" in content["not_measured"]["what came next"]
    assert runs.CEILINGS in waited
    assert made.failed == 0


def test_where_no_time_is_left_the_ceilings_are_measured(checkout: Path) -> None:
    names = [(size, name) for size in ("1 x 8", "2 x 8") for name in ("a", "b", "c")]
    file = write(checkout, *names)
    made = report(checkout, 0, "benchmarks/test_ceilings.py", file, tests=("tests",))
    content, rows = results.load(made.folder)
    assert [row.name for row in rows] == ["copy", "matmul"]
    assert content["dropped"] == {"rows": {"1 x 8": 3, "2 x 8": 3}}
    assert (content["failed"], made.failed) == ({}, 0)
    lines = (made.folder / "report.md").read_text("utf-8").splitlines()
    at = lines.index("- Dropped by the budget, 6 rows:")
    assert lines[at + 1] == "  - rows, 6 rows of 2 groups: 1 x 8; 2 x 8"
    assert "0 passed, 0 failed, 0 skipped; cut short by the budget." in lines


def test_benchmarks_that_cannot_be_collected_leave_the_rest(checkout: Path) -> None:
    (checkout / "benchmarks" / "conftest.py").write_text("raise OSError('is not there')")
    made = report(checkout, 100, "benchmarks/test_ceilings.py")
    content, rows = results.load(made.folder)
    assert rows == []
    assert content["failed"] == {"the benchmarks": "pytest ended with 4; its output tells why"}
    assert {"machine", "tests", "seconds", "not_measured"} <= set(content)
    assert "## Tests" in (made.folder / "report.md").read_text("utf-8")


def test_a_file_that_cannot_be_collected_has_failed(checkout: Path) -> None:
    (checkout / "benchmarks" / "test_broken.py").write_text("raise OSError('is not there')")
    content, rows = results.load(report(checkout, 0, "benchmarks/test_broken.py").folder)
    assert rows == []
    assert content["failed"]["benchmarks/test_broken.py"].endswith("OSError: is not there")


def test_tests_that_crash_have_failed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_good(): pass\ndef test_crash(): os.abort()\n"
    )
    found = runs.run_tests(tmp_path, 60, ("-p", "no:cacheprovider", str(tmp_path)))
    assert found["passed"] == ["test_it.py::test_good"]
    assert found["failed"] == ["the tests"]
    assert found["reasons"] == {"the tests": "pytest ended with -6; its output tells why"}


# ------------------------------------------------------------------------ without running anything


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs end at once, with a row; what was run is in the list."""
    ran: list[str] = []
    found = {"failed": {}, "not_measured": {}, "dropped": {}, "clocks": {}}

    def run_benchmarks(*arguments: Any) -> Any:
        ran.append("benchmarks")
        return [results.Row("g", "a", 1.0, 1.0, 1.0, 5)], {k: dict(v) for k, v in found.items()}

    def run_tests(*arguments: Any) -> Any:
        ran.append("tests")
        reasons = {"t.py::b": "is wrong"}
        kinds = {"passed": ["t.py::a"], "failed": ["t.py::b"], "skipped": []}
        return {**kinds, "reasons": reasons, "complete": True}

    monkeypatch.setattr(runs, "run_benchmarks", run_benchmarks)
    monkeypatch.setattr(runs, "run_tests", run_tests)
    return ran


def test_the_command_fails_where_a_test_did_and_all_is_written(
    tmp_path: Path,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "build", lambda root: None)
    assert main(["--out", str(tmp_path / "out")]) == 1
    assert "1 failed, which the page lists" in capsys.readouterr().err
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "## Failed\n\n- 1 test, see Tests\n" in text
    assert "- failed: `t.py::b`: is wrong" in text
    assert main(["--out", str(tmp_path / "again"), "--no-tests"]) == 0
    assert "## Failed" not in (tmp_path / "again" / "report.md").read_text("utf-8")


@pytest.mark.parametrize("named", [False, True], ids=["default", "--out"])
def test_a_report_is_never_written_over_another(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    for folder in ("tests", "benchmarks"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(facts, "folder_name", lambda facts: "a-machine")
    day = tmp_path / "reports" / "a-machine" / datetime.date.today().isoformat()
    folders = [day, day.with_name(f"{day.name}-2"), day.with_name(f"{day.name}-3")]
    day.mkdir(parents=True)
    (day / "notes.txt").touch()  # in the way of nothing
    for i, folder in enumerate(folders):
        made = make.make(
            day if named else None, 9, tests=None, benchmarks=(), builds=False, root=tmp_path
        )
        assert made.folder == folder
        (folder / "report.md").write_text(f"report {i}")
    assert [(folder / "report.md").read_text() for folder in folders] == [
        *("report 0", "report 1", "report 2")
    ]
    text = compare(folders[0], folders[1])
    assert f"before: {folders[0]} " in text
    assert f"after:  {folders[1]} " in text


@pytest.mark.parametrize("out", [".", "../day", ".."])
def test_a_folder_without_a_name_gets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    here = tmp_path / "day" / "here" if out == ".." else tmp_path / "day"
    here.mkdir(parents=True)
    (tmp_path / "day" / "report.md").touch()
    monkeypatch.chdir(here)
    assert make.vacant(Path(out)) == tmp_path / "day-2"


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert main(["--out", str(out)]) == 1
        told = capsys.readouterr().err
        assert "--out: [Errno" in told
        assert f"'{out}'" in told
    assert main(["--budget", "0"]) == 1
    assert "--budget: expected a second at least, got 0" in capsys.readouterr().err
    assert measured == []


def test_the_time_for_everything_is_under_eight_minutes() -> None:
    assert BUDGET + runs.LATE < 8 * 60


# ------------------------------------------------------------------------------------------ clocks


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that answers from the file "clocks" beside it; where there is none, never."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        f"cd {tmp_path}\n"
        "[ -e clocks ] || exec sleep 600\n"
        'case "$1" in\n'
        "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu) cat clocks;;\n"
        "*) echo 580.1, 1980 MHz, 700.00 W;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "clocks"


def test_clocks_under_load_are_what_was_answered_in_time(
    smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = facts.Asked()
    assert late.answer() == {}
    smi.write_text("1755 MHz, 2619 MHz, 640.50 W, 61\n")
    asked = facts.Asked()
    assert asked._process is not None
    asked._process.wait()
    sample = asked.answer()
    assert list(sample.values()) == ["1755 MHz", "2619 MHz", "640.50 W", "61"]
    smi.write_text("1980 MHz, [N/A], 650.50 W, 63\n")
    monkeypatch.setattr(facts.torch.cuda, "is_available", lambda: True)
    other = facts.clocks()
    spread = facts.spread([sample, {}, other, other])
    assert spread == {
        "clocks.sm": {"min": 1755, "median": 1980, "max": 1980, "unit": "MHz", "samples": 3},
        "clocks.mem": {"min": 2619, "median": 2619, "max": 2619, "unit": "MHz", "samples": 1},
        "power.draw": {"min": 640.5, "median": 650.5, "max": 650.5, "unit": "W", "samples": 3},
        "temperature.gpu": {"min": 61, "median": 63, "max": 63, "unit": "", "samples": 3},
    }


@pytest.mark.parametrize(("visible", "asked"), [(None, "0"), ("", "0"), ("3,1", "3")])
def test_clocks_are_those_of_the_first_device_that_torch_sees(
    visible: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert facts._question(("clocks.sm",))[-1] == f"--id={asked}"


def test_without_nvidia_smi_there_are_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert facts.Asked().answer() == {}
    assert facts.spread([{}]) == {}


def test_the_page_says_what_clocks_were_seen(
    tmp_path: Path, measured: list[str], smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi.touch()
    assert facts.Asked(facts._LASTING).answer(None)["driver_version"] == "580.1"
    gpu = {"name": "NVIDIA H100", "driver_version": "580.1", "clocks.max.sm": "1980 MHz"}
    monkeypatch.setattr(facts, "describe", lambda root: {"cpu": "a processor", "gpu": gpu})
    of_run = runs.run_benchmarks

    def run_benchmarks(*arguments: Any) -> Any:
        rows, found = of_run(*arguments)
        samples = [{"clocks.sm": "1755 MHz"}, {"clocks.sm": "1980 MHz"}, {"clocks.sm": "1980 MHz"}]
        return rows, {**found, "clocks": facts.spread(samples)}

    monkeypatch.setattr(runs, "run_benchmarks", run_benchmarks)
    made = make.make(tmp_path / "out", 9, tests=None, benchmarks=(), builds=False)
    lines = (made.folder / "report.md").read_text("utf-8").splitlines()
    values = dict([cell.strip() for cell in line.split("|")[1:3]] for line in lines if "|" in line)
    assert values["gpu driver version"] == "580.1"
    assert values["gpu clocks.sm during the benchmarks"] == (
        "1755 to 1980 MHz, median 1980, of 3 samples"
    )
    assert results.load(made.folder)[0]["machine"]["clocks"]["clocks.sm"]["min"] == 1755


# ------------------------------------------------------------------------------------ not measured


def test_each_reason_is_told_once() -> None:
    missing = {"liger": "not installed", "a": "no GPU", "b, paged": "no GPU"}
    content = {"machine": {"cpu": "c"}, "date": "", "tests": None, "not_measured": missing}
    text = page.render(content, [])
    assert "\n## Not measured\n\n- liger: not installed\n- a; b, paged: no GPU\n" in text
    assert "## Not measured" not in page.render({**content, "not_measured": {}}, [])
