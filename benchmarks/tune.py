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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

from longrope_kernels import Rope
from longrope_kernels.backends.triton import device
from longrope_kernels.backends.triton.launch import run_launch
from longrope_kernels.calls.records import (
    AttentionCall,
    DecodeCall,
    Keys,
    RotaryCall,
    Scores,
    Selection,
)
from longrope_kernels.kernels import attention, attention_backward, decode, rotary
from longrope_kernels.kernels.attention_backward import Configs
from longrope_kernels.kernels.attention_tiles import table_of
from longrope_kernels.kernels.launch import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KERNELS = {"forward": attention, "backward": attention_backward, "decode": decode, "rotary": rotary}
ROUNDS, WORTH = 3, 0.99
# Units in the last place of its dtype that another order of sums may move a row.
UNITS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 16}


class Shape(NamedTuple):
    """One sequence: its tokens, the heads of q and of k and v, and the dtype."""

    seq: int = 8192
    heads: int = 32
    kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16

    def random(self, heads: int, dim: int, tokens: int | None = None) -> torch.Tensor:
        """(1, tokens, heads, dim), the tokens of a head together, as the pre-pass lays them out."""
        shape = (1, heads, tokens or self.seq, dim)
        return torch.randn(shape, dtype=self.dtype, device=DEVICE).transpose(1, 2)


class Job(NamedTuple):
    """A place in a table: its present entry, the launches of any, and the tensors they fill."""

    name: str
    present: Any
    launches: Callable[[Any], list[Launch]]
    outputs: tuple[torch.Tensor, ...]


