"""pytest-benchmark's facts about the device, and the short tables at the end."""

from __future__ import annotations

import math
import time
from typing import Any

import copies
import measure
import pytest
import test_attention
import test_decode
import test_models
import test_rotary
import test_search
import torch
from ropes import DEVICE
from table import lines

import longrope_kernels

# Rows of attention take longest: of one rank they come after those of the rotation and decoding.
BENCHMARKS = (test_rotary, test_decode, test_attention, test_models, test_search)
BEGIN = time.monotonic()
DROPPED: dict[str, str] = {}  # rows that the budget left out
LEAST_IMPORTANT_SMALL = 1  # rank; those above differ from others in length, which is small anyway


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no further row begins; the least important rows come last",
    )

    parser.addoption(
        "--cache-mb",
        type=float,
        default=1e-6 * copies.cache,
        help="calls take copies of their inputs in turn, which exceed this together [the L2 cache"
        " of a GPU; 0, which is one copy, on a CPU]",
    )


def pytest_configure(config: pytest.Config) -> None:
    measure.deadline = BEGIN + config.getoption("budget")
    copies.cache = int(1e6 * config.getoption("cache_mb"))


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
    if not config.getoption("benchmark_only"):
        dropped = [item for item in items if _rank(item) > LEAST_IMPORTANT_SMALL]
        items[:] = [item for item in items if _rank(item) <= LEAST_IMPORTANT_SMALL]
        config.hook.pytest_deselected(items=dropped)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # What was timed with the first row of its group costs nothing any more.
    if time.monotonic() > measure.deadline and not measure.is_timed(item):
        DROPPED[item.name] = measure.SPENT
        pytest.skip(measure.SPENT)


def pytest_report_header(config: pytest.Config) -> list[str]:
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    size = "full size" if config.getoption("benchmark_only") else "small (full: --benchmark-only)"
    return [
        f"longrope_kernels {longrope_kernels.__version__}, torch {torch.__version__}, {where}, "
        f"{torch.get_num_threads()} threads, {size}",
        *_missing_lines(),
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
    output_json["not_measured"] = {**_not_timed(), **measure.REASONS, **DROPPED}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    timed = [benchmark for benchmark in BENCHMARKS if benchmark.ROWS]
    for benchmark in timed:
        terminalreporter.section(benchmark.TABLE.title)
        for line in lines(benchmark.TABLE, benchmark.ROWS):
            terminalreporter.write_line(line)
    for line in _missing_lines() if timed else ():
        terminalreporter.write_line(line)


def _missing_lines() -> list[str]:
    reasons = {**_not_timed(), **measure.REASONS}
    return [f"not measured: {name}: {reason}" for name, reason in reasons.items()]


def _not_timed() -> dict[str, str]:
    """Why each implementation that is missing here is missing."""
    return {n: why for benchmark in BENCHMARKS for n, why in benchmark.NOT_TIMED.items()}
