"""Builds the CUDA kernels for the emulator (tests/cpp): the module longrope_kernels._cuda_emulated.

    python tests/emulated.py

Does nothing where the module is newer than its sources.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}"
MODULE = ROOT / "longrope_kernels" / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"


def _sources() -> list[Path]:
    csrc = ROOT / "csrc"
    files = [*csrc.glob("*"), *csrc.glob("cpu/element*"), *csrc.glob("cuda/*")]
    return [path for path in (*files, *(ROOT / "tests" / "cpp").rglob("*")) if path.is_file()]


def _is_fresh() -> bool:
    newest = max(path.stat().st_mtime for path in _sources())
    return MODULE.exists() and MODULE.stat().st_mtime > newest


def tool(name: str) -> str | None:
    """cmake, ninja or ctest; what pip installed beside this Python comes first."""
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which(name, path=scripts)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Processes that come at once build one after the other."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(*targets: str) -> None:
    import pybind11

    configure = ["cmake", "-S", ROOT / "tests" / "cpp", "-B", BUILD, "-G", "Ninja"]
    configure += [
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DLONGROPE_PYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={MODULE.parent}",
    ]
    for command in (configure, ["cmake", "--build", BUILD, "--target", *targets]):
        command[0] = tool("cmake") or "cmake"
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            text = f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
            raise RuntimeError(text)


def build() -> None:
    """Build the module, if need be.

    Raises:
        RuntimeError: it does not build, and is not there then; the message has the compiler's.
    """
    if _is_fresh():
        return
    with _locked():
        if not _is_fresh():
            MODULE.unlink(missing_ok=True)
            _make("_cuda_emulated")
            MODULE.touch()


def build_tests() -> None:
    """Build the C++ tests, if need be."""
    with _locked():
        _make("test_rotation", "test_emulator")


if __name__ == "__main__":
    build()