def forward(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """By pre-pass without and with a window, and in registers, which few queries take."""
    few = max(1, attention.PREPASS_QUERIES * shape.kv_heads // shape.heads)
    for name, window, queries in (
        *(("prepass", 0, shape.seq), ("prepass, window", shape.seq // 2, shape.seq)),
        ("registers", 0, min(few, shape.seq)),
    ):
        q, k, v = (
            shape.random(heads, dim, tokens)
            for heads, tokens in ((shape.heads, queries), *[(shape.kv_heads, shape.seq)] * 2)
        )
        out, lse = torch.empty_like(q), q.new_empty(1, shape.heads, queries, dtype=torch.float32)
        in_registers = name == "registers"
        if not in_registers:
            k = k.transpose(1, 2).contiguous().transpose(1, 2)  # as the scratch of the pre-pass
        call = _call(q, k, v, True, window)
        yield Job(
            name,
            attention.choose_config(arch, dim, in_registers, window=window > 0),
            lambda config, given=(call, out, lse, not in_registers): [
                attention.plan(*given, arch, config)
            ],
            (out, lse),
        )


def backward(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """dk and dv in one kernel, each by itself, and dq."""
    q, out, d_out = (shape.random(shape.heads, dim) for _ in range(3))
    k, v = (shape.random(shape.kv_heads, dim) for _ in range(2))
    lse = q.new_empty(1, shape.heads, shape.seq, dtype=torch.float32)
    delta, call = torch.empty_like(lse), _call(q, k, v, True)
    _run([attention.plan(call, out, lse, True, arch)])
    _run([attention_backward.plan_delta(d_out, None, out, lse, delta)])
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    given = (call, d_out, lse, delta, dq, dk, dv, arch)
    present = attention_backward.choose_configs(arch, dim)
    for name, entry, which, filled in (
        ("dk_dv", present.dk, 0, (dk, dv)),
        ("dk", present.dk, 0, (dk,)),
        ("dv", present.dv or present.dk, 1, (dv,)),
        ("dq", present.dq, -1, (dq,)),
    ):
        yield Job(
            name,
            entry,
            lambda config, which=which, fused=name == "dk_dv": [
                attention_backward.plan(*given, Configs(config, None if fused else config, config))[
                    which
                ]
            ],
            filled,
        )


def decoding(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """One query of each head, and as many as make more than 16 rows for a KV head."""
    groups = shape.heads // shape.kv_heads
    k, v = (shape.random(shape.kv_heads, dim) for _ in range(2))
    keys = Keys(k, v, lens=torch.full((1,), shape.seq, device=DEVICE))
    tables, scores = Rope.plain(dim).tables(DEVICE), Scores(True, dim**-0.5)
    for name, queries in (("up to 16 rows", 1), ("more rows", 16 // groups + 1)):
        q = shape.random(shape.heads, dim, queries)
        out, lse = torch.empty_like(q), q.new_empty(1, shape.heads, queries, dtype=torch.float32)

        call = DecodeCall(q, keys, tables, Selection(), scores)

        def launches(
            config: Any, call: DecodeCall = call, out: Any = out, lse: Any = lse
        ) -> list[Launch]:
            multiprocessors = device.multiprocessors_of(call.q, 16)
            splits = decode.splits_of(call, arch, multiprocessors, config)
            of_splits = (splits.most, *lse.shape)
            counters = lse.new_zeros(decode.counters_of(call, config), dtype=torch.int32)
            scratch = lse.new_empty(*of_splits, dim), lse.new_empty(of_splits), counters
            rest = (scratch if splits.most > 1 else None, arch, splits, config)
            return [decode.plan(call, out, lse, *rest)]

        rows = queries * groups
        yield Job(name, decode.choose_config(arch, dim, rows), launches, (out, lse))


def rotating(dim: int, shape: Shape, arch: int) -> Iterator[Job]:
    """q and k out of place."""
    q, k = shape.random(shape.heads, dim), shape.random(shape.kv_heads, dim)
    outputs = torch.empty_like(q), torch.empty_like(k)
    positions, tables = torch.arange(shape.seq, device=DEVICE)[None], Rope.plain(dim).tables(DEVICE)
    call = RotaryCall(q, k, positions, tables, Selection())

    def launches(tile: Any) -> list[Launch]:
        made = rotary.plan(call, *outputs, tile)
        assert made is not None
        return [made]

    most = max(shape.heads, shape.kv_heads)
    present = rotary.choose_tile(shape.seq, most, dim // 2, 0, shape.dtype.itemsize, False)
    yield Job("half pairing", present, launches, outputs)


JOBS = {"forward": forward, "backward": backward, "decode": decoding, "rotary": rotating}


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int = 0
) -> AttentionCall:
    """The queries are the last tokens."""
    (queries, dim), tokens = (q.shape[1], q.shape[3]), k.shape[1]
    at = torch.arange(tokens, device=DEVICE)[None]
    tables, scores = Rope.plain(dim).tables(DEVICE), Scores(causal, dim**-0.5, window)
    return AttentionCall(q, at[:, tokens - queries :], Keys(k, v, at), tables, Selection(), scores)


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        run_launch(launch)


def difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of a row, as a multiple of what rounding may make; NaN if there is one."""
    x, y = (t.float().reshape(-1, t.shape[-1] if t.dim() == 4 else 1) for t in (output, expected))
    size = torch.linalg.vector_norm(y, dim=1)
    allowed = UNITS[output.dtype] * torch.finfo(output.dtype).eps * (size + size.median())
    return float((torch.linalg.vector_norm(x - y, dim=1) / allowed).max())


def seconds(launches: list[Launch]) -> float:
    """Of one run: on a GPU the median of some, the L2 cache cleared before each."""
    if not INTERPRETED:
        bench = triton.testing.do_bench
        return 1e-3 * float(bench(lambda: _run(launches), rep=30, return_mode="median"))
    begin = time.perf_counter()
    _run(launches)
    return time.perf_counter() - begin


def search(job: Job, candidates: Sequence[Any], until: float) -> tuple[Any, float]:
    """The best entry and its seconds; the present one where time is over.

    Half of the time is for compiling and comparing, the rest for timing.
    """
    halfway = (time.monotonic() + until) / 2
    entries = [job.present, *(c for c in candidates if c != job.present)]
    if not INTERPRETED and time.monotonic() < halfway:
        _compile([launch for entry in entries for launch in job.launches(entry)])
    right: dict[Any, list[Launch]] = {}
    expected: list[torch.Tensor] = []
    for entry in entries:
        if right and time.monotonic() > halfway:
            break
        for output in job.outputs:
            output.fill_(torch.nan)
        try:
            launches = job.launches(entry)
            _run(launches)
        except Exception as error:  # whatever the compiler, ptxas and the driver raise
            if not right:
                raise
            _say(f"  {entry}: {type(error).__name__}")
            continue
        expected = expected or [x.clone() for x in job.outputs]
        off = max(map(difference, job.outputs, expected))
        if off <= 1:
            right[entry] = launches
        else:
            _say(f"  {entry}: wrong result, {off:.3g} times what rounding may change")
    times: dict[Any, list[float]] = {entry: [] for entry in right}
    for i_round in range(ROUNDS):
        if i_round and time.monotonic() > until:
            break
        for entry, launches in right.items():
            times[entry].append(seconds(launches))
    medians = {entry: statistics.median(of_entry) for entry, of_entry in times.items()}
    best = min(medians, key=lambda entry: medians[entry])
    present = medians[job.present]
    if medians[best] > WORTH * present:
        best = job.present
    _say(f"  {job.name}: {1e6 * medians[best]:.1f} us, before {1e6 * present:.1f}: {best}")
    return best, medians[best]


def _compile(launches: list[Launch]) -> None:
    """All at once, by as many threads as there are cores; what fails is met again when it runs."""
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for launch in launches:
            options = {"num_warps": launch.warps, "num_stages": launch.stages}
            with contextlib.suppress(Exception):
                launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **options)


def entry_of(kernel: str, found: dict[str, tuple[Any, float]]) -> Any:
    """What stands in the table for a head_dim."""
    best = [config for config, _ in found.values()]
    if kernel != "backward":
        return best[0] if kernel == "rotary" else tuple(best)
    fused, dk, dv, dq = best
    split = found["dk"][1] + found["dv"][1] < found["dk_dv"][1]
    return Configs(dk, dv, dq) if split else Configs(fused, None, dq)


def tune(
    kernels: Sequence[str], dims: Sequence[int], shape: Shape, budget: float
) -> dict[str, dict[int, Any]]:
    """The table of this device's architecture for each kernel, each entry in its share of time."""
    arch, end = device.arch_of(torch.empty(0, device=DEVICE)), time.monotonic() + budget
    left, tables = len(kernels) * len(dims), {}
    for kernel in kernels:
        module: Any = KERNELS[kernel]
        tables[kernel] = dict(table_of(module.CONFIGS, arch)) if kernel != "rotary" else {}
        for dim in dims:
            _say(f"{kernel}, head_dim {dim}")
            jobs = list(JOBS[kernel](dim, shape, arch))
            share = (end - time.monotonic()) / left / len(jobs)
            found = {
                job.name: search(job, module.CANDIDATES, time.monotonic() + share) for job in jobs
            }
            tables[kernel][dim] = entry_of(kernel, found)
            left -= 1
    return tables


def source(tables: dict[str, dict[int, Any]], arch: int) -> str:
    """``CONFIGS = {arch: {head_dim: entry}}`` for each kernel, as Python."""
    lines = []
    for kernel, table in tables.items():
        lines += [f"# {KERNELS[kernel].__name__.rpartition('.')[2]}.py", "CONFIGS = {"]
        lines += [f"    {arch}: {{"]
        lines += [f"        {dim}: {entry!r}," for dim, entry in sorted(table.items())]
        lines += ["    },", "}"]
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 80, 96, 128, 256])
    for name in ("seq", "heads", "kv_heads"):
        default = Shape._field_defaults[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--budget", type=float, default=900.0, help="seconds after which no entry is tried"
    )
    chosen = parser.parse_args(arguments)
    if not INTERPRETED and not torch.cuda.is_available():
        parser.error("needs a CUDA device, torch finds none")
    if chosen.heads % chosen.kv_heads:
        parser.error(f"--kv-heads: expected a divisor of {chosen.heads}, got {chosen.kv_heads}")
    dtype = getattr(torch, chosen.dtype)
    shape = Shape(chosen.seq, chosen.heads, chosen.kv_heads, dtype)
    tables = tune(chosen.kernel, chosen.head_dim, shape, chosen.budget)
    print(source(tables, device.arch_of(torch.empty(0, device=DEVICE))))


if __name__ == "__main__":
    main()
