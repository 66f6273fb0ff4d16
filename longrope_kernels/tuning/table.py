"""What `longrope tune` hands over: the tables as Python source, and every timing as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from .entries import KERNELS, Task
from .search import Candidate, Machine, Outcome, describe

_FORWARD = (*KERNELS["forward-prepass"], *KERNELS["forward-registers"])


def source(outcomes: Sequence[Outcome], arch: int) -> str:
    """The tables with the best entries of one architecture, as Python source.

    One ``CONFIGS = {arch: {head_dim: ...}}`` for each file that has one, in the form it has there:
    the entries that were not tuned are the present ones. Comments give the TFLOP/s of the best
    and of the present entry (not causal/causal where one entry serves both).
    """
    parts = []
    for title, launches, table in (
        ("kernels/attention.py", _FORWARD, _forward_table),
        ("kernels/attention_backward.py", KERNELS["backward"], _backward_table),
    ):
        of_file = [outcome for outcome in outcomes if outcome.entry.launch in launches]
        if of_file:
            parts.append(f"# {title}\n{_source(table(of_file, arch), of_file, arch)}")
    return "\n".join(parts)


def _source(table: dict[int, Any], outcomes: list[Outcome], arch: int) -> str:
    lines = ["CONFIGS = {", f"    {arch}: {{"]
    for dim, configs in sorted(table.items()):
        lines += [f"        # {describe(o)}" for o in outcomes if o.entry.dim == dim]
        shown = ", ".join("None" if config is None else _config(config) for config in configs)
        name = "" if type(configs) is tuple else type(configs).__name__
        lines.append(f"        {dim}: {name}({shown}),")
    return "\n".join((*lines, "    },", "}", ""))


def _config(config: Any) -> str:
    return f"Config({', '.join(map(str, config))})"


def _forward_table(outcomes: list[Outcome], arch: int) -> dict[int, Any]:
    from ..kernels import attention, attention_tiles

    table = dict(attention_tiles.table_of(attention.CONFIGS, arch))
    for outcome in outcomes:
        dim = outcome.entry.dim
        entry = list(table.get(dim) or attention_tiles.nearest(attention.CONFIGS, arch, dim))
        if outcome.best is not None:
            place = 2 if outcome.entry.launch == "registers" else int(outcome.entry.causal[0])
            entry[place] = outcome.best.config
        table[dim] = tuple(entry)
    return table


def _backward_table(outcomes: list[Outcome], arch: int) -> dict[int, Any]:
    from ..kernels import attention_backward, attention_tiles

    present = attention_backward.CONFIGS
    table = dict(attention_tiles.table_of(present, arch))
    for dim in {outcome.entry.dim for outcome in outcomes}:
        best: Any = {o.entry.launch: o.best for o in outcomes if o.entry.dim == dim}
        configs = attention_tiles.nearest(present, arch, dim)
        dq, fused, dk, dv = (best.get(name) for name in ("dq", "dk_dv", "dk", "dv"))
        if dq is not None:
            configs = configs._replace(dq=dq.config)
        # One kernel or two; the form of the present entry must have been timed.
        split = dk is not None and dv is not None
        if split if configs.dv else fused is not None:
            if _seconds(fused) < _seconds(dk, dv):
                configs = configs._replace(dk=fused.config, dv=None)
            else:
                configs = configs._replace(dk=dk.config, dv=dv.config)
        table[dim] = configs
    return table


def _seconds(*candidates: Candidate | None) -> float:
    return sum(math.inf if c is None else c.score for c in candidates)


def report(task: Task, machine: Machine, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that was compiled and timed, in types that JSON has; seconds, bytes."""
    return {
        "longrope_kernels": __version__,
        "device": machine.name,
        "arch": machine.arch,
        "shared": machine.shared,
        "task": {**asdict(task), "dtype": str(task.dtype).removeprefix("torch.")},
        "entries": [
            {
                **outcome.entry._asdict(),
                "best": None if outcome.best is None else list(outcome.best.config),
                "candidates": [_candidate(c) for c in outcome.candidates],
            }
            for outcome in outcomes
        ],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        **candidate.config._asdict(),
        "present": candidate.present,
        "dropped": candidate.dropped,
        "built": [built._asdict() for built in candidate.built],
        "samples": candidate.samples,
        "seconds": candidate.seconds,
        "tflops": candidate.tflops,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Write JSON to a file that is there whole or not at all."""
    text = json.dumps(found, indent=1) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
