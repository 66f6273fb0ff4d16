"""Every measured number that README and docs show, made from the files under reports/.

    python tests/figures.py --write   puts the tables in again

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``. Numbers in sentences are
listed as the sentence with the numbers left out. test_figures.py holds the pages to both.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import figures_codegen as codegen
import figures_rotation as rotation
import figures_search as search
import figures_smollm2 as smollm2
import figures_speed as speed
from report_files import ROOT, markdown, read

from longrope_kernels.integrations import families


def of_extend_tiny(title: str) -> str:
    """A table of the page that examples/extend_tiny/run.py wrote, by the title before it."""
    text = (ROOT / "reports/extend_tiny/results.md").read_text("utf-8")
    table = text.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0].strip()
    if not table:
        raise ValueError(f"reports/extend_tiny/results.md: there is no table {title!r}")
    return table


EXTEND_TINY = {
    "tiny-at-length": "Without tuning, each made for the length",
    "tiny-recipe": "Extended by the whole recipe",
    "tiny-claims": "The claims of the paper",
    "tiny-searches": "Searches at 2048 bytes",
    "tiny-policies": "Where a sequence grows out of the short set",
}


def understands() -> str:
    """What tools/understands.py was told: a row for each kind of rope, and for each sequence."""
    asked = read("reports/understands.json")
    rows = {
        "two sets and an attention factor: a sequence beyond the first": ("two sets", ("400",)),
        "the same: shorter ones beside it": ("two sets", ("60", "200")),
        "an attention factor for each set": ("an attention factor for each set", None),
        "a threshold `n_hat`": ("a threshold", None),
        "three sets": ("three sets", None),
    }

    def cell(told: dict[str, Any], lengths: tuple[str, ...] | None) -> str:
        if "refused" in told:
            return "refused"
        most = max(told[length] for length in lengths or told)
        return "yes" if most < 1e-2 else f"no, off by {most:.1f}"

    lines = [
        [row, *(cell(column[what], lengths) for column in asked.values())]
        for row, (what, lengths) in rows.items()
    ]
    return markdown(["", *(f"{name} ({c['version']})" for name, c in asked.items())], lines)


def compatibility() -> str:
    """Each environment that `make record` has put down."""
    columns = ("environment", "python", "torch", "triton", "transformers", "numpy", "system", "cpu")
    rows = [
        [*(row[name] or "none" for name in columns), str(row["passed"]), str(row["failed"])]
        for row in read("reports/compatibility.json")
    ]
    return markdown([*columns, "passed", "failed"], rows)


def models() -> str:
    """Of longrope_kernels/data/architectures.json, which tools/architectures.py writes."""
    return markdown(["family", "pairs", "unrotated cache", "rotated cache"], families.rows())


def rotated_alone() -> str:
    found = families.proven()["families"]
    rows = [[name, e["unrotated"]] for name, e in found.items() if e["unrotated"]]
    return markdown(["family", "why not unrotated"], rows)


TABLES: dict[str, Callable[[], str]] = {
    **rotation.TABLES,
    **speed.TABLES,
    **search.TABLES,
    **smollm2.TABLES,
    **codegen.TABLES,
    "models": models,
    "models-rotated-alone": rotated_alone,
    "compatibility": compatibility,
    "understands": understands,
    **{name: partial(of_extend_tiny, title) for name, title in EXTEND_TINY.items()},
}


def sentences() -> Iterator[tuple[str, str]]:
    """(page, text) of every sentence with measured numbers outside the tables."""
    yield from rotation.sentences()
    yield from speed.sentences()
    yield from codegen.sentences()


# What tests hold or a program is told, with the same units.
PROMISES = (
    "an entry changes only where that saves at least 1 % of the time",
    "holds it below 2 %",
    # Of data sheets, named there.
    "640 and 540 TFLOP/s of attention, forward and backward, about what others report",
    "900 GB/s both) | 450 GB/s",
    "400 Gb/s) | 50 GB/s",
    "computes 2.5 times as much",
)

BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n\n)(.*?)(\n\n<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for page in pages():
        text = page.read_text("utf-8")
        new = BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[4], text)
        if new == text:
            continue
        print(page.relative_to(ROOT))
        if "--write" in sys.argv[1:]:
            page.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
