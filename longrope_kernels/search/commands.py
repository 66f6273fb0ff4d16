"""What the commands do: files in, a table on the terminal, and files out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from ..rope import FactorSet, Rope, scaling
from ..rope.files import SIDECAR
from . import arguments, plots
from .base import Iteration, Search
from .distributed import start_ranks
from .documents import Document, Encode, encoder, read_documents
from .extend import DONE, Extension
from .find import NEEDLES, RESULT, Options, find
from .fitness import Perplexity, pass_key, passkey_accuracy
from .model import TransformersLosses
from .options import Given
from .ranks import is_main
from .readjust import readjust as readjusted
from .source import (
    Source,
    baselines,
    fingerprint,
    load_model,
    open_source,
    read_json,
    write_config,
    write_json,
)
from .space import SearchSpace, critical_dimension

EVALUATION = "evaluation.json"


# -------------------------------------------------------------------------------------- search


def search(told: arguments.Search) -> None:
    """``longrope search``."""
    start_ranks()
    source, encode = _opened(told.given)
    options = replace(told.options, critical=told.critical)
    space = _space(source, told, options)
    documents, losses = _measured(told.given, encode, told.length)
    with _bars() as watch:
        found = find(
            losses,
            documents,
            space,
            options,
            told.out,
            others=baselines(source, told.length),
            encode=encode,
            context={"weights": fingerprint(losses.model)},
            progress=watch("search", "search", 0),
        )
    if not is_main():
        return
    note = write_config(source, found.rope, told.length, told.out)
    _plot(told.out)
    best, one = found.best.candidate, found.rope.sets[0]
    rows = [[name, _number(value), ""] for name, value in found.others.items()]
    text = f"n_hat {best.n_hat}, attention {one.attention_factor:.4g}"
    rows.append(["LongRoPE", _number(found.best.fitness), text])
    _table([f"perplexity, {told.length} tokens", "", ""], rows)
    _tell_written(told.out, note)


def _opened(given: Given) -> tuple[Source, Encode]:
    source = open_source(Path(given.model), given.original)
    return source, encoder(given.tokenizer or given.model)


def _measured(
    given: Given, encode: Encode, length: int
) -> tuple[list[Document], TransformersLosses]:
    paths, short = [Path(path) for path in given.documents], given.skip_short
    documents = read_documents(
        paths, encode, length, most=given.samples, short="skip" if short else "error"
    )
    return documents, TransformersLosses(load_model(Path(given.model), given.device, given.dtype))


def _space(source: Source, told: arguments.Search, options: Options) -> SearchSpace:
    stage, reached = source.stage, source.trained
    if told.start is not None:
        if told.start_length is None:
            raise ValueError("--start-length: expected the tokens that --start was for")
        earlier, reached = Rope.load(told.start), told.start_length
        one = earlier.sets[earlier.set_index(reached)]
        stage = Rope((FactorSet(one.factors),), earlier.base, earlier.interleaved)
    if told.length <= reached:
        raise ValueError(
            f"--length: expected more than the {reached} tokens that the model serves, got "
            f"{told.length}; longrope readjust is for shorter ones"
        )
    critical = options.critical
    if critical == 0:
        dim, base = source.rope.rotary_dim, source.rope.base
        critical = critical_dimension(dim, base, source.original) // 2
    ratio = None if stage is None else told.length / reached
    chosen = {"stage": stage, "ratio": ratio, "critical": critical}
    return options.space(source.rope, source.original, told.length, **chosen)


# ------------------------------------------------------------------------------------- readjust


def readjust(told: arguments.Readjust) -> None:
    """``longrope readjust``."""
    start_ranks()
    source, encode = _opened(told.given)
    present = source.rope if told.rope is None else Rope.load(told.rope)
    documents, losses = _measured(told.given, encode, max(told.lengths))
    with _bars() as watch:
        result = readjusted(
            losses,
            documents,
            present,
            told.lengths,
            source.original,
            told.options,
            told.out,
            upper=told.upper,
            encode=encode,
            context={"weights": fingerprint(losses.model)},
            progress=watch("search", "readjust", 0),
        )
    out = told.out
    if not is_main():
        return
    note = write_config(source, result.rope, source.trained, out)
    _plot(out)
    rows = []
    for length, found in result.found.items():
        taken = "its own set" if length in result.taken else "as before"
        numbers = (_number(x) for x in (result.before[length], found.best.fitness))
        rows.append([str(length), *numbers, taken])
    _table(["tokens", "before", "best found", "now"], rows)
    _tell_written(out, note)


# --------------------------------------------------------------------------------------- extend


def extend(told: arguments.Extend) -> None:
    """``longrope extend``."""
    start_ranks()
    out = told.out
    extension = Extension(told.plan, out, device=told.machine.device, dtype=told.machine.dtype)
    with _bars() as watch:
        rope = extension.run(watch, lambda line: typer.echo(line, err=True))
    if not is_main():
        return
    rows = []
    for folder in sorted(out.glob("[0-9]*-*"), key=lambda path: int(path.name.split("-")[0])):
        content = read_json(folder / DONE)
        if "perplexity" in content:
            rows.append([folder.name, _number(content["perplexity"])])
        for length, after in content.get("after", {}).items():
            was = _number(content["before"][length])
            rows.append([f"{folder.name}, {length}", f"{_number(after)} (before {was})"])
    _table(["step", "perplexity"], rows)
    _plot(out)
    note = read_json(out / "model" / DONE)["config"]
    _tell_written(out / "model", note)
    sets = ", ".join(_bound(factor_set) for factor_set in rope.sets)
    typer.echo(f"factor sets: {sets}")


# ------------------------------------------------------------------------------------- evaluate


def evaluate(told: arguments.Evaluate) -> None:
    """``longrope evaluate``."""
    lengths, passkey, out = told.lengths, told.passkey, told.out
    source, encode = _opened(told.given)
    longest = lengths[-1]
    compare = told.baselines and longest > source.original
    methods = {"the model's own": source.rope}
    if compare:
        methods |= baselines(source, longest)
    for path in map(Path, told.ropes):
        name = path.name if path.is_dir() else path.stem
        methods[str(path) if name in methods else name] = Rope.load(path)
    needles = [pass_key(encode, number) for number in NEEDLES] if passkey else []
    longest_needle = max((sum(map(len, needle)) for needle in needles), default=longest + 1)
    if passkey and longest_needle > longest:
        raise ValueError(f"--passkey: expected a length of {longest_needle} tokens, got {longest}")
    documents, losses = _measured(told.given, encode, longest)
    names = [*methods, *(["dynamic NTK"] if compare else [])]
    values: dict[str, dict[int, float]] = {name: {} for name in names}
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    with tqdm(total=len(names) * len(lengths), desc="evaluate", unit=" measured") as bar:
        for length in lengths:
            fitness = Perplexity(losses, documents, length, last=told.last, stride=told.stride)
            for name in names:
                rope = methods[name] if name in methods else _dynamic(source, length)
                values[name][length] = fitness(rope)
                if length >= longest_needle:
                    found[name][length] = passkey_accuracy(losses, rope, documents, needles, length)
                bar.update()
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": told.given.model,
        "documents": [document.name for document in documents],
        "last": told.last,
        "stride": told.stride,
        "original": source.original,
        "perplexity": _by_text(values),
        "passkey": _by_text(found) if passkey else None,
    }
    write_json(out / EVALUATION, content)
    _plot(out)
    header = ["perplexity", *map(str, lengths)]
    _table(header, [[name, *map(_number, row.values())] for name, row in values.items()])
    if passkey:
        asked = [length for length in lengths if length >= longest_needle]
        rows = [[name, *(f"{x:.0%}" for x in row.values())] for name, row in found.items()]
        _table(["pass keys found", *map(str, asked)], rows)
    typer.echo(f"written: {out}/{EVALUATION}, perplexity.png")


def _dynamic(source: Source, length: int) -> Rope:
    """The common use: no scaling up to the original length, then by the length alone."""
    return scaling.dynamic_ntk(
        source.rope.rotary_dim,
        1.0,
        source.original,
        length,
        base=source.rope.base,
        interleaved=source.rope.interleaved,
    )


def _by_text(values: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {name: {str(n): value for n, value in row.items()} for name, row in values.items()}


# ----------------------------------------------------------------------------------------- plot


def plot(told: arguments.Plot) -> None:
    """``longrope plot``."""
    _plot(told.folder)


def _plot(folder: Path) -> None:
    """All pictures of a folder and those in it, from the files that have their numbers."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    names = (RESULT, EVALUATION, SIDECAR)
    inner = sorted({path.parent for name in names for path in folder.rglob(name)})
    for part in inner:
        if (part / EVALUATION).exists():
            _draw_evaluation(read_json(part / EVALUATION), part)
        if (part / RESULT).exists():
            _draw_result(read_json(part / RESULT), part)
        elif (part / SIDECAR).exists():
            plots.draw_factors(Rope.load(part / SIDECAR), {}, part / "factors.png")
    if not inner:
        raise ValueError(
            f"{folder}: expected {RESULT}, {EVALUATION} or {SIDECAR}, or folders with them"
        )


