"""The budget and the order of the rows, what a run shows, and pytest-benchmark's facts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import copies
import measure
import overview
import pytest
import test_append
import test_attention
import test_decode
import test_host
import test_models
import test_rotary
import test_search
import torch
from report import facts, recorder
from report.results import Row
from ropes import DEVICE
from table import lines

import longrope_kernels

# Rows of attention take longest: of one rank they come after those of the rotation and decoding.
BENCHMARKS = (
    test_rotary,
    test_host,
    test_append,
    test_decode,
    test_attention,
    test_models,
    test_search,
)
BEGIN = time.monotonic()
ITEMS: list[pytest.Item] = []
FINISHED: set[str] = set()  # their node ids
DROPPED: set[str] = set()  # those that the budget left out
BUDGET = 600 if DEVICE.type == "cuda" else 240  # of `--benchmark-only`: what all users want to see
LEAST_IMPORTANT_SMALL = 1  # rank; those above differ from others in length, which is small anyway


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        help="seconds after which nothing is timed, the least important rows coming last; 0 for no"
        f" end [{BUDGET}, unless --until is given]",
    )
    parser.addoption(
        "--until",
        type=float,
        default=math.inf,
        help="the same as a time, in seconds since the epoch",
    )
    parser.addoption(
        "--done", type=Path, help="a record of `report.recorder`; its rows are not run again"
    )
    parser.addoption(
        "--rows", type=Path, help="a file of row ids, one a line, beside the ceilings all to run"
    )
    parser.addoption(
        "--cache-mb",
        type=float,
        default=1e-6 * copies.cache,
        help="calls take copies of their inputs in turn, which exceed this together [the L2 cache"
        " of a GPU; 0, which is one copy, on a CPU]",
    )


def pytest_configure(config: pytest.Config) -> None:
    until = time.monotonic() + config.getoption("until") - time.time()
    measure.deadline = min(BEGIN + _budget(config), until)
    copies.cache = int(1e6 * config.getoption("cache_mb"))
    measure.config = config
    if not _shows_all(config):
        config.option.benchmark_quiet = True  # the wide tables


def _budget(config: pytest.Config) -> float:
    """Seconds; without the option those of a measurement, where nothing else ends it."""
    given: float | None = config.getoption("budget")
    if given is not None and not given >= 0:
        raise pytest.UsageError(f"--budget: expected seconds, 0 for no end, got {given:g}")
    ends = config.getoption("benchmark_only") and config.getoption("until") == math.inf
    return (BUDGET if ends and given is None else given) or math.inf


def _shows_all(config: pytest.Config) -> bool:
    """Whether each row and its tables are shown: with ``-v``."""
    return config.get_verbosity() > 0


def _rank(item: pytest.Item) -> int:
    """0 for what a report must have, more for what a budget drops first; -1 for the ceilings."""
    marker = item.get_closest_marker("less_important")
    rank = -1 if "test_ceilings" in item.nodeid else 0
    return int(*marker.args) if marker is not None else rank


def _place(item: pytest.Item) -> int:
    """Of its file among `BENCHMARKS`."""
    stems = [benchmark.__name__ for benchmark in BENCHMARKS]
    return stems.index(item.path.stem) if item.path.stem in stems else -1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The ceilings first, what is less important last."""
    items.sort(key=lambda item: (_rank(item), _place(item)))
    full_size, done = config.getoption("benchmark_only"), _done(config.getoption("done"))
    named = config.getoption("rows")
    wanted = None if named is None else set(named.read_text("utf-8").splitlines())

    def runs(item: pytest.Item) -> bool:
        if _rank(item) < 0:  # other rows are told as parts of what they reached
            return done.get(item.nodeid) != "failed"
        if wanted is not None and not (hasattr(item, "callspec") and item.callspec.id in wanted):
            return False
        is_of_size = full_size or _rank(item) <= LEAST_IMPORTANT_SMALL
        return is_of_size and item.nodeid not in done

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = filter(runs, items)


def _done(record: Path | None) -> dict[str, str]:
    """The outcome of each row that the record tells of, by node id."""
    if record is None:
        return {}
    entries = recorder.entries(record)
    return {entry["test"]: entry["outcome"] for entry in entries if "test" in entry}


