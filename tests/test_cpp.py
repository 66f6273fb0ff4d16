"""The C++ tests of tests/cpp, by ctest, and the table that one of them reads."""

from __future__ import annotations

import subprocess

import emulated
import golden_phases


def test_the_table_of_phases_is_that_of_the_golden_angles() -> None:
    table = (golden_phases.DATA / "golden_phases.txt").read_text("utf-8")
    assert table.splitlines() == golden_phases.lines()


def test_cpp_tests_pass() -> None:
    """The rotation's building blocks, and the emulator itself."""
    emulated.build_tests()
    command = [emulated.tool("ctest"), "--test-dir", emulated.BUILD, "--output-on-failure"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "100% tests passed" in result.stdout
