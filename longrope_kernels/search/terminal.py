"""What the commands show: bars, lines above them, tables, pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer

from .extend import Watch
from .ranks import is_main


@contextmanager
def bars() -> Iterator[Watch]:
    """A bar for each step, which goes where the next begins."""
    from tqdm import tqdm

    from .bar import SearchBar

    with ExitStack() as now:

        def watch(kind: str, name: str, total: int) -> Any:
            now.close()
            if kind == "search":
                return now.enter_context(SearchBar(name, quiet=not is_main())).show
            told = {"desc": name, "total": total or None, "unit": " steps"}
            bar = now.enter_context(tqdm(**told, dynamic_ncols=True, disable=not is_main()))

            def tuned(step: int, loss: float) -> None:
                bar.update(step - bar.n)
                bar.set_postfix_str(f"perplexity {number(math.exp(min(loss, 700.0)))}")

            return tuned

        yield watch


def say(line: str) -> None:
    """Above a bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def draw(folders: Iterable[Path], *names: str) -> None:
    """The pictures of a command's own folders, from its own files."""
    from .plots import draw_folder

    for folder in folders:
        draw_folder(folder, names, say)


def table(header: list[str], rows: list[list[str]]) -> None:
    """The first column to the left, the others to the right."""
    left, *widths = (max(map(len, column)) for column in zip(header, *rows, strict=True))
    for first, *rest in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(rest, widths, strict=True))
        typer.echo("  ".join([first.ljust(left), *cells]).rstrip())


def number(value: float | str) -> str:
    """As tables have it."""
    return f"{float(value):.4g}"
