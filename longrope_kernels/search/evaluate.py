"""``longrope evaluate``: ropes beside one another, by length."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..rope import Rope
from .compare import legend, of_perplexity, of_retrieval, perplexity_cells, retrieval_cells
from .distributed import start_ranks
from .documents import Document, Encoder, tails
from .fitness import Measured, Perplexity
from .measurements import Measurements
from .model import TransformersLosses
from .needles import Needle, key_values
from .options import LENGTHS, Given, Last, Out, Read, Stride, paths
from .ranks import is_main, shared_out
from .readjust import as_json
from .retrieval import KINDS, Retrieved, retrieval, room_for
from .source import (
    EVALUATION,
    Source,
    baselines,
    digest,
    dynamic_ntk,
    identity,
    write_json,
)
from .terminal import draw, table

DYNAMIC = "dynamic NTK"  # another at each length


class _Found(NamedTuple):
    """What was measured, by rope and length; of retrieval by kind of text before."""

    perplexity: dict[str, dict[int, Measured]]
    retrieval: dict[str, dict[str, dict[int, Retrieved]]]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure perplexity at several lengths, under several ropes.

    \b
    longrope evaluate ~/models/llama --documents held-out.jsonl --rope search-32k \\
      --length 4096 --length 8192 --length 16384 --length 32768

    The same tokens are scored at every length, after more or less of the text that stands before
    them: the last ones of the documents' first --length, by default half of the shortest, and with
    one length all of it. The formulas extend to the longest. Prints tables; the folder gets
    evaluation.json and perplexity.png. Processes of torchrun share the measurements, with
    --context-parallel N each sequence among N of them.
    """

    lengths: Annotated[
        tuple[int, ...], typer.Option("--length", help="Tokens; repeat for several."), LENGTHS
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
        start_ranks()
        source, encode = self.given.open(
            self.out, (EVALUATION,), *(("--rope", path) for path in self.ropes)
        )
        ropes = self._ropes(source)
        needles = self._needles(encode)
        documents, losses = self.given.measured(encode, self.lengths[-1])
        found = self._measure(source, ropes, documents, losses, needles, len(encode.start))
        if is_main():
            self._write(found, documents, source)
            self._print(found, len(documents))

    @property
    def _scored(self) -> int | None:
        """How many of the last tokens."""
        if self.same_tokens and self.last is None and self.stride is None and len(self.lengths) > 1:
            return self.lengths[0] // 2
        return self.last

    def _ropes(self, source: Source) -> list[tuple[int, str, Rope]]:
        """By length and name."""
        longest = self.lengths[-1]
        compare = self.baselines and longest > source.original
        every = {"the model's own": source.rope, **(baselines(source, longest) if compare else {})}
        for path in map(Path, self.ropes):
            name = path.name if path.is_dir() else path.stem
            more = (f"{path} ({again})" for again in itertools.count(2))
            free = (n for n in itertools.chain((name, str(path)), more) if n not in every)
            every[next(n for n in free if n != DYNAMIC)] = Rope.load(path)
        ropes = []
        for length in self.lengths:
            dynamic = {DYNAMIC: dynamic_ntk(source, length)} if compare else {}
            ropes += [(length, name, rope) for name, rope in (every | dynamic).items()]
        return ropes

    def _needles(self, encode: Encoder) -> list[Needle]:
        """To be hidden; none where nobody asks."""
        if not self.retrieval:
            return []
        needles, longest = key_values(encode), self.lengths[-1]
        room = room_for(needles)
        if room > longest:
            raise ValueError(f"--retrieval: expected a length of {room} tokens, got {longest}")
        return needles

    def _measure(
        self,
        source: Source,
        ropes: Sequence[tuple[int, str, Rope]],
        documents: Sequence[Document],
        losses: TransformersLosses,
        needles: Sequence[Needle],
        start: int,
    ) -> _Found:
        """Shared by the processes; start: how many tokens begin each document."""
        from tqdm import tqdm

        decides: dict[str, Any] = {
            **identity(source, losses.model),
            "documents": digest(documents),
            "needles": needles,
            **{"longest": self.lengths[-1], "start": start, "same_tokens": self.same_tokens},
            **{"last": self._scored, "stride": self.stride},
        }
        known = Measurements(self.out, decides)

        def measure(one: tuple[int, str, Rope]) -> tuple[Measured, dict[str, Retrieved]]:
            length, _, rope = one
            which = {"rope": [rope.base, rope.interleaved, *as_json(rope)], "length": length}
            value = known.get(which, lambda: _as_json(*fresh(length, rope)))
            bar.update()
            return _from_json(value)

        def fresh(length: int, rope: Rope) -> tuple[Measured, dict[str, Retrieved]]:
            texts = documents
            if self.same_tokens and self.stride is None:
                texts = tails(documents, self.lengths[-1], length, start)
            fitness = Perplexity(losses, texts, length, last=self._scored, stride=self.stride)
            value = fitness.measure([rope])[0]
            found = {
                kind: retrieval(losses, rope, hidden(documents, needles, length), length)
                for kind, hidden in KINDS.items()
                if needles and length >= room_for(needles)
            }
            return value, found

        shown: Any = {"desc": "evaluate", "unit": " measured", "disable": not is_main()}
        with tqdm(total=len(ropes), **shown) as bar:
            measured = shared_out(ropes, measure, self.given.context_parallel)
        found = _Found({}, {})
        for (length, name, _), (value, told) in zip(ropes, measured, strict=True):
            found.perplexity.setdefault(name, {})[length] = value
            for kind, retrieved in told.items():
                found.retrieval.setdefault(kind, {}).setdefault(name, {})[length] = retrieved
        return found

    def _write(self, found: _Found, documents: Sequence[Document], source: Source) -> None:
        """evaluation.json and perplexity.png."""
        retrieved = {kind: of_retrieval(rows) for kind, rows in found.retrieval.items()}
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "model": self.given.model,
            "documents": [document.name for document in documents],
            "last": self._scored,
            "stride": self.stride,
            "same_tokens": self.same_tokens,
            "original": source.original,
            **of_perplexity(found.perplexity),
            "retrieval": retrieved if self.retrieval else None,
        }
        write_json(self.out / EVALUATION, content)
        draw([self.out], EVALUATION)

    def _print(self, found: _Found, documents: int) -> None:
        scored = "perplexity" if self._scored is None else f"perplexity, last {self._scored}"
        table([scored, *map(str, self.lengths)], perplexity_cells(found.perplexity))
        for kind, rows in found.retrieval.items():
            lengths = next(iter(rows.values()))
            table([f"found, {kind}; loss", *map(str, lengths)], retrieval_cells(rows))
        typer.echo(legend(documents))
        typer.echo(f"written: {self.out}/{EVALUATION}, perplexity.png")


def _as_json(value: Measured, retrieved: Mapping[str, Retrieved]) -> dict[str, Any]:
    told = {kind: one.as_json() for kind, one in retrieved.items()}
    return {**value._asdict(), "retrieval": told}


def _from_json(content: Mapping[str, Any]) -> tuple[Measured, dict[str, Retrieved]]:
    told = {kind: Retrieved.from_json(one) for kind, one in content["retrieval"].items()}
    return Measured.from_json(content), told
