"""benchmarks/report: rows of the recorder, the page, the comparison, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import benchmark_modules  # noqa: F401  whose folder has the report
import forked
import pytest
import torch
from report import build, facts, order, page, results, runs
from report.__main__ import main
from report.compare import compare
from report.make import ROOT, make
from report.results import Row

MACHINE = {"cpu": "a processor", "threads": 2, "commit": "0123456789ab", "torch": "2.13.0"}
TESTS = {"passed": ["t.py::a"], "failed": [], "skipped": [], "reasons": {}, "complete": True}
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "subprocess", forked.processes())


def row(name: str, median: float, group: str = "forward", **info: Any) -> Row:
    return Row(group, name, median, 0.9 * median, 1.1 * median, 10, info)


def rows() -> list[Row]:
    """Two implementations at two lengths, and the ceilings."""
    result = [
        row("copy", 1.0, results.CEILINGS, gb_per_s=200.0),
        row("matmul", 1.0, results.CEILINGS, tflop_per_s=100.0),
    ]
    for tokens in (1024, 8192):
        for name, seconds in (("theirs", 2e-9), ("ours", 1e-9)):
            info = {"work": "prefill", "kind": "causal", "tokens": tokens, "flops": 10**6}
            speed = 1e-12 * 10**6 / (seconds * tokens)
            info |= {"bytes": 10**4, "tflop_per_s": speed, "matmul_fraction": speed / 100}
            info["peak_bytes"] = 2500000
            result.append(row(name, seconds * tokens, f"prefill, {tokens} tokens", **info))
    return result


def save(path: Path, *members: Row) -> Path:
    path.mkdir()
    content = {"machine": MACHINE, "date": "2026-01-02", "tests": TESTS, "not_measured": {}}
    results.save(path / "results.json", content, list(members))
    return path


def test_rows_of_the_recorder() -> None:
    of_eleven = Row.of("g", "ours", [float(i) for i in range(11)], {"bytes": 8})
    assert of_eleven == Row("g", "ours", 5.0, 2.0, 8.0, 11, {"bytes": 8})
    assert Row.of("g", "once", [3.0], {}) == Row("g", "once", 3.0, 3.0, 3.0, 1)
    lines = [
        {"test": "a", "outcome": "passed", "benchmark": vars(of_eleven)},
        {"test": "b", "outcome": "failed", "reason": "E: wrong", "row": "g, theirs"},
        {"test": "c", "outcome": "failed", "reason": "E: no such file"},
        {"test": "d", "outcome": "skipped", "reason": "no", "row": "g, none"},
        {"note": {"not_measured": {"x": "no"}}},
    ]
    read, found = results.benchmarks_of(lines)
    assert read == [of_eleven]
    assert found["failed"] == {"g, theirs": "E: wrong", "c": "E: no such file"}
    assert found["not_measured"] == {"g, none": "no", "x": "no"}


def test_a_test_that_fails_in_teardown_has_failed() -> None:
    lines = [
        {"test": "a", "outcome": "passed"},
        {"test": "b", "outcome": "passed"},
        {"test": "b", "outcome": "failed", "reason": "E: teardown"},
        {"test": "c", "outcome": "skipped", "reason": "no such thing"},
    ]
    found = results.tests_of(lines)
    assert (found["passed"], found["failed"], found["skipped"]) == (["a"], ["b"], ["c"])
    assert found["reasons"] == {"b": "E: teardown", "c": "no such thing"}


def test_the_recorder_tells_of_each_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_not(): pytest.skip('for a reason')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no disk')\n"
        "def test_broken(broken): pass\n"
    )
    found = runs.run_tests(tmp_path, 60, ("-p", "no:cacheprovider", str(tmp_path)))
    assert found["complete"]
    assert found["passed"] == ["test_it.py::test_good"]
    assert found["failed"] == ["test_it.py::test_bad", "test_it.py::test_broken"]
    assert found["reasons"] == {
        "test_it.py::test_bad": "assert 1 == 2",
        "test_it.py::test_broken": "OSError: no disk",
        "test_it.py::test_not": "Skipped: for a reason",
    }
    assert found["skipped"] == ["test_it.py::test_not"]


def test_tests_cut_short_keep_what_they_showed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(600)\n"
    )

    class Impatient(forked.Popen):  # type: ignore[misc]
        def __init__(self, *args: Any, env: dict[str, str], **kwargs: Any) -> None:
            self.record = Path(env["LONGROPE_RECORD"])
            super().__init__(*args, env=env, **kwargs)

        def wait(self, timeout: float | None = None) -> Any:
            while timeout == 17 and not self.record.read_text():
                time.sleep(0.1)
            return super().wait(0 if timeout == 17 else timeout)

    monkeypatch.setattr(runs, "subprocess", forked.processes(Impatient))
    found = runs.run_tests(tmp_path, 17, ("-p", "no:cacheprovider", str(tmp_path)))
    assert not found["complete"]
    assert found["passed"] == ["test_it.py::test_quick"]
    text = page.render(_report(tests=found), rows())
    assert "1 passed, 0 failed, 0 skipped; cut short by the budget" in text


def test_nothing_goes_on_after_tests_that_were_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = tmp_path / "beats"
    (tmp_path / "child.py").write_text(
        "import pathlib, time\n"
        "while True:\n"
        f"    with pathlib.Path({str(beats)!r}).open('a') as file: file.write('.')\n"
        "    time.sleep(0.02)\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import subprocess, sys\n"
        "def test_slow():\n"
        f"    subprocess.Popen([sys.executable, {str(tmp_path / 'child.py')!r}]).wait()\n"
    )

    class Impatient(forked.Popen):  # type: ignore[misc]
        def wait(self, timeout: float | None = None) -> Any:
            while timeout == 17 and not beats.exists():
                time.sleep(0.1)
            return super().wait(0 if timeout == 17 else timeout)

    monkeypatch.setattr(runs, "subprocess", forked.processes(Impatient))
    runs.run_tests(tmp_path, 17, ("-p", "no:cacheprovider", str(tmp_path)))
    time.sleep(0.1)
    size = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == size


def test_tests_of_the_device_come_first(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "from types import SimpleNamespace\n"
        "places = [SimpleNamespace(device=device) for device in ('cpu', 'cuda')]\n"
        "def test_anywhere(): pass\n"
        "@pytest.mark.parametrize('target', places, ids=['cpu', 'cuda'])\n"
        "def test_at(target): pass\n"
        "@pytest.mark.gpu\n"
        "def test_marked(): pass\n"
    )
    (tmp_path / "test_b.py").write_text("DEVICE = 'cuda'\ndef test_of_module(): pass\n")
    (tmp_path / "test_c.py").write_text("def test_anywhere_too(): pass\n")
    options = ("-p", "report.order", "-p", "no:cacheprovider", str(tmp_path))
    found = runs.run_tests(tmp_path, 60, options)
    assert [name.partition("::")[2] for name in found["passed"]] == [
        *("test_at[cuda]", "test_marked", "test_of_module"),
        *("test_anywhere", "test_at[cpu]", "test_anywhere_too"),
    ]


def test_only_those_of_the_device(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_anywhere(): pass\n@pytest.mark.gpu\ndef test_marked(): pass\n"
    )
    options = ("-p", "report.order", "--on-device", "-p", "no:cacheprovider", str(tmp_path))
    assert runs.run_tests(tmp_path, 60, options)["passed"] == ["test_a.py::test_marked"]


def test_what_no_device_runs_and_cannot_be_imported_is_not_in_the_way(tmp_path: Path) -> None:
    """Tests that lean on packages a machine may lack; without --on-device they fail by name."""
    for module, package in order.ELSEWHERE.items():
        assert f"import {package}" in (ROOT / "tests" / module).read_text("utf-8")
        (tmp_path / module).write_text("import no_such_package\n")
    (tmp_path / "test_a.py").write_text("DEVICE = 'cuda'\ndef test_it(): pass\n")
    (tmp_path / "conftest.py").write_text(
        "from report import order\norder.ELSEWHERE = dict.fromkeys(order.ELSEWHERE, 'absent')\n"
    )
    options = ("-p", "report.order", "-p", "no:cacheprovider", str(tmp_path))
    found = runs.run_tests(tmp_path, 30, ("--on-device", *options))
    assert [len(found[x]) for x in ("passed", "failed")] == [1, 0]
    found = runs.run_tests(tmp_path, 30, options)
    assert sorted(Path(name).name for name in found["failed"]) == sorted(order.ELSEWHERE)


def test_a_process_whose_gpu_refuses_gives_way_to_another(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "from report import order\n"
        "broken = []\n"
        "order.gpu_refuses = lambda: bool(broken)\n"
        "@pytest.mark.parametrize('i', range(4))\n"
        "def test_it(i):\n"
        "    assert not broken, 'of another test'\n"
        "    if i == 1:\n"
        "        broken.append(i)\n"
        "        raise RuntimeError('an illegal memory access was encountered')\n"
    )
    options = ("-p", "report.order", "-n", "1", "-p", "no:cacheprovider", str(tmp_path))
    found = runs.run_tests(tmp_path, 100, options)
    assert sorted(found["passed"]) == [f"test_it.py::test_it[{i}]" for i in (0, 2, 3)]
    assert found["failed"] == ["test_it.py::test_it[1]"]
    reason = "RuntimeError: an illegal memory access was encountered"
    assert found["reasons"] == {"test_it.py::test_it[1]": reason}


def test_a_gpu_runs_many_tests_at_once_and_none_that_takes_long_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.cuda.is_available() or runs.options_here() == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs, "MOST_PROCESSES", 2)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.slow\n"
        "def test_slow(): pass\n"
        "@pytest.mark.slow\n"
        "@pytest.mark.gpu\n"
        "def test_slow_on_it(): pass\n"
        "def test_workers():\n"
        "    workers = int(os.environ['PYTEST_XDIST_WORKER_COUNT'])\n"
        "    assert workers == min(os.cpu_count(), 2)\n"
        "    assert os.environ['OMP_NUM_THREADS'] == '1'\n"
    )
    options = (*runs.options_here(), "-p", "no:cacheprovider", str(tmp_path))
    found = runs.run_tests(tmp_path, 120, options)
    assert (found["failed"], found["reasons"]) == ([], {})
    names = sorted(name.partition("::")[2] for name in found["passed"])
    assert names == ["test_slow_on_it", "test_workers"]


@needs_git
def test_a_checkout_names_its_commit_and_whether_it_has_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a name")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "name@example.org")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "a.py").touch()
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all of it")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert facts.commit(tmp_path) == head
    (copy / "a.py").write_text("changed = True\n")
    assert facts.commit(tmp_path) == f"{head} with changes"
    # A copy without git is not of the repository around it.
    monkeypatch.delenv("LONGROPE_COMMIT", raising=False)
    assert facts.commit(copy) is None
    monkeypatch.setenv("LONGROPE_COMMIT", "0123456789ab")
    assert facts.describe(copy)["commit"] == "0123456789ab"


def git(root: Path, *arguments: str) -> str:
    command = ("git", "-C", str(root), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_python_runs_the_command_line_of_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    command = [sys.executable, "-m", "benchmarks.report", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--compare" in done.stdout


# ------------------------------------------------------------------------------------------- build


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A setup.py that makes the modules, and their sources."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").touch()
    (tmp_path / "CMakeLists.txt").touch()
    (tmp_path / "longrope_kernels").mkdir()
    (tmp_path / "setup.py").write_text(
        "import os, pathlib, sys, sysconfig\n"
        "assert sys.argv[1:] == ['--quiet', 'build_ext', '--inplace']\n"
        "suffix = sysconfig.get_config_var('EXT_SUFFIX')\n"
        "for name in ['_native'] + ['_cuda'] * (os.environ.get('LONGROPE_BUILD_CUDA') != '0'):\n"
        "    pathlib.Path('longrope_kernels', name + suffix).touch()\n"
    )
    return tmp_path


@pytest.mark.parametrize("gpu", [False, True])
def test_a_bare_checkout_is_built_once(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.delenv("LONGROPE_BUILD_CUDA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    modules = ["_native", "_cuda"] if gpu else ["_native"]
    assert build.stale(checkout) == modules
    assert build.build(checkout) is None
    assert build.stale(checkout) == []
    made = {path.name.partition(".")[0] for path in (checkout / "longrope_kernels").iterdir()}
    assert made == set(modules)
    (checkout / "setup.py").write_text("raise SystemExit('is not run')")
    past = os.stat(checkout / "csrc" / "a.cpp").st_mtime - 60
    os.utime(checkout / "setup.py", (past, past))
    assert build.build(checkout) is None
    module = checkout / "longrope_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    os.utime(module, (past - 60, past - 60))
    assert "_native" in build.stale(checkout)


def test_what_cannot_be_built_is_told(checkout: Path) -> None:
    (checkout / "setup.py").write_text("raise SystemExit(3)")
    failed = build.build(checkout)
    assert failed == "setup.py --quiet build_ext --inplace ended with 3"
    built = {"failed": failed, "seconds": 2.4}
    lines = page.render(_report(build=built, seconds=71.2), rows()).splitlines()
    assert "This took 71 s, of which 2 s to build what was not built." in lines
    assert f"The compiled backends could not be built: {failed}." in lines


# ----------------------------------------------------------------------------- page and comparison


def _report(**changes: Any) -> dict[str, Any]:
    default = {"machine": MACHINE, "date": "2026-01-02", "tests": TESTS, "not_measured": {}}
    return {**default, **changes}


def test_the_page() -> None:
    text = page.render(_report(not_measured={"liger": "not installed"}), rows())
    lines = text.splitlines()
    assert lines[0] == "# longrope_kernels on a processor"
    assert "- copy: 200 GB/s" in lines
    assert "- matmul: 100 TFLOP/s" in lines
    ours = next(line for line in lines if line.startswith("| ours"))
    # 1.024 us, 10^6 operations in that time, of 100 TFLOP/s, 2.5 MB, twice the first row.
    assert [cell.strip() for cell in ours.split("|")[2:]] == [
        *("1.0", "0.9", "1.1", "0.977", "0.01", "2.5", "2.00", "")
    ]
    assert "- liger: not installed" in lines
    assert "1 passed, 0 failed, 0 skipped." in lines
    assert "t.py::a" in lines


def test_compare_says_what_is_more_than_noise(tmp_path: Path) -> None:
    before = [row("faster", 1.0), row("slower", 1.0), row("same", 1.0), row("gone", 1.0)]
    after = [row("faster", 0.5), row("slower", 2.0), row("same", 1.1), row("new", 1.0)]
    text = compare(save(tmp_path / "a", *before), save(tmp_path / "b", *after) / "results.json")
    verdicts = {
        line.split("|")[2].strip(): line.split("|")[5:8]
        for line in text.splitlines()
        if "|" in line
    }
    assert [cell.strip() for cell in verdicts["faster"]] == ["-50.0 %", "20.0 %", "faster"]
    assert [cell.strip() for cell in verdicts["slower"]] == ["+100.0 %", "20.0 %", "slower"]
    assert [cell.strip() for cell in verdicts["same"]] == ["+10.0 %", "20.0 %", ""]
    assert text.endswith("only before:\n  forward / gone\n\nonly after:\n  forward / new")


@pytest.mark.parametrize(
    ("a", "b", "change", "noise", "verdict"),
    [
        # The intervals of the first four do not meet; some are lopsided.
        ((1.0, 1.0, 1.8, 9), (1.9, 1.9, 2.8, 9), "+90.0 %", "63.7 %", "slower"),
        ((1.0, 0.7, 1.01, 9), (1.05, 1.02, 1.2, 9), "+5.0 %", "24.1 %", ""),
        ((1.0, 0.99, 1.2, 9), (0.95, 0.8, 0.98, 9), "-5.0 %", "20.0 %", ""),
        ((1.0, 0.98, 1.02, 9), (0.9, 0.88, 0.92, 9), "-10.0 %", "4.2 %", "faster"),
        ((1.0, 0.9, 1.1, 9), (1.3, 1.05, 1.31, 9), "+30.0 %", "20.0 %", ""),
        ((1.0, 1.0, 1.0, 1), (2.0, 2.0, 2.0, 9), "+100.0 %", "0.0 %", "too few rounds"),
        ((1.0, 1.0, 1.0, 9), (0.5, 0.5, 0.5, 2), "-50.0 %", "0.0 %", "too few rounds"),
        ((1.0, 0.99, 1.01, 3), (0.5, 0.49, 0.51, 3), "-50.0 %", "3.0 %", "faster"),
    ],
)
def test_a_verdict_agrees_with_the_noise_beside_it(
    tmp_path: Path, a: Any, b: Any, change: str, noise: str, verdict: str
) -> None:
    both = [
        save(tmp_path / name, Row("g", "x", *times))
        for name, times in zip("ab", (a, b), strict=True)
    ]
    line = compare(*both).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[5:8]] == [change, noise, verdict]


def test_old_reports_compare(tmp_path: Path) -> None:
    old = {"format": 1, "date": "2026-01-02", "rows": [vars(row("a", 1.0))]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    text = compare(tmp_path / "old.json", save(tmp_path / "new", row("a", 0.5)))
    assert "(an unknown machine, commit unknown)" in text
    assert "(a processor, commit 0123456789ab)" in text
    assert "faster" in text


def test_round_trip(tmp_path: Path) -> None:
    loaded, members = results.load(save(tmp_path / "a", *rows()))
    assert members == rows()
    assert loaded["machine"] == MACHINE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found none"),
        ("{", "expected a results.json"),
        ('{"format": 99}', "expected format 1, got 99"),
        ('{"format": 1}', "expected a results.json .*rows"),
    ],
)
def test_what_is_no_report(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        results.load(tmp_path)
    assert main(["--compare", str(tmp_path), str(tmp_path)]) == 1
    assert "results.json" in capsys.readouterr().err


def test_from_a_checkout_to_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "subprocess", subprocess)
    out, failed = make(
        tmp_path / "out", 60, tests=None, benchmarks=("benchmarks/test_ceilings.py",), builds=False
    )
    assert failed == 0
    assert {file.name for file in out.iterdir()} == {"report.md", "results.json"}
    content, members = results.load(out)
    assert [member.name for member in members] == ["copy", "matmul"]
    assert all(member.median > 0 and member.rounds >= 5 for member in members)
    assert {"torch", "commit", "threads"} <= set(content["machine"])
    text = (out / "report.md").read_text("utf-8")
    assert "## Ceilings" in text
    assert "Not run." in text


def test_a_row_that_the_budget_drops_is_skipped() -> None:
    files = ("benchmarks/test_ceilings.py", "benchmarks/test_search.py")
    status, told = forked.run(*files, "-q", "-k", "ceiling or evaluator", "--budget=0.001")
    assert status == 0
    assert "[2] benchmarks" in told
    assert "2 passed, 2 skipped" in told
    assert "the budget was spent" in told
