"""The commands: what each is told, with its help, and what it does.

A field that is `Annotated` by Typer is an option, as in options.py; its default stands here alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..rope import FactorSet, Rope
from .compare import (
    legend,
    of_perplexity,
    of_retrieval,
    perplexity_cells,
    retrieval_cells,
)
from .descent import in_words
from .distributed import start_ranks
from .documents import Document, Encode, Encoder, encoder, read_documents, tails
from .extend import DONE, ExtendPlan, Extension, Watch
from .find import Options, find
from .fitness import Measured, Perplexity
from .model import TransformersLosses
from .needles import key_values
from .options import Given, Last, Machine, Out, Read, Stride, Upper, ascending, paths
from .ranks import is_main, sequence_group, shared_out
from .readjust import readjust
from .retrieval import KINDS, Retrieved, retrieval, room_for
from .source import (
    EVALUATION,
    Source,
    baselines,
    dynamic_ntk,
    fingerprint,
    load_model,
    open_source,
    read_json,
    write_config,
    write_json,
)
from .space import SearchSpace, critical_dimension

_LENGTHS = Read(list[int], ascending)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find factors for a longer context by LongRoPE's search.

    \b
    longrope search ~/models/llama --documents held-out.jsonl --length 32768 --out search-32k

    Candidates are judged by perplexity over the first documents, cut to the length. The result is
    in the folder: longrope.json (Rope.load), the model's config.json with the new factors,
    result.json, factors.png and history.png. evaluations.jsonl has every candidate. Several
    processes share the candidates: torchrun --nproc-per-node 8 --no-python longrope search ...
    With --context-parallel N, N of them share each sequence.
    """

    length: Annotated[int, typer.Option(min=2, help="Tokens to extend the model to.")]
    out: Out = Path("longrope-search")
    start: Annotated[
        Path | None,
        typer.Option(
            help="longrope.json of an earlier stage, or its folder; factors multiply its."
        ),
    ] = None
    start_length: Annotated[
        int | None, typer.Option(help="Tokens that stage was for; needed with --start.")
    ] = None
    critical: Annotated[
        int | None,
        typer.Option(min=0, help="LongRoPE2: search from this pair on; 0 takes the theory's."),
    ] = None
    given: Given
    options: Options

    def run(self) -> None:
        start_ranks()
        source, encode = _opened(self.given)
        options = replace(self.options, critical=self.critical)
        space = self._space(source)
        documents, losses = _measured(self.given, encode, self.length)
        with _bars() as watch:
            found = find(
                *(losses, documents, space, options, self.out),
                others=baselines(source, self.length),
                encode=encode,
                context={"weights": fingerprint(losses.model)},
                progress=watch("search", "search", 0),
                say=_say,
                sharing=self.given.context_parallel,
            )
        if is_main():
            best, one = found.best.candidate, found.rope.sets[0]
            rows = [[name, _number(value), ""] for name, value in found.others.items()]
            text = f"n_hat {best.n_hat}, attention {one.attention_factor:.4g}"
            rows.append(["LongRoPE", _number(found.best.fitness), text])
            header = [f"perplexity, {self.length} tokens", "", ""]
            note = write_config(source, found.rope, self.length, self.out)
            _tell(header, rows, self.out, note)
            if found.descent is not None:
                typer.echo(in_words(found.descent))

    def _space(self, source: Source) -> SearchSpace:
        stage, reached = source.stage, source.trained
        if self.start is not None:
            if self.start_length is None:
                raise ValueError("--start-length: expected the tokens that --start was for")
            earlier, reached = Rope.load(self.start), self.start_length
            one = earlier.sets[earlier.set_index(reached)]
            stage = Rope((FactorSet(one.factors),), earlier.base, earlier.interleaved)
        if self.length <= reached:
            raise ValueError(
                f"--length: expected more than the {reached} tokens that the model serves, got "
                f"{self.length}; longrope readjust is for shorter ones"
            )
        critical = self.critical
        if critical == 0:
            dim, of_rope = source.rope.rotary_dim, source.rope.base
            critical = critical_dimension(dim, of_rope, source.original) // 2
        ratio = None if stage is None else self.length / reached
        return self.options.space(
            *(source.rope, source.original, self.length),
            stage=stage,
            ratio=ratio,
            critical=critical,
        )


