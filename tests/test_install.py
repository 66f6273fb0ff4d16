"""What is built from a checkout installs and runs elsewhere, with a compiler and without."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.full]

ROOT = Path(__file__).parent.parent
# In a process that sees neither the checkout nor what is installed in place of it.
USE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch
import longrope_kernels
from longrope_kernels import Rope, apply_rotary
from longrope_kernels.backends import choose
from longrope_kernels.rope.published import published_configs
assert longrope_kernels.__file__.startswith(sys.argv[1]), longrope_kernels.__file__
rope = Rope.from_config(published_configs()["phi-3-mini-128k"])
q, lengths = torch.randn(1, 5, 2, 96), torch.tensor([5])
out, _ = apply_rotary(q, None, torch.arange(5), rope, lengths=lengths)
same, _ = apply_rotary(q, None, torch.arange(5), rope, lengths=lengths, backend="reference")
torch.testing.assert_close(out, same)
import longrope_kernels.kernels.splits
print(choose.missing("native"))
"""


def python(*arguments: str, folder: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "LONGROPE_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def pip(*arguments: str, **environment: str) -> None:
    python("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from what git knows."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    tree.mkdir()
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    copy = ["tar", "--create", "--no-recursion", "--files-from=-", "--ignore-failed-read"]
    packed = subprocess.run(copy, cwd=ROOT, input=names, capture_output=True, check=True).stdout
    subprocess.run(("tar", "--extract"), cwd=tree, input=packed, check=True)
    code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, check=True)
    (made,) = folder.glob("*.tar.gz")
    return made


def test_a_wheel_holds_nothing_of_an_earlier_build(sdist: Path, tmp_path: Path) -> None:
    subprocess.run(("tar", "--extract", "--file", sdist), cwd=tmp_path, check=True)
    (tree,) = tmp_path.iterdir()
    here = str(Path(sys.executable).parent)  # without a compiler: pure Python
    old = tree / "build" / "lib" / "longrope_kernels" / "no_longer.py"
    old.parent.mkdir(parents=True)
    old.touch()
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"))
    pip("wheel", *options, str(tree), PATH=here)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "longrope_kernels/__init__.py" in names
    assert not any("no_longer" in name for name in names)


def test_who_insists_on_cuda_is_told_what_lacks(sdist: Path, tmp_path: Path) -> None:
    subprocess.run(("tar", "--extract", "--file", sdist), cwd=tmp_path, check=True)
    (tree,) = tmp_path.iterdir()
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent), "CXX": ""}
    for wish, said in (
        ("1", "LONGROPE_BUILD_CUDA=1, but there is no C++ compiler"),
        ("2", "LONGROPE_BUILD_CUDA: expected 0 or 1, got '2'"),
    ):
        done = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=tree,
            env={**environment, "LONGROPE_BUILD_CUDA": wish},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert said in done.stderr


@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_the_sdist_installs_and_runs(sdist: Path, tmp_path: Path, compiler: bool) -> None:
    """By way of its wheel, as pip does; without a compiler it is pure Python and says so."""
    if compiler and sysconfig.get_config_var("CXX") is None:
        pytest.fail("expected a C++ compiler on this machine")
    here = str(Path(sys.executable).parent)
    paths = {"PATH": here + os.pathsep + os.environ["PATH"] if compiler else here}
    pip(
        *("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path / "wheels")),
        str(sdist),
        **paths,
    )
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    said = python("-c", USE, str(target), folder=target, PYTHONPATH=str(target)).strip()
    assert (said == "None") is compiler, said
