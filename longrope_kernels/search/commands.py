"""The commands: what each is told, with its help, and what it does.

A field that is `Annotated` by Typer is an option, as in options.py; its default stands here alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer

from ..rope import FactorSet, Rope
from ..rope.files import SIDECAR
from .budget import BUDGET
from .descent import in_words
from .distributed import start_ranks
from .extend import DONE, ExtendPlan, Extension
from .find import RESULT, find
from .options import LENGTHS, Given, Machine, Out, Upper
from .ranks import is_main
from .readjust import readjust
from .settings import Options
from .source import CONFIG, Source, baselines, identity, read_json, write_config
from .space import SearchSpace, critical_dimension
from .state import JOURNAL, STATE
from .terminal import bars, draw, number, say, table


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
        written = (SIDECAR, CONFIG, RESULT, JOURNAL, STATE, BUDGET)
        source, encode = self.given.open(self.out, written, ("--start", self.start))
        options = replace(self.options, critical=self.critical)
        space = self._space(source)
        documents, losses = self.given.measured(encode, self.length)
        with bars() as watch:
            found = find(
                *(losses, documents, space, options, self.out),
                others=baselines(source, self.length),
                encode=encode,
                context=identity(source, losses.model),
                progress=watch("search", "search", 0),
                say=say,
                sharing=self.given.context_parallel,
            )
        if is_main():
            best, one = found.best.candidate, found.rope.sets[0]
            rows = [[name, number(value), ""] for name, value in found.others.items()]
            text = f"n_hat {best.n_hat}, attention {one.attention_factor:.4g}"
            rows.append(["LongRoPE", number(found.best.fitness), text])
            header = [f"perplexity, {self.length} tokens", "", ""]
            note = write_config(source, found.rope, self.length, self.out)
            draw([self.out], RESULT, SIDECAR)
            _tell(header, rows, self.out, note)
            if found.descent is not None:
                typer.echo(in_words(found.descent))
            name, least = min(found.others.items(), key=itemgetter(1))
            if not found.best.fitness < least:
                typer.echo(f"found nothing better than {name}, which is a formula")

    def _space(self, source: Source) -> SearchSpace:
        stage, reached = source.stage, source.trained
        given = _rope_given("start", self.start, self.start_length)
        if given is not None:
            earlier, reached = given
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
        LENGTHS,
    ]
    rope: Annotated[
        Path | None, typer.Option(help="Rope JSON of the extended model. [default: the folder's]")
    ] = None
    rope_length: Annotated[
        int | None, typer.Option(help="Tokens that --rope is for; needed with it.")
    ] = None
    out: Out = Path("longrope-readjust")
    upper: Upper = None
    given: Given
    options: Options

    def run(self) -> None:
        start_ranks()
        written = (SIDECAR, CONFIG, *map(str, self.lengths))
        source, encode = self.given.open(self.out, written, ("--rope", self.rope))
        present, reached = source.rope, source.trained
        given = _rope_given("rope", self.rope, self.rope_length)
        if given is not None:
            present, reached = given
        if max(self.lengths) >= reached:
            raise ValueError(
                f"--length: expected less than the {reached} tokens that the rope is for, got "
                f"{max(self.lengths)}"
            )
        documents, losses = self.given.measured(encode, max(self.lengths))
        with bars() as watch:
            result = readjust(
                *(losses, documents, present, self.lengths, source.original),
                *(self.options, self.out),
                upper=self.upper,
                encode=encode,
                context=identity(source, losses.model),
                progress=watch("search", "readjust", 0),
                say=say,
                sharing=self.given.context_parallel,
            )
        if is_main():
            rows = []
            for length, found in result.found.items():
                taken = "its own set" if length in result.taken else "as before"
                numbers = map(number, (result.before[length], found.best.fitness))
                rows.append([str(length), *numbers, taken])
            note = write_config(source, result.rope, reached, self.out)
            draw([self.out], SIDECAR)
            draw((self.out / str(length) for length in self.lengths), RESULT, SIDECAR)
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
    shard: Annotated[
        bool,
        typer.Option(
            help="Processes of torchrun share the weights in fine-tuning (FSDP2), or each has all."
        ),
    ] = True
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
            shard=self.shard,
        )
        with bars() as watch:
            rope = extension.run(watch, say)
        if not is_main():
            return
        rows = []
        for step in self.plan.steps:
            content = read_json(out / step / DONE)
            if "perplexity" in content:
                rows.append([step, number(content["perplexity"])])
            for length, after in content.get("after", {}).items():
                was = number(content["before"][length])
                rows.append([f"{step}, {length}", f"{number(after)} (before {was})"])
            inner = (out / step / str(length) for length in self.plan.short)
            draw([out / step, *inner], RESULT, SIDECAR)
        _tell(["step", "perplexity"], rows, out / step, content["config"])
        ends = [one.max_length for one in rope.sets]
        bounds = ("all longer" if end is None else f"to {end}" for end in ends)
        typer.echo(f"factor sets: {', '.join(bounds)}")


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
        from .plots import draw_all

        draw_all(self.folder, say)


def _rope_given(name: str, rope: Path | None, length: int | None) -> tuple[Rope, int] | None:
    """What ``--name`` and ``--name-length`` say together; None where there is neither."""
    if rope is None and length is None:
        return None
    if rope is None:
        raise ValueError(f"--{name}-length: expected none without --{name}, got {length}")
    if length is None or length < 1:
        raise ValueError(f"--{name}-length: expected the tokens that --{name} is for, got {length}")
    return Rope.load(rope), length


def _tell(header: list[str], rows: list[list[str]], out: Path, note: str | None) -> None:
    """What a command did whose rope is in ``out``."""
    table(header, rows)
    written = "longrope.json, config.json, pictures"
    if note is not None:
        written = f"longrope.json, pictures; no config.json: {note}"
    typer.echo(f"written: {out}: {written}")
