"""results.md and the pictures, made from results.json alone."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope_kernels import FactorSet, Rope
from longrope_kernels.search.plots import draw_factors, draw_perplexity

FORMULAS = ("no scaling", "PI", "NTK", "dynamic NTK", "YaRN, attention factor 1", "YaRN")


def write_page(content: dict[str, Any], folder: Path) -> None:
    """results.md, perplexity.png and factors.png from what `run.py` wrote."""
    parts = [_head(content), *(f"## {title}\n\n{table}" for title, table in tables(content))]
    (folder / "results.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    _draw(content, folder)


def tables(content: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, table) of each part of the page; a part whose results are missing is left out."""
    page = _Page(content)
    return [(title, table) for title, make in page.parts if (table := make())]


def answers(content: dict[str, Any]) -> dict[str, str]:
    """What it says of each claim of the paper."""
    return {claim: answer for claim, *_, answer in _Page(content).lines()}


class _Page:
    def __init__(self, content: dict[str, Any]) -> None:
        self.results: dict[str, Any] = content["results"]
        sizes = content["sizes"]
        self.context: int = sizes["recipe"]["context"]
        self.near: int = self.context * sizes["ratio"]
        self.far: int = self.context * sizes["far"]
        self.lengths = [self.context, *(self.context * ratio for ratio in sizes["ratios"])]
        self.parts = [
            ("Without tuning, each made for the length", self.halves),
            ("The same, of the last bytes alone", self.at_length),
            (f"By length, all made for {self.near} bytes", self.by_length),
            ("Extended by the whole recipe", self.recipe),
            ("The claims of the paper", self.claims),
            (f"Searches at {self.near} bytes", self.searches),
            ("Keys remembered", self.memory),
            ("Where a sequence grows out of the short set", self.policies),
        ]

    def halves(self) -> str:
        """Of the second half of texts of each length, what the searches minimise on others."""
        rows = {name: self.results.get(f"second half: {name}", {}) for name in FORMULAS}
        searched = {
            str(n): self.results[f"second half: search: at {n}"]
            for n in self.lengths
            if f"second half: search: at {n}" in self.results
        }
        return _by_length({**rows, "LongRoPE, search only": searched}, self.lengths[1:])

    def at_length(self) -> str:
        rows = {name: self.results.get(f"at its length: {name}", {}) for name in FORMULAS}
        searched = {
            str(n): self.results[f"search: at {n}"]["perplexity"]
            for n in self.lengths
            if f"search: at {n}" in self.results
        }
        return _by_length({**rows, "LongRoPE, search only": searched}, self.lengths[1:])

    def by_length(self) -> str:
        return _by_length(self._curves((*FORMULAS, "LongRoPE, search only")), self.lengths)

    def recipe(self) -> str:
        far = self.far
        names = (
            "no scaling",
            "LongRoPE, search only",
            "LongRoPE, fine-tuned",
            "LongRoPE, fine-tuned, searched again",
            f"LongRoPE, to {far}",
            f"LongRoPE, to {far}, readjusted",
        )
        return _by_length(self._curves(names), self.lengths)

    def _curves(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: self.results.get(f"by length: {name}", {}) for name in names}

    def _half(self, name: str) -> float | None:
        found: float | None = self.results.get(f"second half: {name}")
        return found

    def _seeds(self, name: str) -> list[float]:
        """Of a search and of the same with other seeds."""
        pattern = re.compile(rf"second half: {re.escape(name)}(, seed \d+)?")
        return [value for key, value in self.results.items() if pattern.fullmatch(key)]

    def _short(self, name: str) -> list[float]:
        found = self.results.get(f"by length: {name}")
        return [] if found is None else [found[str(self.context)]]

    def lines(self) -> list[list[str]]:
        """Of the table of claims: the claim first, and the answer last."""
        near, far = self.near, self.far
        best = f"search: at {near}"
        uniform = self.results.get(f"uniform at {near}")
        claims = [
            (
                "non-uniform lambda beats uniform", f"at {near} bytes, without tuning",
                "the best uniform lambda", [] if uniform is None else [uniform["half"]],
                "LongRoPE's", self._seeds(best),
            ),
            (
                "n_hat helps without tuning", f"at {near} bytes",
                "n_hat 0", self._seeds(f"{best}, no n_hat"),
                "n_hat searched", self._seeds(best),
            ),
            (
                "direct search at the far length is worse than progressive", f"at {far} bytes",
                "searched at once, untuned", self._seeds(f"search: at {far}"),
                f"tuned at {near}, searched from there",
                self._seeds(f"search: at {far}, from {near}"),
            ),
            (
                "readjustment recovers the short lengths", f"at {self.context} bytes",
                "under the long set", self._short(f"LongRoPE, to {far}"),
                "readjusted", self._short(f"LongRoPE, to {far}, readjusted"),
            ),
            (
                "the monotone constraint", f"at {near} bytes, without tuning",
                "off", self._seeds(f"{best}, not monotone"),
                "on", self._seeds(best),
            ),
        ]  # fmt: skip
        return [
            [claim, where, f"{_spread(without)} ({a})", f"{_spread(with_)} ({b})",
             _answer(without, with_)]
            for claim, where, a, without, b, with_ in claims
            if without and with_
        ]  # fmt: skip

    def claims(self) -> str:
        lines = self.lines()
        return markdown(["claim", "where", "without", "with", "answer"], lines) if lines else ""

    def searches(self) -> str:
        prefix = f"search: at {self.near}"
        lines = []
        for name, found in self.results.items():
            if name != prefix and not name.startswith(f"{prefix}, "):
                continue
            (one,) = found["sets"]
            lines.append(
                [
                    name.removeprefix(prefix).removeprefix(", ") or "as in the table above",
                    f"{found['fitness']:.4f}",
                    f"{self._half(name) or float('nan'):.4f}",
                    f"{found['perplexity']:.4f}",
                    str(one["n_hat"]),
                    f"{one['attention_factor']:.2f}",
                    str(found["evaluations"]),
                    f"{found['seconds']:.0f}",
                ]
            )
        head = ["search", "its texts", "others", "their last bytes", "n_hat", "attention factor"]
        return markdown([*head, "evaluations", "seconds"], lines) if lines else ""

    def memory(self) -> str:
        found = self.results.get("memory", {})
        cells = {
            name: {n: f"{100 * one['accuracy']:.0f} % ({one['perplexity']:.2f})" for n, one in of}
            for name, of in ((name, row.items()) for name, row in found.items())
        }
        return _by_length(cells, self.lengths) if cells else ""

    def policies(self) -> str:
        found = self.results.get("policies")
        if not found:
            return ""
        distances = list(next(iter(found.values())))
        lines = [[name, *(f"{row[d]:.3f}" for d in distances)] for name, row in found.items()]
        return markdown(["policy", *(f"bytes {d}" for d in distances)], lines)


