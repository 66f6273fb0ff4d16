"""Context parallelism on gloo: 2, 3 and 4 processes make what the truth says of the whole."""

from __future__ import annotations

import itertools
import os
import re
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from attention_cases import Case
from attention_truth import Call, assert_lse_close, bf16, fp32, fp64
from cases import Shape, two_sets
from ranks import Ranks
from tolerance import assert_close
from torch.distributed.device_mesh import init_device_mesh

from longrope_kernels import attention as local_attention
from longrope_kernels.calls.records import Scores
from longrope_kernels.distributed import (
    attention,
    blocks,
    choose_schedule,
    ring,
    shard,
    unshard,
)
from longrope_kernels.distributed.blocks import Hidden
from longrope_kernels.distributed.ranks import Line
from longrope_kernels.distributed.ring import Plan
from longrope_kernels.distributed.shards import spans_of

AXIS = {"bshd": 1, "bhsd": 2, "thd": 0}


def slots_of(tokens: int, rank: int, size: int, order: str) -> list[int]:
    """The slots of a rank, told apart from the package's spans."""
    if order == "contiguous":
        cuts, own = [i * tokens // size for i in range(size + 1)], [rank]
    else:
        cuts = [i * tokens // (2 * size) for i in range(2 * size + 1)]
        own = [rank, 2 * size - 1 - rank]
    return [slot for i in own for slot in range(cuts[i], cuts[i + 1])]


def whole(parts: list[torch.Tensor], tokens: int, order: str, dim: int) -> torch.Tensor:
    slots = [slot for i in range(len(parts)) for slot in slots_of(tokens, i, len(parts), order)]
    return torch.cat(parts, dim).index_select(dim, torch.tensor(slots).argsort())


@dataclass(frozen=True)
class Spread:
    """A case, over how many ranks (0: a mesh of two times two), and how."""

    case: Case
    ranks: int = 2
    order: str = "balanced"
    schedule: str = "ring"
    backend: str | None = None
    ordered: bool = False  # positions are the slots

    def __str__(self) -> str:
        parts = [str(self.ranks or "2x2"), self.schedule, self.order, self.backend or "any"]
        return "-".join([*parts, "ordered" if self.ordered else "mixed", str(self.case)])

    @property
    def size(self) -> int:
        return self.ranks or 4

    def group(self) -> Any:
        return ranks.GROUPS[self.ranks] if self.ranks else ranks.MESH[0]

    def arguments(self) -> tuple[torch.Tensor, dict[str, Any]]:
        made = self.case.arguments()
        positions = made.pop("positions")
        if self.ordered:
            positions = torch.arange(len(positions))
        return positions, made


def attend(spread: Spread) -> tuple[torch.Tensor, ...] | None:
    """out and lse, dq, dk and dv of the tokens of this rank."""
    if dist.get_rank() >= spread.size:
        return None
    torch.manual_seed(0)
    case, group, dim = spread.case, spread.group(), AXIS[spread.case.layout]
    tensors = case.tensors()
    positions, made = spread.arguments()
    leaves = [shard(x, group, dim, order=spread.order).requires_grad_() for x in tensors]
    out, lse = attention(
        *(*leaves, shard(positions, group, -1, order=spread.order), case.rope()),
        group=group,
        tokens=case.tokens()[0],
        order=spread.order,
        schedule=spread.schedule if spread.ranks else "auto",
        backend=spread.backend,
        return_lse=True,
        **made,
    )
    grads = of_outputs(case)
    own = [shard(x, group, d, order=spread.order) for x, d in zip(grads, (dim, -1), strict=True)]
    outs = (out, lse) if case.return_lse else (out,)
    return out.detach(), lse.detach(), *torch.autograd.grad(outs, leaves, own[: len(outs)])


def of_outputs(case: Case) -> list[torch.Tensor]:
    """Gradients of the whole out and lse, the same in each process."""
    torch.manual_seed(1)
    queries = case.tokens()[0]
    shapes = {
        "bshd": (case.batch, queries, case.heads, case.dim),
        "bhsd": (case.batch, case.heads, queries, case.dim),
        "thd": (queries, case.heads, case.dim),
    }
    of_lse = (case.heads, queries) if case.layout == "thd" else (case.batch, case.heads, queries)
    of_sums = fp64 if case.dtype == fp64 else fp32
    return [torch.randn(shapes[case.layout]).to(case.dtype), torch.randn(of_lse).to(of_sums)]


def check(spread: Spread, pool: Ranks) -> None:
    case, dim = spread.case, AXIS[spread.case.layout]
    found = pool("attend", attend, spread)[: spread.size]
    for rank, answer in enumerate(found):
        if not isinstance(answer, tuple):
            raise AssertionError(f"rank {rank}: {answer!r}")
    torch.manual_seed(0)
    tensors = case.tensors()
    positions, made = spread.arguments()
    call = Call(*tensors, positions, case.rope(), **made)
    out, lse, *grads = (
        whole(list(parts), case.tokens()[0], spread.order, d)
        for parts, d in zip(zip(*found, strict=True), (dim, -1, dim, dim, dim), strict=True)
    )
    expected = call.expected()
    assert_close(out, expected.out)
    assert_lse_close(lse, expected.lse)
    given = of_outputs(case)
    wanted = call.expected_grads(given[0], given[1] if case.return_lse else None)
    for name, grad, one in zip("qkv", grads, wanted, strict=True):
        assert_close(grad, one, f"grad of {name}")


CASES = [
    Case(),
    Case(queries=16, heads=4, kv_heads=1),
    Case(queries=17, heads=3, kv_heads=3, pairs=8, layout="bhsd"),
    Case(queries=23, interleaved=True, return_lse=True),
    Case(queries=24, lengths=(4096, 4097)),
    Case(queries=20, sets=(1, 0), pairs=8, interleaved=True),
    Case(queries=24, window=5),
    Case(queries=24, causal=False),
    Case(queries=24, causal=False, window=4),
    Case(queries=21, softcap=3.0, scale=0.3),
    Case(queries=22, kv_start=(0, 9)),
    Case(queries=22, kv_start=(15, 3), window=6),
    Case(layout="thd", counts=(5, 1, 12, 7)),
    Case(layout="thd", counts=(9, 0, 16), lengths=(4096, 5000, 4097), window=4, kv_start=(2, 0, 5)),
    Case(layout="thd", counts=(3, 14), causal=False),
    Case(queries=19, dtype=bf16),
]
SMALL = Case(batch=1, queries=5, heads=2, kv_heads=1, dim=16, dtype=bf16)  # the interpreter is slow
SLOW = [
    Spread(replace(SMALL, batch=2, kv_start=(1, 3), return_lse=True), backend="triton"),
    Spread(replace(SMALL, queries=9, softcap=2.0), ranks=3, backend="triton"),
    Spread(replace(SMALL, kv_heads=2), schedule="ulysses", backend="triton"),
]
SPREAD = [
    *(Spread(case) for case in CASES),
    *(Spread(case, ranks=3, order="contiguous") for case in CASES[4:9]),
    *(Spread(case, ranks=4) for case in CASES[::3]),
    *(Spread(case, ranks=2, schedule="ulysses") for case in CASES if case.kv_heads == 2),
    Spread(Case(queries=17, heads=3, kv_heads=3), ranks=3, schedule="ulysses"),
    Spread(Case(queries=13, heads=8, kv_heads=4), ranks=4, order="contiguous", schedule="ulysses"),
    Spread(Case(queries=32, window=18), ranks=4),  # keys that a window cuts beside some it does not
    *(Spread(case, ranks=0) for case in CASES if case.kv_heads == 2),
    *(Spread(Case(queries=n), ranks=4) for n in (1, 2, 3, 7)),
    *(Spread(Case(queries=n), ranks=3, order="contiguous") for n in (1, 2, 4)),
    Spread(Case(queries=1), ranks=2, schedule="ulysses"),
    Spread(Case(queries=5), ranks=0),
    Spread(Case(queries=13, batch=1), ranks=1),
    # at large positions the angles of float64 are those of the reference, which the rule is not for
    Spread(Case(queries=11, dtype=fp64), ranks=3, ordered=True),
    # n_hat within a piece of a shard, and where one ends
    *(Spread(Case(queries=16, n_hat=n), ordered=True) for n in (4, 6, 8, 9)),
    *(Spread(Case(queries=12), backend=name) for name in ("reference", "composed")),
    Spread(replace(SMALL, layout="thd", counts=(3, 1, 2)), backend="triton"),
    Spread(Case(queries=16, heads=2, kv_heads=1, dim=16, softcap=2.0), ranks=3),
]


@pytest.mark.parametrize(
    "spread",
    [*SPREAD, *(pytest.param(spread, marks=pytest.mark.full) for spread in SLOW)],
    ids=str,
)
def test_equals_the_whole(spread: Spread, four: Ranks) -> None:
    check(spread, four)


# ---------------------------------------------------------------------------------------- shards


def round_trip(tokens: int, size: int, order: str) -> tuple[Any, ...] | None:
    if dist.get_rank() >= (size or 4):
        return None
    group = ranks.GROUPS[size] if size else ranks.MESH[0]
    x = torch.arange(2 * tokens * 3).view(2, tokens, 3)
    own = shard(x, group, order=order)  # type: ignore[arg-type]
    back = unshard(own, group, tokens=tokens, order=order)  # type: ignore[arg-type]
    return own, torch.equal(back, x)


@pytest.mark.parametrize("order", ["balanced", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 3, 0])
def test_shard_and_back(size: int, order: str, four: Ranks) -> None:
    for tokens in (0, 1, 5, 8, 17):
        x = torch.arange(2 * tokens * 3).view(2, tokens, 3)
        for rank, answer in enumerate(four("shard", round_trip, tokens, size, order)[: size or 4]):
            own, same = answer
            assert torch.equal(own, x[:, slots_of(tokens, rank, size or 4, order)])
            assert same


def test_balanced_ranks_have_the_same_work() -> None:
    seen = [sum(slot + 1 for slot in slots_of(64, rank, 4, "balanced")) for rank in range(4)]
    assert len(set(seen)) == 1


def plan(order: str, scores: Scores, rank: int = 0) -> Plan:
    spans = tuple(spans_of(16, i, 4, order) for i in range(4))  # type: ignore[arg-type]
    return Plan(Line(None, rank, 4), spans, Hidden(scores, 16), "reference")


def test_what_nobody_sees_is_neither_computed_nor_sent() -> None:
    causal = Scores(True, 1.0)
    assert [len(plan("contiguous", causal, 0).pairs(step)) for step in range(4)] == [1, 0, 0, 0]
    assert [len(plan("contiguous", causal, 3).pairs(step)) for step in range(4)] == [1] * 4
    # Of pieces 1 and 6 both see 0 and themselves, 6 sees 1, and the others of ranks 3 and 2.
    assert [len(plan("balanced", causal, 1).pairs(step)) for step in range(4)] == [3, 1, 1, 1]
    near = causal._replace(window=4)
    assert plan("contiguous", causal).steps == 4
    assert plan("contiguous", near._replace(window=1)).steps == 1
    assert plan("contiguous", near).steps == 2
    assert plan("contiguous", near._replace(window=6)).steps == 3


def rows_sent(schedule: str) -> float:
    """Head rows that leave this rank for each of its tokens in a forward, beside the arguments."""
    group, sent = ranks.GROUPS[4], []
    isend, exchange = dist.isend, dist.all_to_all_single

    def counted(x: torch.Tensor, *args: Any) -> Any:
        sent.append(x.numel() if x.dtype == fp32 else 0)
        return isend(x, *args)

    def exchanged(came: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(x.numel() * 3 // 4 if x.shape[-1] == 16 else 0)
        return exchange(came, x, *args, **kwargs)

    dist.isend, dist.all_to_all_single = counted, exchanged
    try:
        q, k, v = (torch.ones(1, 8, heads, 16) for heads in (8, 4, 4))
        rope, at = Shape(1, 1, 1, 1, 16).rope(0), torch.arange(8)
        attention(q, k, v, at, rope, group=group, schedule=schedule)
    finally:
        dist.isend, dist.all_to_all_single = isend, exchange
    return sum(sent) / (8 * 16)


@pytest.mark.parametrize("schedule", ["ring", "ulysses"])
def test_as_much_is_sent_as_the_schedule_says(schedule: str, four: Ranks) -> None:
    expected = choose_schedule(8, 4, 4, schedule).rows_sent
    assert four("sent", rows_sent, schedule) == [expected] * 4


def small(
    rank_has: dict[int, dict[str, Any]], die: int = -1, late: bool = False, trains: bool = True
) -> str:
    """`attention` on all ranks, some with other arguments; one dies before it or its backward."""
    rank, size = dist.get_rank(), dist.get_world_size()
    made: dict[str, Any] = {"queries": 4, "rope": Shape(1, 1, 1, 1, 16).rope(4)} | rank_has.get(
        rank, {}
    )
    n = made.pop("queries")
    q, k, v = (torch.ones(1, n, 2, 16, requires_grad=trains) for _ in range(3))
    if rank == die and not late:
        os._exit(7)
    positions = torch.arange(n) + rank * n
    rest = {"order": "contiguous", "schedule": "ring", **made}
    out = attention(q, k, v, positions, rest.pop("rope"), **rest)
    if rank == die:
        os._exit(7)
    assert isinstance(out, torch.Tensor)
    if trains:
        out.sum().backward()
    return f"{size} ranks"


def blocks_held(trains: bool) -> int:
    """How many tensors for what other ranks have a rank holds at a time, at most."""
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, like = 0, Plan.like

    def noted(plan: Plan, x: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal most
        made = like(plan, x, step)
        held.add(made)
        most = max(most, len(held))
        return made

    Plan.like = noted  # type: ignore[method-assign]
    try:
        small({}, trains=trains)
    finally:
        Plan.like = like  # type: ignore[method-assign]
    return most


def test_a_rank_holds_two_blocks_beside_its_own(four: Ranks) -> None:
    """Of k and of v: the one it attends to, and the one that comes; the gradients that come."""
    assert four("held", blocks_held, False) == [4] * 4
    assert four("held", blocks_held, True) == [6] * 4


def order_of_work() -> str:
    """What the ring of a rank does, one after another, forward and backward."""
    found: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "wait" or args[1]:  # for nothing nobody waits
                found.append(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, function, name in (
            (Plan, "pass_on", "send"),
            (blocks, "attend", "compute"),
            (blocks, "attend_backward", "compute"),
            (ring, "finish", "wait"),
        ):
            patch.setattr(owner, function, noted(name, getattr(owner, function)))
        small({})
    return " ".join(found)


def test_a_block_is_on_its_way_while_a_rank_computes(four: Ranks) -> None:
    """The last rank sees the block of each; in the backward the sums of the one before come too."""
    forward = ["send compute wait"] * 3 + ["compute"]
    first, others = "send compute send wait", ["send compute wait send wait"] * 2
    backward = [first, *others, "compute wait", "send wait"]
    assert four("order", order_of_work)[3] == " ".join([*forward, *backward])


def over_a_dimension() -> Any:
    """Of a mesh of 2 x 2: of its second dimension, of the group that is in there, and of three."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))["context"]
    q = torch.randn(1, 9, 2, 16, generator=torch.Generator().manual_seed(dist.get_rank() // 2))
    rope, found = Shape(1, 1, 1, 1, 16).rope(4), []
    for group in (mesh, mesh.get_group()):
        own, at = shard(q, group), shard(torch.arange(9), group, 0)
        found.append(
            unshard(attention(own, own, own, at, rope, tokens=9, group=group), group, tokens=9)
        )
    whole = local_attention(q, q, q, torch.arange(9), rope)
    try:
        shard(q, init_device_mesh("cpu", (1, 2, 2)))
    except ValueError as error:
        return [float((x - whole).abs().max()) for x in found], str(error)
    return None


def test_a_dimension_of_a_mesh_is_a_group(four: Ranks) -> None:
    for errors, message in four("mesh", over_a_dimension):
        assert max(errors) < 1e-5
        assert message == "group: expected a mesh of 1 or 2 dimensions, got 3"


@pytest.mark.parametrize("order", ["balanced", "contiguous"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_kernel_is_told_what_a_pair_sees(packed: bool, causal: bool, order: str) -> None:
    """The record of a pair, whose slots begin at 0, hides what the whole sequence hides."""
    borders = torch.tensor([0, 3, 3, 11, 29]) if packed else None
    hidden = Hidden(Scores(causal, 1.0), 29, torch.tensor([1, 0, 2, 5]), borders)
    spans = [spans_of(29, i, 3, order) for i in range(3)]  # type: ignore[arg-type]
    batch, pairs = 1 if packed else 4, 0
    for queries, keys in itertools.product(spans, spans):
        for pair in blocks.pairs_of(queries, keys, hidden.scores):
            shapes = [x.stop - x.start for x in (pair.queries, pair.keys, pair.keys)]
            q, k, v = (torch.zeros(batch, count, 1, 4) for count in shapes)
            seen = blocks._call(blocks.Parts(q, k, v), pair, hidden).visible()
            rows = slice(0, shapes[0])
            expected = blocks._visible(pair, hidden, rows, q.device)
            assert expected is not None
            assert torch.equal(seen, expected[:, 0, 0].expand_as(seen))
            pairs += 1
    assert pairs >= 6


def test_the_schedule_sends_the_less() -> None:
    assert choose_schedule(32, 8, 2).name == "ring"
    assert choose_schedule(32, 8, 8).name == "ulysses"
    assert choose_schedule(32, 8, 16).name == "ring"
    assert str(choose_schedule(32, 8, 8)) == (
        "ulysses over 8 ranks: 70 head rows sent a token; ring sends 112"
    )
    with pytest.raises(ValueError, match="schedule: 'ulysses' needs KV heads that 3 ranks divide"):
        choose_schedule(32, 8, 3, "ulysses")
    with pytest.raises(ValueError, match="schedule: expected one of auto, ring, ulysses, got 'x'"):
        choose_schedule(32, 8, 3, "x")


# -------------------------------------------------------------------------------------- the page


def page() -> list[tuple[int, ...]]:
    """What docs/distributed.md shows, with the names that it leaves to the reader."""
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text("utf-8")
    torch.manual_seed(0)
    tokens, rope = 9, two_sets(8)
    q, k, v = (torch.randn(1, tokens, heads, 16) for heads in (4, 2, 2))
    sizes = {"batch": 1, "capacity": 8, "kv_heads": 2, "head_dim": 16, "layers": 1, "layer": 0}
    new = {"q_new": q[:, :1], "k_new": k[:, :1], "v_new": v[:, :1]}
    given = {"q": q, "k": k, "v": v, "positions": torch.arange(tokens)[None]}
    namespace: dict[str, Any] = {"rope": rope, "tokens": tokens, **sizes, **new, **given}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "transformers" not in block:
            exec(block, namespace)
    return [tuple(namespace[name].shape) for name in ("everything", "out")]


def test_the_page_runs(four: Ranks) -> None:
    assert four("page", page) == [[(1, 9, 4, 16), (1, 1, 4, 16)]] * 4