@dataclass(frozen=True, kw_only=True)
class Readjust:
    """Find factors for the short lengths of a model that was extended.

    \b
    longrope readjust extended --documents held-out.jsonl --length 4096 --length 8192

    Short sequences then take their own set, and long ones the set they had. A length whose search
    finds nothing better than before gets none. --attention fixed is here the attention factor of
    the set that served the length. Files as those of longrope search; each length has a folder.
    """

    lengths: Annotated[
        tuple[int, ...],
        typer.Option("--length", help="Tokens up to which a set is wanted; repeat for several."),
        _LENGTHS,
    ]
    rope: Annotated[
        Path | None, typer.Option(help="Rope JSON of the extended model. [default: the folder's]")
    ] = None
    out: Out = Path("longrope-readjust")
    upper: Upper = None
    given: Given
    options: Options

    def run(self) -> None:
        start_ranks()
        source, encode = _opened(self.given)
        present = source.rope if self.rope is None else Rope.load(self.rope)
        documents, losses = _measured(self.given, encode, max(self.lengths))
        with _bars() as watch:
            result = readjust(
                *(losses, documents, present, self.lengths, source.original),
                *(self.options, self.out),
                upper=self.upper,
                encode=encode,
                context={"weights": fingerprint(losses.model)},
                progress=watch("search", "readjust", 0),
                say=_say,
                sharing=self.given.context_parallel,
            )
        if is_main():
            rows = []
            for length, found in result.found.items():
                taken = "its own set" if length in result.taken else "as before"
                numbers = map(_number, (result.before[length], found.best.fitness))
                rows.append([str(length), *numbers, taken])
            note = write_config(source, result.rope, source.trained, self.out)
            _tell(["tokens", "before", "best found", "now"], rows, self.out, note)


@dataclass(frozen=True, kw_only=True)
class Extend:
    """Extend a model step by step: search, fine-tune, readjust.

    \b
    longrope extend ~/models/llama --documents held-out.jsonl --train books.jsonl \\
      --stage 131072:400 --stage 262144:600 --stage 2097152 --short 4096 --short 8192

    Each stage starts from the model and the factors of the one before. plan.json says what is done;
    each step has a folder with its result, and a finished one is not repeated. The folder model has
    the extended model: weights, tokenizer, longrope.json, config.json.
    """

    out: Out = Path("longrope-extend")
    plan: ExtendPlan
    machine: Machine

    def run(self) -> None:
        start_ranks()
        out, machine = self.out, self.machine
        extension = Extension(
            *(self.plan, out),
            device=machine.device,
            dtype=machine.dtype,
            sharing=machine.context_parallel,
        )
        with _bars() as watch:
            rope = extension.run(watch, _say)
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
        note = read_json(out / "model" / DONE)["config"]
        _tell(["step", "perplexity"], rows, out, note, out / "model")
        ends = [one.max_length for one in rope.sets]
        bounds = ("all longer" if end is None else f"to {end}" for end in ends)
        typer.echo(f"factor sets: {', '.join(bounds)}")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure perplexity at several lengths, under several ropes.

    \b
    longrope evaluate ~/models/llama --documents held-out.jsonl --rope search-32k \\
      --length 4096 --length 8192 --length 16384 --length 32768

    The same tokens are scored at every length, after more or less of the text that stands before
    them: the last ones of the documents' first --length, by default half of the shortest. The
    formulas extend to the longest. Prints tables; the folder gets evaluation.json and
    perplexity.png. Processes of torchrun share the measurements, with --context-parallel N each
    sequence among N of them.
    """

    lengths: Annotated[
        tuple[int, ...], typer.Option("--length", help="Tokens; repeat for several."), _LENGTHS
    ]
    ropes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--rope", help="Rope JSON, or a folder with one, to compare; repeat for several."
        ),
        Read(list[Path] | None, paths),
    ] = ()
    baselines: Annotated[
        bool, typer.Option(help="Compare with no scaling, PI, NTK, dynamic NTK and YaRN.")
    ] = True
    same_tokens: Annotated[
        bool,
        typer.Option(
            "--same-tokens/--same-start",
            help="Where documents are cut to each length: from their end, so that the same tokens "
            "are scored, or from their beginning, so that other tokens are.",
        ),
    ] = True
    retrieval: Annotated[
        bool,
        typer.Option(
            "--retrieval",
            help="Also the numbers it finds that are hidden at five depths, with one key in a "
            "text and with five: the share, and the loss of the answers.",
        ),
    ] = False
    out: Out = Path("longrope-evaluate")
    last: Last = None
    stride: Stride = None
    given: Given

    def run(self) -> None:
        from tqdm import tqdm

        start_ranks()
        source, encode = _opened(self.given)
        lengths, longest = self.lengths, self.lengths[-1]
        compare = self.baselines and longest > source.original
        methods = self._methods(source, baselines(source, longest) if compare else {})
        needles = key_values(encode) if self.retrieval else []
        room = room_for(needles) if self.retrieval else longest + 1
        if self.retrieval and room > longest:
            raise ValueError(f"--retrieval: expected a length of {room} tokens, got {longest}")
        documents, losses = _measured(self.given, encode, longest)
        last = self.last
        if self.same_tokens and last is None and self.stride is None and len(lengths) > 1:
            last = lengths[0] // 2
        wanted: list[tuple[int, str, Rope]] = []
        for length in lengths:
            dynamic = {"dynamic NTK": dynamic_ntk(source, length)} if compare else {}
            wanted += [(length, name, rope) for name, rope in (methods | dynamic).items()]

        def measure(one: tuple[int, str, Rope]) -> tuple[Measured, dict[str, Retrieved]]:
            length, _, rope = one
            texts = documents
            if self.same_tokens and self.stride is None:
                texts = tails(documents, longest, length, len(encode.start))
            fitness = Perplexity(losses, texts, length, last=last, stride=self.stride)
            value = fitness.measure([rope])[0]
            found = {
                kind: retrieval(losses, rope, hidden(documents, needles, length), length)
                for kind, hidden in (KINDS.items() if length >= room else ())
            }
            bar.update()
            return value, found

        shown: Any = {"desc": "evaluate", "unit": " measured", "disable": not is_main()}
        with tqdm(total=len(wanted), **shown) as bar:
            measured = shared_out(wanted, measure, self.given.context_parallel)
        if not is_main():
            return
        values: dict[str, dict[int, Measured]] = {}
        told: dict[str, dict[str, dict[int, Retrieved]]] = {kind: {} for kind in KINDS}
        for (length, name, _), (value, found) in zip(wanted, measured, strict=True):
            values.setdefault(name, {})[length] = value
            for kind, retrieved in found.items():
                told[kind].setdefault(name, {})[length] = retrieved
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "model": self.given.model,
            "documents": [document.name for document in documents],
            "last": last,
            "stride": self.stride,
            "same_tokens": self.same_tokens,
            "original": source.original,
            **of_perplexity(values),
            "retrieval": {kind: of_retrieval(rows) for kind, rows in told.items()}
            if self.retrieval
            else None,
        }
        write_json(self.out / EVALUATION, content)
        _draw(self.out)
        scored = "perplexity" if last is None else f"perplexity, last {last}"
        _table([scored, *map(str, lengths)], perplexity_cells(values))
        asked = [str(length) for length in lengths if length >= room]
        for kind, rows in told.items() if self.retrieval else ():
            _table([f"found, {kind}; loss", *asked], retrieval_cells(rows))
        typer.echo(legend(len(documents)))
        typer.echo(f"written: {self.out}/{EVALUATION}, perplexity.png")

    def _methods(self, source: Source, formulas: dict[str, Rope]) -> dict[str, Rope]:
        methods = {"the model's own": source.rope, **formulas}
        for path in map(Path, self.ropes):
            name = path.name if path.is_dir() else path.stem
            methods[str(path) if name in methods else name] = Rope.load(path)
        return methods


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the pictures of a folder again.

    \b
    longrope plot search-32k

    It may be that of a search that is still running. factors.png: lambda by pair, beside PI, NTK
    and YaRN; history.png: the best perplexity so far; perplexity.png: against length. Only those
    that the folder has the numbers for.
    """

    folder: Annotated[
        Path, typer.Argument(help="Of longrope search, readjust, extend or evaluate.")
    ]

    def run(self) -> None:
        _draw(self.folder)


