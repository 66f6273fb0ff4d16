"""The house: which part may import which. Nothing imports upward, and nothing in a circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "longrope_kernels"
# From the ground up; a part imports those before it, and its own.
PARTS = (
    *("_version", "_native", "torch_private", "rope", "calls", "kernels", "backends", "ops"),
    *("cache", "distributed", "integrations", "search", "demo", "cli", "__main__"),
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: tuple[str, ...]) -> str:
    return module[0]


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of this package that a file imports, lazily and for type checkers included."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module or "").split(".")) if node.module else base
            found.update((*target, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(tuple(alias.name.split(".")) for alias in node.names)
    return {name[1:] for name in found if name[0] == PACKAGE.name and len(name) > 1}


def exists(module: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*module)
    return (
        any(path.with_suffix(end).exists() for end in (".py", ".pyi"))
        or (path / "__init__.py").exists()
    )


def resolved(module: tuple[str, ...]) -> tuple[str, ...]:
    """Without the name that a module was asked for."""
    return module if exists(module) else module[:-1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_imported_upward(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts
    if own == ("__init__",):
        return
    for module in imported(path):
        target = resolved(module)
        if not target:  # the package's own names, of which only the version is below all parts
            assert module == ("__version__",), f"{'.'.join(own)} imports {module[0]} from the top"
            continue
        assert PARTS.index(part_of(target)) <= PARTS.index(part_of(own)), (
            f"{'.'.join(own)} imports {'.'.join(target)}, which stands above it"
        )


def test_backends_never_import_one_another() -> None:
    names = ("reference", "composed", "native", "flash_attention", "triton", "cuda")
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = path.relative_to(PACKAGE / "backends").with_suffix("").parts[0]
        others = {m[1] for m in map(resolved, imported(path)) if m[:1] == ("backends",) and m[1:]}
        assert own == "choose" or others <= {own}, f"{path.name} imports {others - {own}}"
    assert {path.stem for path in (PACKAGE / "backends").iterdir()} >= set(names)


def test_no_circle() -> None:
    """Of modules, at import time or later."""
    graph = {}
    for path in MODULES:
        own = path.relative_to(PACKAGE).with_suffix("").parts
        own = own[:-1] if own[-1] == "__init__" else own
        graph[own] = {resolved(m) for m in imported(path)} - {own}
    seen: dict[tuple[str, ...], int] = {}

    def visit(module: tuple[str, ...], way: tuple[tuple[str, ...], ...]) -> None:
        if seen.get(module) == 2 or not module:
            return
        shown = " -> ".join(".".join(m) for m in (*way, module))
        assert seen.get(module) != 1, f"a circle: {shown}"
        seen[module] = 1
        for other in sorted(graph.get(module, ())):
            visit(other, (*way, module))
        seen[module] = 2

    for module in sorted(graph):
        visit(module, ())


def test_every_folder_is_packaged() -> None:
    """The list in pyproject.toml is by hand: ``kernels`` has no ``__init__.py`` to be found by."""
    text = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    folders = {path.parent.relative_to(PACKAGE.parent) for path in MODULES}
    for folder in folders:
        assert f'"{".".join(folder.parts)}"' in text


def test_the_map_is_true() -> None:
    """CONTRIBUTING names every part of the package, and no file that is not there."""
    root = PACKAGE.parent
    text = (root / "CONTRIBUTING.md").read_text("utf-8")
    folders = ("longrope_kernels", "csrc", "tests", "benchmarks", "tools", "docs", ".github")
    files = {"/" + str(p.relative_to(root)) for name in folders for p in (root / name).rglob("*.*")}
    files |= {f"/{path.name}" for path in root.glob("*.*")}
    for name in re.findall(r"(?<![*\w./-])[\w./-]*\w\.(?:py|h|cpp|md|toml|yml)\b", text):
        assert any(file.endswith(f"/{name}") for file in files), f"there is no {name}"
    house = text.split("## How the house is built")[1].split("## ")[0]
    for part in PARTS:
        assert re.search(rf"\b{part}(/|\.py)", house) or part.startswith("_"), f"no {part}"
