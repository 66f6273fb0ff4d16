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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from longrope_kernels import Rope
from longrope_kernels.backends.triton import device
from longrope_kernels.backends.triton.launch import run_launch as run
from longrope_kernels.calls import records
from longrope_kernels.calls.records import Keys, Scores, Selection
from longrope_kernels.kernels import attention, attention_backward, decode, rotary
from longrope_kernels.kernels.attention_backward import Configs
from longrope_kernels.kernels.attention_tiles import table_of
from longrope_kernels.kernels.launch import Launch

INTERPRETED = device.interpreting()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HEADS, KV_HEADS = (2, 1) if INTERPRETED else (32, 8)  # of q, and of k and v
ROUNDS, WORTH = 3, 0.99
# Units in the last place of its dtype that another order of sums may move a row.
UNITS = {torch.bfloat16: 4, torch.float32: 16}


class Job(NamedTuple):
    """A place in a table: its present entry, the launch of any, and the tensors that this fills."""

    name: str
    present: Any
    launch: Callable[[Any], Launch]
    outputs: tuple[torch.Tensor, ...]


# ------------------------------------------------------------------------------------- the kernels
# One sequence of ``seq`` tokens, and what any entry of a kernel's table makes of it.


def random(heads: int, seq: int, dim: int) -> torch.Tensor:
    """(1, seq, heads, dim), the tokens of a head together, as the pre-pass lays them out."""
    return torch.randn(1, heads, seq, dim, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)


