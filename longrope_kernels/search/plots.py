"""The pictures of a search, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise ImportError(
        f"{__name__} needs matplotlib: pip install 'longrope-kernels[search]'"
    ) from error

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


def draw_all(folder: Path, say: Callable[[str], None]) -> None:
    """The pictures of a folder and of those in it, as `draw_folder`.

    Raises:
        ValueError: there is no such folder, or none has the numbers of a picture.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    inner = sorted({path.parent for name in _KINDS for path in folder.rglob(name)})
    drawn = [draw_folder(part, tuple(_KINDS), say) for part in inner]
    if not any(drawn):
        raise ValueError(
            f"{folder}: expected {RESULT}, {EVALUATION} or {SIDECAR} of a command, or folders with "
            "them"
        )


def draw_folder(folder: Path, names: Collection[str], say: Callable[[str], None]) -> bool:
    """The pictures of a folder, from the files that have their numbers; whether there were any.

    Args:
        folder: where the pictures go, too.
        names: of the files to look for; other programs call theirs so as well, which have none.
        say: told what can't be drawn: no picture is worth the error that ends a long search.
    """
    drawn: set[str] = set()
    for name, draw in _KINDS.items():
        path = folder / name
        shown = name == SIDECAR and RESULT in drawn
        if name not in names or shown or not path.exists():
            continue
        try:
            if draw(read_json(path), folder):
                drawn.add(name)
        except Exception as error:
            say(f"{path}: no picture of it: {type(error).__name__}: {error}")
    return bool(drawn)


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


def _draw_result(content: Mapping[str, Any], folder: Path) -> bool:
    if "space" not in content:
        return False
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
    return True


def _draw_evaluation(content: Mapping[str, Any], folder: Path) -> bool:
    if "perplexity" not in content:
        return False
    rows = {
        name: {int(n): float(value) for n, value in row.items()}
        for name, row in content["perplexity"].items()
    }
    title = f"{len(content['documents'])} documents"
    draw_perplexity(rows, folder / "perplexity.png", title, content["original"])
    return True


def _draw_rope(_: Mapping[str, Any], folder: Path) -> bool:
    draw_factors(Rope.load(folder), {}, folder / "factors.png")
    return True


# What draws a file, by its name. A rope alone is drawn where no result has.
_KINDS: dict[str, Callable[[Mapping[str, Any], Path], bool]] = {
    EVALUATION: _draw_evaluation,
    RESULT: _draw_result,
    SIDECAR: _draw_rope,
}


def _set_label(rope: Rope, index: int) -> str:
    bound = rope.sets[index].max_length
    return "longer" if bound is None else f"to {bound} tokens"


def _cycle(count: int) -> list[str]:
    return [_OTHERS[i % len(_OTHERS)] for i in range(count)]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
