"""Extend a small model for real: train it at 256 bytes, then search, fine-tune and readjust.

    python examples/extend_tiny/run.py --out extend-tiny-output
    python examples/extend_tiny/run.py --out extend-tiny-output --full    # all claims and lengths
    python examples/extend_tiny/run.py --out /tmp/small --small           # a check, two minutes

Stopped at any moment, the same command goes on. The folder gets results.json, results.md and the
pictures; README.md beside this file says what is in them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from base import DEVICE, Recipe, train
from book import Book
from judge import Judge, policies, slices
from page import write_page
from text import Windows, read_corpus
from transformers import LlamaForCausalLM

from longrope_kernels import FactorSet, Rope
from longrope_kernels.rope import scaling
from longrope_kernels.search.coarse import Coarse
from longrope_kernels.search.documents import Document
from longrope_kernels.search.find import find
from longrope_kernels.search.readjust import readjust
from longrope_kernels.search.settings import Options
from longrope_kernels.search.source import fingerprint, read_json
from longrope_kernels.search.space import SearchSpace
from longrope_kernels.search.tune import TuneSettings, tune

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from report import facts  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """What is done, and how much of it."""

    recipe: Recipe = field(default_factory=Recipe)
    ratios: tuple[int, ...] = (4, 8, 16, 32)
    ratio: int = 8  # of the fine-tuning and of the comparisons
    far: int = 32  # extended to from there, without tuning
    population: int = 32
    iterations: int = 8
    searched: int = 3  # documents of a search
    judged: int = 16  # documents of the tables
    last: int = 128  # tokens that count in each
    remembered: int = 4  # documents with five keys each
    tune_steps: int = 150
    tune_rows: int = 4
    tune_windows: int = 600
    tune_rate: float = 5e-4

    @property
    def options(self) -> Options:
        """Half of the paper's population, and fewer iterations."""
        return Options(
            population=self.population,
            iterations=self.iterations,
            mutants=self.population // 4,
            crossovers=self.population // 4,
            parents=self.population // 2,
            attention="searched",
            coarse=Coarse("off"),  # coarse.py compares with and without
        )


SMALL = Sizes(
    recipe=Recipe(hidden=64, layers=2, heads=2, context=128, steps=40, rows=8),
    ratios=(2, 4),
    ratio=2,
    far=4,
    population=8,
    iterations=2,
    searched=1,
    judged=2,
    last=32,
    remembered=1,
    tune_steps=4,
    tune_rows=2,
    tune_windows=8,
)


