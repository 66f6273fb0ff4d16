"""The pictures of a search, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ..rope.files import SIDECAR
from ..rope.value import Rope
from .base import Iteration
from .descent import in_words
from .find import RESULT
from .source import EVALUATION, Source, baselines, read_json

# Colours that also differ in lightness (Okabe and Ito).
_STYLES = {
    "no scaling": {"color": "#999999", "linestyle": ":"},
    "PI": {"color": "#E69F00", "linestyle": "--"},
    "NTK": {"color": "#56B4E9", "linestyle": "--"},
    "dynamic NTK": {"color": "#009E73", "linestyle": "--"},
    "YaRN": {"color": "#D55E00", "linestyle": "--"},
}
_OTHERS = ("#0072B2", "#CC79A7", "#000000", "#8C564B", "#7F7F00")


def draw_all(folder: Path) -> None:
    """All pictures of a folder and those in it, from the files that have their numbers.

    Raises:
        ValueError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    names = (RESULT, EVALUATION, SIDECAR)
    inner = sorted({path.parent for name in names for path in folder.rglob(name)})
    for part in inner:
        if (part / EVALUATION).exists():
            _draw_evaluation(read_json(part / EVALUATION), part)
        content = read_json(part / RESULT) if (part / RESULT).exists() else {}
        if "space" in content:  # other programs call their files so too
            _draw_result(content, part)
        elif (part / SIDECAR).exists():
            draw_factors(Rope.load(part / SIDECAR), {}, part / "factors.png")
    if not inner:
        raise ValueError(
            f"{folder}: expected {RESULT}, {EVALUATION} or {SIDECAR}, or folders with them"
        )


def draw_factors(rope: Rope, others: Mapping[str, Rope], path: Path, title: str = "") -> None:
    """``lambda`` by pair of dimensions.

    Args:
        rope: each of its sets a line.
        others: formulas to compare with, one set each.
        path: of the PNG.
        title: of the picture.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, other in others.items():
        axes.plot(other.sets[0].factors, label=name, linewidth=1, **_STYLES.get(name, {}))
    colors = _cycle(len(rope.sets))
    for index, (factor_set, color) in enumerate(zip(rope.sets, colors, strict=True)):
        label = "LongRoPE" if len(rope.sets) == 1 else _set_label(rope, index)
        if factor_set.n_hat:
            label += f", n_hat {factor_set.n_hat}"
        axes.plot(factor_set.factors, label=label, color=color, marker=".", linewidth=1.6)
    axes.set(xlabel="pair of dimensions, from fast to slow", ylabel="lambda", yscale="log")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_perplexity(
    rows: Mapping[str, Mapping[int, float]], path: Path, title: str = "", trained: int | None = None
) -> None:
    """Perplexity against length, both logarithmic.

    Args:
        rows: for each method the perplexity by length in tokens.
        path: of the PNG.
        title: of the picture.
        trained: a length to mark with a line.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = iter(_cycle(len(rows)))
    for name, values in rows.items():
        style: Mapping[str, Any] = _STYLES.get(name) or {"color": next(colors)}
        lengths = sorted(values)
        axes.plot(lengths, [values[x] for x in lengths], label=name, marker=".", **style)
    if trained is not None:
        axes.axvline(trained, color="black", linewidth=0.8, linestyle=":")
    ticks = sorted({length for values in rows.values() for length in values})
    axes.set(xlabel="tokens", ylabel="perplexity", yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(length) for length in ticks])
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_history(
    history: Sequence[Iteration], others: Mapping[str, float], path: Path, title: str = ""
) -> None:
    """The best perplexity so far, and the median of each iteration, against iterations.

    Args:
        history: of a search.
        others: the perplexity of formulas, as level lines.
        path: of the PNG.
        title: of the picture.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    numbers = range(1, len(history) + 1)
    axes.plot(numbers, [one.best for one in history], label="best so far", color=_OTHERS[0])
    axes.plot(
        numbers, [one.median for one in history], ".", label="median of an iteration",
        color=_OTHERS[1],
    )  # fmt: skip
    for name, value in others.items():
        axes.axhline(value, label=name, linewidth=1, **_STYLES.get(name, {}))
    axes.set(xlabel="iteration", ylabel="perplexity", yscale="log")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    _save(figure, path)


def _draw_result(content: Mapping[str, Any], folder: Path) -> None:
    space, length, formulas = content["space"], content["length"], {}
    original = space["original_length"]
    if length > original:
        plain = Rope.plain(space["dim"], base=space["base"], interleaved=space["interleaved"])
        formulas = baselines(Source(Path(), {}, plain, original, original), length)
    title = f"{length} tokens, {content['judged']} candidates"
    if content["descent"] is not None:
        title += f"; {in_words(content['descent'])}"
    draw_factors(Rope.load(folder / SIDECAR), formulas, folder / "factors.png", title)
    history = [Iteration(float(best), float(median), 0, 0.0) for best, median in content["history"]]
    values = {name: float(value) for name, value in content["others"].items()}
    draw_history(history, values, folder / "history.png", title)


def _draw_evaluation(content: Mapping[str, Any], folder: Path) -> None:
    rows = {
        name: {int(n): float(value) for n, value in row.items()}
        for name, row in content["perplexity"].items()
    }
    title = f"{len(content['documents'])} documents"
    draw_perplexity(rows, folder / "perplexity.png", title, content["original"])


def _set_label(rope: Rope, index: int) -> str:
    bound = rope.sets[index].max_length
    return "longer" if bound is None else f"to {bound} tokens"


def _cycle(count: int) -> list[str]:
    return [_OTHERS[i % len(_OTHERS)] for i in range(count)]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
