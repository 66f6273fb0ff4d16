"""Plain tables of what the demo found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first aligned left, all others right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = (cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
        return "  ".join((line[0].ljust(widths[0]), *cells)).rstrip()

    return "\n".join((text(header), text(["-" * w for w in widths]), *map(text, rows)))


def model_text(logits: dict[str, Any], generated: dict[str, Any]) -> str:
    """What `logits_agreement` and `generate_agreement` returned."""
    rows = [
        ("float32, kernels", f"{logits['float32_kernels']:.1e}"),
        ("bfloat16, untouched", f"{logits['bfloat16_untouched']:.1e}"),
        ("bfloat16, kernels", f"{logits['bfloat16_kernels']:.1e}"),
    ]
    total = generated["prompt_tokens"] + generated["new_tokens"]
    verdict = "the same tokens" if generated["equal"] else "OTHER TOKENS"
    return "\n".join(
        (
            f"Phi-3 (2 layers, 32 heads of 96, random weights) on {logits['tokens']} bytes of text",
            f"largest logit difference from the untouched float32 model (logits up to "
            f"{logits['largest_logit']:.1f}):",
            aligned(("model", "difference"), rows),
            f"generate(), {generated['prompt_tokens']} + {generated['new_tokens']} tokens"
            + (", across the switch at 4097" if generated["prompt_tokens"] <= 4096 < total else "")
            + f": {verdict} with and without the kernels",
        )
    )


def errors_text(rows: list[dict[str, Any]]) -> str:
    """The rows of `errors_at`."""
    cells = []
    for row in rows:
        angle = row["angle_error"]
        name = "(rounding alone)" if row["method"] == "rounding" else row["method"]
        cells.append(
            (
                name,
                f"{row['position']:,}",
                "-" if angle is None else f"{angle:.1e}",
                f"{row['float32_error']:.1e}",
                f"{row['bfloat16_error']:.1e}",
            )
        )
    header = ("method", "last position", "angle (rad)", "q, k float32", "q, k bfloat16")
    return "Error against float64\n" + aligned(header, cells)


def times_text(rows: list[dict[str, Any]], shape: Sequence[int], where: str) -> str:
    """The rows of `time_rotations`."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    by_variant: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["dtype"]] = row
    cells, notes = [], []
    for variant, found in by_variant.items():
        line = [variant]
        for dtype in dtypes:
            row = found[dtype]
            if "ms" in row:
                line += [f"{row['ms']:.2f}", f"{row['gb_per_s']:.1f}", f"{row['speedup']:.1f}"]
            else:
                line += ["-", "-", "-"]
                notes.append(f"{variant}, {dtype}: not measured: {row['reason']}")
        cells.append(line)
    header = ["variant", *(f"{d} {unit}" for d in dtypes for unit in ("ms", "GB/s", "x eager"))]
    title = f"Time of rotating q and k {tuple(shape)} each, {where}, medians"
    return "\n".join((title, aligned(header, cells), *notes))
