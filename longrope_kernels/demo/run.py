"""The demo from beginning to end."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm

from .. import __version__
from ..rope.value import Rope
from .errors import errors_at
from .figure import draw
from .methods import methods
from .model import build_model, generate_agreement, logits_agreement, real_queries_and_keys
from .peers import TransformersRotary
from .report import errors_text, model_text, times_text
from .text import standard_library_bytes
from .timing import time_rotations

_TABLE_POSITIONS = (4095, 2**17 - 1, 2**20 - 1, 2**21 - 1)
_TITLE = "Rotary position embedding with Phi-3-mini's factors: error against float64"
_MODEL_STEPS, _TIME_STEPS, _FIGURE_STEPS = 6, 4, 1


class Sizes(NamedTuple):
    """How much of everything."""

    logits_tokens: int
    prompt_tokens: int
    new_tokens: int
    figure_positions: int
    time_tokens: int
    rounds: int


FULL = Sizes(1024, 4090, 12, 32, 4096, 21)
QUICK = Sizes(128, 64, 8, 12, 512, 5)


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run the demo, print its tables and write ``results.json`` and ``error.png``.

    Args:
        out: the folder to write to; made where it is not there.
        quick: small sizes: a check that everything runs, with times that say little.

    Returns:
        What results.json holds.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = standard_library_bytes(max(sizes.prompt_tokens, sizes.logits_tokens)).to(device)
    positions = sorted({*_TABLE_POSITIONS, *_spaced(sizes.figure_positions)})
    transformers.logging.set_verbosity_error()

    steps = _MODEL_STEPS + len(positions) + _TIME_STEPS + _FIGURE_STEPS
    with tqdm(total=steps, unit="step") as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        model = build_model(device)
        rope, rotary = Rope.from_config(model.config), TransformersRotary(model.config, device)
        q, k = real_queries_and_keys(model, text[:, :64])
        logits = logits_agreement(model, text[:, : sizes.logits_tokens], step)
        generated = generate_agreement(
            model, text[:, : sizes.prompt_tokens], sizes.new_tokens, step
        )
        del model

        error_rows = []
        for last in positions:
            step(f"error: position {last:,}")
            error_rows += errors_at(last, q, k, rope, methods(rope, rotary, device))

        shape = (1, sizes.time_tokens, *q.shape[2:])
        time_rows = time_rotations(rope, rotary, shape, device, sizes.rounds, step)

        step("figure")
        figure = out / "error.png"
        draw(error_rows, _TITLE, figure)
        bar.set_description("done")

    environment = _environment(device)
    results = {
        "environment": environment,
        "logits": logits,
        "generate": generated,
        "errors": error_rows,
        "times": {"shape": shape, "rows": time_rows},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = [row for row in error_rows if row["position"] in _TABLE_POSITIONS]
    for part in (
        model_text(logits, generated),
        errors_text(table),
        times_text(time_rows, shape, environment["device"]),
    ):
        print("\n" + part)
    print(f"\n{figure} and {out / 'results.json'} written; {time.perf_counter() - begin:.0f} s")
    return results


def _spaced(count: int) -> list[int]:
    """Last positions from 2**8 to 2**31 - 1, evenly spaced in their logarithm."""
    return [round(2 ** (8 + 23 * i / (count - 1))) - 1 for i in range(count)]


def _environment(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        where = f"{platform.machine()} CPU ({capability}), {torch.get_num_threads()} threads"
    return {
        "longrope_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": where,
    }
