"""pytest-benchmark's facts about the device, and the short table at the end."""

from __future__ import annotations

import pytest
import torch
from implementations import DEVICE, missing
from table import lines
from test_rotary import NAMES, ROWS

import longrope_kernels


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


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    terminalreporter.section("rotation of q (1, S, 32, 128) and k (1, S, 8, 128), medians")
    for line in lines(ROWS):
        terminalreporter.write_line(line)
    terminalreporter.write_line(
        "\nof copy: median ratio to a clone (in place: copy_) timed before each round"
    )
    for line in _missing_lines():
        terminalreporter.write_line(line)


def _missing_lines() -> list[str]:
    reasons = {name: missing(name) for name in NAMES}
    return [f"not timed: {name}: {reason}" for name, reason in reasons.items() if reason]
