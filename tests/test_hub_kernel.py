"""tools/hub_kernel.py: what it writes loads from any place, twice, without the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "hub_kernel.py"

# In a process of its own: ops are registered for good.
USE = """
import importlib.util, sys
import torch

sys.modules["longrope_kernels"] = None  # any absolute import of it fails


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


first = load(sys.argv[1], "hub_0")
published = first.published_configs()
del sys.modules["longrope_kernels"]
import longrope_kernels
from longrope_kernels.published import published_configs

second = load(sys.argv[2], "hub_1")  # takes nothing from the package that is there
assert not {"accelerate", "transformers", "typer"} & set(sys.modules)
assert published == published_configs()
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
q, k, v = torch.randn(2, 20, 4, 32), torch.randn(2, 20, 2, 32), torch.randn(2, 20, 2, 32)
lengths = torch.tensor([12, 4097])


def results(package, backend):
    rope = package.Rope.longrope([1.0] * 16, [1.0 + i for i in range(16)], 4096, 131072)
    x = q[:, :2].detach().requires_grad_()
    rest = {"lengths": lengths, "backend": backend}
    rotated = package.apply_rotary(x, k[:, :2], torch.arange(2), rope, **rest)
    rotated[0].square().sum().backward()
    low = [t.bfloat16() for t in (q[:, :1], k, v)]
    decoded = package.decode(*low, torch.tensor([12, 20]), rope, **rest)
    return [*(t.detach() for t in rotated), x.grad, decoded]


for backend in ("reference", "triton"):
    expected = results(longrope_kernels, backend)
    for package in (first, second):
        for a, b in zip(results(package, backend), expected, strict=True):
            assert torch.equal(a, b), backend
rope = first.Rope.plain(32)
out = first.flash_attn.flash_attn_func(q, k, v, rope, causal=True)
positions, plain = torch.arange(20), longrope_kernels.Rope.plain(32)
torch.testing.assert_close(out, longrope_kernels.attention(q, k, v, positions, plain))
for name in ("_hub_a", "_hub_b", "longrope_kernels"):
    assert hasattr(getattr(torch.ops, name), "attention_backward"), name
q, k, positions = q.cpu(), k.cpu(), positions.cpu()
for package in (first, second):
    try:
        package.apply_rotary(q, k, positions, package.Rope.plain(32), backend="native")
    except RuntimeError as error:
        assert "extension is not built" in str(error)
    else:
        raise AssertionError("the copy took the package's extension")
"""


def written(out: Path) -> Path:
    """The package that the tool writes, as kernel-builder leaves it: with a namespace for ops."""
    done = subprocess.run([sys.executable, TOOL, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def add_ops(package: Path, namespace: str) -> None:
    (package / "_ops.py").write_text(
        f"import torch\n\nops = torch.ops.{namespace}\n\n\n"
        f'def add_op_namespace_prefix(op_name):\n    return f"{namespace}::{{op_name}}"\n'
    )


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    """The packages that are imported by name, but for those that only type checkers import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
        yield from absolute_imports(node)


def test_it_loads_twice_beside_the_package(tmp_path: Path) -> None:
    packages = [written(tmp_path / name) for name in ("a", "b")]
    for package, namespace in zip(packages, ("_hub_a", "_hub_b"), strict=True):
        add_ops(package, namespace)
    done = subprocess.run(
        [sys.executable, "-c", USE, *packages], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_tree_is_what_kernel_builder_takes(tmp_path: Path) -> None:
    package = written(tmp_path)
    assert package == tmp_path / "torch-ext" / "longrope_kernels"
    assert not any(path.is_symlink() for path in package.rglob("*"))
    assert {path.suffix for path in package.rglob("*.*")} == {".py", ".json"}
    # The Hub allows the standard library, torch and the kernel itself.
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in package.rglob("*.py"):
        imported = set(absolute_imports(ast.parse(path.read_text("utf-8"))))
        assert imported <= allowed, (path, imported - allowed)
    text = (tmp_path / "build.toml").read_text("utf-8")
    assert 'name = "longrope-kernels"' in text
    assert "[torch-noarch]" in text
    for name in ("flake.nix", "CARD.md", "LICENSE"):
        assert (tmp_path / name).stat().st_size


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True)
    assert "expected an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("arguments", [[], ["a", "b"]], ids=str)
def test_it_says_how_it_is_used(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    assert done.returncode
    assert "python tools/hub_kernel.py FOLDER" in done.stderr