# ------------------------------------------------------------------------------- a model, and texts


def _opened(given: Given) -> tuple[Source, Encoder]:
    source = open_source(Path(given.model), given.original)
    return source, encoder(given.tokenizer or given.model)


def _measured(
    given: Given, encode: Encode, length: int
) -> tuple[list[Document], TransformersLosses]:
    paths, short = [Path(path) for path in given.documents], given.skip_short
    documents = read_documents(
        paths, encode, length, most=given.samples, short="skip" if short else "error"
    )
    model = load_model(Path(given.model), given.device, given.dtype)
    return documents, TransformersLosses(model, group=sequence_group(given.context_parallel))


# --------------------------------------------------------------------------------- on the terminal


@contextmanager
def _bars() -> Iterator[Watch]:
    """A bar for each step, which goes where the next begins."""
    from tqdm import tqdm

    from .bar import SearchBar

    with ExitStack() as now:

        def watch(kind: str, name: str, total: int) -> Any:
            now.close()
            if kind == "search":
                return now.enter_context(SearchBar(name, quiet=not is_main())).show
            told = {"desc": name, "total": total or None, "unit": " steps"}
            bar = now.enter_context(tqdm(**told, dynamic_ncols=True, disable=not is_main()))

            def tuned(step: int, loss: float) -> None:
                bar.update(step - bar.n)
                bar.set_postfix_str(f"perplexity {_number(math.exp(min(loss, 700.0)))}")

            return tuned

        yield watch


def _say(line: str) -> None:
    """Above a bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _tell(
    header: list[str], rows: list[list[str]], out: Path, note: str | None, model: Path | None = None
) -> None:
    """The end of a command whose rope is in ``model``, or in ``out``: pictures, and what it did."""
    _draw(out)
    _table(header, rows)
    written = "longrope.json, config.json, pictures"
    if note is not None:
        written = f"longrope.json, pictures; no config.json: {note}"
    typer.echo(f"written: {model or out}: {written}")


def _draw(folder: Path) -> None:
    from .plots import draw_all

    draw_all(folder)


def _table(header: list[str], rows: list[list[str]]) -> None:
    """The first column to the left, the others to the right."""
    left, *widths = (max(map(len, column)) for column in zip(header, *rows, strict=True))
    for first, *rest in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(rest, widths, strict=True))
        typer.echo("  ".join([first.ljust(left), *cells]).rstrip())


def _number(value: float | str) -> str:
    return f"{float(value):.4g}"
