"""The three policies where a row crosses into another factor set, at 4097 tokens and elsewhere."""

from __future__ import annotations

import pytest
import torch
from cache_cases import (
    REAL,
    Maker,
    assert_decodes,
    assert_same_state,
    dense,
    every_cache,
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