def _spread(values: Sequence[float]) -> str:
    """One number, or of several seeds the smallest and the largest."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if len(values) == 1 else f"{low} to {high}"


def _answer(without: Sequence[float], with_: Sequence[float]) -> str:
    """What seeds agree on; differences below half a percent are none."""
    if max(with_) * 1.005 < min(without):
        return "yes"
    if max(without) * 1.005 < min(with_):
        return "no, the reverse"
    if len(with_) == len(without) == 1:
        return "no difference"
    return "not decided: seeds differ by more"


def _by_length(rows: Mapping[str, Mapping[str, Any]], lengths: Sequence[int]) -> str:
    def cell(value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else f"{value:.3f}"

    lines = [[name, *(cell(row.get(str(n))) for n in lengths)] for name, row in rows.items() if row]
    return markdown(["", *(f"{n} bytes" for n in lengths)], lines) if lines else ""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(content: dict[str, Any]) -> str:
    sizes, machine = content["sizes"], content["machine"]
    recipe = sizes["recipe"]
    where = machine.get("gpu") or machine.get("cpu") or "a CPU"
    return (
        "# A small model, extended\n\n"
        f"A Llama over bytes: {recipe['layers']} layers, hidden size {recipe['hidden']}, "
        f"{recipe['heads']} heads, trained for {recipe['steps']} steps of {recipe['rows']} windows "
        f"of {recipe['context']} bytes of the Python standard library (text {content['text']}). "
        f"Perplexities are of {sizes['judged']} slices of files that no training and no search "
        "saw; lower is better. Without tuning, of the second half of each slice of that length, "
        f"which is what the searches minimise over {sizes['searched']} slices of other held-out "
        f"files. By length, and where it says so, of the last {sizes['last']} bytes alone, the "
        "same in every column, after as much of the text before them as the column says. "
        f"Fine-tuning: {sizes['tune_steps']} steps of {sizes['tune_rows']} windows. "
        f"Machine: {where}, torch {machine.get('torch')}; "
        f"{sum(content['seconds'].values()):.0f} seconds without the first training. "
        "Made by `python examples/extend_tiny/run.py`; results.json has the numbers behind it."
    )


def _draw(content: dict[str, Any], folder: Path) -> None:
    page = _Page(content)
    names = (
        *FORMULAS,
        "LongRoPE, search only",
        "LongRoPE, fine-tuned",
        f"LongRoPE, to {page.far}, readjusted",
    )
    rows = {
        name: {int(n): value for n, value in row.items()}
        for name, row in page._curves(names).items()
        if row
    }
    draw_perplexity(
        rows,
        folder / "perplexity.png",
        f"Perplexity of held-out bytes; formulas and search made for {page.near}",
        page.context,
    )
    best = content["results"].get(f"search: at {page.near}")
    if best is not None:
        sets = tuple(FactorSet(**{**s, "factors": tuple(s["factors"])}) for s in best["sets"])
        others = _formulas(len(sets[0].factors), page.near, page.context)
        title = f"Factors for {page.near} bytes, without tuning"
        draw_factors(Rope(sets, 10000.0), others, folder / "factors.png", title)


def _formulas(pairs: int, length: int, context: int) -> dict[str, Rope]:
    from longrope_kernels.rope import scaling

    ratio = length / context
    return {
        "PI": scaling.linear(2 * pairs, ratio),
        "NTK": scaling.ntk_aware(2 * pairs, ratio),
        "YaRN": scaling.yarn(2 * pairs, ratio, context),
    }


if __name__ == "__main__":
    where = Path(sys.argv[1])
    write_page(json.loads((where / "results.json").read_text("utf-8")), where)
