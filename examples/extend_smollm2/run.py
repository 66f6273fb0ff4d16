"""Extend a pretrained model: SmolLM2-135M from 8192 tokens to 16384, without tuning.

    python examples/extend_smollm2/run.py --out extend-smollm2-output          # main table
    python examples/extend_smollm2/run.py --out extend-smollm2-output --full   # for a GPU
    python examples/extend_smollm2/run.py --out /tmp/small --small             # a check, minutes

It says beforehand what it will take: three hours on two cores. Stopped at any moment, the same
command goes on. The folder gets results.json, results.md and pictures; README.md beside this file
says what is in them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fetch import documents, model_folder
from table import BEST_YARN, FORMULAS, READJUSTED, SEARCH, write_page

from longrope_kernels import FactorSet, Rope
from longrope_kernels.search.documents import Document, tails
from longrope_kernels.search.find import Options, find
from longrope_kernels.search.fitness import Perplexity
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.readjust import readjust
from longrope_kernels.search.source import (
    baselines,
    digest,
    dynamic_ntk,
    fingerprint,
    load_model,
    open_source,
    read_json,
)

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples/extend_tiny")]
from book import Book  # noqa: E402
from report import facts  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """What is done, and how much of it."""

    original: int = 8192
    lengths: tuple[int, ...] = (4096, 8192, 16384)
    target: int = 16384  # what each row is made for
    last: int = 1024  # tokens that count in each text, the same at every length
    longest: int = 32768  # tokens of a text; their ends are what is measured
    searched: tuple[str, ...] = ("prose: Genesis",)
    judged: tuple[str, ...] = (
        "prose: Jeremiah",
        "drama: king-lear",
        "code: turtle.py",
        "prose: Isaiah",
        "drama: othello",
    )
    attentions: tuple[float, ...] = (1.0, 1.02, 1.04, 1.1)  # tried beside YaRN's own
    scored: int = 2048  # tokens that count in a search
    population: int = 32
    iterations: int = 6
    hours: float = 0.5  # of each search
    short_hours: float = 0.1  # of each readjustment
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int | None = None


FULL = Sizes(
    lengths=(4096, 8192, 16384, 32768),
    searched=("prose: Genesis", "drama: hamlet", "code: _pydecimal.py"),
    population=64,
    iterations=40,
    hours=8,
    short_hours=2,
    seeds=(0, 1, 2),
)
SMALL = Sizes(
    original=512,
    lengths=(256, 512, 1024),
    target=1024,
    last=64,
    scored=64,
    longest=1024,
    judged=("prose: Jeremiah", "code: turtle.py"),
    attentions=(1.0,),
    population=4,
    iterations=1,
    hours=1,
    short_hours=1,
    seeds=(0,),
    layers=4,
)


class Experiment:
    """One model, extended; what is in the book is not measured again."""

    def __init__(self, sizes: Sizes, out: Path) -> None:
        self.sizes, self.out = sizes, out
        folder = model_folder(out, sizes.layers)
        self.source = open_source(folder, sizes.original)
        self.searched = documents(out, sizes.searched, sizes.longest)
        self.judged = documents(out, sizes.judged, sizes.longest)
        # The check compares with a loop of its own, which rounding to bfloat16 would blur.
        self.model = load_model(folder, dtype="bfloat16" if sizes.layers is None else "float32")
        self.losses = TransformersLosses(self.model)
        texts = [*self.searched, *self.judged]
        head = {
            "machine": facts.describe(ROOT),
            "text": hashlib.sha256(digest(texts).encode()).hexdigest()[:16],
            "texts": {document.name: digest([document]) for document in texts},
            "model": fingerprint(self.model),
            "sizes": asdict(sizes),
        }
        self.book = Book(out / "results.json", head)

    # ---------------------------------------------------------------------------------------- plan

    def plan(self) -> None:
        """Time forwards of a part of the shortest length, and say what all will take."""
        seconds = self._seconds()
        rows = len(FORMULAS) + 2 + len(self.sizes.seeds)
        each = {n: seconds(n) for n in self.sizes.lengths}
        table = rows * len(self.judged) * sum(each.values())
        factors = len(self.sizes.attentions) * len(self.searched) * seconds(self.sizes.target)
        short = sum(n < self.sizes.target for n in self.sizes.lengths)
        searches = self.sizes.hours * len(self.sizes.seeds) + self.sizes.short_hours * short
        print("forward of one text, extrapolated:")
        for length, time_of_one in each.items():
            print(f"  {length:>6} tokens {time_of_one:7.0f} s")
        print(f"table, {rows} rows of {len(self.judged)} texts {table / 3600:6.2f} hours")
        print(f"attention factors of YaRN {factors / 3600:6.2f} hours")
        print(f"searches {searches:6.2f} hours, at most")
        done = sum(self.book.content["seconds"].values())
        total = (table + factors) / 3600 + searches
        print(f"in all {total:.1f} hours, of which {done / 3600:.1f} are done", flush=True)

    def _seconds(self) -> Callable[[int], float]:
        """Of a forward by its tokens: a share that grows with them, and one with their square."""
        short = self.sizes.lengths[0] // 8

        def make() -> list[float]:
            taken = []
            for length in (short, short, 2 * short):  # the first one loads and compiles
                begin = time.perf_counter()
                self._loss(self.source.rope, length, self.judged[0])
                taken.append(time.perf_counter() - begin)
            return taken[1:]

        one, two = self.book.get("plan", make)
        square = max(two - 2 * one, 0.0) / short**2 / 2
        line = one / short - square * short
        return lambda tokens: line * tokens + square * tokens**2

    # ---------------------------------------------------------------------------------------- rows

    def run(self) -> None:
        """All steps; the ones that say most come first."""
        lengths = sorted(self.sizes.lengths, key=lambda n: n != self.sizes.target)
        formulas = dict(self.formulas())
        first, *others = self.judged
        self.look(formulas, first)
        for length in lengths:
            for name in FORMULAS:
                self.measure(name, formulas.get(name), length, first)
        ropes = {BEST_YARN: self.best_yarn(formulas["YaRN"])}
        for seed in self.sizes.seeds:
            ropes[SEARCH if seed == 0 else f"{SEARCH}, seed {seed}"] = self.search(seed)
        ropes[READJUSTED] = self.readjusted(ropes[SEARCH])
        for document in (first, *others):
            for length in lengths:
                for name, rope in (formulas | ropes).items():
                    self.measure(name, rope, length, document)

    def formulas(self) -> Iterator[tuple[str, Rope | None]]:
        """By name, each for the target; None for dynamic NTK, another at each length."""
        found = baselines(self.source, self.sizes.target)
        yield from ((name, found.get(name)) for name in FORMULAS)

    def look(self, formulas: dict[str, Rope | None], document: Document) -> None:
        """Each formula by a short window at the positions of the target, which takes a minute."""
        options, target = self._options(self.sizes.hours, 0), self.sizes.target
        end = tails([document], self.sizes.longest, target)
        fitness = options.skipped(self.losses, end, target, None)
        assert fitness is not None
        for name, rope in formulas.items():
            one = rope or dynamic_ntk(self.source, target)
            key = f"{name}, a window, {document.name}"
            self.book.get(key, lambda one=one: math.log(fitness(one)))
            write_page(self.book.content, self.out)

    def measure(self, name: str, rope: Rope | None, length: int, document: Document) -> None:
        """The loss of the last tokens of a text, after as much of it as makes the length."""
        key = f"{name}, {length} tokens, {document.name}"
        self.book.get(
            key, lambda: self._loss(rope or dynamic_ntk(self.source, length), length, document)
        )
        write_page(self.book.content, self.out)

    def _loss(self, rope: Rope, length: int, document: Document) -> float:
        end = tails([document], self.sizes.longest, length)
        last = min(self.sizes.last, length // 2)
        return math.log(Perplexity(self.losses, end, length, last=last)(rope))

    # ------------------------------------------------------------------------------------ searches

    def best_yarn(self, yarn: Rope | None) -> Rope:
        """YaRN's factors with the attention factor that serves the searched texts best."""
        assert yarn is not None
        (one,) = yarn.sets
        target = self.sizes.target

        def with_attention(attention: float) -> Rope:
            return Rope((FactorSet(one.factors, attention_factor=attention),), yarn.base)

        tried = (float(one.attention_factor), *self.sizes.attentions)
        losses = {
            attention: self.book.get(
                f"YaRN, attention factor {attention:.4g}, searched texts",
                lambda attention=attention: sum(
                    self._loss(with_attention(attention), target, document)
                    for document in self.searched
                ),
            )
            for attention in tried
        }
        return with_attention(min(tried, key=lambda attention: losses[attention]))

    def search(self, seed: int) -> Rope:
        """LongRoPE's search at the target, coarse to fine."""
        folder = self.out / f"search-{seed}"
        target = self.sizes.target
        options = self._options(self.sizes.hours, seed)

        def make() -> dict[str, Any]:
            found = find(
                *(self.losses, self._ends(target)),
                options.space(self.source.rope, self.sizes.original, target),
                *(options, folder),
                others=baselines(self.source, target),
                context={"weights": fingerprint(self.model)},
                progress=_progress(folder.name),
                say=print,
            )
            kept = read_json(folder / "result.json")
            names = ("evaluations", "seconds", "correlation", "descent", "others")
            return {"fitness": found.best.fitness, **{name: kept[name] for name in names}}

        self.book.get(f"search, seed {seed}", make)
        return Rope.load(folder)

    def readjusted(self, rope: Rope) -> Rope:
        """That rope, with sets for shorter lengths where a search finds better ones."""
        folder = self.out / "readjust"
        lengths = [n for n in self.sizes.lengths if n < self.sizes.target]

        def make() -> dict[str, Any]:
            result = readjust(
                *(self.losses, self._ends(max(lengths)), rope, lengths, self.sizes.original),
                *(self._options(self.sizes.short_hours, 0), folder),
                context={"weights": fingerprint(self.model)},
                progress=_progress("readjust"),
                say=print,
            )
            result.rope.save(folder)
            return {"taken": list(result.taken), "before": result.before}

        self.book.get("readjust", make)
        return Rope.load(folder)

    def _options(self, hours: float, seed: int) -> Options:
        """At most the population and iterations, and at most the hours."""
        population = self.sizes.population
        return Options(
            population=population,
            iterations=self.sizes.iterations,
            mutants=population // 2,
            crossovers=population // 2,
            parents=population // 2,
            attention="searched",
            last=self.sizes.scored,
            hours=hours,
            seed=seed,
        )

    def _ends(self, length: int) -> list[Document]:
        return tails(self.searched, self.sizes.longest, length)


def _progress(name: str) -> Callable[[Any], None]:
    seen = 0

    def show(search: Any) -> None:
        nonlocal seen
        if search.evaluated > seen and search.best is not None:
            seen = search.evaluated
            print(f"{name}: {seen} evaluated, best {search.best.fitness:.4f}", flush=True)

    return show


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("extend-smollm2-output"))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="32k, three seeds, the paper's numbers")
    size.add_argument("--small", action="store_true", help="four layers; numbers say nothing")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = FULL if chosen.full else SMALL if chosen.small else Sizes()
    experiment = Experiment(sizes, chosen.out)
    experiment.plan()
    experiment.run()
    print(f"{chosen.out / 'results.md'} and the pictures beside it")


if __name__ == "__main__":
    main()