class Experiment:
    """One model, extended; each method is a step of its own."""

    def __init__(self, sizes: Sizes, out: Path, until: int | None = None) -> None:
        self.sizes, self.out = sizes, out
        self.corpus = read_corpus()
        self.context = sizes.recipe.context
        self.lengths = [self.context, *(self.context * ratio for ratio in sizes.ratios)]
        self.length = self.context * sizes.ratio
        longest = self.lengths[-1]
        self.searched = slices(self.corpus, longest, sizes.searched, of_search=True)
        self.judged = slices(self.corpus, longest, sizes.judged, of_search=False)
        self.book = Book(
            out / "results.json",
            {
                "machine": facts.describe(ROOT),
                "text": self.corpus.digest,
                "sizes": asdict(sizes),
                "files": {
                    "searched": [d.name for d in self.searched],
                    "judged": [d.name for d in self.judged],
                },
            },
        )
        self.model = train(sizes.recipe, self.corpus, out, until=until)
        self.judge = Judge(self.model, self.judged, sizes.last)
        self.dim = self.judge.losses.rope.rotary_dim

    # ------------------------------------------------------------------------------- formulas

    def formulas(self, length: int) -> dict[str, Rope]:
        """The ropes to beat, each made for ``length``."""
        ratio = length / self.context
        return {
            "no scaling": Rope.plain(self.dim),
            "PI": scaling.linear(self.dim, ratio),
            "NTK": scaling.ntk_aware(self.dim, ratio),
            "dynamic NTK": scaling.dynamic_ntk(self.dim, ratio, self.context, length),
            "YaRN, attention factor 1": scaling.yarn(
                self.dim, ratio, self.context, attention_factor=1.0
            ),
            "YaRN": scaling.yarn(self.dim, ratio, self.context),
        }

    def base_model(self) -> None:
        """The untuned model at each length, each formula made for that length."""
        names = self.formulas(self.length)
        for name in names:
            self.book.get(
                f"at its length: {name}",
                lambda name=name: {
                    str(n): self.judge.perplexity(self.formulas(n)[name], n)
                    for n in self.lengths[1:]
                },
            )
            self.book.get(
                f"second half: {name}",
                lambda name=name: {
                    str(n): self.judge.half(self.formulas(n)[name], n) for n in self.lengths[1:]
                },
            )
            self.book.get(
                f"by length: {name}",
                lambda name=name: self.judge.perplexities(names[name], self.lengths),
            )

    # -------------------------------------------------------------------------------- searches

    def space(self, length: int, options: Options, **arguments: Any) -> SearchSpace:
        return options.space(Rope.plain(self.dim), self.context, length, **arguments)

    def search(
        self, name: str, length: int, judge: Judge | None = None, space: Any = None, **changes: Any
    ) -> Rope:
        """The best rope of a search, which is in the folder of that name."""
        # Beyond that length a forward takes seconds: what falls behind on one document is given up.
        margin = 0.05 if length > self.length else None
        options = replace(self.sizes.options, last=length // 2, margin=margin, **changes)
        judge, folder = judge or self.judge, self.out / name.replace(" ", "-")

        def make() -> dict[str, Any]:
            begin = time.process_time()
            found = find(
                judge.losses,
                [Document(d.name, d.tokens[-length:]) for d in self.searched],
                space or self.space(length, options),
                options,
                folder,
                context={"weights": fingerprint(judge.losses.model)},
                progress=progress(name),
            )
            kept = read_json(folder / "result.json")
            return {
                **rope_json(found.rope),
                # Of this run of the command alone, where it was stopped within the search.
                "processor_seconds": round(time.process_time() - begin, 1),
                "perplexity": judge.perplexity(found.rope, length),
                "fitness": found.best.fitness,
                **{key: kept[key] for key in ("evaluations", "seconds", "history")},
            }

        rope = rope_of(self.book.get(f"search: {name}", make))
        self.book.get(f"second half: search: {name}", lambda: judge.half(rope, length))
        return rope

    def searches(self, full: bool) -> None:
        """LongRoPE without tuning, and at one length what each of its parts is worth."""
        near = self.length
        rope = self.search(f"at {near}", near)
        self.book.get(
            "by length: LongRoPE, search only",
            lambda: self.judge.perplexities(rope, self.lengths),
        )
        self.search(f"at {near}, no n_hat", near, n_hats=(0,))
        self.search(f"at {near}, not monotone", near, monotone=False)
        self.search(f"at {near}, attention factor 1", near, attention=1.0)
        self.search(f"at {near}, attention factor of the paper", near, attention=None)
        self.search(f"at {near}, the paper's moves", near, moves="paper")
        self.search(f"at {near}, CMA-ES", near, optimizer="cmaes")
        for seed in (1, 2) if full else ():
            self.search(f"at {near}, seed {seed}", near, seed=seed)
            self.search(f"at {near}, no n_hat, seed {seed}", near, seed=seed, n_hats=(0,))
            self.search(f"at {near}, not monotone, seed {seed}", near, seed=seed, monotone=False)
        self.book.get(f"uniform at {near}", lambda: self.uniform(near))
        for length in self.lengths[1:]:
            if length != near:
                self.search(f"at {length}", length)

    def uniform(self, length: int) -> dict[str, float]:
        """One lambda for all pairs, the best of a grid, with the best attention factor of another.

        On the documents of the searches; what it reaches on the others is "perplexity".
        """
        options = replace(self.sizes.options, last=length // 2)
        documents = [Document(d.name, d.tokens[-length:]) for d in self.searched]
        fitness = options.measure(self.judge.losses, documents, length, None)
        ratio = length // self.context
        tried = {}
        for factor in [1 + step * (1.25 * ratio - 1) / 12 for step in range(13)]:
            for attention in (1.0, 1.1, 1.2):
                one = FactorSet((factor,) * (self.dim // 2), attention_factor=attention)
                tried[Rope((one,), 10000.0)] = fitness(Rope((one,), 10000.0))
        best = min(tried, key=lambda rope: tried[rope])
        return {
            "factor": best.sets[0].factors[0],
            "attention_factor": float(best.sets[0].attention_factor),
            "fitness": tried[best],
            "perplexity": self.judge.perplexity(best, length),
            "half": self.judge.half(best, length),
        }

    # ---------------------------------------------------------------------------------- tuning

    def tuned(self) -> Judge:
        """The model, fine-tuned under the factors of the search at one length."""
        sizes, folder = self.sizes, self.out / "tuned"
        rope = self.search(f"at {self.length}", self.length)

        def make() -> dict[str, Any]:
            windows = Windows(self.corpus, self.length, seed=1).batch(sizes.tune_windows)
            documents = [Document(f"window {i}", w) for i, w in enumerate(windows)]
            settings = TuneSettings(rate=sizes.tune_rate, rows=sizes.tune_rows, every=25)
            model = train(sizes.recipe, self.corpus, self.out)
            tune(model, rope, documents, self.length, sizes.tune_steps, settings, folder)
            torch.save(model.state_dict(), folder / "model.pt")
            return {"steps": sizes.tune_steps, "rows": sizes.tune_rows, "tokens": self.length}

        self.book.get("tuned", make)
        model = LlamaForCausalLM(self.model.config)
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return Judge(model.to(DEVICE).eval(), self.judged, sizes.last)

    def extended(self) -> None:
        """After fine-tuning: all lengths, further without tuning, and the short ones again."""
        judge, sizes = self.tuned(), self.sizes
        rope = self.search(f"at {self.length}", self.length)
        self.book.get(
            "by length: LongRoPE, fine-tuned",
            lambda: judge.perplexities(rope, self.lengths),
        )
        again = self.search(f"at {self.length}, after tuning", self.length, judge)
        self.book.get(
            "by length: LongRoPE, fine-tuned, searched again",
            lambda: judge.perplexities(again, self.lengths),
        )
        far = self.context * sizes.far
        options = replace(sizes.options, last=far // 2)
        space = self.space(
            far,
            options,
            stage=Rope((FactorSet(rope.sets[0].factors),), rope.base),
            ratio=far / self.length,
        )
        further = self.search(f"at {far}, from {self.length}", far, judge, space)
        self.book.get(
            f"by length: LongRoPE, to {far}",
            lambda: judge.perplexities(further, self.lengths),
        )
        short = [n for n in (self.context, 2 * self.context) if n < self.length]
        whole = self.readjusted(judge, further, short)
        self.book.get(
            f"by length: LongRoPE, to {far}, readjusted",
            lambda: judge.perplexities(whole, self.lengths),
        )
        self.book.get("memory", lambda: self.memory(judge, rope, whole))
        if len(whole.sets) > 1:
            length = min(whole.sets[-2].max_length + 8 * self.context, self.lengths[-1])  # type: ignore[operator]
            self.book.get(
                "policies",
                lambda: policies(judge.losses.model, whole, self.judged, length),
            )

    def readjusted(self, judge: Judge, rope: Rope, short: Sequence[int]) -> Rope:
        def make() -> dict[str, Any]:
            result = readjust(
                judge.losses,
                [Document(d.name, d.tokens[-short[-1] :]) for d in self.searched],
                rope,
                short,
                self.context,
                self.sizes.options,
                self.out / "readjust",
                context={"weights": fingerprint(judge.losses.model)},
                progress=progress("readjust"),
            )
            return {"before": result.before, "taken": result.taken, **rope_json(result.rope)}

        return rope_of(self.book.get("readjust", make))

    def memory(self, judge: Judge, rope: Rope, whole: Rope) -> dict[str, Any]:
        """Keys told right, by length, before and after."""
        some = self.judged[: self.sizes.remembered]
        base = Judge(self.model, some, self.sizes.last)
        tuned = Judge(judge.losses.model, some, self.sizes.last)
        formulas = self.formulas(self.length)
        ways = {
            **{name: (base, formulas[name]) for name in ("no scaling", "PI", "NTK", "YaRN")},
            "LongRoPE, search only": (base, rope),
            "LongRoPE, fine-tuned": (tuned, rope),
            "LongRoPE, further, readjusted": (tuned, whole),
        }
        near = [n for n in self.lengths if n <= self.length]
        found = {name: {str(n): one.memory(r, n) for n in near} for name, (one, r) in ways.items()}
        beyond = [n for n in self.lengths if self.length < n]
        found["LongRoPE, further, readjusted"] |= {str(n): tuned.memory(whole, n) for n in beyond}
        return found


def rope_json(rope: Rope) -> dict[str, Any]:
    return {
        "sets": [
            {
                "factors": list(s.factors),
                "n_hat": s.n_hat,
                "attention_factor": float(s.attention_factor),
                "max_length": s.max_length,
            }
            for s in rope.sets
        ]
    }


def rope_of(content: dict[str, Any]) -> Rope:
    return Rope(tuple(FactorSet(**{**s, "factors": tuple(s["factors"])}) for s in content["sets"]))


def progress(name: str) -> Callable[[Any], None]:
    seen = 0

    def show(search: Any) -> None:
        nonlocal seen
        if len(search.history) > seen and search.best is not None:
            seen = len(search.history)
            print(f"{name}: {search.evaluated} evaluated, {search.best.fitness:.4f}", flush=True)

    return show


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("extend-tiny-output"))
    parser.add_argument("--full", action="store_true", help="three seeds of each comparison")
    parser.add_argument("--small", action="store_true", help="small sizes; numbers say nothing")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    experiment = Experiment(SMALL if chosen.small else Sizes(), chosen.out)
    experiment.base_model()
    experiment.extended()
    experiment.searches(chosen.full)
    write_page(experiment.book.content, chosen.out)
    print(f"{chosen.out / 'results.md'} and the pictures beside it")


if __name__ == "__main__":
    main()
