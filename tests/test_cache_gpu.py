"""What only a device can show of caches: nothing waits for it, and one graph serves all lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import factors

from longrope_kernels import FactorSet, KVCache, PagedKVCache, Rope

pytestmark = pytest.mark.gpu

KV_HEADS, DIM, BATCH, CAPACITY = 2, 64, 3, 96
PLACE: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
ROPE = Rope(
    (
        FactorSet(factors(DIM // 2), 0, 1.0, 20),
        FactorSet(factors(DIM // 2, 2.0), 5, 1.1, 33),
        FactorSet(factors(DIM // 2, 4.0), 3, 1.2),
    )
)
Cache = KVCache | PagedKVCache
every_kind = pytest.mark.parametrize("kind", ["dense", "paged"])
every_policy = pytest.mark.parametrize("policy", ["switch", "pin"])


def make(kind: str, batch: int = BATCH, capacity: int = CAPACITY, **kwargs: Any) -> Cache:
    if kind == "dense":
        return KVCache(ROPE, batch, capacity, KV_HEADS, DIM, **PLACE, **kwargs)
    return PagedKVCache(ROPE, batch, batch * capacity // 16, 16, KV_HEADS, DIM, **PLACE, **kwargs)


def new(count: int, heads: int = KV_HEADS, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, count, heads, DIM, **PLACE)


@every_policy
@every_kind
def test_no_sync(kind: str, policy: str) -> None:
    cache = make(kind, policy=policy)
    q, k, packed = new(1, 4), new(1), new(7).flatten(0, 1)
    cache.append(k, k)
    cache.decode(q)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.append(packed, packed, (19, 0, 2))
        cache.decode(q)
        cache.truncate(0, 5)
        cache.free(1)
        cache.fork(0, 1)
        cache.append(k, k)
        cache.append(k[:1], k[:1], rows=[2])
        cache.decode(q)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.lens.tolist() == list(cache.lengths) == [6, 6, 5]


@every_policy
@every_kind
@pytest.mark.parametrize("q_len", [1, 3])
def test_one_graph_for_all_lengths(kind: str, policy: str, q_len: int) -> None:
    """Captured at the first token, replayed past two boundaries; rows pause, end, fork, return."""
    cache = make(kind, policy=policy)
    q, k, v = new(q_len, 4), new(q_len), new(q_len)
    rows: list[list[torch.Tensor]] = [[] for _ in range(BATCH)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cache.extend(q_len)
        cache.write(k, v)
        cache.decode(q)
    torch.cuda.current_stream().wait_stream(stream)
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(k, v)
        out = cache.decode(q)

    for step in range(CAPACITY // q_len - 1):
        if step == 12:
            cache.free(1)
            cache.fork(0, 1)
            rows[1] = list(rows[0])
        if step == 25 // q_len:
            cache.truncate(2, 1)
            rows[2] = rows[2][:1]
        counts = [q_len, step % (q_len + 1), q_len - step % 2]
        cache.extend(counts)
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        for row, count in enumerate(counts):
            rows[row] += list(k[row, q_len - count :].clone())
            wanted = torch.stack(rows[row]) if rows[row] else k[0, :0]
            assert torch.equal(cache.gather(row)[0], wanted)
        assert torch.equal(out, cache.decode(q))
        assert not out.isnan().any()


def test_upkeep_stays_out_of_graphs() -> None:
    cache = make("paged", policy="pin")
    k = new(1)
    cache.append(k, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(k, k)
        for call in (
            lambda: cache.extend(1),
            lambda: cache.free(0),
            lambda: cache.fork(0, 1),
            lambda: cache.pin(0, length=3),
            lambda: cache.reset(),
        ):
            with pytest.raises(RuntimeError, match="outside of the CUDA graph"):
                call()
        with pytest.raises(ValueError, match=r"k: expected shape .* in a CUDA graph"):
            cache.write(k[:2], k[:2])
    assert cache.lengths == (1, 1, 1)


# ------------------------------------------------------------------------- appending and attending

LONG = 2112  # a capacity whose keys are split


class Step:
    """`decode` of a cache with its newest keys, on a stream, in a graph of its own or not."""

    def __init__(self, kind: str, lengths: tuple[int, ...]) -> None:
        batch = len(lengths)
        self.twin, self.cache = (make(kind, batch, LONG, policy="switch") for _ in range(2))
        self.q, self.k, self.v = (new(1, heads, batch) for heads in (4, KV_HEADS, KV_HEADS))
        prompt = [torch.randn(sum(lengths), KV_HEADS, DIM, **PLACE) for _ in "kv"]
        for cache in (self.twin, self.cache):
            cache.append(*prompt, lengths)

    def append_and_attend(self) -> torch.Tensor:
        out = self.cache.decode(self.q, k_new=self.k, v_new=self.v)
        assert isinstance(out, torch.Tensor)
        return out

    def capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.out = self.append_and_attend()
        return graph

    def next_token(self) -> None:
        """Its numbers, and room for it."""
        for x in (self.q, self.k, self.v):
            x.normal_()
        for cache in (self.twin, self.cache):
            cache.extend(1)

    def check(self) -> None:
        """As `write` and `decode` one after the other, of the twin that no graph has."""
        self.twin.write(self.k, self.v)
        assert torch.equal(self.out, self.twin.decode(self.q))
        assert not self.out.isnan().any()
        for row in range(len(self.k)):
            for held, wanted in zip(self.cache.gather(row), self.twin.gather(row), strict=True):
                assert torch.equal(held, wanted)


@every_kind
def test_two_graphs_of_one_stream_append_and_attend_in_turns(kind: str) -> None:
    """Each counts the splits that ended in memory of its own; a call without a graph comes between.

    Replayed in either order, and one of them twice.
    """
    steps = [Step(kind, lengths) for lengths in ((1700, 3), (260, 900, 40))]
    for step in steps:
        step.next_token()
        step.out = step.append_and_attend()  # compiles
        step.check()
    torch.cuda.synchronize()
    graphs = [step.capture() for step in steps]
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        for i in order:
            steps[i].next_token()
            graphs[i].replay()
            steps[i].check()


@every_kind
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graphs"])
def test_two_streams_append_and_attend_at_once(kind: str, captured: bool) -> None:
    steps = [Step(kind, (1700, 30)) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in steps]
    for step in steps:
        step.next_token()
        step.out = step.append_and_attend()  # compiles
        step.check()
    torch.cuda.synchronize()
    graphs = [step.capture() for step in steps] if captured else []
    for _ in range(8):
        for step in steps:
            step.next_token()
        torch.cuda.synchronize()
        for i, (step, stream) in enumerate(zip(steps, streams, strict=True)):
            with torch.cuda.stream(stream):
                if captured:
                    graphs[i].replay()
                else:
                    step.out = step.append_and_attend()
        torch.cuda.synchronize()
        for step in steps:
            step.check()