def _draw_result(content: Mapping[str, Any], folder: Path) -> None:
    space, length, formulas = content["space"], content["length"], {}
    original = space["original_length"]
    if length > original:
        plain = Rope.plain(space["dim"], base=space["base"], interleaved=space["interleaved"])
        formulas = baselines(Source(Path(), {}, plain, original, original), length)
    title = f"{length} tokens, {content['evaluations']} candidates"
    plots.draw_factors(Rope.load(folder / SIDECAR), formulas, folder / "factors.png", title)
    history = [Iteration(float(best), float(median), 0, 0.0) for best, median in content["history"]]
    values = {name: float(value) for name, value in content["others"].items()}
    plots.draw_history(history, values, folder / "history.png", title)


def _draw_evaluation(content: Mapping[str, Any], folder: Path) -> None:
    rows = {
        name: {int(n): float(value) for n, value in row.items()}
        for name, row in content["perplexity"].items()
    }
    title = f"{len(content['documents'])} documents"
    plots.draw_perplexity(rows, folder / "perplexity.png", title, content["original"])


# --------------------------------------------------------------------------- on the terminal


@contextmanager
def _bars() -> Iterator[Any]:
    """`extend.Watch`: a bar for each step."""
    open_bars: list[tqdm[Any]] = []

    def watch(kind: str, name: str, total: int) -> Any:
        for bar in open_bars:
            bar.close()
        open_bars.clear()
        unit = " candidates" if kind == "search" else " steps"
        quiet = not is_main()
        bar = tqdm(desc=name, total=total or None, unit=unit, dynamic_ncols=True, disable=quiet)
        open_bars.append(bar)

        def searched(now: Search) -> None:
            if now.evaluated < bar.n:
                bar.reset()
            bar.total = now.total
            bar.update(now.evaluated - bar.n)
            if now.best is not None:
                bar.set_postfix_str(f"best perplexity {_number(now.best.fitness)}")

        def tuned(step: int, loss: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"perplexity {_number(math.exp(min(loss, 700.0)))}")

        return searched if kind == "search" else tuned

    try:
        yield watch
    finally:
        for bar in open_bars:
            bar.close()


def _tell_written(folder: Path, note: str | None) -> None:
    if note is None:
        typer.echo(f"written: {folder}: longrope.json, config.json, pictures")
    else:
        typer.echo(f"written: {folder}: longrope.json, pictures; no config.json: {note}")


def _table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *rest = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        typer.echo("  ".join([first, *rest]).rstrip())


def _number(value: float | str) -> str:
    return f"{float(value):.4g}"


def _bound(factor_set: FactorSet) -> str:
    bound = factor_set.max_length
    return "all longer" if bound is None else f"to {bound}"
