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

FORMULAS = ("no scaling", "PI", "NTK", "dynamic NTK", "YaRN")
BEST_YARN, SEARCH, READJUSTED = "YaRN, best attention factor", "LongRoPE", "LongRoPE, readjusted"
ROWS = (*FORMULAS, BEST_YARN, SEARCH, READJUSTED)
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
    parts = [_head(content), _missing(content), _table(content), _windows(content)]
    parts += [_searches(content), _seconds(content)]
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


def _windows(content: Mapping[str, Any]) -> str:
    middle = ", a window, "
    found = {key: value for key, value in content["results"].items() if middle in key}
    if not found:
        return ""
    (text,) = {key.split(middle)[1] for key in found}
    lines = [[key.split(middle)[0], f"{math.exp(value):.2f}"] for key, value in found.items()]
    target = content["sizes"]["target"]
    return (
        f"## By a short window at the positions of {target} tokens\n\n"
        "What a search judges most of its candidates by (`longrope search --coarse`): a piece of "
        f"{text}, a quarter as long, in two chunks whose positions lie at both ends.\n\n"
        + _markdown(["", "perplexity"], lines)
    )


def _missing(content: Mapping[str, Any]) -> str:
    """What of the table was not run, in a sentence."""
    sizes, rows = content["sizes"], _losses(content)
    cells = len(sizes["lengths"]) * len(sizes["judged"])
    done = sum(len(texts) for row in rows.values() for texts in row.values())
    searched = sum(key.startswith("search, ") for key in content["results"])
    if searched == len(sizes["seeds"]) and done == cells * (len(ROWS) - 1 + searched):
        return ""
    total = cells * (len(ROWS) - 1 + len(sizes["seeds"]))
    readjusted = "a" if "readjust" in content["results"] else "no"
    return (
        f"**Not all of it was run**: {done} of {total} cells of the table, {searched} of "
        f"{len(sizes['seeds'])} searches, {readjusted} readjustment. The same command goes on."
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
    head = ["", "seconds, beside whatever else the machine did", "commit"]
    return "## What was run\n\n" + _markdown(head, lines) if lines else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(content: Mapping[str, Any]) -> str:
    sizes, machine = content["sizes"], content["machine"]
    where = machine.get("gpu") or machine.get("cpu") or "a CPU"
    layers = ", in bfloat16"
    if sizes["layers"] is not None:
        layers = f", its first {sizes['layers']} layers alone, in float32"
    texts = ", ".join(f"{name} ({text})" for name, text in content["texts"].items())
    return (
        "# A pretrained model, extended\n\n"
        f"SmolLM2-135M-Instruct{layers}, from {sizes['original']} tokens, without "
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
