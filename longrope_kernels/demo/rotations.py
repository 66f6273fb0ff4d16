"""The rotations that the demo compares: how far each is from float64, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import Timer

from ..backends import choose as backends
from ..ops.rotary import apply_rotary
from ..rope import Rope
from .peers import TransformersRotary

Rotations = dict[str, Callable[..., Any]]
Rows = list[dict[str, Any]]
_COMPILED = "transformers torch.compile"


def backends_for(device: torch.device) -> list[str]:
    """Those made for this kind of device, where they can run."""
    rows = [row for row in backends.table() if {"any", device.type} & set(row["devices"])]
    return [row["name"] for row in rows if row["missing"] is None]


def by(rope: Rope, backend: str, **how: Any) -> Callable[..., Any]:
    """``rotate(q, k, positions)`` by a named backend; the last position chooses the factor set."""

    def rotate(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> Any:
        lengths = positions[:, -1] + 1
        return apply_rotary(q, k, positions, rope, lengths=lengths, backend=backend, **how)

    return rotate


def errors_at(last: int, q: torch.Tensor, rope: Rope, rotations: Rotations) -> Rows:
    """A row for each rotation of a float32 q (1, seq, heads, dim), its last token at ``last``.

    ``angle_error`` is the largest, in rad; ``float32_error`` that of rotated q, norm over norm.
    """
    exact = by(rope, "reference")  # given float64
    positions = torch.arange(last - q.shape[1] + 1, last + 1, device=q.device)[None]
    # Each pair rotates (1, 0) to a (cos, sin), which tells the angle whatever the method does.
    unit = torch.zeros_like(q[:, :, :1])
    unit[..., : rope.pairs] = 1.0

    def angles(method: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        x = method(x, x, positions)[0].double()
        return torch.atan2(x[..., rope.pairs : rope.rotary_dim], x[..., : rope.pairs])

    truth = exact(q.double(), q.double(), positions)[0]
    rows: Rows = []
    for name, method in rotations.items():
        turns = (angles(method, unit) - angles(exact, unit.double())) / (2 * math.pi)
        angle = float((turns - turns.round()).abs().max()) * 2 * math.pi
        error = float((method(q, q, positions)[0] - truth).norm() / truth.norm())
        found = {"angle_error": angle, "float32_error": error}
        rows.append({"position": last, "method": name, **found})
    return rows


def time_rotations(
    rope: Rope, rotary: TransformersRotary, q: torch.Tensor, dtype: torch.dtype, seconds: float
) -> Rows:
    """The median time of each way to rotate q (1, seq, heads, dim) and a k as large.

    transformers' table is made beforehand, since a model makes one for all its layers; the kernels
    make their angles in each call. ``speedup`` is over transformers eager; GB/s count q and k read
    once and written once; ``reason`` says why one did not run. ``seconds`` are for each.
    """
    positions = torch.arange(q.shape[1], device=q.device)[None]
    given, spare, into = ([torch.randn_like(q).to(dtype) for _ in "qk"] for _ in range(3))
    table = rotary.table(positions, dtype)
    heads_first = [x.transpose(1, 2) for x in given]  # as views, which is how a model has them
    compiled = torch.compile(rotary.apply, dynamic=False)
    variants: Rotations = {"transformers eager": partial(rotary.apply, *heads_first, *table)}
    variants[_COMPILED] = partial(compiled, *heads_first, *table)
    for name in backends_for(q.device):
        variants[name] = partial(by(rope, name), *given, positions)
        if name != "reference":
            variants[f"{name}, in place"] = partial(by(rope, name, inplace=True), *spare, positions)
    variants["clone"] = lambda: [x.clone() for x in given]
    variants["copy_"] = lambda: [x.copy_(y) for x, y in zip(into, given, strict=True)]
    rows: Rows = []
    for name, run in variants.items():
        row: dict[str, Any] = {"variant": name, "dtype": str(dtype).removeprefix("torch.")}
        rows.append(row)
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        try:
            row["ms"] = 1e3 * timer.blocked_autorange(min_run_time=seconds).median
        except Exception as error:
            if name != _COMPILED:
                raise
            row["reason"] = str(error).strip().splitlines()[0]  # no C++ compiler, say
        else:
            row["gb_per_s"] = 4e-6 * q.numel() * dtype.itemsize / row["ms"]
            row["speedup"] = rows[0]["ms"] / row["ms"]
    return rows