def tensors(queries: int, seq: int, dim: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, and the output of the queries and their log-sum-exp, to be filled."""
    q, k, v = random(HEADS, queries, dim), random(KV_HEADS, seq, dim), random(KV_HEADS, seq, dim)
    return q, k, v, torch.empty_like(q), q.new_empty(1, HEADS, queries, dtype=torch.float32)


def attending(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = 0
) -> records.AttentionCall:
    """The queries are the last tokens."""
    (_, tokens, _, dim), at = k.shape, torch.arange(k.shape[1], device=DEVICE)[None]
    of_all = Rope.plain(dim).tables(DEVICE), Selection(), Scores(True, dim**-0.5, window)
    return records.AttentionCall(q, at[:, tokens - q.shape[1] :], Keys(k, v, at), *of_all)


def forward(dim: int, seq: int, arch: int) -> Iterator[Job]:
    """By pre-pass without and with a window, and in registers, which few queries take."""
    few = min(seq, max(1, attention.PREPASS_QUERIES * KV_HEADS // HEADS))
    for name, window, queries in (
        ("prepass", 0, seq),
        ("prepass, window", seq // 2, seq),
        ("registers", 0, few),
    ):
        q, k, v, out, lse = tensors(queries, seq, dim)
        rotated = name != "registers"
        present = attention.choose_config(arch, dim, not rotated, window=window > 0)
        launch = partial(attention.plan, attending(q, k, v, window), out, lse, rotated, arch)
        yield Job(name, present, launch, (out, lse))


def backward(dim: int, seq: int, arch: int) -> Iterator[Job]:
    """dk and dv in one kernel, each by itself, and dq."""
    q, k, v, out, lse = tensors(seq, seq, dim)
    d_out, delta, call = random(HEADS, seq, dim), torch.empty_like(lse), attending(q, k, v)
    run(attention.plan(call, out, lse, True, arch))
    run(attention_backward.plan_delta(d_out, None, out, lse, delta))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    plan = partial(attention_backward.plan, call, d_out, lse, delta, dq, dk, dv, arch)
    of_k, of_v, of_q = attention_backward.choose_configs(arch, dim)
    yield Job("dk_dv", of_k, lambda config: plan(Configs(config, None, config))[0], (dk, dv))
    for i, (name, present, filled) in enumerate(
        (("dk", of_k, dk), ("dv", of_v or of_k, dv), ("dq", of_q, dq))
    ):
        yield Job(name, present, lambda config, i=i: plan(Configs(*(config,) * 3))[i], (filled,))


def decoding(dim: int, seq: int, arch: int) -> Iterator[Job]:
    """One query of each head, and as many as make more than 16 rows for a KV head."""
    groups = HEADS // KV_HEADS
    for name, queries in (("up to 16 rows", 1), ("more rows", 16 // groups + 1)):
        q, k, v, out, lse = tensors(queries, seq, dim)
        keys = Keys(k, v, lens=torch.full((1,), seq, device=DEVICE))
        of_all = Rope.plain(dim).tables(DEVICE), Selection(), Scores(True, dim**-0.5)
        call = records.DecodeCall(q, keys, *of_all)

        def launch(config: Any, call: Any = call, out: Any = out, lse: Any = lse) -> Launch:
            splits = decode.splits_of(call, arch, device.multiprocessors_of(out, 16), config)
            shape = splits.most, *lse.shape
            # Counters of its own: an entry that is wrong may leave other than zeros there.
            counters = lse.new_zeros(decode.counters_of(call, config), dtype=torch.int32)
            scratch = (lse.new_empty(*shape, dim), lse.new_empty(shape), counters)
            rest = (scratch if splits.most > 1 else None, arch, splits, config)
            return decode.plan(call, out, lse, *rest)

        yield Job(name, decode.choose_config(arch, dim, queries * groups), launch, (out, lse))


def rotating(dim: int, seq: int, arch: int) -> Iterator[Job]:
    """q and k out of place."""
    q, k = random(HEADS, seq, dim), random(KV_HEADS, seq, dim)
    outputs = torch.empty_like(q), torch.empty_like(k)
    of_all = torch.arange(seq, device=DEVICE)[None], Rope.plain(dim).tables(DEVICE), Selection()
    present = rotary.choose_tile(seq, HEADS, dim // 2, 0, q.dtype.itemsize, False)
    launch = partial(rotary.plan, records.RotaryCall(q, k, *of_all), *outputs)
    yield Job("half pairing", present, launch, outputs)


KERNELS = {
    "forward": (attention, forward),
    "backward": (attention_backward, backward),
    "decode": (decode, decoding),
    "rotary": (rotary, rotating),
}

# -------------------------------------------------------------------------------------- the search


def search(job: Job, candidates: Sequence[Any], until: float) -> tuple[Any, float]:
    """The best entry and its seconds; the present one where time is over.

    Half of the time is for compiling and comparing, the rest for timing.
    """
    halfway = (time.monotonic() + until) / 2
    entries = dict.fromkeys((job.present, *candidates))
    if not INTERPRETED and time.monotonic() < halfway:
        compile_all(map(job.launch, entries))
    times: dict[Any, list[float]] = {}
    expected: list[torch.Tensor] = []
    for entry in entries:
        if times and time.monotonic() > halfway:
            break
        for output in job.outputs:
            output.fill_(torch.nan)
        try:
            run(job.launch(entry))
        except Exception as error:  # whatever the compiler, ptxas and the driver raise
            if not times:
                raise
            say(f"  {entry}: {type(error).__name__}")
            continue
        expected = expected or [x.clone() for x in job.outputs]
        off = max(map(difference, job.outputs, expected))
        if off <= 1:
            times[entry] = []
        else:
            say(f"  {entry}: wrong result, {off:.3g} times what rounding may change")
    for i_round in range(ROUNDS):
        if i_round and time.monotonic() > until:
            break
        for entry, of_entry in times.items():
            of_entry.append(seconds(job.launch(entry)))
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
    parser.add_argument("--seq", type=int, default=8192, help="tokens")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds to try entries in")
    chosen = parser.parse_args(arguments)
    if not INTERPRETED and not torch.cuda.is_available():
        parser.error("needs a CUDA device, torch finds none")
    arch, end = device.arch_of(torch.empty(0, device=DEVICE)), time.monotonic() + chosen.budget
    left = len(chosen.kernel) * len(chosen.head_dim)
    for kernel in chosen.kernel:
        module, jobs_of = KERNELS[kernel]
        table = {} if kernel == "rotary" else dict(table_of(module.CONFIGS, arch))
        for dim in chosen.head_dim:
            say(f"{kernel}, head_dim {dim}")
            jobs, found = list(jobs_of(dim, chosen.seq, arch)), {}
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
