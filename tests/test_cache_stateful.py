"""Random growth, forks, cuts and frees against dictionaries of tokens: nothing lost or leaked.

The model knows nothing of addresses. A row is its list of tokens, the factor set it stays on where
the policy keeps one, and, for paged caches, one object for each of its blocks, which forks share;
blocks in use are the different objects that rows have.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_cases import DIM, KV_HEADS, ROPE, Cache, assert_decodes, dense, fp64
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longrope_kernels import CacheFullError, PagedKVCache, PrefillAgain

BATCH, LAYERS = 4, 2
row = st.integers(0, BATCH - 1)
counts = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), min_size=4, max_size=4)


class CacheMachine(RuleBasedStateMachine):
    """A cache and its model, and in every step one thing that happens to both."""

    block_size = 0  # dense
    blocks = 0
    limit = 70
    policy = "switch"

    def __init__(self) -> None:
        super().__init__()
        rest: dict[str, Any] = {"layers": LAYERS, "dtype": fp64, "policy": self.policy}
        size = (KV_HEADS, DIM)
        self.cache: Cache
        if self.block_size:
            size = (self.blocks, self.block_size, *size)
            self.cache = PagedKVCache(ROPE, BATCH, *size, max_length=self.limit, **rest)
        else:
            self.cache = dense(ROPE, BATCH, self.limit, **rest)
        self.tokens: dict[int, list[int]] = {i: [] for i in range(BATCH)}
        self.held: dict[int, list[object]] = {i: [] for i in range(BATCH)}
        self.sets: dict[int, int | None] = dict.fromkeys(range(BATCH))
        self.goals: dict[int, int] = dict.fromkeys(range(BATCH), 0)  # of prompts yet to come
        self.made = 0

    # ------------------------------------------------------------------------------ the model

    def in_use(self, held: dict[int, list[object]]) -> int:
        return len({id(block) for blocks in held.values() for block in blocks})

    def grown(self, order: list[int], of_row: list[int]) -> dict[int, list[object]]:
        """The blocks that rows hold after they have grown one after the other."""
        held = {i: list(blocks) for i, blocks in self.held.items()}
        if not self.block_size:
            return held
        for i, count in zip(order, of_row, strict=True):
            length = len(self.tokens[i])
            others = {id(b) for j, blocks in held.items() if j != i for b in blocks}
            if count and length % self.block_size and id(held[i][-1]) in others:
                held[i][-1] = object()
            while len(held[i]) * self.block_size < length + count:
                held[i].append(object())
        return held

    def due(self, i: int, length: int) -> int:
        """The set of a row that grows to this length."""
        return ROPE.set_index(max(length, self.goals[i]))

    def emptied(self, i: int) -> None:
        self.tokens[i], self.held[i], self.sets[i], self.goals[i] = [], [], None, 0

    # ------------------------------------------------------------------------------- the rules

    @rule(
        order=st.permutations(range(BATCH)),
        rows=st.integers(0, BATCH),
        of_row=counts,
        packed=st.booleans(),
    )
    def grow(self, order: list[int], rows: int, of_row: list[int], packed: bool) -> None:
        order, of_row = order[:rows], of_row[:rows]
        held = self.grown(order, of_row)
        too_long = any(
            len(self.tokens[i]) + c > self.limit for i, c in zip(order, of_row, strict=True)
        )
        crossing = [
            i
            for i, c in zip(order, of_row, strict=True)
            if c and self.sets[i] not in (None, self.due(i, len(self.tokens[i]) + c))
        ]
        if self.policy == "recompute" and crossing and not too_long:
            with pytest.raises(PrefillAgain) as again:
                self.cache.extend(of_row, order)
            assert again.value.rows == tuple(crossing)
            return
        too_many = bool(self.block_size) and self.in_use(held) > self.blocks
        if too_long or too_many:
            with pytest.raises(CacheFullError) as caught:
                self.cache.extend(of_row, order)
            full = caught.value
            assert full.needed > full.free
            assert (full.row is not None) == too_long
            if not too_long:
                assert full.needed == self.in_use(held) - self.in_use(self.held)
                assert full.free == self.blocks - self.in_use(self.held)
            return
        self.cache.extend(of_row, order)
        self.held = held
        new = [[self.made + i * 64 + t for t in range(c)] for i, c in enumerate(of_row)]
        self.made += BATCH * 64
        for i, ids in zip(order, new, strict=True):
            self.tokens[i] = self.tokens[i] + ids
            if ids and self.sets[i] is None and self.policy != "switch":
                self.sets[i] = ROPE.set_index(len(self.tokens[i]))
        longest = max(of_row, default=0)
        padded = [[-1] * (longest - len(ids)) + ids for ids in new]
        ids = torch.tensor([t for ids in new for t in ids] if packed else padded, dtype=torch.int64)
        ids = ids.view(-1) if packed else ids.view(rows, longest)
        for layer in range(LAYERS):
            self.cache.write(*content(ids, layer), layer)

    @rule(source=row, to=row)
    def fork(self, source: int, to: int) -> None:
        if source == to or self.tokens[to]:
            with pytest.raises(ValueError, match="target"):
                self.cache.fork(source, to)
            return
        self.cache.fork(source, to)
        self.tokens[to] = list(self.tokens[source])
        self.held[to] = list(self.held[source])
        self.sets[to], self.goals[to] = self.sets[source], self.goals[source]

    @rule(i=row, part=st.floats(0, 1))
    def truncate(self, i: int, part: float) -> None:
        length = int(part * len(self.tokens[i]))
        self.cache.truncate(i, length)
        self.tokens[i], self.goals[i] = self.tokens[i][:length], 0
        if not length:
            self.sets[i] = None
        if self.block_size:
            self.held[i] = self.held[i][: -(-length // self.block_size)]

    @rule(i=row)
    def free(self, i: int) -> None:
        self.cache.free(i)
        self.emptied(i)

    @rule(i=row, length=st.integers(1, limit))
    def pin(self, i: int, length: int) -> None:
        if self.policy == "switch" or self.tokens[i]:
            with pytest.raises(ValueError, match=r"policy|row"):
                self.cache.pin(i, length=length)
            return
        self.cache.pin(i, length=length)
        self.sets[i], self.goals[i] = ROPE.set_index(length), length

    @precondition(lambda self: self.made > 2000)
    @rule()
    def reset(self) -> None:
        self.cache.reset()
        for i in range(BATCH):
            self.emptied(i)

    @rule(i=row, layer=st.integers(0, LAYERS - 1))
    def decode(self, i: int, layer: int) -> None:
        if self.tokens[i]:
            k, v = content(torch.tensor(self.tokens[i]), layer)
            kept = self.sets[i]
            index = ROPE.set_index(len(self.tokens[i])) if kept is None else kept
            assert_decodes(self.cache, i, k, v, index, min(3, len(self.tokens[i])), layer)

    # -------------------------------------------------------------------------- the invariants

    @invariant()
    def lengths_agree(self) -> None:
        wanted = [len(self.tokens[i]) for i in range(BATCH)]
        assert list(self.cache.lengths) == self.cache.lens.tolist() == wanted

    @invariant()
    def contents_agree(self) -> None:
        for i, ids in self.tokens.items():
            for layer in range(LAYERS):
                wanted = content(torch.tensor(ids, dtype=torch.int64), layer)
                for got, x in zip(self.cache.gather(i, layer), wanted, strict=True):
                    assert torch.equal(got, x)

    @invariant()
    def blocks_are_all_there(self) -> None:
        cache = self.cache
        if not isinstance(cache, PagedKVCache):
            return
        assert self.blocks - cache.free_blocks == self.in_use(self.held)
        rows = [cache.block_table[i, : len(self.held[i])].tolist() for i in range(BATCH)]
        assert rows == [cache._table[i, : len(self.held[i])].tolist() for i in range(BATCH)]
        used = [block for blocks in rows for block in blocks]
        assert [used.count(block) for block in range(self.blocks)] == cache._users
        assert sorted({*used, *cache._free}) == list(range(self.blocks))
        assert not {*used} & {*cache._free}
        assert len({*cache._free}) == len(cache._free)


def content(ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that tell each token, head, dimension and layer from all others."""
    place = torch.arange(KV_HEADS * DIM).view(KV_HEADS, DIM)
    k = torch.sin(ids[..., None, None] * 1.7 + place * 0.3 + layer * 0.11).double()
    return k, torch.cos(ids[..., None, None] * 0.9 + place * 0.2 - layer * 0.7).double()


def machine(name: str, block_size: int = 0, blocks: int = 0, policy: str = "switch") -> type:
    settled = {"block_size": block_size, "blocks": blocks, "policy": policy}
    case = type(name, (CacheMachine,), settled).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=30)
    return case


TestDense = machine("DenseMachine")
TestPaged16 = machine("Paged16Machine", 16, 9)  # rows at their limit would fill it alone twice
TestPaged32 = machine("Paged32Machine", 32, 7)
TestDensePin = machine("DensePinMachine", policy="pin")
TestPagedPin = machine("PagedPinMachine", 16, 9, "pin")
TestPagedRecompute = machine("PagedRecomputeMachine", 16, 9, "recompute")
