"""Tables as Markdown that also reads well as text."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table with aligned columns; numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for cells in (head, *rows):
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    rules = (
        "-" * (width - 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    )
    lines.insert(1, f"| {' | '.join(rules)} |")
    return lines


def significant(value: float) -> str:
    """Three digits at least; 0.0612, 1.5, 4213."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0] in "+-0123456789"
