"""Context parallelism that can't go on: every rank ends, and says which one is why."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import Shape, two_sets
from ranks import Ranks, check_survivors
from test_distributed import small

from longrope_kernels.distributed import attention, shard, unshard

DIFFER: dict[str, tuple[dict[str, Any], str]] = {
    "window": (
        {"window": 3},
        "window: expected the same on all ranks, got 0 on rank 0, 3 on rank 1",
    ),
    "order": ({"order": "balanced"}, "order: expected the same on all ranks, got contiguous on"),
    "tokens": ({"queries": 5}, "tokens: expected the same on all ranks, got 16 on rank 0, 20 on"),
    "rope": ({"rope": two_sets(8), "sets": torch.zeros(1).int()}, "factors: expected the same on"),
    "n_hat": ({"rope": Shape(1, 1, 1, 1, 16).rope(8)}, "factors: expected the same on all ranks"),
    "lengths": ({"lengths": torch.tensor([9])}, r"lengths: expected the same .* \[9\] on rank 1"),
}


@pytest.mark.parametrize(("given", "message"), DIFFER.values(), ids=DIFFER)
def test_other_arguments_end_all(given: dict[str, Any], message: str, four: Ranks) -> None:
    for answer in four("differ", small, {1: given}):
        assert isinstance(answer, RuntimeError)
        with pytest.raises(RuntimeError, match=f"^ValueError: {message}"):
            raise answer
    assert four("again", small, {}) == ["4 ranks"] * 4


def test_a_wrong_argument_of_one_rank_ends_all(four: Ranks) -> None:
    found = four("wrong", small, {2: {"softcap": -1.0}})
    own = "ValueError: softcap: expected a finite number above 0, got -1.0"
    others = f"ValueError: group: rank 2: {own}"
    assert [str(answer) for answer in found] == [others, others, own, others]


def with_no_tensor(bad: int) -> str:
    x = torch.ones(1, 4, 2, 16)
    given = [x.numpy() if dist.get_rank() == bad else x, x, x]
    attention(*given, torch.arange(4), Shape(1, 1, 1, 1, 16).rope(4))
    return "served"


def test_what_is_no_tensor_on_one_rank_ends_all_at_once(four: Ranks) -> None:
    begin = time.monotonic()
    found = four("array", with_no_tensor, 1)
    own = "TypeError: q: expected a tensor, got ndarray"
    others = f"ValueError: group: rank 1: {own}"
    assert [str(answer) for answer in found] == [others, own, others, others]
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
def test_a_dead_rank_ends_the_others_by_name(late: bool) -> None:
    pool = Ranks(3, timeout=5)
    found = pool("die", small, {}, 1, late)
    pool.close()
    check_survivors(found)


def small_on_a_mesh(bad: int, given: dict[str, Any]) -> str:
    mesh = {"group": ranks.MESH[0], "schedule": "auto"}
    return small({rank: mesh | (given if rank == bad else {}) for rank in range(4)})


def test_one_rank_of_a_mesh_ends_all(four: Ranks) -> None:
    """Also those that it exchanges nothing with."""
    window = "window: expected the same on all ranks, got 0 on rank 2, 3 on rank 3"
    found = four("mesh", small_on_a_mesh, 3, {"window": 3})
    told = f"ValueError: group: {window}"
    assert [str(answer) for answer in found] == [told, told, *[f"ValueError: {window}"] * 2]
    own = "ValueError: softcap: expected a finite number above 0, got -1.0"
    found = four("mesh", small_on_a_mesh, 0, {"softcap": -1.0})
    assert [str(answer) for answer in found] == [own, *[f"ValueError: group: rank 0: {own}"] * 3]


def silent() -> Any:
    """A rank that does not come in time, and for how long the others waited."""
    if dist.get_rank() == 1:
        time.sleep(4)
        return None
    begin = time.monotonic()
    try:
        small({})
    except RuntimeError as error:
        return str(error), time.monotonic() - begin


def test_a_silent_rank_ends_the_others_within_the_timeout() -> None:
    pool = Ranks(3, timeout=2)
    found = pool("silent", silent)
    pool.close()
    check_survivors([None if answer is None else answer[0] for answer in found])
    assert all(seconds < 3.5 for _, seconds in (found[0], found[2]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "schedule": ({"schedule": "both"}, "schedule: expected one of auto, ring, ulysses"),
    "heads": ({"schedule": "ulysses"}, "schedule: 'ulysses' needs KV heads that 4 ranks divide"),
    "order": ({"order": "mixed"}, "order: expected 'balanced' or 'contiguous', got 'mixed'"),
    "tokens": ({"tokens": 3}, "tokens: a sequence of 3 tokens has . on rank . of 4"),
    "group": ({"group": 3}, "group: expected a ProcessGroup, a DeviceMesh or None, got int"),
    "backend": ({"backend": "native"}, "backend: expected one of reference, composed, triton or"),
    "composed": ({"backend": "composed", "softcap": 1.0}, "backend: 'composed' serves neither"),
    "window": ({"backend": "triton", "window": 2}, "backend: 'triton' serves no window here"),
    "sets": ({"rope": two_sets(8)}, "lengths: expected lengths= or sets="),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_what_is_not_served_is_refused(given: dict[str, Any], message: str, four: Ranks) -> None:
    for answer in four("refuse", small, dict.fromkeys(range(4), given)):
        with pytest.raises(RuntimeError, match=message):
            raise answer


def test_without_processes() -> None:
    with pytest.raises(RuntimeError, match="group: expected processes that"):
        shard(torch.zeros(1, 2))


def others_of_unshard() -> None:
    unshard(torch.zeros(1, 2, 3 + (dist.get_rank() == 1)))


def test_unshard_names_what_differs(four: Ranks) -> None:
    expected = "x: expected the same on all ranks, got (1, 3, 'torch.float32') on rank 0, (1, 4, "
    for answer in four("unshard", others_of_unshard):
        assert expected in str(answer)


def of_unshard() -> None:
    unshard(torch.zeros(1, 2, requires_grad=True))


def test_unshard_has_no_gradient(four: Ranks) -> None:
    for answer in four("unshard", of_unshard):
        assert "x: expected one without grad" in str(answer)
