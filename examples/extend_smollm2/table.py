"""results.md and the picture, made from results.json alone: python table.py FOLDER."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope_kernels.search.plots import draw_perplexity

_ROW = re.compile(r"(?P<name>.+), (?P<length>\d+) tokens, (?P<text>.+)")
Losses = dict[str, dict[int, dict[str, float]]]  # by row, length and text


def write_page(content: dict[str, Any], folder: Path) -> None:
    """results.md and perplexity.png from what `run.py` wrote."""
    (folder / "results.md").write_text(page(content), "utf-8")
    rows = {
        name: {length: _perplexity(of_texts) for length, of_texts in sorted(row.items())}
        for name, row in _losses(content).items()
        if len(row) > 1
    }
    if rows:
        sizes = content["sizes"]
        title = f"Perplexity of the same {sizes['last']} tokens; made for {sizes['target']}"
        draw_perplexity(rows, folder / "perplexity.png", title, sizes["original"])


def page(content: dict[str, Any]) -> str:
    """The page, as Markdown."""
    parts = [_head(content), _table(content), _searches(content), _seconds(content)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _losses(content: Mapping[str, Any]) -> Losses:
    found: Losses = {}
    for key, value in content["results"].items():
        if match := _ROW.fullmatch(key):
            row = found.setdefault(match["name"], {})
            row.setdefault(int(match["length"]), {})[match["text"]] = float(value)
    return found


def _perplexity(of_texts: Mapping[str, float]) -> float:
    return math.exp(statistics.fmean(of_texts.values()))


def _table(content: Mapping[str, Any]) -> str:
    lengths = sorted(content["sizes"]["lengths"])
    kinds = content["sizes"]["judged"]
    rows = _losses(content)
    lines = [
        [name, *(_cell(row.get(length), len(kinds)) for length in lengths)]
        for name, row in rows.items()
    ]
    if not lines:
        return ""
    target = content["sizes"]["target"]
    return (
        f"## Perplexity by length, each row made for {target} tokens\n\n"
        + _markdown(["", *(f"{length} tokens" for length in lengths)], lines)
        + "\n\nDynamic NTK is another rope at each length. After a perplexity of several texts "
        "stands the factor by which it is known, from the standard error over the texts; in "
        f"brackets, of how many of the {len(kinds)} texts it is. A cell without a number has not "
        "been run."
    )


def _cell(of_texts: Mapping[str, float] | None, texts: int) -> str:
    if of_texts is None:
        return ""
    count = len(of_texts)
    shown = f"{_perplexity(of_texts):.2f}"
    if count > 1:
        error = statistics.stdev(of_texts.values()) / math.sqrt(count)
        shown += f" */{math.exp(error):.2f}"
    return shown if count == texts else f"{shown} ({count})"


def _searches(content: Mapping[str, Any]) -> str:
    lines = []
    for key, found in content["results"].items():
        if key.startswith("search, "):
            descent = found["descent"] or {}
            change = descent.get("largest_change")
            lines.append(
                [
                    key,
                    f"{found['fitness']:.2f}",
                    str(found["evaluations"]),
                    f"{found['seconds']:.0f}",
                    str(descent.get("formula", "")),
                    "" if change is None else f"{change - 1:.0%}",
                ]
            )
    if not lines:
        return ""
    head = ["", "perplexity, searched texts", "evaluations", "seconds", "descends from", "changed"]
    return "## Searches\n\n" + _markdown(head, lines)


def _seconds(content: Mapping[str, Any]) -> str:
    lines = [
        [key, f"{seconds:.0f}", str(content["commits"].get(key))]
        for key, seconds in content["seconds"].items()
    ]
    return "## What was run\n\n" + _markdown(["", "seconds", "commit"], lines) if lines else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(content: Mapping[str, Any]) -> str:
    sizes, machine = content["sizes"], content["machine"]
    where = machine.get("gpu") or machine.get("cpu") or "a CPU"
    layers = "" if sizes["layers"] is None else f", its first {sizes['layers']} layers alone"
    texts = ", ".join(f"{name} ({text})" for name, text in content["texts"].items())
    return (
        "# A pretrained model, extended\n\n"
        f"SmolLM2-135M-Instruct{layers}, in bfloat16, from {sizes['original']} tokens, without "
        f"tuning. Perplexity of the last {sizes['last']} of {sizes['longest']} tokens of each "
        "text, the same in every column, after as much of the text before them as the column says. "
        "Searches see other texts than the table. Texts and their digests: "
        f"{texts}. Model: {content['model']}. Machine: {where}, "
        f"{machine['threads']} threads, torch {machine['torch']}; seed 0 where none is named. Made "
        "by `python examples/extend_smollm2/run.py`; results.json has the numbers behind it."
    )


if __name__ == "__main__":
    where = Path(sys.argv[1])
    write_page(json.loads((where / "results.json").read_text("utf-8")), where)
