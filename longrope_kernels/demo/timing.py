"""Time of one rotation of q and k, against transformers and against a plain copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..ops.rotary import apply_rotary
from ..rope.value import Rope
from .methods import usable_backends
from .peers import TransformersRotary

_DTYPES = (torch.float32, torch.bfloat16)


def time_rotations(
    rope: Rope,
    rotary: TransformersRotary,
    shape: tuple[int, int, int, int],
    device: torch.device,
    rounds: int,
    step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The median time of each variant, taken in turns so that noise meets all alike.

    Args:
        rope: of the model.
        rotary: transformers' rotation. Its table is made beforehand and not timed, since a model
            makes one for all its layers; the kernels make their angles in each call.
        shape: (batch, seq, heads, dim) of q and of k.
        device: where to run.
        rounds: how often each variant runs.
        step: called with what is done next.

    Returns:
        Rows of ``variant``, ``dtype``, ``ms``, ``gb_per_s`` (q and k read once and written once)
        and ``speedup`` over transformers eager; ``reason`` in place of numbers where a variant
        did not run.
    """
    rows = []
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        step(f"time: {name}, compiling transformers' rotation")
        q, k = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        variants, failed = _variants(q, k, rope, rotary)
        step(f"time: {name}")
        seconds = _measure(variants, device, rounds)
        traffic = 2 * (q.nbytes + k.nbytes)
        rows += [
            {
                "variant": variant,
                "dtype": name,
                "ms": 1e3 * seconds[variant],
                "gb_per_s": 1e-9 * traffic / seconds[variant],
                "speedup": seconds["transformers eager"] / seconds[variant],
            }
            for variant in variants
        ]
        rows += [{"variant": v, "dtype": name, "reason": reason} for v, reason in failed.items()]
    return rows


def _variants(
    q: torch.Tensor, k: torch.Tensor, rope: Rope, rotary: TransformersRotary
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What to time, each with its tensors, and why others cannot run."""
    seq = q.shape[1]
    positions = torch.arange(seq, device=q.device)
    table = rotary.table(positions[None], q.dtype)
    heads_first = q.transpose(1, 2), k.transpose(1, 2)  # as views, which is how a model has them
    failed = {}
    variants: dict[str, Callable[[], Any]] = {
        "transformers eager": partial(rotary.apply, *heads_first, *table)
    }
    compiled = torch.compile(rotary.apply, dynamic=False)
    try:
        compiled(*heads_first, *table)
        variants["transformers torch.compile"] = partial(compiled, *heads_first, *table)
    except Exception as error:  # no C++ compiler, say; the demo goes on without this row
        failed["transformers torch.compile"] = str(error).strip().splitlines()[0]

    lengths = torch.full((q.shape[0],), seq, device=q.device)
    rotate = partial(apply_rotary, positions=positions, factors=rope, lengths=lengths)
    for backend in usable_backends(q.device):
        variants[backend] = partial(rotate, q, k, backend=backend)
        if backend != "reference":
            spare = q.clone(), k.clone()
            variants[f"{backend}, in place"] = partial(
                rotate, *spare, backend=backend, inplace=True
            )
    into = torch.empty_like(q), torch.empty_like(k)
    variants["clone"] = lambda: (q.clone(), k.clone())
    variants["copy_"] = lambda: (into[0].copy_(q), into[1].copy_(k))
    return variants, failed


def _measure(
    variants: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median seconds of each variant."""
    clock = _device_seconds if device.type == "cuda" else _host_seconds
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times[name].append(clock(run))
    return {name: statistics.median(values) for name, values in times.items()}


def _host_seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    del result  # freed after the clock has stopped: returning memory is not the variant's work
    return seconds


def _device_seconds(run: Callable[[], Any]) -> float:
    # Writing more than any L2 holds makes each variant read its inputs from memory.
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)  # type: ignore[no-any-return]
