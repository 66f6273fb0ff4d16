"""The progressive extension of a model: search, fine-tune, search further, readjust, as a plan.

LongRoPE (arXiv 2402.13753) does not search at the far length at once: it extends by a factor that
fine-tuning can follow, and searches from there, with factors that multiply those before.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from ..rope import FactorSet, Rope
from ..rope.files import SIDECAR
from .documents import Document, Encode, encoder, read_documents
from .find import find
from .model import Losses, TransformersLosses
from .options import Read, Texts, Upper, ascending, paths, tell
from .ranks import from_main, is_main, sequence_group
from .readjust import readjust
from .settings import Options
from .source import (
    CONFIG,
    baselines,
    device_of,
    digest,
    dtype_of,
    identity,
    load_model,
    open_source,
    read_json,
    repeats,
    save_rope,
    write_config,
    write_json,
    write_lengths,
)
from .state import differences, locked
from .tune import LOG, TuneSettings, remove_checkpoints, tune

PLAN, DONE = "plan.json", "done.json"
ADAPTER = "adapter_config.json"  # PEFT's
Say = Callable[[str], None]
# What shows the progress of a step, by its kind and name: of a search, and of fine-tuning.
Watch = Callable[[str, str, int], Any]


@dataclass(frozen=True)
class Stage:
    """A length to extend to, in tokens, and how many steps to fine-tune there."""

    length: int
    steps: int = 0


def _stages(texts: list[str]) -> tuple[Stage, ...]:
    return tuple(map(_stage, texts))


def _stage(text: str) -> Stage:
    try:
        return Stage(*map(int, text.split(":")))
    except (TypeError, ValueError):
        raise ValueError(f"--stage: expected LENGTH or LENGTH:STEPS, got {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class ExtendPlan(Texts):
    """What to do; the same plan and folder go on where they were stopped.

    Attributes:
        model: the folder of a local model.
        documents: files and folders of texts to search on, as in `documents.texts`.
        training: those to fine-tune on; not the same.
        stages: ascending lengths. A stage searches from the factors of the one before, on the
            model that was fine-tuned there, and then fine-tunes it where it has steps.
        short: lengths to readjust for at the end, ascending; none for no readjustment.
        samples: documents that a search takes, the first ones.
        tokenizer: as in `documents.encoder`; None for the model's.
        original: as in `open_source`.
        upper: as in `readjust`.
        options: of the searches.
        tuning: of the fine-tuning.

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    stages: Annotated[
        tuple[Stage, ...],
        typer.Option(
            "--stage",
            metavar="LENGTH[:STEPS]",
            help="A length in tokens, and how many steps to fine-tune there; repeat, ascending.",
        ),
        Read(list[str], _stages),
    ]
    training: Annotated[
        tuple[str, ...],
        typer.Option("--train", help="Texts to fine-tune on, like --documents and not the same."),
        Read(list[Path] | None, paths),
    ] = ()
    short: Annotated[
        tuple[int, ...],
        typer.Option(help="Length that gets a set of its own at the end; repeat for several."),
        Read(list[int] | None, ascending),
    ] = ()
    upper: Upper = None
    options: Options = field(default_factory=Options)
    tuning: TuneSettings = field(default_factory=TuneSettings)

    def __post_init__(self) -> None:
        lengths = [stage.length for stage in self.stages]
        if not lengths or sorted(set(lengths)) != lengths:
            raise ValueError(f"stages: expected ascending lengths, got {lengths}")
        for stage in self.stages:
            if stage.steps < 0:
                raise ValueError(f"stages: expected 0 or more steps, got {stage.steps}")
        if any(stage.steps for stage in self.stages) and not self.training:
            raise ValueError(
                "training: expected texts (--train) for the stages that fine-tune, got none"
            )
        if list(self.short) != sorted(set(self.short)) or max(self.short, default=0) >= lengths[-1]:
            raise ValueError(
                f"short: expected ascending lengths below {lengths[-1]}, got {list(self.short)}"
            )
        if self.upper is not None and not 1 <= self.upper < math.inf:
            raise ValueError(f"upper: expected at least 1.0, and finite, got {self.upper}")
        if self.options.critical is not None and len(lengths) > 1:
            raise ValueError("critical: expected one stage: its factors are of the whole extension")

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the folders of what is done, in order."""
        kinds = []
        for stage in self.stages:
            kinds.append(f"search-{stage.length}")
            kinds += [f"tune-{stage.length}"] if stage.steps else []
        kinds += ["readjust"] if self.short else []
        return (*(f"{number}-{kind}" for number, kind in enumerate(kinds, 1)), "model")

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


class Extension:
    """A plan in its folder, which it carries out step by step.

    Each step has a folder: ``1-search-1024``, ``2-tune-1024``, ..., ``5-readjust``, and ``model``
    with the result. One with a ``done.json`` is finished and not repeated.
    """

    def __init__(
        self,
        plan: ExtendPlan,
        folder: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        sharing: int = 1,
        shard: bool = True,
    ) -> None:
        """Write the plan, or find it there.

        Args:
            plan: what to do.
            folder: made where it is missing.
            device: as in `load_model`.
            dtype: as in `load_model`; fine-tuning always has float32 weights.
            sharing: how many processes share each sequence, one rank after another.
            shard: as in `tune`.

        Raises:
            ValueError: the folder has another plan, or the same of other texts or another model,
                named by what differs; the model or a text lies where a step writes; the plan does
                not go with the model; a text is too short for a stage.
            RuntimeError: another extension has the folder open.
        """
        self.plan, self.folder, self._device = plan, folder, device
        self._dtype = dtype_of(dtype, device)
        self._sharing, self._group = sharing, sequence_group(sharing)
        self._shard = shard
        plan.check_out(folder, (PLAN, *plan.steps), *(("--train", path) for path in plan.training))
        self.source = open_source(Path(plan.model), plan.original)
        if plan.stages[0].length <= self.source.trained:
            raise ValueError(
                f"stages: expected more than {self.source.trained} tokens, which the model has, "
                f"got {plan.stages[0].length}"
            )
        tuned = [stage for stage in plan.stages if stage.steps]
        if tuned and self.source.config.get("quantization_config"):
            raise ValueError(
                "stages: expected no steps for a model whose weights are quantised, got "
                f"{tuned[0].steps} at {tuned[0].length} tokens; extend the one it was made of"
            )
        if tuned and (self.source.folder / ADAPTER).exists():
            raise ValueError(
                f"stages: expected no steps for a model with {ADAPTER}, whose adapter transformers "
                f"puts on with all weights frozen, got {tuned[0].steps} at {tuned[0].length} "
                "tokens; merge the adapter into the weights (PEFT's merge_and_unload), or extend a "
                "folder without it"
            )
        if max(plan.short, default=0) and plan.short[-1] > plan.stages[0].length:
            raise ValueError(f"short: expected at most the first stage's length: {plan.short[-1]}")
        self.encode: Encode = encoder(plan.tokenizer or plan.model, self.source.read.vocab_size)
        # For all stages, since a later one would find them too short after hours.
        self._documents = read_documents(
            [Path(p) for p in plan.documents],
            self.encode,
            plan.stages[-1].length,
            most=plan.samples,
        )
        self._training = self._read_training([stage.length for stage in tuned])
        self._check_searches()
        tell(repeats(self._documents, self._training))
        with self._alone():
            from_main(self._write_plan)

    def _check_searches(self) -> None:
        """What a later search would refuse after hours is refused now."""
        plan, options = self.plan, self.plan.options
        given = cast(Losses, None), self._documents  # of no model: nothing is measured here
        stages = [(stage.length, None) for stage in plan.stages]
        for length, upper in [*stages, *((length, plan.upper) for length in plan.short)]:
            ratio = max(1.0, length / self.source.original)
            options.space(
                *(self.source.rope, self.source.original, length),
                ratio=ratio,
                upper=upper,
                critical=None,
            )
            options.measure(*given, length, self.encode)
            options.measure_first(*given, length, self.encode)

    def _read_training(self, lengths: list[int]) -> list[Document]:
        """The texts of the shortest of these lengths or more; there is one of the longest."""
        if not lengths:
            return []
        texts = [Path(p) for p in self.plan.training]
        found = read_documents(texts, self.encode, lengths[0], short="skip")
        longest = max(len(document.tokens) for document in found)
        if longest < lengths[-1]:
            raise ValueError(
                f"training: expected a text of {lengths[-1]} tokens or more, the longest has "
                f"{longest}"
            )
        return found

    def _write_plan(self) -> None:
        path, content = self.folder / PLAN, self.plan.to_json()
        content["dtype"] = self._dtype
        content["digests"] = {
            "documents": digest(self._documents),
            "training": digest(self._training),
            "model": _digest_of_files(self.source.folder),
        }
        if path.stat().st_size:
            known = read_json(path)
            for name in ("digests", "dtype"):  # an earlier version wrote none
                known.setdefault(name, content[name])
            found = differences(known, content)
            if found:
                raise ValueError(
                    f"{self.folder}: it has another plan: {'; '.join(found)}. Name another folder, "
                    "or the same plan to go on"
                )
        else:
            write_json(path, content)

    def run(self, watch: Watch | None = None, say: Say = print) -> Rope:
        """Do what is not done yet.

        Args:
            watch: ``watch("search" | "tune", name, total)`` gives the ``progress`` of a step.
            say: told what begins, ends, or was done before.

        Returns:
            The rope of the extended model, in the folder ``model``.

        Raises:
            RuntimeError: another extension has the folder open.
        """
        self._watch, self._say = watch, say
        with self._alone():
            return self._run()

    def _alone(self) -> ExitStack:
        """While it is open, no other extension has the folder."""
        with ExitStack() as stack:
            from_main(lambda: stack.enter_context(locked(self.folder / PLAN, "extension")))
            return stack.pop_all()

    def _run(self) -> Rope:
        plan, steps = self.plan, iter(self.plan.steps)
        rope: Rope | None = None  # of the stages so far, one set
        weights = self.source.folder
        reached = self.source.trained
        for stage in plan.stages:
            rope = self._search(next(steps), stage, rope, reached, weights)
            if stage.steps:
                weights = self._tune(next(steps), stage, rope, weights)
            reached = stage.length
        assert rope is not None
        if any(stage.steps for stage in plan.stages):
            rope = self._with_plain(rope)
        if plan.short:
            rope = self._readjust(next(steps), rope, weights)
        self._write(next(steps), rope, weights)
        return rope

    def _search(
        self, name: str, stage: Stage, before: Rope | None, reached: int, weights: Path
    ) -> Rope:
        step = self._step(name)
        if step.done:
            return Rope.load(step.folder / SIDECAR)
        start = self.source.stage if before is None else before
        space = self.plan.options.space(
            *(self.source.rope, self.source.original, stage.length),
            stage=start,
            ratio=None if start is None else stage.length / reached,
        )
        losses = self._losses(weights)
        found = find(
            losses,
            self._documents,
            space,
            self.plan.options,
            step.folder,
            others=baselines(self.source, stage.length),
            encode=self.encode,
            context=identity(self.source, losses.model),
            progress=self._progress("search", step),
            say=self._say,
            sharing=self._sharing,
        )
        step.finish({"perplexity": found.best.fitness, "others": found.others})
        return found.rope

    def _tune(self, name: str, stage: Stage, rope: Rope, weights: Path) -> Path:
        step = self._step(name)
        if step.done:
            return step.folder
        model = load_model(weights, "cpu", "float32")
        training = [x for x in self._training if len(x.tokens) >= stage.length]
        model = tune(
            model,
            self._with_plain(rope),
            training,
            stage.length,
            stage.steps,
            self.plan.tuning,
            step.folder,
            short_length=self.source.original,
            progress=self._progress("tune", step, stage.steps),
            group=self._group,
            shard=self._shard,
            device=device_of(self._device),
        )
        from ..integrations.transformers import disable
        from .sharding import whole_weights

        config = self.source.config
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        whole = whole_weights(disable(model).to(getattr(torch, dtype)))
        from_main(lambda: model.save_pretrained(step.folder, state_dict=whole))
        step.finish({"steps": stage.steps, "documents": len(training)})
        from_main(partial(remove_checkpoints, step.folder))
        return step.folder

    def _with_plain(self, rope: Rope) -> Rope:
        """With the set that ``short_share`` trains before the others."""
        if not self.plan.tuning.short_share:
            return rope
        plain = FactorSet((1.0,) * rope.pairs, max_length=self.source.original)
        return Rope((plain, *rope.sets), rope.base, rope.interleaved)

    def _readjust(self, name: str, rope: Rope, weights: Path) -> Rope:
        step = self._step(name)
        if step.done:
            return Rope.load(step.folder / SIDECAR)
        losses = self._losses(weights)
        result = readjust(
            losses,
            self._documents,
            rope,
            self.plan.short,
            self.source.original,
            self.plan.options,
            step.folder,
            upper=self.plan.upper,
            encode=self.encode,
            context=identity(self.source, losses.model),
            progress=self._progress("search", step),
            say=self._say,
            sharing=self._sharing,
        )
        from_main(lambda: save_rope(result.rope, step.folder))
        after = {str(n): found.best.fitness for n, found in result.found.items()}
        before = {str(n): value for n, value in result.before.items()}
        step.finish({"before": before, "after": after, "taken": list(result.taken)})
        return result.rope

    def _write(self, name: str, rope: Rope, weights: Path) -> None:
        step = self._step(name)
        if step.done:
            return
        note = from_main(lambda: self._copy(rope, weights, step.folder))
        if note is not None:
            self._say(
                "model: only longrope.json has the new rope, config.json the old one and the new "
                f"length: {note}"
            )
        step.finish({"weights": str(weights), "config": note})

    def _copy(self, rope: Rope, weights: Path, folder: Path) -> str | None:
        left_out = (PLAN, DONE, LOG, CONFIG, SIDECAR)
        for origin in (self.source.folder, weights):
            for file in sorted(origin.iterdir()):
                # Of the untouched model all files but its weights, where there are newer ones.
                old = weights != self.source.folder and origin == self.source.folder
                if file.is_file() and file.name not in left_out and not (old and _is_weights(file)):
                    shutil.copy2(file, folder / file.name)
        length = self.plan.stages[-1].length
        note = write_config(self.source, rope, length, folder)
        if note is not None:
            write_lengths(self.source, length, folder)
        return note

    def _losses(self, weights: Path) -> TransformersLosses:
        model = load_model(weights, self._device, self._dtype)
        return TransformersLosses(model, group=self._group)

    def _progress(self, kind: str, step: Step, total: int = 0) -> Any:
        return None if self._watch is None else self._watch(kind, step.name, total)

    def _step(self, name: str) -> Step:
        step = Step(name, self.folder / name)
        done = step.done
        if is_main():
            self._say(f"{name}: {'done before' if done else 'begins, or goes on'}")
        return step


@dataclass
class Step:
    """A step of an extension, and its folder."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def done(self) -> bool:
        """Whether it was when the step was made, on all ranks alike."""
        return from_main((self.folder / DONE).exists)

    def finish(self, content: dict[str, Any]) -> None:
        """Mark it as done, after everything else was written."""
        from_main(partial(write_json, self.folder / DONE, content))


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin", ".pt", ".pth") or ".index.json" in file.name


def _digest_of_files(model: Path) -> str:
    """Which model a folder has, by the bytes of its files; loading it would take longer."""
    total = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.is_file() and (_is_weights(file) or file.name == CONFIG):
            total.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as content:
                while block := content.read(2**20):
                    total.update(block)
    return total.hexdigest()[:16]
