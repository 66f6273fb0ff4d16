"""Build the compiled extension through CMake; everything else stands in pyproject.toml.

Without a C++ compiler the package installs as pure Python and says so: its `native` backend is
then missing, and says how to get it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake and ninja once and puts ``_native`` where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_native"], check=True)


def has_compiler() -> bool:
    return any(
        shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name
    )


if has_compiler():
    extensions = [Extension("longrope_kernels._native", sources=[])]
else:
    extensions = []
    print("longrope_kernels: no C++ compiler found, installing without the native CPU backend")

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
