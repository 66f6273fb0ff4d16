"""Fine-tuning under given factors: a short loop over accelerate, resumable."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..distributed.ranks import Group, agree, ranks_of
from ..distributed.sums import whole_sum
from ..rope.value import Rope
from .documents import Document
from .model import CHUNK_NUMBERS, Head, head_of
from .own_tokens import OwnTokens
from .readjust import as_json
from .source import digest, fingerprint, read_json, write_json
from .state import differences

LOG, TOLD = "tuning.jsonl", "told.json"
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class TuneSettings:
    """How to fine-tune; the paper's where it says so (arXiv 2402.13753).

    Attributes:
        rate: of AdamW; it rises over ``warmup`` steps and falls linearly to 0, as in the paper.
        warmup: in steps, the paper's.
        rows: windows of a part in each process; the paper's steps have 32 windows in all.
        accumulate: parts of a step.
        short_share: share of the parts that are windows of the original length under the original
            embedding, as in LongRoPE2 (arXiv 2502.20082); the rope gets a set for it.
        recompute: layers keep no activations and are run again in the backward pass.
        every: a checkpoint after so many steps, and the last.
        seed: of the windows.

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    rate: Annotated[float, typer.Option(help="Learning rate (the paper: 2e-5).")] = 2e-5
    warmup: Annotated[int, typer.Option(min=0, help="Steps of warm-up (the paper: 20).")] = 20
    rows: Annotated[
        int, typer.Option(min=1, help="Windows of text in a forward, in each process.")
    ] = 1
    accumulate: Annotated[int, typer.Option(min=1, help="Forwards in a step.")] = 1
    short_share: Annotated[
        float, typer.Option(help="LongRoPE2: share of forwards over short windows, not rescaled.")
    ] = 0.0
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Gradient checkpointing: less memory.")
    ] = False
    every: Annotated[int, typer.Option("--checkpoint-every", min=1, help="In steps.")] = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "accumulate", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate: expected above 0, and finite, got {self.rate}")
        if not 0 <= self.short_share < 1:
            raise ValueError(
                f"short_share: expected a share from 0 to below 1, got {self.short_share}"
            )


