"""Searches with and without the coarse fitness: what they find, and how many forwards they take.

    python examples/extend_tiny/coarse.py --out coarse-output
    python examples/extend_tiny/coarse.py --out coarse-output --ratio 32 --tokens 128 \\
        --ways "full length" "coarse first, a sixteenth"
    python examples/extend_tiny/coarse.py --out coarse-output --ways "full length" "windows first"

Stopped at any moment, the same command goes on. The folder gets coarse.json and coarse.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from base import Recipe
from judge import Judge
from run import Experiment, Sizes, rope_of

from longrope_kernels.search.coarse import Coarse
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.source import read_json, write_json

# Three layers, trained in half of the steps: there are six searches to do.
RECIPE = Recipe(hidden=192, layers=3, heads=3, rows=16, steps=1000)
FULL, FEW = "full length", "full length, 4 parents"
WAYS = {
    FULL: Coarse("off"),
    # As many parents as a search has that judges an eighth in full.
    FEW: Coarse("off"),
    "coarse first": Coarse(),
    # More in full than the default's eighth, and less.
    "coarse first, a quarter": Coarse(share=1 / 4),
    "coarse first, a sixteenth": Coarse(share=1 / 16),
}
# The same as of a model that can't keep unrotated keys.
WINDOWS = {
    f"windows {way.removeprefix('coarse ')}": one for way, one in WAYS.items() if one.mode != "off"
}
WAYS |= WINDOWS
TWO = (FULL, "coarse first")


class ByWindows(TransformersLosses):
    """Losses by which a search can't read the last tokens behind a prefix alone."""

    keeps = False


def compare(
    out: Path,
    ratio: int,
    seeds: Sequence[int],
    until: int = RECIPE.steps,
    ways: Sequence[str] = TWO,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Each search and what it took, in coarse.json as soon as it is done.

    ``tokens`` are what the coarse fitness judges by, None for its default.
    """
    experiment = Experiment(Sizes(recipe=RECIPE), out, until)
    length = experiment.context * ratio
    path = out / "coarse.json"
    known: dict[str, Any] = read_json(path) if path.exists() else {"searches": {}}
    known |= {
        "trained": until,
        "sizes": experiment.book.content["sizes"],
        "text": experiment.corpus.digest,
    }
    known["machine"] = experiment.book.content["machine"]
    yarn = f"YaRN at {length}"
    if yarn not in known["searches"]:
        known["searches"][yarn] = {"judged": experiment.judge.half(
            experiment.formulas(length)["YaRN"], length
        )}  # fmt: skip
    windows = Judge(experiment.model, experiment.judged, experiment.sizes.last)
    windows.losses = ByWindows(experiment.model)
    for seed in seeds:
        for way in ways:
            chosen = replace(WAYS[way], tokens=tokens)
            by = "" if tokens is None or chosen.mode == "off" else f" by {tokens} tokens"
            name = f"{way}{by} at {length}, seed {seed}"
            if name in known["searches"]:
                continue
            judge = windows if way in WINDOWS else experiment.judge
            fewer = {"parents": 4} if way == FEW else {}
            rope = experiment.search(name, length, judge, seed=seed, coarse=chosen, **fewer)
            kept = experiment.book.content["results"][f"search: {name}"]
            folder = out / name.replace(" ", "-")
            known["searches"][name] = {
                **_taken(folder),
                "judged": experiment.judge.half(rope, length),
                "length": length,
                "seed": seed,
                "way": way,
                "processor_seconds": kept["processor_seconds"],
                "commit": experiment.book.content["commits"][f"search: {name}"],
            }
            write_json(path, known)
            assert rope_of(kept) == rope
    return known


def _taken(folder: Path) -> dict[str, Any]:
    """Documents at the full length, windows, and their tokens, from the journal."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    result = read_json(folder / "result.json")
    windows = sum(len(row["details"]["losses"]) for row in rows if row["stage"] == "coarse")
    forwards = sum(len(row["details"]["losses"]) for row in rows if row["stage"] != "coarse")
    tokens = forwards * result["length"] + windows * (result["windows"] or {"tokens": 0})["tokens"]
    return {
        "fitness": result["best"]["fitness"],
        "candidates": result["judged"],
        "in full": result["evaluations"],
        "forwards": forwards,
        "windows": windows,
        "tokens": tokens,
        "correlation": result["correlation"],
        "coarse": result["coarse"],
        "descent": result["descent"],
        "attention": result["best"]["attention"],
    }


def page(known: dict[str, Any]) -> str:
    """The table, as Markdown."""
    head = [
        "search", "judged", "its texts", "candidates", "forwards at the full length",
        "million tokens", "processor seconds", "rank correlation", "descends from",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name, one in known["searches"].items():
        if "way" not in one:
            lines.append([name, f"{one['judged']:.4f}", *([""] * (len(head) - 2))])
            continue
        rho, origin = one["correlation"], one["descent"]
        lines.append([
            name,
            f"{one['judged']:.4f}",
            f"{one['fitness']:.4f}",
            str(one["candidates"]),
            str(one["forwards"]),
            f"{one['tokens'] / 1e6:.2f}",
            f"{one['processor_seconds']:.0f}",
            "" if rho is None else f"{rho:.2f}" + ("" if one["coarse"] else ", switched off"),
            "" if origin is None else f"{origin['formula']}, {origin['largest_change'] - 1:.0%}",
        ])  # fmt: skip
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    recipe = known["sizes"]["recipe"]
    return (
        "# Searches with and without the coarse fitness\n\n"
        f"A Llama over bytes of {recipe['layers']} layers of {recipe['hidden']}, trained for "
        f"{known['trained']} of {recipe['steps']} steps at {recipe['context']} bytes "
        '(`examples/extend_tiny/coarse.py`). "Judged" is the perplexity of the second half of '
        'texts that no search saw, "its texts" that of those it minimised. A forward is one '
        "document at the full length; races give candidates up after some of them, in both ways. "
        "Tokens are those of the coarse fitness too, without prefixes, which are read again where "
        "the best has moved. Processor seconds are of one thread, on a machine that did other "
        "work as well.\n\n"
        f"{table}\n"
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("coarse-output"))
    parser.add_argument("--ratio", type=int, default=8, help="target length over 256 bytes")
    parser.add_argument("--until", type=int, default=RECIPE.steps, help="step to end training at")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, help="that the coarse fitness judges by")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=TWO)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    known = compare(
        chosen.out, chosen.ratio, chosen.seeds, chosen.until, chosen.ways, chosen.tokens
    )
    (chosen.out / "coarse.md").write_text(page(known), "utf-8")
    print(chosen.out / "coarse.md")


if __name__ == "__main__":
    main()
