"""Fresh processes: what is missing is not imported, and what is there works without it."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import longrope_kernels

ROOT = Path(longrope_kernels.__file__).parent.parent

# What Python itself documents for "must not be imported": find_spec finds None as well.
BLOCK = """
import sys
for name in NAMES:
    sys.modules[name] = None
"""
ROTATE = """
import torch
from longrope_kernels import Rope, apply_rotary
q, k = torch.randn(1, 5, 2, 16, requires_grad=True), torch.randn(1, 5, 1, 16)
outs = apply_rotary(q, k, torch.arange(5), Rope.plain(16), backend=BACKEND)
outs[0].sum().backward()
assert q.grad is not None
assert outs[0].shape == q.shape
"""


def run(
    code: str, names: tuple[str, ...] = (), backend: str | None = "reference", **env: str
) -> str:
    """The code in a new interpreter, ``names`` not importable there; what it prints."""
    code = (BLOCK if names else "") + code
    code = f"NAMES = {names!r}\nBACKEND = {backend!r}\n" + code
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_and_transformers_the_reference_runs() -> None:
    run(ROTATE, ("triton", "transformers"))


def test_without_anything_compiled_the_default_is_the_reference() -> None:
    names = ("triton", "transformers", "longrope_kernels._native")
    code = (
        "from longrope_kernels.backends import choose\n"
        "assert choose.choose_rotary(None, 'cpu', False) == 'reference'\n"
    )
    run(ROTATE + code, names, backend=None)


def test_a_missing_backend_says_how_to_get_it() -> None:
    out = run(
        """
import torch
from longrope_kernels import Rope, apply_rotary
from longrope_kernels.backends import choose as backends
for name in ("native", "triton"):
    reason = backends.missing(name)
    assert isinstance(reason, str)
    try:
        apply_rotary(torch.randn(1, 5, 2, 16), None, torch.arange(5), Rope.plain(16), backend=name)
    except RuntimeError as error:
        assert name in str(error)
        assert reason in str(error)
        print(name, reason)
    else:
        raise AssertionError(f"{name} fell back in silence")
""",
        ("triton", "longrope_kernels._native"),
    )
    assert "pip install" in out.splitlines()[0] or "build" in out.splitlines()[0], out
    assert "pip install" in out.splitlines()[1], out


@pytest.mark.parametrize(
    ("module", "extra", "packages"),
    [
        ("integrations.transformers", "transformers", ("transformers",)),
        ("integrations.llamacpp", "gguf", ("gguf", "numpy")),
        ("integrations.lm_eval", "lm-eval", ("lm_eval",)),
        ("search.cmaes", "search", ("cmaes", "numpy")),
        ("search.plots", "search", ("matplotlib",)),
    ],
)
def test_a_module_says_how_to_get_what_it_needs(
    module: str, extra: str, packages: tuple[str, ...]
) -> None:
    run(
        f"""
import importlib
try:
    importlib.import_module("longrope_kernels.{module}")
except ImportError as error:
    assert str(error).startswith("longrope_kernels.{module} needs {packages[0]}"), error
    assert "pip install 'longrope-kernels[{extra}]'" in str(error), error
else:
    raise AssertionError("imported")
""",
        packages,
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    run(
        """
import sys
import torch
before = set(sys.modules)
import longrope_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "transformers", "matplotlib", "numpy", "tqdm", "typer", "kernels"}
assert not new & heavy, new & heavy
"""
    )


def test_triton_without_the_interpreter_refuses_cpu_tensors() -> None:
    run(
        """
import torch
from longrope_kernels import Rope, apply_rotary
try:
    apply_rotary(torch.randn(1, 5, 2, 16), None, torch.arange(5), Rope.plain(16), backend="triton")
except (ValueError, RuntimeError) as error:
    assert "backend" in str(error)
    assert "triton" in str(error)
    assert "TRITON_INTERPRET" in str(error) or "cuda" in str(error)
else:
    raise AssertionError("ran")
"""
    )


def test_the_huggingface_package_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """The repository root comes first on sys.path; ``import kernels`` must go past ours."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("HUB = True\n")
    run(
        f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import kernels
assert kernels.HUB
"""
    )


def test_the_package_is_typed() -> None:
    assert (Path(longrope_kernels.__file__).parent / "py.typed").is_file()


def test_without_numpy_nothing_is_said() -> None:
    run(
        """
import warnings
warnings.simplefilter("error")
from longrope_kernels import Rope, apply_rotary, attention, decode
import torch
q, n = torch.randn(1, 3, 2, 16), torch.tensor([3])
apply_rotary(q, None, torch.arange(3), [1.0] * 8, 0)
apply_rotary(q, None, torch.arange(3), torch.ones(8), 0)
attention(q, q, q, torch.arange(3), Rope.plain(16))
decode(q, q, q, n, Rope.plain(16))
""",
        ("numpy",),
    )


def test_the_stubs_name_what_the_extensions_have() -> None:
    """Of those that were built here."""
    package = Path(longrope_kernels.__file__).parent
    for name in ("_native", "_cuda"):
        stub = ast.parse((package / f"{name}.pyi").read_text())
        named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
        assert named
        if importlib.util.find_spec(f"longrope_kernels.{name}") is not None:
            module = importlib.import_module(f"longrope_kernels.{name}")
            assert named == {entry for entry in dir(module) if not entry.startswith("__")}
