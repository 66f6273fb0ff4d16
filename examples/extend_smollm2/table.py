"""results.md and the picture, made from results.json alone: python table.py FOLDER."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims import claims
from page import markdown  # of examples/extend_tiny, where claims looks too
from rows import AGAIN, ASKED, N_HAT, ROW, ROWS, SEARCH, UNIFORM, WINDOW, losses

from longrope_kernels.search.compare import with_error
from longrope_kernels.search.plots import draw_perplexity
from longrope_kernels.search.retrieval import Retrieved


def write_page(content: dict[str, Any], folder: Path) -> None:
    """results.md from what `run.py` wrote."""
    (folder / "results.md").write_text(page(content), "utf-8")


def draw_page(content: dict[str, Any], folder: Path) -> None:
    """perplexity.png, which takes a second."""
    whole = {name: row for name, row in losses(content).items() if len(row) > 1}
    # Texts differ by more than ropes do: each point is of the same ones.
    cells = [set(of_texts) for row in whole.values() for of_texts in row.values()]
    common = set.intersection(*cells) if cells else set()
    rows = {
        name: {
            length: _perplexity({text: of_texts[text] for text in common})
            for length, of_texts in sorted(row.items())
        }
        for name, row in whole.items()
        if common
    }
    if rows:
        sizes = content["sizes"]
        title = f"Perplexity of the same {sizes['last']} tokens; made for {sizes['target']}"
        draw_perplexity(rows, folder / "perplexity.png", title, sizes["original"])


def page(content: dict[str, Any]) -> str:
    """The page, as Markdown."""
    parts = [_head(content), _missing(content), _table(content), claims(content)]
    parts += [_retrieval(content), _policies(content), _searches(content), _windows(content)]
    parts.append(_seconds(content))
    return "\n\n".join(part for part in parts if part) + "\n"


def _perplexity(of_texts: Mapping[str, float]) -> float:
    return math.exp(statistics.fmean(of_texts.values()))


def _table(content: Mapping[str, Any]) -> str:
    lengths = sorted(content["sizes"]["lengths"])
    kinds = content["sizes"]["judged"]
    rows = losses(content)
    lines = [
        [name, *(_cell(row.get(length), len(kinds)) for length in lengths)]
        for name, row in rows.items()
        if not name.startswith((UNIFORM, N_HAT))
    ]
    if not lines:
        return ""
    target = content["sizes"]["target"]
    return (
        f"## Perplexity by length, each row made for {target} tokens\n\n"
        + markdown(["", *(f"{length} tokens" for length in lengths)], lines)
        + "\n\nDynamic NTK is another rope at each length. After a perplexity of several texts "
        "stands the factor by which it is known, from the standard error over the texts; in "
        f"brackets, of how many of the {len(kinds)} texts it is. A cell without a number has not "
        "been run."
    )


def _windows(content: Mapping[str, Any]) -> str:
    results = content["results"]
    found = {key: match for key in results if (match := WINDOW.fullmatch(key))}
    if not found:
        return ""
    (text,) = {match["text"] for match in found.values()}
    lines = [[match["name"], f"{math.exp(results[key]):.2f}"] for key, match in found.items()]
    target = content["sizes"]["target"]
    return (
        f"## By a short window at the positions of {target} tokens\n\n"
        "What a search judges most of its candidates by (`longrope search --coarse`): a piece of "
        f"{text}, a quarter as long, in two chunks whose positions lie at both ends.\n\n"
        + markdown(["", "perplexity"], lines)
    )


def _missing(content: Mapping[str, Any]) -> str:
    """What of it all was not run, in a sentence."""
    sizes, rows, results = content["sizes"], losses(content), content["results"]
    named = (*ROWS, *(f"{SEARCH}, seed {seed}" for seed in sizes["seeds"][1:]))
    cells = len(named) * len(sizes["lengths"]) * len(sizes["judged"])
    done = sum(len(texts) for name in named for texts in rows.get(name, {}).values())
    searches = len(sizes["seeds"]) + 1
    searched = sum(key.startswith("search, ") for key in results)
    asked = 2 * len(sizes["lengths"]) * len(named)
    answered = sum(ASKED.fullmatch(key) is not None for key in results)
    if (done, searched, answered) == (cells, searches, asked) and "readjust" in results:
        return ""
    readjusted = "a" if "readjust" in results else "no"
    return (
        f"**Not all of it was run**: {done} of {cells} cells of the table, {searched} of {searches}"
        f" searches, {readjusted} readjustment, {answered} of {asked} cells of the retrieval. The "
        "same command goes on."
    )


def _retrieval(content: Mapping[str, Any]) -> str:
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for key, value in content["results"].items():
        if match := ASKED.fullmatch(key):
            found = Retrieved.from_json(value)
            share = with_error(100 * found.share, 100 * found.error)
            loss = with_error(found.measured.loss, found.measured.error)
            column = match["length"], match["kind"]
            cells.setdefault(match["name"], {})[column] = f"{share} %; {loss}"
    if not cells:
        return ""
    sizes = content["sizes"]
    columns = [
        (str(n), kind) for n in sorted(sizes["lengths"]) for kind in ("one key", "several keys")
    ]
    head = ["", *(f"{kind}, {length} tokens" for length, kind in columns)]
    lines = [[name, *(row.get(column, "") for column in columns)] for name, row in cells.items()]
    return (
        "## Numbers found that a text hides\n\n"
        + markdown(head, lines)
        + "\n\nThe share of answers that greedy decoding gives in full, and the loss of the "
        "answers' tokens, with standard errors over texts where there are several. One key: five "
        "texts with a statement each, at five depths; several keys: "
        f"{sizes['asked']} texts with five statements each, asked for all of them. As RULER's "
        "single and multi key tasks."
    )


def _policies(content: Mapping[str, Any]) -> str:
    found = content["results"].get("policies")
    if not found:
        return ""
    distances = list(next(iter(found.values())))
    lines = [[name, *(f"{row[d]:.3f}" for d in distances)] for name, row in found.items()]
    return (
        "## Where a sequence grows out of the short set\n\n"
        + markdown(["policy", *(f"tokens {d}" for d in distances)], lines)
        + "\n\nPerplexity of the tokens behind the crossing, by distance: with all keys under the "
        "long set from there on (switch), under the short set as before (pin), or prefilled again "
        "(recompute)."
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
                    str(found.get("judged", "")),
                    str(found["evaluations"]),
                    f"{found['seconds']:.0f}",
                    str(descent.get("formula", "")),
                    "" if change is None else f"{change - 1:.0%}",
                ]
            )
    if not lines:
        return ""
    head = ["", "perplexity, searched texts", "judged", "in full", "seconds", "descends from"]
    return "## Searches\n\n" + markdown([*head, "changed"], lines)


def _seconds(content: Mapping[str, Any]) -> str:
    """By row of the tables; results.json has each number's."""
    parts: dict[str, list[str]] = {}
    for key in content["seconds"]:
        match = ROW.fullmatch(key) or ASKED.fullmatch(key) or WINDOW.fullmatch(key)
        parts.setdefault(match["name"] if match else key, []).append(key)
    lines = [
        [
            name,
            str(len(keys)),
            f"{sum(content['seconds'][key] for key in keys):.0f}",
            ", ".join(dict.fromkeys(str(content["commits"].get(key)) for key in keys)),
            ", ".join(
                dict.fromkeys(
                    content["machines"][key] for key in keys if key in content["machines"]
                )
            ),
        ]
        for name, keys in parts.items()
    ]
    head = ["", "numbers", "seconds, beside whatever else the machine did", "commits", "machines"]
    if not lines:
        return ""
    sizes, note = content["sizes"], ""
    moved = [
        f"{key.removeprefix(AGAIN)}: "
        + ", ".join(f"{change:+.4f} at {length} tokens" for length, change in again.items())
        for key, again in content["results"].items()
        if key.startswith(AGAIN)
    ]
    if moved:
        note = (
            "\n\nWhere no machine is named it is that of the first paragraph. Others round "
            f"otherwise. The loss of YaRN on {sizes['judged'][0]} there: {'; '.join(moved)}."
        )
    return "## What was run\n\n" + markdown(head, lines) + note


def _head(content: Mapping[str, Any]) -> str:
    sizes, machine = content["sizes"], content["machine"]
    dtype = machine.get("dtype", sizes["dtype"])
    where = machine.get("gpu") or machine.get("cpu") or "a CPU"
    layers = "" if sizes["layers"] is None else f", its first {sizes['layers']} layers alone"
    texts = ", ".join(f"{name} ({text})" for name, text in content["texts"].items())
    return (
        "# A pretrained model, extended\n\n"
        f"SmolLM2-135M-Instruct{layers}, in {dtype}, from {sizes['original']} "
        f"tokens, without tuning. Perplexity of the last {sizes['last']} of {sizes['longest']} "
        "tokens of each text, the same in every column, after as much of the text before them as "
        "the column says. Searches see other texts than the table. Texts and their digests: "
        f"{texts}. Model: {content['model']}. Machine: {where}, "
        f"{machine['threads']} threads, torch {machine['torch']}; seed 0 where none is named. Made "
        "by `python examples/extend_smollm2/run.py`; results.json has the numbers behind it."
    )


if __name__ == "__main__":
    where = Path(sys.argv[1])
    results = json.loads((where / "results.json").read_text("utf-8"))
    write_page(results, where)
    draw_page(results, where)
