"""The three policies where a row crosses into another factor set, at 4097 tokens and elsewhere."""

from __future__ import annotations

import pytest
import torch
from cache_cases import (
    DIM,
    KV_HEADS,
    REAL,
    ROPE,
    Maker,
    assert_decodes,
    assert_same_state,
    attend,
    dense,
    every_cache,
    fp64,
    paged,
    state,
    tokens,
)

from longrope_kernels import KVCache, PagedKVCache, PrefillAgain

SHORT, LONG = 0, 1
real_cache = pytest.mark.parametrize("make", [dense, paged(256)], ids=["dense", "paged256"])


def grown(make: Maker, policy: str) -> tuple[KVCache | PagedKVCache, torch.Tensor, torch.Tensor]:
    """A row of 4096 tokens of the 4097 that come back as well; another row has 7."""
    cache = make(REAL, 2, 4200, policy=policy)
    k, v = tokens(4097)
    cache.append(torch.cat((k[:4096], k[:7])), torch.cat((v[:4096], v[:7])), (4096, 7))
    assert_decodes(cache, 0, k[:4096], v[:4096], SHORT)
    return cache, k, v


@real_cache
def test_switch_takes_the_long_set_at_4097(make: Maker) -> None:
    cache, k, v = grown(make, "switch")
    assert cache.sets is None
    cache.append(k[4096:], v[4096:], [1], rows=[0])
    assert_decodes(cache, 0, k, v, LONG)
    assert_decodes(cache, 1, k[:7], v[:7], SHORT)
    cache.truncate(0, 4096)
    assert_decodes(cache, 0, k[:4096], v[:4096], SHORT)


@real_cache
def test_pin_stays_on_the_short_set_until_freed(make: Maker) -> None:
    cache, k, v = grown(make, "pin")
    cache.append(k[4096:], v[4096:], [1], rows=[0])
    assert cache.sets.tolist() == [SHORT, SHORT]
    assert_decodes(cache, 0, k, v, SHORT)
    cache.free(0)
    cache.append(k, v, [4097], rows=[0])
    assert cache.sets.tolist() == [LONG, SHORT]
    assert_decodes(cache, 0, k, v, LONG)
    cache.truncate(0, 50)
    assert_decodes(cache, 0, k[:50], v[:50], LONG)


@real_cache
def test_recompute_asks_for_a_prefill(make: Maker) -> None:
    cache, k, v = grown(make, "recompute")
    before = state(cache)
    with pytest.raises(PrefillAgain, match=r"counts: rows \[0\]") as caught:
        cache.append(torch.cat((k[4096:], k[:1])), torch.cat((v[4096:], v[:1])), [1, 1])
    assert caught.value.rows == (0,)
    assert_same_state(cache, before)
    cache.free(0)
    cache.append(k, v, [4097], rows=[0])
    assert_decodes(cache, 0, k, v, LONG)
    cache.append(k[:1], v[:1], [1], rows=[0])  # further on in the same set
    assert cache.lengths == (4098, 7)


@every_cache
@pytest.mark.parametrize("policy", ["pin", "recompute"])
def test_chunks_of_a_pinned_prompt_have_its_set(make: Maker, policy: str) -> None:
    cache = make(policy=policy)
    k, v = tokens(33)
    cache.pin(1, length=33)
    for start, end in ((0, 10), (10, 20), (20, 21), (21, 33)):
        cache.append(k[start:end], v[start:end], [end - start], rows=[1])
        assert cache.sets.tolist() == [0, 1, 0]
        assert_decodes(cache, 1, k[:end], v[:end], 1)
    if policy == "recompute":
        with pytest.raises(PrefillAgain):
            cache.extend(1, [1])
    else:
        cache.extend(1, [1])
        assert cache.sets.tolist() == [0, 1, 0]


@every_cache
@pytest.mark.parametrize("policy", ["pin", "recompute"])
@pytest.mark.parametrize("name", ["lengths", "sets"])
def test_a_kept_set_is_not_said_anew(make: Maker, policy: str, name: str) -> None:
    cache = make(ROPE, 1, 64, policy=policy)
    cache.append(*tokens(3), [3])
    q = torch.randn(1, 1, KV_HEADS, DIM, dtype=cache.dtype)
    with pytest.raises(ValueError, match=rf"^{name}: .*'{policy}'.*call pin"):
        cache.decode(q, **{name: torch.ones(1, dtype=torch.int32)})
    assert torch.equal(cache.decode(q, **{name: None}), cache.decode(q))


def test_pin_by_index() -> None:
    cache = dense(policy="pin")
    cache.pin(2, set_index=2)
    cache.append(*tokens(3, 4))
    assert cache.sets.tolist() == [0, 0, 2]
    cache.free(2)
    cache.append(*tokens(1, 4), rows=[2])
    assert cache.sets.tolist() == [0, 0, 0]