def pytest_collection_finish(session: pytest.Session) -> None:
    ITEMS[:] = session.items


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The ceilings are measured even where no time is left."""
    _tell_group(item)
    until = measure.deadline
    measure.deadline = math.inf if _rank(item) < 0 else until
    try:
        return (yield)
    finally:
        measure.deadline = until


def _tell_group(item: pytest.Item) -> None:
    """A line for each group that is begun, with the time left."""
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not _draws_lines(item.config):
        return
    reporter.showfspath = False
    if not measure.is_row(item) or measure.is_timed(item) or not _has_time(item):
        return
    now = time.monotonic()
    left = "" if measure.deadline == math.inf else f"{measure.deadline - now:4.0f} s left"
    group = item.callspec.id.removesuffix(f"-{item.callspec.params['name']}")
    what = item.path.stem.removeprefix("test_")
    reporter.write_line(f"{now - BEGIN:4.0f} s  {left}  {what}: {group}")


def _draws_lines(config: pytest.Config) -> bool:
    """Whether groups are told of in place of a dot for each row."""
    return bool(config.getoption("benchmark_only")) and not _shows_all(config)


def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    if _draws_lines(config) and report.outcome != "failed":
        return (report.outcome if report.when == "call" or report.skipped else "", "", "")
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not _has_time(item):
        DROPPED.add(item.nodeid)
        pytest.skip(measure.SPENT)


def _has_time(item: pytest.Item) -> bool:
    # What was timed with the first row of its group costs nothing any more.
    seconds_a_row = getattr(item.module, "SECONDS_A_ROW", 0.0)
    return measure.is_timed(item) or measure.fits(item, seconds_a_row)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """What `report.recorder` is told of the row."""
    benchmark = item.funcargs.get("benchmark")
    if call.when != "call" or benchmark is None or not measure.is_row(item):
        return
    name = item.callspec.params["name"]
    item.user_properties.append(("row", f"{benchmark.group}, {name}"))
    if benchmark.stats and not benchmark.disabled:
        row = Row.of(benchmark.group, name, benchmark.stats.stats.data, benchmark.extra_info)
        item.user_properties.append(("benchmark", asdict(row)))


def pytest_runtest_logfinish(nodeid: str) -> None:
    FINISHED.add(nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder.tell(session.config, {"note": _notes()})


def pytest_report_header(config: pytest.Config) -> list[str]:
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    size = "full size" if config.getoption("benchmark_only") else "small (full: --benchmark-only)"
    return [
        f"longrope_kernels {longrope_kernels.__version__}, torch {torch.__version__}, {where}, "
        f"{torch.get_num_threads()} threads, {size}",
        *(_missing_lines() if _shows_all(config) else ()),
    ]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, object]
) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        machine_info["device"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    output_json.update(_notes())


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    timed = [benchmark for benchmark in BENCHMARKS if benchmark.ROWS]
    if not _shows_all(terminalreporter.config):
        _end_shortly(terminalreporter, bool(timed))
        return
    for benchmark in timed:
        terminalreporter.section(benchmark.TABLE.title)
        for line in lines(benchmark.TABLE, benchmark.ROWS):
            terminalreporter.write_line(line)
    for line in _missing_lines() if timed else ():
        terminalreporter.write_line(line)


def _end_shortly(terminalreporter: pytest.TerminalReporter, timed: bool) -> None:
    table = overview.lines()
    if table:
        terminalreporter.section("longrope_kernels beside stock RoPE, medians")
    notes = overview.left_out(_dropped(), _not_timed(), measure.REASONS) if timed else []
    for line in (*table, *notes):
        terminalreporter.write_line(line)


def _notes() -> dict[str, Any]:
    """What a report says beside the rows; see `report.results.benchmarks_of`."""
    return {
        "not_measured": {**_not_timed(), **measure.REASONS},
        "dropped": _dropped(),
        "clocks": facts.spread(measure.CLOCKS),
    }


def _dropped() -> dict[str, dict[str, int]]:
    """How many rows the budget left out, by benchmark and group."""
    spent = time.monotonic() > measure.deadline
    counts: dict[str, dict[str, int]] = {}
    for item in filter(measure.is_row, ITEMS):
        if item.nodeid in DROPPED or (spent and item.nodeid not in FINISHED):
            groups = counts.setdefault(item.path.stem.removeprefix("test_"), {})
            group = item.callspec.id.removesuffix(f"-{item.callspec.params['name']}")
            groups[group] = groups.get(group, 0) + 1
    return counts


def _missing_lines() -> list[str]:
    reasons = {**_not_timed(), **measure.REASONS}
    return [f"not measured: {name}: {reason}" for name, reason in reasons.items()]


def _not_timed() -> dict[str, str]:
    """Why each implementation that is missing here is missing."""
    return {n: why for benchmark in BENCHMARKS for n, why in benchmark.NOT_TIMED.items()}
