"""The demo from beginning to end."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from .._version import __version__
from ..rope import Rope
from ..search.terminal import table
from .figure import draw
from .model import build_model, generate_agreement, logits_agreement
from .peers import TransformersRotary
from .rotations import Rotations, backends_for, by, errors_at, time_rotations

_POSITIONS = (4095, 2**17 - 1, 2**20 - 1, 2**21 - 1)  # of the table


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Print the tables as they come, and write ``results.json`` and ``error.png`` into ``out``.

    ``quick`` takes small sizes, with times that say little. Returns what results.json holds.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    logits_of, prompt, new, points, seq, seconds = (
        (128, 64, 8, 12, 512, 0.05) if quick else (1024, 4090, 12, 32, 4096, 1.0)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capability = torch.backends.cpu.get_cpu_capability()
    where = f"{platform.machine()} CPU ({capability}), {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else where
    transformers.logging.set_verbosity_error()
    model = build_model(device)
    rope, rotary = Rope.from_config(model.config), TransformersRotary(model.config, device)
    text = torch.randint(256, (1, max(logits_of, prompt)), device=device)

    print(f"A Phi-3 of 2 layers, 32 heads of 96 and random weights on {where} ...", flush=True)
    logits = logits_agreement(model, text[:, :logits_of])
    rows = [{"model": name, "difference": f"{logits[name]:.1e}"} for name in list(logits)[2:]]
    _table(f"Largest difference from float32 logits up to {logits['largest_logit']:.1f}", rows)
    generated = generate_agreement(model, text[:, :prompt], new)
    across = "" if quick else " across the switch at 4097, cache='rotated'"
    verdict = "the same tokens" if generated["equal"] else "OTHER TOKENS"
    print(f"\ngenerate(), {prompt} + {new} tokens{across}: {verdict} with and without the kernels")

    # Last positions from 2**8 to 2**31 - 1, evenly spaced in their logarithm.
    spaced = {round(2 ** (8 + 23 * i / (points - 1))) - 1 for i in range(points)}
    last, q = sorted({*_POSITIONS, *spaced}), torch.randn((1, 64, 32, 96), device=device)
    rotations: Rotations = {"transformers": rotary}
    rotations |= {name: by(rope, name) for name in backends_for(device)}
    errors = [row for n in last for row in errors_at(n, q, rope, rotations)]
    draw(errors, out / "error.png")
    rows = [error_cells(row) for row in errors if row["position"] in _POSITIONS]
    _table("Error against float64", rows)

    q = torch.randn((1, seq, 32, 96), device=device)
    times = time_rotations(rope, rotary, q, torch.float32, seconds)
    times += time_rotations(rope, rotary, q, torch.bfloat16, seconds)
    _table(f"Time of rotating q and k {tuple(q.shape)} each", [time_cells(row) for row in times])

    versions = {"longrope_kernels": __version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {
        "environment": {**versions, "device": where},
        "logits": logits,
        "generate": generated,
        "errors": errors,
        "times": {"shape": q.shape, "rows": times},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {out}/error.png, results.json; {time.perf_counter() - begin:.0f} s")
    return results


def error_cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of `errors_at` as text."""
    cells = {"method": row["method"], "last position": f"{row['position']:,}"}
    names = {"angle_error": "angle (rad)", "float32_error": "q in float32"}
    return cells | {shown: f"{row[name]:.1e}" for name, shown in names.items()}


def time_cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of `time_rotations` as text."""
    cells = {"variant": row["variant"], "dtype": row["dtype"]}
    if "reason" in row:
        return {**cells, "ms": f"not measured: {row['reason']}", "GB/s": "", "x eager": ""}
    names = {"ms": ("ms", ".2f"), "gb_per_s": ("GB/s", ".1f"), "speedup": ("x eager", ".1f")}
    return cells | {shown: format(row[name], form) for name, (shown, form) in names.items()}


def _table(title: str, rows: list[dict[str, str]]) -> None:
    print(f"\n{title}", flush=True)
    table(list(rows[0]), [list(row.values()) for row in rows])
