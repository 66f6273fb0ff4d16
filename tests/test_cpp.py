"""The C++ tests of tests/cpp, by ctest, and the table that one of them reads."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import emulated
import golden_phases
import pytest

CPU = emulated.ROOT / "csrc" / "cpu"


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


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast"])
def test_flags_of_the_environment_make_no_arithmetic_inexact(flag: str, tmp_path: Path) -> None:
    """They would fold away how the kernels round, and NaN; the last word is of CMakeLists.txt."""
    cmake = emulated.tool("cmake") or "cmake"
    configure = [cmake, "-S", emulated.ROOT, "-B", tmp_path, "-G", "Ninja", "-DLONGROPE_CUDA=OFF"]
    configure += [
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DCMAKE_MAKE_PROGRAM={emulated.tool('ninja')}",
    ]
    environment = {**os.environ, "CXXFLAGS": flag}
    subprocess.run(configure, check=True, capture_output=True, env=environment)
    commands = json.loads((tmp_path / "compile_commands.json").read_text("utf-8"))
    ours = [x for x in commands if Path(x["file"]).parent == CPU]
    assert len(ours) >= 4
    for command in ours:
        words = shlex.split(command["command"])
        assert flag in words
        compiler, *options = words[: words.index("-o")]
        ask = [compiler, *options, "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
        assert "__FAST_MATH__" not in macros
        assert "__FINITE_MATH_ONLY__ 1" not in macros


def test_who_compiles_the_kernels_so_is_told() -> None:
    ask = ["c++", "-ffast-math", "-fsyntax-only", "-x", "c++", str(CPU / "element.h")]
    done = subprocess.run(ask, capture_output=True, text=True)
    assert done.returncode != 0
    assert "longrope: built without -ffast-math" in done.stderr
