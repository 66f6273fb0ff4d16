"""Search the fastest tiles of the Triton kernels on this GPU, and print their tables as Python.

    python -m benchmarks.tune --budget 900 > tables.py
    python -m benchmarks.tune --kernel decode --head-dim 128 --seq 32768

Each kernel has a list of candidates beside its table, ``CANDIDATES``. A candidate that does not
compile or fit is left out; one that computes something else than the present entry is told and
never timed; the others are timed in turns with a cold L2 cache. An entry changes only where that
saves at least 1 % of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from longrope_kernels.backends.triton import device
from longrope_kernels.backends.triton.launch import run_launch as run
from longrope_kernels.kernels.attention_backward import Configs
from longrope_kernels.kernels.attention_tiles import table_of
from longrope_kernels.kernels.launch import Launch

from .tunable import DEVICE, INTERPRETED, KERNELS, Job, Shape

ROUNDS, WORTH = 3, 0.99
# Units in the last place of its dtype that another order of sums may move a row.
UNITS = {torch.bfloat16: 4, torch.float32: 16}


def search(job: Job, candidates: Sequence[Any], until: float) -> tuple[Any, float]:
    """The best entry and its seconds; the present one where time is over.

    Half of the time is for compiling and comparing, the rest for timing.
    """
    halfway = (time.monotonic() + until) / 2
    entries = dict.fromkeys((job.present, *candidates))
    if not INTERPRETED and time.monotonic() < halfway:
        compile_all(job.launch(entry) for entry in entries)
    right: dict[Any, Launch] = {}
    expected: list[torch.Tensor] = []
    for entry in entries:
        if right and time.monotonic() > halfway:
            break
        for output in job.outputs:
            output.fill_(torch.nan)
        try:
            launch = job.launch(entry)
            run(launch)
        except Exception as error:  # whatever the compiler, ptxas and the driver raise
            if not right:
                raise
            say(f"  {entry}: {type(error).__name__}")
            continue
        expected = expected or [x.clone() for x in job.outputs]
        off = max(map(difference, job.outputs, expected))
        if off <= 1:
            right[entry] = launch
        else:
            say(f"  {entry}: wrong result, {off:.3g} times what rounding may change")
    times: dict[Any, list[float]] = {entry: [] for entry in right}
    for i_round in range(ROUNDS):
        if i_round and time.monotonic() > until:
            break
        for entry, launch in right.items():
            times[entry].append(seconds(launch))
    medians = {entry: statistics.median(of_entry) for entry, of_entry in times.items()}
    best, present = min(medians, key=medians.__getitem__), medians[job.present]
    if medians[best] > WORTH * present:
        best = job.present
    say(f"  {job.name}: {1e6 * medians[best]:.1f} us, before {1e6 * present:.1f}: {best}")
    return best, medians[best]


def compile_all(launches: Iterable[Launch]) -> None:
    """All at once, by as many threads as there are cores; what fails is met again when it runs."""
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for launch in launches:
            options = {"num_warps": launch.warps, "num_stages": launch.stages}
            with contextlib.suppress(Exception):
                launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **options)


def difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of a row, as a multiple of what rounding may make; NaN if there is one."""
    x, y = (t.float().reshape(-1, t.shape[-1] if t.dim() == 4 else 1) for t in (output, expected))
    size = torch.linalg.vector_norm(y, dim=1)
    allowed = UNITS[output.dtype] * torch.finfo(output.dtype).eps * (size + size.median())
    return float((torch.linalg.vector_norm(x - y, dim=1) / allowed).max())


def seconds(launch: Launch) -> float:
    """Of one run: on a GPU the median of some, the L2 cache cleared before each."""
    if not INTERPRETED:
        timed = triton.testing.do_bench(lambda: run(launch), rep=30, return_mode="median")
        return 1e-3 * float(timed)
    begin = time.perf_counter()
    run(launch)
    return time.perf_counter() - begin


def entry_of(kernel: str, found: dict[str, tuple[Any, float]]) -> Any:
    """What stands in the table for a head_dim."""
    best = [config for config, _ in found.values()]
    if kernel != "backward":
        return best[0] if kernel == "rotary" else tuple(best)
    fused, dk, dv, dq = best
    split = found["dk"][1] + found["dv"][1] < found["dk_dv"][1]
    return Configs(dk, dv, dq) if split else Configs(fused, None, dq)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Each entry in its share of the time; what is not tuned stands in its table as it was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 80, 96, 128, 256])
    for name, default in (("seq", 8192), ("heads", 32), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--budget", type=float, default=900.0, help="seconds after which no entry is tried"
    )
    chosen = parser.parse_args(arguments)
    if not INTERPRETED and not torch.cuda.is_available():
        parser.error("needs a CUDA device, torch finds none")
    if chosen.heads % chosen.kv_heads:
        parser.error(f"--kv-heads: expected a divisor of {chosen.heads}, got {chosen.kv_heads}")
    shape = Shape(chosen.seq, chosen.heads, chosen.kv_heads)
    arch, end = device.arch_of(torch.empty(0, device=DEVICE)), time.monotonic() + chosen.budget
    left = len(chosen.kernel) * len(chosen.head_dim)
    for kernel in chosen.kernel:
        module, jobs_of = KERNELS[kernel]
        table = {} if kernel == "rotary" else dict(table_of(module.CONFIGS, arch))
        for dim in chosen.head_dim:
            say(f"{kernel}, head_dim {dim}")
            jobs, found = list(jobs_of(dim, shape, arch)), {}
            share = (end - time.monotonic()) / left / len(jobs)
            for job in jobs:
                found[job.name] = search(job, module.CANDIDATES, time.monotonic() + share)
            table[dim] = entry_of(kernel, found)
            left -= 1
        entries = (f"    {dim}: {entry!r},\n" for dim, entry in sorted(table.items()))
        file = f"{module.__name__.rpartition('.')[2]}.py"
        print(f"# {file}\nCONFIGS[{arch}] = {{\n{''.join(entries)}}}", flush=True)


if __name__ == "__main__":
    main()