def test_freeing_an_empty_row_unpins_it() -> None:
    cache = dense(policy="recompute")
    cache.pin(0, length=60)
    assert cache.sets.tolist() == [2, 0, 0]
    cache.free(0)
    assert cache.sets.tolist() == [0, 0, 0]
    cache.pin(0, length=60)
    cache.reset()
    cache.append(*tokens(3, 20))
    assert cache.sets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("policy", ["pin", "recompute"])
def test_a_fork_keeps_the_set(policy: str) -> None:
    cache = paged(16)(policy=policy)
    cache.pin(0, length=60)
    cache.append(*tokens(1, 5), rows=[0])
    cache.fork(0, 1)
    cache.append(*tokens(2, 5), rows=[0, 1])  # by their lengths, both would be in set 0
    assert cache.sets.tolist() == [2, 2, 0]


def test_cutting_back_across_a_boundary_asks_for_a_prefill() -> None:
    """The keys left were made under a set that a prefill of so few tokens would not have."""
    cache = dense(policy="recompute")
    cache.append(*tokens(3, 25))
    cache.truncate(0, 19)
    cache.truncate(1, 21)
    with pytest.raises(PrefillAgain) as caught:
        cache.extend(1)
    assert caught.value.rows == (0,)
    cache.extend((0, 1, 1))  # a row that gets none may wait
    cache.extend(2, [0])  # 21 tokens are in the set of the 25
    assert cache.lengths == (21, 22, 26)


def test_a_prompt_cut_back_is_no_longer_the_one_announced() -> None:
    cache = dense(policy="recompute")
    cache.pin(0, length=40)
    cache.append(*tokens(1, 30), rows=[0])
    cache.truncate(0, 10)
    with pytest.raises(PrefillAgain):
        cache.extend(1, [0])


def test_no_tokens_choose_no_set() -> None:
    cache = dense(policy="pin")
    cache.extend((0, 25, 0))
    cache.extend((25, 0, 1))
    assert cache.sets.tolist() == [1, 1, 0]


@every_cache
def test_drafts_across_a_boundary_equal_step_by_step_under_switch(make: Maker) -> None:
    """Boundaries lie at 20 and 33: five drafts each, two rows that cross and one that does not."""
    cache = make(policy="switch")
    k, v = tokens(35)
    counts = (17, 30, 3)
    cache.append(*(torch.cat([x[:n] for n in counts]) for x in (k, v)), counts)
    drafts = [torch.stack([x[n : n + 5] for n in counts]) for x in (k, v)]
    cache.append(*drafts)
    q = torch.randn(3, 5, 2 * KV_HEADS, DIM, dtype=fp64)
    together = cache.decode(q, backend="reference")
    for row, count in enumerate(counts):
        cache.truncate(row, count)
    for t in range(5):
        cache.append(*(x[:, t : t + 1] for x in drafts))
        one = cache.decode(q[:, t : t + 1], backend="reference")
        torch.testing.assert_close(together[:, t : t + 1], one, rtol=1e-9, atol=1e-9)
        for row, count in enumerate(counts):
            end = count + t + 1
            wanted = attend(q[row, t : t + 1], k[:end], v[:end], ROPE, [ROPE.set_index(end)])
            torch.testing.assert_close(together[row, t : t + 1], wanted, rtol=1e-9, atol=1e-9)


@every_cache
def test_rejected_drafts_leave_no_trace_under_switch(make: Maker) -> None:
    cache = make(policy="switch")
    k, v = tokens(24)
    cache.append(k[:18], v[:18], [18], rows=[0])
    cache.append(k[18:], v[18:], [6], rows=[0])  # over the boundary at 20
    assert_decodes(cache, 0, k, v, 1)
    cache.truncate(0, 19)
    assert_decodes(cache, 0, k[:19], v[:19], 0, q_len=3)


@every_cache
def test_drafts_across_a_boundary_stay_on_the_set_of_a_pinned_row(make: Maker) -> None:
    cache = make(policy="pin")
    k, v = tokens(35)
    cache.append(*(torch.cat((x[:18], x[:31])) for x in (k, v)), (18, 31), rows=[0, 1])
    cache.append(*(torch.stack((x[18:22], x[31:35])) for x in (k, v)), rows=[0, 1])
    assert_decodes(cache, 0, k[:22], v[:22], 0, q_len=4)
    assert_decodes(cache, 1, k, v, 1, q_len=4)


@every_cache
def test_drafts_across_a_boundary_ask_for_a_prefill_under_recompute(make: Maker) -> None:
    """Those up to the boundary do not; after the prefill all are under the set of the whole row."""
    cache = make(policy="recompute")
    k, v = tokens(22)
    cache.append(k[:18], v[:18], [18], rows=[0])
    before = state(cache)
    with pytest.raises(PrefillAgain):
        cache.append(k[18:], v[18:], [4], rows=[0])
    assert_same_state(cache, before)
    cache.append(k[18:20], v[18:20], [2], rows=[0])
    assert_decodes(cache, 0, k[:20], v[:20], 0, q_len=2)
    cache.free(0)
    cache.append(k, v, [22], rows=[0])
    assert_decodes(cache, 0, k, v, 1, q_len=4)
