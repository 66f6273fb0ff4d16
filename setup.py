"""Build the compiled extensions through CMake; everything else stands in pyproject.toml.

Without a C++ compiler the package installs as pure Python: its `native` backend is then missing,
and `longrope info` says how to get it. The `cuda` backend is built where there is nvcc, GPU or not;
LONGROPE_BUILD_CUDA=1 insists on it, LONGROPE_BUILD_CUDA=0 leaves it out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command import build as build_command
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class Build(build_command.build):
    """setuptools packs whatever lies in its folder, that of earlier builds too."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake and ninja once and puts the modules where setuptools wants them."""

    def build_extensions(self) -> None:
        import pybind11

        if not self.extensions:
            return
        names = [extension.name for extension in self.extensions]
        # setuptools' own folder is a temporary one in editable installs: everything would be built
        # again whenever one file changes.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{self.plat_name}"
        build.mkdir(parents=True, exist_ok=True)
        folders = {Path(self.get_ext_fullpath(name)).resolve().parent for name in names}
        (target,) = folders
        target.mkdir(parents=True, exist_ok=True)
        if CUDA_MODULE not in names:  # one of an earlier editable install would be imported
            Path(self.get_ext_fullpath(CUDA_MODULE)).unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLONGROPE_PYTHON=ON",
            f"-DLONGROPE_CUDA={'ON' if CUDA_MODULE in names else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]
        compiler = nvcc()
        if CUDA_MODULE in names and compiler is not None:
            configure.append(f"-DCMAKE_CUDA_COMPILER={compiler}")
        subprocess.run(configure, check=True)
        modules = [name.rpartition(".")[2] for name in names]
        subprocess.run(["cmake", "--build", str(build), "--target", *modules], check=True)


def has_compiler() -> bool:
    return any(
        shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name
    )


def nvcc() -> str | None:
    """CUDACXX, or nvcc on the PATH or in the usual folders."""
    folders = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    candidates = [os.environ.get("CUDACXX"), "nvcc"]
    candidates += [str(Path(folder) / "bin" / "nvcc") for folder in folders if folder]
    found = (shutil.which(name) for name in candidates if name)
    return next((path for path in found if path), None)


def builds_cuda() -> bool:
    wish = os.environ.get("LONGROPE_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"LONGROPE_BUILD_CUDA: expected 0 or 1, got {wish!r}")
    if not has_compiler():
        if wish == "1":
            raise RuntimeError("LONGROPE_BUILD_CUDA=1, but there is no C++ compiler: see CXX")
        return False
    if wish == "0":
        print("longrope_kernels: LONGROPE_BUILD_CUDA=0, installing without the cuda backend")
        return False
    if nvcc() is None:
        if wish == "1":
            raise RuntimeError(
                "LONGROPE_BUILD_CUDA=1, but there is no nvcc: put it on the PATH or in CUDACXX"
            )
        print("longrope_kernels: no nvcc found, installing without the cuda backend")
        return False
    return True


CUDA_MODULE = "longrope_kernels._cuda"
extensions = []
if has_compiler():
    extensions.append(Extension("longrope_kernels._native", sources=[]))
else:
    print("longrope_kernels: no C++ compiler found, installing without the native CPU backend")
if builds_cuda():
    extensions.append(Extension(CUDA_MODULE, sources=[]))

setup(ext_modules=extensions, cmdclass={"build": Build, "build_ext": CMakeBuild})
