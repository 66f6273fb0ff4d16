"""Caches spread over ranks, on gloo: each step is what the truth says of the whole cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from attention_truth import assert_lse_close, bf16, fp32, fp64
from cases import DTYPE_NAMES, factors
from decode_truth import Call
from ranks import Ranks, check_survivors
from tolerance import assert_close

from longrope_kernels import CacheFullError, FactorSet, KVCache, PagedKVCache, Rope
from longrope_kernels.distributed import SpreadCache, decode, shard


@dataclass(frozen=True)
class Case:
    """A prompt that is cut, then steps; the queries of the last step are compared."""

    ranks: int = 2  # 0: a mesh of two times two
    prompt: int = 13
    steps: tuple[int, ...] = (1, 1, 1)
    heads: int = 4
    kv_heads: int = 2
    pairs: int = 16
    dtype: torch.dtype = fp32
    order: str = "balanced"
    backend: str | None = None
    block_size: int = 0
    interleaved: bool = False
    switch: int = 0  # the longest length of the first of two sets
    n_hat: int = 5
    window: int | None = None
    softcap: float | None = None
    kv_start: tuple[int, ...] = ()

    def __str__(self) -> str:
        default = Case()
        shown = [f"{self.ranks or '2x2'}"]
        for name, value in vars(self).items():
            if name != "ranks" and value != getattr(default, name):
                shown.append(f"{name}{DTYPE_NAMES.get(value, value)}")
        return "-".join(shown)

    @property
    def size(self) -> int:
        return self.ranks or 4

    def rope(self) -> Rope:
        last = FactorSet(factors(self.pairs, 2.0), self.n_hat, 1.19)
        if not self.switch:
            return Rope((last,), interleaved=self.interleaved)
        first = FactorSet(factors(self.pairs, 1.25), 0, 1.05, self.switch)
        return Rope((first, last), interleaved=self.interleaved)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        total = self.prompt + sum(self.steps)
        q = torch.randn(2, self.steps[-1], self.heads, 32).to(self.dtype)
        k, v = (torch.randn(2, total, self.kv_heads, 32).to(self.dtype) for _ in range(2))
        return q, k, v

    def keywords(self) -> dict[str, Any]:
        given: dict[str, Any] = {"window": self.window, "softcap": self.softcap}
        if self.kv_start:
            given["kv_start"] = torch.tensor(self.kv_start)
        return {name: value for name, value in given.items() if value is not None}

    def local(self, room: int) -> KVCache | PagedKVCache:
        args = (self.kv_heads, 32)
        rest: dict[str, Any] = {"dtype": self.dtype, "policy": "switch"}
        if self.block_size:
            return PagedKVCache(self.rope(), 2, 2 * -(-room // 16), 16, *args, **rest)
        return KVCache(self.rope(), 2, room, *args, **rest)


def steps(case: Case) -> Any:
    """out and lse of the last step, and how many keys this rank has."""
    if dist.get_rank() >= case.size:
        return None
    group: Any = ranks.GROUPS[case.ranks] if case.ranks else ranks.MESH[0]
    q, k, v = case.tensors()
    cache = SpreadCache(case.local(32), group)
    cache.extend(case.prompt, order=case.order)  # type: ignore[arg-type]
    prompt = (shard(x[:, : case.prompt], group, order=case.order) for x in (k, v))  # type: ignore[arg-type]
    cache.write(*prompt)
    at = case.prompt
    for number in case.steps:
        cache.extend(number)
        cache.write(k[:, at : at + number], v[:, at : at + number])
        at += number
    assert cache.lengths == (at, at)
    found = cache.decode(q, return_lse=True, backend=case.backend, **case.keywords())
    return *found, cache.cache.lengths


CASES = [
    Case(),
    Case(ranks=3, kv_heads=1),
    Case(ranks=4, heads=2, pairs=6, order="contiguous"),
    Case(ranks=0, interleaved=True),
    Case(ranks=1),
    Case(ranks=3, steps=(1, 3)),
    Case(ranks=4, prompt=0, steps=(1, 2)),
    Case(ranks=4, prompt=1, steps=(1,)),
    *(Case(switch=n, steps=(1, 3)) for n in (14, 15, 16, 17)),
    *(Case(ranks=3, n_hat=n) for n in (0, 14, 15, 16, 17)),
    Case(ranks=3, window=6, steps=(1, 4)),
    Case(ranks=4, window=1),
    Case(softcap=2.0),
    Case(ranks=3, kv_start=(0, 9), switch=6, steps=(2,)),
    Case(ranks=3, kv_start=(4, 12), window=5, steps=(1, 2)),
    Case(block_size=16, ranks=3, prompt=40),
    Case(dtype=bf16, ranks=4),
    Case(dtype=fp64, ranks=3, backend="reference"),
    Case(backend="native"),
    Case(backend="reference", interleaved=True, pairs=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_whole(case: Case, four: Ranks) -> None:
    found = four("steps", steps, case)[: case.size]
    for answer in found:
        assert isinstance(answer, tuple), answer
    q, k, v = case.tensors()
    total = torch.full((2,), k.shape[1])
    expected = Call(q, k, v, total, case.rope(), **case.keywords()).expected()
    for out, lse, _ in found:
        assert_close(out, expected.out)
        assert_lse_close(lse, expected.lse)
        assert torch.equal(out, found[0][0])
    held = [lengths for _, _, lengths in found]
    assert [sum(of_row) for of_row in zip(*held, strict=True)] == total.tolist()


def test_new_tokens_go_where_there_is_room(four: Ranks) -> None:
    answers = four("room", steps, Case(ranks=4, prompt=6, order="contiguous", steps=(1,) * 6))
    assert [lengths[0] for _, _, lengths in answers] == [3, 3, 3, 3]


def uneven_rows(dtype: torch.dtype) -> list[float]:
    """Errors beside one cache of all, of which rows get other numbers of tokens in a step."""
    case = Case(switch=16)
    scale = torch.tensor([0.01, 0.02]) if dtype == torch.float8_e4m3fn else None
    whole, local = (
        KVCache(
            case.rope(), 2, 32, 2, 32, dtype=dtype, policy="switch", k_scale=scale, v_scale=scale
        )
        for _ in range(2)
    )
    spread, found = SpreadCache(local), []
    generator = torch.Generator().manual_seed(0)
    for counts in ([13, 13], [2, 0], [0, 1], [0, 1], [1, 4], [1, 1]):
        q, k, v = (torch.randn(2, max(counts), n, 32, generator=generator) for n in (4, 2, 2))
        whole.extend(counts)
        whole.write(k, v)
        prompt = max(counts) == 13
        spread.extend(13 if prompt else counts, order="balanced" if prompt else None)
        spread.write(*(shard(x) for x in (k, v)) if prompt else (k, v))
        assert spread.lengths == whole.lengths
        one, own = (x.decode(q[:, -1:], backend="reference") for x in (whole, spread))
        found.append(float((one - own).abs().max()))
    return found


@pytest.mark.parametrize("dtype", [fp32, torch.float8_e4m3fn], ids=str)
def test_rows_of_other_numbers_of_tokens(dtype: torch.dtype, four: Ranks) -> None:
    for errors in four("rows", uneven_rows, dtype):
        assert max(errors) < 1e-5


def drafts() -> Any:
    """Three drafts, two rejected, and two others in their place: as if they never came."""
    case = Case(ranks=4, steps=(1, 2))
    q, k, v = case.tensors()
    cache = SpreadCache(case.local(8))
    cache.extend(13, order="balanced")
    cache.write(shard(k[:, :13]), shard(v[:, :13]))
    cache.extend(3)
    junk = torch.cat((k[:, 13:14], 9 * k[:, :2]), 1), torch.cat((v[:, 13:14], 9 * v[:, :2]), 1)
    cache.write(*junk)
    for row in range(2):
        cache.truncate(row, 14)
    cache.extend(2)
    cache.write(k[:, 14:], v[:, 14:])
    return cache.decode(q)


def test_rejected_drafts(four: Ranks) -> None:
    q, k, v = Case(ranks=4, steps=(1, 2)).tensors()
    expected = Call(q, k, v, torch.full((2,), 16), Case().rope()).expected()
    for out in four("drafts", drafts):
        assert_close(out, expected.out)


def full() -> Any:
    cache = SpreadCache(Case().local(2))
    cache.extend(7, order="balanced")
    try:
        cache.extend(2)
    except CacheFullError as error:
        return str(error), cache.lengths, cache.cache.lengths
    return None


def test_a_full_cache_says_so_on_all_ranks(four: Ranks) -> None:
    answers = four("full", full)
    for message, lengths, _ in answers:
        assert message.startswith("counts: expected at most 1 tokens for row 0 on rank")
        assert lengths == (7, 7)


def uneven(counts: list[Any]) -> None:
    SpreadCache(Case().local(8)).extend(counts[dist.get_rank()])


def test_other_counts_end_all(four: Ranks) -> None:
    for answer in four("uneven", uneven, [1, 1, 2, 1]):
        assert "counts: expected the same on all ranks, got [1, 1] on rank 0" in str(answer)
    for rank, answer in enumerate(four("uneven", uneven, [1, -1, 1, 1])):
        own = "ValueError: counts: expected from 0 to 2147483647, got -1"
        assert str(answer).endswith(own if rank == 1 else f"group: rank 1: {own}")


def too_wide(order: str | None) -> list[str]:
    """What `write` says of k and v of other shapes; their right ones it takes."""
    cache, said = SpreadCache(Case().local(8)), []
    here = 1 if order else 4  # of four tokens on four ranks
    cache.extend(4, order=order)
    k = torch.zeros(2, here + 2, 2, 32)
    for x, y in ((k, k), (k[:, 2:], k), (k[:1, 2:], k[:1, 2:])):
        with pytest.raises(ValueError, match="expected shape") as error:
            cache.write(x, y)
        said.append(str(error.value))
    cache.write(k[:, 2:], k[:, 2:])
    return said


@pytest.mark.parametrize("order", [None, "balanced"])
def test_other_tokens_than_there_is_room_for(order: str | None, four: Ranks) -> None:
    """Also on ranks that keep none of them."""
    width = 1 if order else 4
    shapes = [(2, width + 2), (2, width + 2), (1, width)]
    for said in four("too_wide", too_wide, order):
        for name, (rows, tokens), message in zip("kvk", shapes, said, strict=True):
            assert message.startswith(f"{name}: expected shape (2, {width}, 2, 32)")
            assert message.endswith(f"got ({rows}, {tokens}, 2, 32)")


def wrong(rank_has: dict[int, dict[str, Any]]) -> Any:
    case = Case(ranks=4)
    given: dict[str, Any] = {
        "q": torch.zeros(2, 1, 4, 32),
        "cache_lens": torch.tensor([1, 1]),
        "key_slots": torch.zeros(2, 3, dtype=torch.int64) + dist.get_rank(),
        "total_lens": torch.tensor([4, 4]),
    } | rank_has.get(dist.get_rank(), {})
    stored = (torch.zeros(2, 3, 2, 32) for _ in range(2))
    return decode(given.pop("q"), *stored, given.pop("cache_lens"), case.rope(), **given)


def test_other_arguments_end_all(four: Ranks) -> None:
    for answer in four("wrong", wrong, {2: {"total_lens": torch.tensor([4, 5])}}):
        assert "total_lens: expected the same on all ranks, got [4, 4] on rank 0" in str(answer)


def test_a_wrong_argument_of_one_rank_ends_all(four: Ranks) -> None:
    own = "ValueError: window: expected at least 1 token, got 0"
    others = f"ValueError: group: rank 2: {own}"
    found = four("wrong", wrong, {2: {"window": 0}})
    assert [str(answer) for answer in found] == [others, others, own, others]


def dying(where: str) -> None:
    """Rank 1 dies before a prompt is spread, or before a step attends."""
    case = Case(ranks=3)
    q, k, v = case.tensors()
    cache = SpreadCache(case.local(16))
    if where == "decode":
        cache.extend(13, order="balanced")
        cache.write(shard(k[:, :13]), shard(v[:, :13]))
    if dist.get_rank() == 1:
        os._exit(7)
    if where == "extend":
        cache.extend(13, order="balanced")
    cache.decode(q)


@pytest.mark.parametrize("where", ["extend", "decode"])
def test_a_dead_rank_ends_the_others_by_name(where: str) -> None:
    pool = Ranks(3, timeout=5)
    found = pool("die", dying, where)
    pool.close()
    check_survivors(found)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "q": ({"q": torch.zeros(2, 17, 4, 32)}, "q: expected from 1 to 16 tokens a sequence, got 17"),
    "grad": ({"q": torch.zeros(2, 1, 4, 32, requires_grad=True)}, "q: .*grad"),
    "slots": ({"key_slots": torch.zeros(3).long()}, r"key_slots: expected shape \(2, slots\)"),
    "totals": ({"total_lens": torch.zeros(3).long()}, r"total_lens: expected shape \(2,\)"),
    "lengths": ({"lengths": torch.zeros(3).long()}, r"lengths: expected shape \(2,\) or \(2, 1\)"),
    "negative": (
        {"lengths": torch.tensor([3, -5])},
        "lengths: expected token counts from 0, got -5",
    ),
    "sets": (
        {"sets": torch.tensor([0, 7]).int()},
        "sets: expected indices from 0 to 0, got 0 to 7",
    ),
    "lens": ({"cache_lens": torch.tensor([1, 4])}, "cache_lens: expected from 0 to 3 .*, got 4"),
    "order": (
        {"cache_lens": torch.tensor([2, 2]), "key_slots": torch.tensor([[0, 1, 9], [2, 1, 3]])},
        "key_slots: expected ascending slots from 0 to 3 .* sequence 1.*, got 1 for key 1",
    ),
    "above": (
        {"key_slots": torch.tensor([[0, 9, 9], [4, 9, 9]])},
        "key_slots: expected ascending slots from 0 to 3 .* sequence 1.*, got 4 for key 0",
    ),
    "window": ({"window": 0}, "window: expected at least 1 token, got 0"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str, four: Ranks) -> None:
    for answer in four("wrong", wrong, dict.fromkeys(range(4), given)):
        with pytest.raises(RuntimeError, match=message):
            raise answer


def pinned() -> None:
    SpreadCache(KVCache(Case(switch=4).rope(), 1, 8, 2, 32, policy="pin"))


def test_a_policy_that_is_not_served(four: Ranks) -> None:
    for answer in four("pinned", pinned):
        assert "policy: expected 'switch' for a spread cache, got 'pin'" in str(answer)