def tune(
    model: Any,
    rope: Rope,
    documents: Sequence[Document],
    length: int,
    steps: int,
    settings: TuneSettings,
    folder: Path,
    *,
    short_length: int | None = None,
    progress: Progress | None = None,
    group: Group = None,
    shard: bool = True,
    device: str | None = None,
) -> Any:
    """Fine-tune a model; in a folder with checkpoints the same call goes on from the last.

    Under torchrun each process, or each ``group``, has windows of its own; gradients are averaged.

    Args:
        model: of transformers, changed in place; float32 weights, which are what AdamW needs (on a
            GPU the forward is in bfloat16).
        rope: a set for ``length``; with ``settings.short_share`` another for ``short_length``.
        documents: each of at least ``length`` tokens.
        length: of a window, in tokens.
        steps: of the optimiser.
        settings: the rest.
        folder: of ``tuning.jsonl`` (loss and seconds of every step) and checkpoints.
        short_length: of the windows that ``settings.short_share`` asks for.
        progress: called with the number of steps done and the loss of the last.
        group: as in `enable`: its processes share the windows of each.
        shard: whether processes share weights, gradients and the optimiser's state (FSDP2), or each
            has all of them (DDP).
        device: "cpu", or a GPU, of which each process takes its own; None for where the model is.

    Returns:
        The model, enabled under ``rope``, in eval mode. Its weights stay sharded where they were:
        `sharding.whole_weights` has them.

    Raises:
        ValueError: a document is too short, the weights are quantised or frozen, the model has no
            layers to be sharded, its logits are not what its head gives, scaled or capped, an
            argument is not the same on all processes, or the last checkpoint is of another
            fine-tuning.
        RuntimeError: the loss is not finite; the last checkpoint is from before it.
    """
    from accelerate import Accelerator

    from ..integrations.transformers import disable, enable
    from ..integrations.transformers.models import cache_of
    from .sharding import share_weights

    if getattr(model, "is_quantized", False):
        raise ValueError("model: expected weights that training changes, got quantised ones")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: expected weights that training changes, got frozen ones alone, as where "
            "transformers has put an adapter on"
        )
    for document in documents:
        if len(document.tokens) < length:
            raise ValueError(
                f"{document.name}: expected at least {length} tokens to train on, got "
                f"{len(document.tokens)}"
            )
    kind = torch.device(device or next(model.parameters()).device).type
    accelerator = Accelerator(cpu=kind == "cpu", mixed_precision="no" if kind == "cpu" else "bf16")
    sharing = 1 if group is None else ranks_of(group).size
    fields: dict[str, Any] = {"length": length, "steps": steps, "settings": settings}
    fields |= {"documents": digest(documents), "short_length": short_length, "rope": rope}
    if accelerator.num_processes > 1:
        shared = fields | {"sharing": sharing, "shard": shard}
        agree(ranks_of(None), shared, accelerator.device)
    told = fields | {"settings": asdict(settings), "rope": as_json(rope)}
    told = json.loads(json.dumps(told | {"weights": fingerprint(model)}))  # as it reads back
    head = head_of(disable(model).eval())
    enable(model, rope=rope, cache=cache_of(model), group=group)
    if settings.recompute:
        _checkpointing(model, "enable")
    module: Any = _Loss(model, head, group)
    shard = shard and accelerator.num_processes > 1
    if shard:
        share_weights(module, kind)
    # accelerate then adds no more than the forward in bfloat16.
    module = accelerator.prepare_model(module, device_placement=not shard, evaluation_mode=shard)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    folder.mkdir(parents=True, exist_ok=True)
    start = _restore(accelerator, model, optimizer, folder, told)
    share = accelerator.process_index // sharing
    windows = _Windows(documents, settings, length, short_length, share)
    module.train()
    for step in range(start, steps):
        begin = time.perf_counter()
        # Dropout, too, depends on the step alone.
        torch.manual_seed(hash((settings.seed, step, accelerator.process_index)))
        for parameters in optimizer.param_groups:
            parameters["lr"] = settings.rate * _schedule(step, steps, settings.warmup)
        total = 0.0
        for part in range(settings.accumulate):
            loss = module(windows.part(step, part).to(accelerator.device)) / settings.accumulate
            total += loss.item()
            accelerator.backward(loss)
        if not math.isfinite(total):
            raise RuntimeError(
                f"{folder}: the loss of step {step + 1} is {total}; a lower rate, or more warm-up"
            )
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.is_main_process:
            row = {"step": step + 1, "loss": total, "seconds": time.perf_counter() - begin}
            with (folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        if progress is not None:
            progress(step + 1, total)
        if (step + 1) % settings.every == 0 or step + 1 == steps:
            _save(accelerator, model, optimizer, folder, step + 1, told)
    if settings.recompute:
        _checkpointing(model, "disable")
    return model.eval()


def remove_checkpoints(folder: Path) -> None:
    """Those of `tune`, when the model is written."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


class _Loss(nn.Module):
    """The mean cross entropy as a module, so that gradients are averaged whatever wraps it.

    The logits of a long window are made, and made again in the backward pass, in pieces.
    """

    def __init__(self, model: Any, head: Head, group: Group) -> None:
        super().__init__()
        self.model = model
        self._head = head
        self._group = group

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (rows, length) int64. Gives ()."""
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        if self._group is None:
            hidden, targets = hidden[:, :-1], tokens[:, 1:]
        else:
            own = OwnTokens(self._group, tokens.shape[1], tokens.shape[1] - 1)
            hidden, targets = own.of(hidden, tokens)
        count = tokens[:, 1:].numel()
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        size = max(CHUNK_NUMBERS // self.model.config.get_text_config().vocab_size, 1)
        total: torch.Tensor = hidden.new_zeros((), dtype=torch.float32)
        for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            total = total + checkpoint(self._sum, part, wanted, use_reentrant=False)
        total = total / count
        return total if self._group is None else whole_sum(total, ranks_of(self._group))

    def _sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._head(hidden).float()
        return nn.functional.cross_entropy(logits, targets, reduction="sum")


class _Windows:
    """Random windows that depend on the step alone, so that a run which goes on gets the same."""

    def __init__(
        self,
        documents: Sequence[Document],
        settings: TuneSettings,
        length: int,
        short_length: int | None,
        process: int,
    ) -> None:
        if settings.short_share and short_length is None:
            raise ValueError("short_length: expected a number of tokens where short is above 0")
        self._documents, self._settings = documents, settings
        self._lengths = (length, short_length or length)
        self._process = process

    def part(self, step: int, part: int) -> torch.Tensor:
        """(rows, length) int64; of short windows as many more as make the same tokens."""
        settings = self._settings
        key = (settings.seed, step, part)
        alike = torch.Generator().manual_seed(hash(key))  # of small integers, so always the same
        generator = torch.Generator().manual_seed(hash((*key, self._process)))
        length, rows = self._lengths[0], settings.rows
        if torch.rand((), generator=alike) < settings.short_share:
            rows, length = rows * length // self._lengths[1], self._lengths[1]
        places = torch.tensor([len(d.tokens) - length + 1.0 for d in self._documents])
        which = torch.multinomial(places, rows, replacement=True, generator=generator)
        windows = []
        for index in which.tolist():
            tokens = self._documents[index].tokens
            at = int(torch.randint(len(tokens) - length + 1, (), generator=generator))
            windows.append(tokens[at : at + length])
        return torch.stack(windows)


def _checkpointing(model: Any, verb: str) -> None:
    """By the name of transformers 6, which late versions of 5 ask for, or by that of 5."""
    new, old = (f"{kind}_checkpointing_{verb}" for kind in ("activation", "gradient"))
    getattr(model, new if hasattr(model, new) else old)()


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(steps - warmup, 1)


def _checkpoints(folder: Path) -> list[Path]:
    """The whole ones, the oldest first."""
    found = (p for p in folder.glob("checkpoint-*") if p.suffix != ".new")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _restore(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    told: dict[str, Any],
) -> int:
    """Load the last checkpoint, which was told the same; returns the steps done."""
    from .sharding import load

    found, step = _checkpoints(folder), 0
    if found:
        known = found[-1] / TOLD
        # An earlier version wrote none.
        other = differences(read_json(known), told) if known.exists() else []
        if other:
            raise ValueError(
                f"{found[-1]}: of another fine-tuning: {'; '.join(other)}. Name another folder, "
                "or the same arguments to go on"
            )
        load(model, optimizer, found[-1])
        step = int(found[-1].name.split("-")[1])
    log = folder / LOG
    if accelerator.is_main_process and log.exists():  # the steps after it come again
        lines = log.read_text("utf-8").splitlines(keepends=True)
        log.write_text("".join(lines[:step]), "utf-8")
    return step


def _save(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    step: int,
    told: dict[str, Any],
) -> None:
    from .sharding import save

    draft = folder / f"checkpoint-{step}.new"
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was stopped while it saved
    accelerator.wait_for_everyone()
    save(model, optimizer, draft)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(draft / TOLD, told)
        old = _checkpoints(folder)
        draft.rename(folder / f"checkpoint-{step}")
        for path in old:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()
