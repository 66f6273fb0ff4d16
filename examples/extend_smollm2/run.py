"""Extend a pretrained model: SmolLM2-135M from 8192 tokens to 16384, without tuning.

    python examples/extend_smollm2/run.py --out extend-smollm2-output          # main table
    python examples/extend_smollm2/run.py --out extend-smollm2-output --full   # for a GPU
    python examples/extend_smollm2/run.py --out /tmp/small --small             # a check, minutes

It says beforehand what it will take. Stopped at any moment, the same command goes on. The folder
gets results.json, results.md and pictures; README.md beside this file says what is in them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fetch import documents, model_folder
from rows import (
    AGAIN,
    BEST_YARN,
    FORMULAS,
    LONGER,
    N_HAT,
    NEEDLES,
    READJUSTED,
    SEARCH,
    UNIFORM,
)
from sizes import FULL, SMALL, Sizes
from table import draw_page, write_page

from longrope_kernels import FactorSet, Rope
from longrope_kernels.search.coarse import Coarse
from longrope_kernels.search.documents import Document, encoder, tails
from longrope_kernels.search.find import Options, find
from longrope_kernels.search.fitness import Perplexity
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import key_values
from longrope_kernels.search.readjust import readjust
from longrope_kernels.search.retrieval import retrieval, several_keys, single_key
from longrope_kernels.search.skipped import SkippedPerplexity
from longrope_kernels.search.source import (
    baselines,
    digest,
    dynamic_ntk,
    fingerprint,
    load_model,
    open_source,
    read_json,
)
from longrope_kernels.search.space import critical_dimension

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples/extend_tiny")]
from book import Book  # noqa: E402
from judge import policies  # noqa: E402
from report import facts  # noqa: E402

Ropes = Mapping[str, Rope | None]  # by name; None for dynamic NTK, another at each length


class Experiment:
    """One model, extended; what is in the book is not measured again."""

    def __init__(self, sizes: Sizes, out: Path, dtype: str | None = None) -> None:
        """What it will do, and where; in another dtype than that of the sizes."""
        self.sizes, self.out = sizes, out
        folder = model_folder(out, sizes.layers)
        self.source = open_source(folder, sizes.original)
        self.encode = encoder(str(folder))
        self.searched = documents(out, sizes.searched, sizes.longest)
        self.judged = documents(out, sizes.judged, sizes.longest)
        self.model = load_model(folder, dtype=dtype or sizes.dtype)
        machine = facts.describe(ROOT)
        if dtype not in (None, sizes.dtype):
            machine["dtype"] = dtype
        texts = [*self.searched, *self.judged]
        head = {
            "machine": machine,
            "text": hashlib.sha256(digest(texts).encode()).hexdigest()[:16],
            "texts": {document.name: digest([document]) for document in texts},
            "model": fingerprint(self.model),
            "sizes": asdict(sizes),
        }
        self.book = Book(out / "results.json", head)
        self.known: dict[Hashable, Any] = {}  # by rope, length and what was measured

    @property
    def losses(self) -> TransformersLosses:
        """Those of the tables, by one backend on every machine, since others round otherwise."""
        return TransformersLosses(self.model, backend="composed")

    @property
    def fastest(self) -> TransformersLosses:
        """Those of a search."""
        return TransformersLosses(self.model)

    # ---------------------------------------------------------------------------------------- plan

    def plan(self) -> None:
        """Time forwards of a part of the shortest length, and say what all will take."""
        sizes, seconds = self.sizes, self._seconds()
        each = {n: seconds(n) for n in sizes.lengths}
        rows = len(FORMULAS) + 3 + len(sizes.seeds)
        variants = len(sizes.attentions) * len(self.searched)
        variants += (len(sizes.uniform) + len(sizes.n_hats)) * len(self.judged)
        asked = sum(each.values()) * (sizes.asked + 5)
        short = sum(n < sizes.target for n in sizes.lengths)
        parts = {
            f"table, {rows} rows of {len(self.judged)} texts": (
                rows * len(self.judged) * sum(each.values())
            ),
            "uniform factors, thresholds, YaRN's attention": variants * seconds(sizes.target),
            "retrieval": rows * asked,
            "searches, at most": 3600 * sizes.hours * (len(sizes.seeds) + 1),
            "readjustments, at most": 3600 * sizes.short_hours * short,
        }
        print("forward of one text, extrapolated:")
        for length, time_of_one in each.items():
            print(f"  {length:>6} tokens {time_of_one:7.0f} s")
        for name, taken in parts.items():
            print(f"{name}: {taken / 3600:.2f} hours")
        done = sum(self.book.content["seconds"].values())
        total = sum(parts.values())
        print(f"in all {total / 3600:.1f} hours, of which {done / 3600:.1f} are done", flush=True)

    def _seconds(self) -> Callable[[int], float]:
        """Of a forward by its tokens: a share that grows with them, and one with their square."""
        short = self.sizes.lengths[0] // 2

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

    # ----------------------------------------------------------------------------------------- all

    def run(self, longer: Path | None = None) -> None:
        """All steps; the ones that say most come first.

        ``longer`` is the folder of a search by the command line, a row at the target.
        """
        sizes = self.sizes
        if longer is not None:
            self.table({LONGER: Rope.load(longer)}, self.judged, only=sizes.target)
        some = self.judged[: sizes.asked]
        formulas = self.formulas()
        self.look(formulas, some[0])
        self.table(formulas, some[:1])
        self.again(formulas["YaRN"], some[0])
        found: dict[str, Rope | None] = {BEST_YARN: self.best_yarn(formulas["YaRN"])}
        found[SEARCH] = self.search(sizes.seeds[0])
        self.table(found | formulas, some)
        self.ask(found)
        found[READJUSTED] = self.readjusted(found[SEARCH])
        self.table(found, some)
        self.cross(found[READJUSTED])
        found[NEEDLES] = self.search_needles()
        self.table(found, some)
        self.ask(found)
        self.table(found, self.judged)
        self.vary(found[SEARCH])
        self.ask(formulas)
        for seed in sizes.seeds[1:]:
            found[f"{SEARCH}, seed {seed}"] = self.search(seed)
            self.table(found, self.judged, only=sizes.target)
        self.ask(found)
        self.table(found | formulas, self.judged)

    def formulas(self) -> dict[str, Rope | None]:
        """By name, each for the target."""
        found = baselines(self.source, self.sizes.target)
        return {name: found.get(name) for name in FORMULAS}

    # ------------------------------------------------------------------------------------ measured

    def look(self, ropes: Ropes, document: Document) -> None:
        """Each by a short window at the positions of the target, which takes a minute."""
        target, last = self.sizes.target, self.sizes.scored
        end = tails([document], self.sizes.longest, target)
        fitness = SkippedPerplexity(self.losses, end, target, target // 4, Coarse(), last=last)
        for name, rope in ropes.items():
            one = rope or dynamic_ntk(self.source, target)
            self._get(f"{name}, a window, {document.name}", lambda one=one: math.log(fitness(one)))

    def again(self, rope: Rope | None, document: Document) -> None:
        """Some of another machine's numbers on this one: by how much rounding moves them."""
        if self.book.at_home:
            return
        known = self.book.content["results"]
        before = {n: known[f"YaRN, {n} tokens, {document.name}"] for n in self.sizes.lengths}
        assert rope is not None
        self._get(
            f"{AGAIN}{self.book.called}",
            lambda: {str(n): self._loss(rope, n, document) - was for n, was in before.items()},
        )

    def table(self, ropes: Ropes, texts: list[Document], only: int | None = None) -> None:
        """The loss of the last tokens of texts, after as much of each as makes a length."""
        for document in texts:
            for length in self._lengths if only is None else [only]:
                for name, rope in ropes.items():
                    self._once(
                        *(f"{name}, {length} tokens, {document.name}", rope, length, document.name),
                        lambda one, n=length, text=document: self._loss(one, n, text),
                    )
        write_page(self.book.content, self.out)
        draw_page(self.book.content, self.out)

    def _loss(self, rope: Rope, length: int, document: Document) -> float:
        end = tails([document], self.sizes.longest, length)
        last = min(self.sizes.last, length // 2)
        return math.log(Perplexity(self.losses, end, length, last=last)(rope))

    def ask(self, ropes: Ropes) -> None:
        """What is found of numbers that texts hide: five in each text, and one in the first."""
        needles = key_values(self.encode)
        for length in self._lengths:
            ends = tails(self.judged[: self.sizes.asked], self.sizes.longest, length)
            texts = {
                "several keys": several_keys(ends, needles, length),
                "one key": single_key(ends[:1], needles, length),
            }
            for name, rope in ropes.items():
                for kind, hidden in texts.items():
                    self._once(
                        *(f"{name}, {length} tokens: {kind}", rope, length, kind),
                        lambda one, hidden=hidden, n=length: retrieval(
                            self.losses, one, hidden, n
                        ).as_json(),
                    )

    @property
    def _lengths(self) -> list[int]:
        """The columns of the tables, the target first."""
        return sorted(self.sizes.lengths, key=lambda n: n != self.sizes.target)

    def cross(self, rope: Rope | None) -> None:
        """What each policy costs where a sequence grows out of its short set."""
        assert rope is not None
        if len(rope.sets) == 1:
            print("policies: no short set was better, so there is nothing to switch from")
            return
        bound = rope.sets[-2].max_length
        assert bound is not None
        end = min(bound + self.sizes.last, self.sizes.longest)
        self._get("policies", lambda: policies(self.model, rope, self.judged, end))

    def vary(self, rope: Rope | None) -> None:
        """Uniform factors, and other thresholds for the factors of a search, at the target."""
        assert rope is not None
        (one,) = rope.sets
        target, pairs = self.sizes.target, len(one.factors)
        rows = {
            f"{UNIFORM} {value:g}": Rope((FactorSet((value,) * pairs),), rope.base)
            for value in self.sizes.uniform
        }
        for n_hat in self.sizes.n_hats:
            rows[f"{N_HAT} {n_hat}"] = Rope((replace(one, n_hat=n_hat),), rope.base)
        self.table(rows, self.judged, only=target)

    def _once(
        self, name: str, rope: Rope | None, length: int, what: str, make: Callable[[Rope], Any]
    ) -> None:
        """One number of a rope at a length; rows that have the same rope there share it."""
        one = (rope or dynamic_ntk(self.source, length)).for_length(length)
        key = one, length, what
        self.known[key] = self._get(
            name, lambda: self.known[key] if key in self.known else make(one)
        )

    def _get(self, name: str, make: Callable[[], Any]) -> Any:
        new = name not in self.book.content["results"]
        found = self.book.get(name, make)
        if new:
            write_page(self.book.content, self.out)
        return found

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
        return self._search(f"search-{seed}", f"search, seed {seed}", seed)

    def search_needles(self) -> Rope:
        """LongRoPE2's: the answers about needles alone count, and pairs from the critical one."""
        rope = self.source.rope
        critical = critical_dimension(rope.rotary_dim, rope.base, self.sizes.original) // 2
        chosen = {"fitness": "needle", "critical": critical, "last": None}
        return self._search("search-needles", "search, by needles", self.sizes.seeds[0], **chosen)

    def _search(self, name: str, key: str, seed: int, **options: Any) -> Rope:
        folder, target = self.out / name, self.sizes.target
        chosen = replace(self._options(self.sizes.hours, seed), **options)

        def make() -> dict[str, Any]:
            found = find(
                *(self.fastest, self._ends(target)),
                chosen.space(self.source.rope, self.sizes.original, target),
                *(chosen, folder),
                others=baselines(self.source, target),
                encode=self.encode,
                context={"weights": fingerprint(self.model)},
                progress=_progress(name),
                say=print,
            )
            kept = read_json(folder / "result.json")
            names = ("judged", "evaluations", "seconds", "correlation", "descent", "others")
            return {"fitness": found.best.fitness, **{name: kept[name] for name in names}}

        self._get(key, make)
        return Rope.load(folder)

    def readjusted(self, rope: Rope | None) -> Rope:
        """That rope, with sets for shorter lengths where a search finds better ones."""
        assert rope is not None
        folder = self.out / "readjust"
        lengths = [n for n in self.sizes.lengths if n < self.sizes.target]

        def make() -> dict[str, Any]:
            result = readjust(
                *(self.fastest, self._ends(max(lengths)), rope, lengths, self.sizes.original),
                *(self._options(self.sizes.short_hours, 0), folder),
                context={"weights": fingerprint(self.model)},
                progress=_progress("readjust"),
                say=print,
            )
            result.rope.save(folder)
            return {"taken": list(result.taken), "before": result.before}

        self._get("readjust", make)
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
    parser.add_argument(
        "--float32",
        action="store_true",
        help="compute so: for processors that multiply no bfloat16",
    )
    parser.add_argument(
        "--rope", type=Path, help="folder of a `longrope search` for the target, as one more row"
    )
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = FULL if chosen.full else SMALL if chosen.small else Sizes()
    experiment = Experiment(sizes, chosen.out, "float32" if chosen.float32 else None)
    experiment.plan()
    experiment.run(chosen.rope)
    print(f"{chosen.out / 'results.md'} and the pictures beside it")


if __name__ == "__main__":
    main()
