"""One sequence over processes of this machine: memory, a long cache, the ring, and its host work.

    python benchmarks/spread.py --out spread.json [--only memory decode ring host] [--quick]

On gloo and CPUs; processes share the cores, so nothing gets faster by more of them. Four tables:

- memory: resident memory that a forward of a model of one layer takes at its peak in each of 1, 2
  and 4 processes, beyond what was there before it.
- decode: a step over 2,097,152 cached keys of 8 KV heads of 128 numbers in bfloat16, 8.6 GB, by one
  process and by two, each with half of them: the time beside that of reading the cache, and the
  error of some heads against float64.
- ring: attention of one process with two threads and of two with one each, in turns.
- host: processor time of a step of a ring of 8 ranks with tiny blocks, messages left out: with the
  attention of a block, and with a stand-in for it.

Seconds are those of the clock, with the load of the machine beside them, and of its processors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory import peak_bytes
from report.facts import describe
from transformers import LlamaConfig, LlamaModel

from longrope_kernels import FactorSet, Rope
from longrope_kernels import attention as attend_alone
from longrope_kernels import decode as decode_alone
from longrope_kernels.calls.records import Scores
from longrope_kernels.distributed import attention, blocks, decode, ring, shard
from longrope_kernels.distributed.ranks import Line
from longrope_kernels.distributed.shards import spans_of
from longrope_kernels.integrations.transformers import enable

ROOT = Path(__file__).parents[1]
PARTS = ("memory", "decode", "ring", "host")


@dataclass(frozen=True)
class Sizes:
    """In tokens, where nothing else is said."""

    forward: int = 131072
    hidden: int = 512  # numbers of a hidden state
    keys: int = 2**21
    period: int = 2**17  # keys are those of so many, shifted each time
    checked: tuple[int, ...] = (0, 31)  # query heads that are held to float64
    steps: int = 3
    ring: int = 8192
    rounds: int = 7
    host_rounds: int = 300


QUICK = Sizes(2048, 64, 2**13, 2**10, (0, 31), 2, 256, 2, 20)


def in_processes(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, size, *args)`` returns in each of some processes with a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked: they have the imports, and no threads run here that they would miss.
        mp.start_processes(_child, (size, folder, function, args), nprocs=size, start_method="fork")
        return [torch.load(Path(folder) / str(rank)) for rank in range(size)]


def _child(rank: int, size: int, folder: str, function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(function(rank, size, *args), Path(folder) / str(rank))
    dist.destroy_process_group()


def plain_rope(pairs: int = 64) -> Rope:
    return Rope((FactorSet(tuple(1.5 + i / 8 for i in range(pairs)), 4, 1.1),))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = run()
    return time.perf_counter() - begin, value


# ------------------------------------------------------------------------------------------ memory


def memory(sizes: Sizes) -> list[dict[str, Any]]:
    """Bytes at the peak in each process, by how many there are."""
    rows = []
    for size in (1, 2, 4):
        found = in_processes(size, _forward, sizes)
        rows.append({"processes": size, "tokens": sizes.forward, "bytes": found})
        print(f"memory: {size} processes: {[round(x / 1e6) for x in found]} MB", flush=True)
    return rows


def _forward(rank: int, size: int, sizes: Sizes) -> int | None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=sizes.forward,
    )
    model = enable(LlamaModel(config).eval(), group=dist.group.WORLD if size > 1 else None)
    ids = torch.randint(0, 256, (1, sizes.forward))
    with torch.no_grad():
        model(input_ids=ids[:, : 16 * size], use_cache=False)  # what is loaded and kept once
        return peak_bytes(lambda: model(input_ids=ids, use_cache=False))


# ------------------------------------------------------------------------------------------ decode

HEADS, KV_HEADS, DIM = 32, 8, 128


def cached(sizes: Sizes, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v (1, slots, KV heads, dim) of a stretch of slots, the same in every process.

    The value of a slot is the key of the slot a period later, so that both lie in half the memory:
    what a step reads is 8.6 GB all the same, since a period is more than any processor caches.
    """
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((sizes.period, KV_HEADS, DIM), generator=generator).bfloat16()
    stored = torch.empty((1, stop - start + sizes.period, KV_HEADS, DIM), dtype=torch.bfloat16)
    for first in range(start, stop + sizes.period, sizes.period):
        slots = torch.arange(first, min(first + sizes.period, stop + sizes.period))
        own = (slots + 977 * (slots // sizes.period)) % sizes.period
        stored[0, first - start : first - start + len(slots)] = base[own]
    return stored[:, : stop - start], stored[:, sizes.period :]


def query() -> torch.Tensor:
    return torch.randn((1, 1, HEADS, DIM), generator=torch.Generator().manual_seed(1)).bfloat16()


def by_formula(sizes: Sizes, k: torch.Tensor, v: torch.Tensor, head: int) -> torch.Tensor:
    """The output of a query head in float64, (dim,), over chunks of keys."""
    rope = plain_rope()
    (one,) = rope.sets
    pairs = rope.pairs
    theta = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    slow = theta / torch.tensor(one.factors, dtype=torch.float64)

    def turned(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        far = (at >= one.n_hat)[:, None]
        angle = at[:, None].double() * torch.where(far, slow, theta)
        scale = torch.where(far, float(one.attention_factor), 1.0)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        a, b = x.double().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    last = sizes.keys - 1
    q = turned(query()[0, 0, head][None], torch.tensor([last]))[0]
    total, most, out = 0.0, -float("inf"), torch.zeros(DIM, dtype=torch.float64)
    of_group = head * KV_HEADS // HEADS
    for at in range(0, sizes.keys, 2**15):
        keys = torch.arange(at, min(at + 2**15, sizes.keys))
        scores = turned(k[0, keys, of_group], keys) @ q / DIM**0.5
        highest = max(most, float(scores.max()))
        p = torch.exp(scores - highest)
        shrink = torch.tensor(most - highest).exp().item()
        out = out * shrink + p @ v[0, keys, of_group].double()
        total, most = total * shrink + float(p.sum()), highest
    return out / total


def long_decode(sizes: Sizes) -> list[dict[str, Any]]:
    """A step by one process and by two."""
    rows = []
    (alone,) = in_processes(1, _decode_step, sizes)
    truth = alone.pop("truth")
    pair = in_processes(2, _decode_step, sizes)
    for size, found in ((1, [alone]), (2, pair)):
        heads = list(sizes.checked)
        off = [float((x["out"][heads].double() - truth).abs().max()) for x in found]
        row = {"processes": size, "keys": sizes.keys, "error": max(off)}
        row["rounding"] = float((truth - truth.bfloat16().double()).abs().max())
        row["largest"] = float(truth.abs().max())
        for name in ("seconds", "reading", "bytes"):
            row[name] = [x[name] for x in found]
        row["load"] = os.getloadavg()[0]
        rows.append(row)
        print(f"decode: {size} processes: {row}", flush=True)
    return rows


def _decode_step(rank: int, size: int, sizes: Sizes) -> dict[str, Any]:
    ((start, stop),) = spans_of(sizes.keys, rank, size, "contiguous")
    k, v = cached(sizes, start, stop)
    q, rope = query(), plain_rope()
    slots = torch.arange(start, stop)[None]
    here, total = (torch.tensor([n]) for n in (k.shape[1], sizes.keys))

    def step() -> torch.Tensor:
        if size == 1:
            out = decode_alone(q, k, v, here, rope)
        else:
            out = decode(q, k, v, here, rope, key_slots=slots, total_lens=total)
        assert isinstance(out, torch.Tensor)
        return out

    def read() -> list[int]:
        return [int(x.view(torch.int64).sum()) for x in (k, v)]

    found: dict[str, Any] = {"bytes": k.nbytes + v.nbytes, "out": step()[0, 0]}
    times: dict[str, list[float]] = {"seconds": [], "reading": []}
    for _ in range(sizes.steps):  # in turns
        for name, run in (("seconds", step), ("reading", read)):
            dist.barrier()
            times[name].append(timed(run)[0])
    found |= {name: min(values) for name, values in times.items()}
    if size == 1:
        found["truth"] = torch.stack([by_formula(sizes, k, v, head) for head in sizes.checked])
    return found


# -------------------------------------------------------------------------------------------- ring


def ring_beside_threads(sizes: Sizes) -> list[dict[str, Any]]:
    """Seconds of a call, and of all processors together."""
    rows = []
    for size in (1, 2) * 2:
        found = in_processes(size, _ring, sizes)
        row = {"processes": size, "threads": 2 // size, "tokens": sizes.ring}
        row["seconds"] = max(x["seconds"] for x in found)
        row["processors"] = sum(x["processors"] for x in found)
        row["load"] = os.getloadavg()[0]
        rows.append(row)
        print(f"ring: {row}", flush=True)
    return rows


def _ring(rank: int, size: int, sizes: Sizes) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, sizes.ring, heads, 64) for heads in (8, 2, 2))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    at, rope = torch.arange(sizes.ring)[None], plain_rope(32)
    if size > 1:
        q, k, v, at = (shard(x) for x in (q, k, v, at))
    torch.set_num_threads(2 // size)

    def run() -> Any:
        if size == 1:
            return attend_alone(q, k, v, at, rope, backend="composed")
        return attention(q, k, v, at, rope, backend="composed", schedule="ring")

    run()
    seconds, processors = [], []
    for _ in range(sizes.rounds):
        dist.barrier()
        begin = time.process_time()
        seconds.append(timed(run)[0])
        processors.append(time.process_time() - begin)
    return {"seconds": min(seconds), "processors": statistics.median(processors)}


# -------------------------------------------------------------------------------------------- host


def host(sizes: Sizes) -> list[dict[str, Any]]:
    """Processor microseconds of a step, forward: the least of some rounds."""
    size, tokens = 8, 16
    spans = tuple(spans_of(size * tokens, i, size, "balanced") for i in range(size))
    hidden = blocks.Hidden(Scores(True, 0.125), size * tokens)
    q, k, v = (torch.randn(1, tokens, heads, 64) for heads in (4, 2, 2))
    start, finish, attend = ring.start, ring.finish, blocks.attend
    made = torch.randn(q.shape), torch.randn(1, 4, tokens)

    def stand_in(_: str, parts: Any, pair: Any, __: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return made[0][:, pair.queries], made[1][..., pair.queries]

    ring.start, ring.finish = (lambda *_: []), (lambda *_: None)  # type: ignore[assignment]
    torch.set_num_threads(1)
    rows = []
    try:
        for name, function in (("all", attend), ("without attention", stand_in)):
            blocks.attend = function
            least = float("inf")
            for _ in range(sizes.host_rounds):
                plan = ring.Plan(Line(None, 3, size), spans, hidden, "composed")
                begin = time.thread_time()
                ring.attend(q, k, v, plan)
                least = min(least, time.thread_time() - begin)
            rows.append({"what": name, "microseconds": 1e6 * least / size})
            print(f"host: {rows[-1]}", flush=True)
    finally:
        ring.start, ring.finish, blocks.attend = start, finish, attend
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    given = parser.parse_args()
    sizes = QUICK if given.quick else Sizes()
    found: dict[str, Any] = {"machine": describe(ROOT), "sizes": asdict(sizes)}
    if given.out.exists():
        found = json.loads(given.out.read_text("utf-8")) | found
    functions = (memory, long_decode, ring_beside_threads, host)
    for name, function in zip(PARTS, functions, strict=True):
        if name in given.only:
            found[name] = function(sizes)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
