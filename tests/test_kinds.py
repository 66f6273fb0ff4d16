"""Kinds of calls: what tells two apart, and that what is kept by them changes no call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from longrope_kernels import Rope, append, apply_rotary, attention, decode
from longrope_kernels.calls import kinds
from longrope_kernels.calls.kinds import by_kind, forget, kind_of
from longrope_kernels.calls.records import Scores
from longrope_kernels.ops import rotary as rotary_op

# ------------------------------------------------------------------------------ what a kind tells

MEMORY = torch.zeros(64)
A, B = torch.zeros(2, 3), torch.zeros(2, 3)
UNLIKE: list[tuple[Any, ...]] = [
    (),
    (None,),
    (0,),
    (1,),
    (-1,),
    (127,),
    (128,),
    (2**63 - 1,),
    (True,),
    (False,),
    (0.0,),
    (-0.0,),
    (1.0,),
    ("",),
    ("1",),
    ("bshd",),
    ("bs", "hd"),
    (1, 2),
    ((1, 2),),
    ((1,), 2),
    (1, (2,)),
    ((),),
    (A,),
    (A, B),
    (A, A),
    (A, (B,)),
    (A, B, A),
    (A, B, B),
    (A.double(),),
    (A.bfloat16(),),
    (A.half(),),
    (A.int(),),
    (A.long(),),
    (A.bool(),),
    (A.to(torch.uint8),),
    (A.to(torch.float8_e4m3fn),),
    (A.to(torch.float8_e5m2),),
    (A.t(),),
    (A.view(6),),
    (A.view(1, 2, 3),),
    (A[:1],),
    (A[:, :2],),
    (A[:1].expand(2, 3),),
    (MEMORY[1:7].view(2, 3),),
    (MEMORY[2:8].view(2, 3),),
    (torch.zeros(3, 2),),
    (torch.zeros(0, 3),),
    (torch.zeros(()),),
]


def test_all_but_values_and_places_is_told_apart() -> None:
    found = [kind_of(*arguments) for arguments in UNLIKE]
    assert None not in found
    assert len(set(found)) == len(UNLIKE)


def test_values_and_places_are_not() -> None:
    one, other = torch.zeros(2, 3), torch.nn.Parameter(torch.ones(2, 3))
    assert kind_of(one, 1, (None, "thd")) == kind_of(other, 1, (None, "thd"))
    assert kind_of(Scores(True, 0.5)) == kind_of((True, 0.5, 0, 0.0))


class Wrapped(torch.Tensor):
    pass


NO_KIND: dict[str, Callable[[], Any]] = {
    "another object": object,
    "a list": lambda: [1],
    "a number of many bits": lambda: 2**63,
    "a device": lambda: torch.device("cpu"),
    "a subclass": lambda: torch.zeros(2).as_subclass(Wrapped),
    "no memory": lambda: torch.empty(2, device="meta"),
    "a fake tensor": lambda: FakeTensorMode().from_tensor(torch.zeros(2)),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "text of no encoding": lambda: "\ud800",
}


@pytest.mark.parametrize("make", NO_KIND.values(), ids=NO_KIND)
def test_what_cannot_be_told_has_no_kind(make: Callable[[], Any]) -> None:
    assert kind_of(A, make()) is None
    assert kind_of((A, (make(),))) is None


def test_what_torch_traces_or_wraps_has_no_kind() -> None:
    seen: list[object] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(kind_of(x))
        return x.sum()

    torch.func.vmap(look)(A)
    torch.func.grad(look)(A)
    assert seen == [None, None]
    compiled = torch.compile(lambda x: x + (kind_of(x) is None), backend="eager", fullgraph=True)
    assert torch.equal(compiled(A), A + 1)


# -------------------------------------------------------------------------------- what is kept


def test_a_kind_is_worked_out_once_and_errors_anew() -> None:
    seen: list[Any] = []

    @by_kind
    def size(x: torch.Tensor) -> int:
        seen.append(x)
        if x.dim() == 1:
            raise ValueError("x: expected two dimensions")
        return x.numel()

    assert [size(A), size(B), size(A.t())] == [6, 6, 6]
    assert [x.shape for x in seen] == [A.shape, A.t().shape]
    for times in (3, 4):
        with pytest.raises(ValueError, match="two dimensions"):
            size(A[0])
        assert len(seen) == times


def test_what_is_kept_is_bounded_and_holds_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MOST", 3)
    alive = []
    for seq in range(1, 9):
        q, positions = torch.randn(1, seq, 2, 8), torch.arange(seq)
        alive += [weakref.ref(q), weakref.ref(positions)]
        apply_rotary(q, None, positions, Rope.plain(8))
        assert 0 < len(rotary_op._check_kind.kept) <= 3  # type: ignore[attr-defined]
    del q, positions
    gc.collect()
    assert not any(x() is not None for x in alive)


def test_threads_share_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MOST", 2)
    shapes = [(1, seq, heads, 8) for seq in range(1, 5) for heads in (1, 2)] * 20

    def rotate(shape: tuple[int, ...]) -> bool:
        x = torch.ones(shape)
        rotated, _ = apply_rotary(x, None, torch.zeros(shape[1], dtype=torch.int64), Rope.plain(8))
        with pytest.raises(ValueError, match="positions: expected shape"):
            apply_rotary(x, None, torch.zeros(shape[1] + 1, dtype=torch.int64), Rope.plain(8))
        return torch.equal(rotated, x)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(rotate, shapes))


# ------------------------------------------------------------- good and bad calls, one by one

ONE, TWO = Rope.plain(8), Rope.longrope([1.0] * 4, [2.0] * 4, 4, 8)


def heads(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def indices(*values: Any) -> torch.Tensor:
    return torch.tensor(values)


CACHES = {"k_cache": heads(2, 4, 2, 8), "v_cache": heads(2, 4, 2, 8)}
GOOD: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (
        apply_rotary,
        {"q": heads(2, 3, 4, 8), "k": heads(2, 3, 2, 8), "positions": indices(0, 1, 2)}
        | {"factors": TWO, "lengths": indices(3, 8), "sets": None, "layout": "bshd"}
        | {"cu_seqlens": None, "inplace": False, "backend": None},
    ),
    (
        apply_rotary,
        {"q": heads(3, 4, 8), "k": None, "positions": indices([0, 1, 0]), "factors": TWO}
        | {"lengths": None, "sets": indices(0, 1).int(), "layout": "thd"}
        | {"cu_seqlens": indices(0, 2, 3), "inplace": True, "backend": "reference"},
    ),
    (
        attention,
        {"q": heads(2, 3, 4, 8), "k": heads(2, 3, 2, 8), "v": heads(2, 3, 2, 8)}
        | {"positions": indices(0, 1, 2), "factors": TWO, "lengths": indices(3, 8)}
        | {"key_positions": None, "kv_start": indices(0, 1), "layout": "bshd", "backend": None}
        | {"causal": True, "window": 2, "softcap": 5.0, "return_lse": False, "k_rotation": None},
    ),
    (
        decode,
        {"q": heads(2, 1, 4, 8), **CACHES, "cache_lens": indices(1, 4), "factors": TWO}
        | {"k_new": heads(2, 1, 2, 8), "v_new": heads(2, 1, 2, 8), "slot_mapping": None}
        | {"block_table": None, "lengths": None, "sets": None, "kv_start": indices(0, 1)}
        | {"window": 2, "softcap": 5.0, "softmax_scale": 0.5, "backend": None},
    ),
    (
        append,
        {"k": heads(2, 1, 2, 8), "v": heads(2, 1, 2, 8), **CACHES, "cache_lens": indices(1, 4)}
        | {"slot_mapping": None, "block_table": indices([0], [1]).int(), "backend": None},
    ),
]
# In place of an argument, from the argument; most make a bad call.
OTHERS: list[Callable[[Any], Any]] = [
    *(lambda x: None, lambda x: x + x, lambda x: x[:1], lambda x: x[..., :1], lambda x: -x),
    *(lambda x: x.int(), lambda x: x.long(), lambda x: x.bfloat16(), lambda x: x.double()),
    *(lambda x: x.transpose(-1, -2), lambda x: x.transpose(1, 2), lambda x: x.unsqueeze(0)),
    *(lambda x: x[..., ::2], lambda x: x.tolist(), lambda x: x[:1].expand(x.shape)),
    *(
        lambda x: "bhsd",
        lambda x: True,
        lambda x: ONE,
        lambda x: "native",
        lambda x: x + 2**40,
    ),
]


@st.composite
def calls(draw: st.DrawFn) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A good call, or one in which something stands in place of an argument or two."""
    function, named = draw(st.sampled_from(GOOD))
    named = dict(named)
    for _ in range(draw(st.sampled_from((0, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(named)))
        with suppress(AttributeError, IndexError, TypeError, RuntimeError):
            named[name] = draw(st.sampled_from(OTHERS))(named[name])
    return function, named


def outcome(function: Callable[..., Any], named: dict[str, Any]) -> Any:
    """What a call returns or raises, and what it leaves in what it was given."""
    copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in named.items()}
    try:
        result = function(**copies)
    except (TypeError, ValueError, RuntimeError) as error:
        result = type(error), str(error)
    everything = [result, *copies.values()]
    return [x.tolist() if isinstance(x, torch.Tensor) else x for x in flat(everything)]


def flat(x: Any) -> Iterator[Any]:
    if isinstance(x, list | tuple):
        for y in x:
            yield from flat(y)
    else:
        yield x


@settings(max_examples=200)
@given(given=st.lists(calls(), min_size=2, max_size=5), order=st.randoms(use_true_random=False))
def test_calls_do_as_if_nothing_were_kept(given: list[Any], order: Any) -> None:
    forget()
    turns = given * 2
    order.shuffle(turns)
    kept = [outcome(*call) for call in turns]
    alone = []
    for call in turns:
        forget()
        alone.append(outcome(*call))
    assert repr(kept) == repr(alone)


def test_a_kept_choice_of_attention_makes_gradients_where_they_are_wanted() -> None:
    q, k, v = heads(1, 3, 4, 8), heads(1, 3, 2, 8), heads(1, 3, 2, 8)
    given = {"positions": indices(0, 1, 2), "factors": ONE}
    assert not attention(q, k, v, **given).requires_grad
    attention(q, k, v.clone().requires_grad_(), **given).sum().backward()
    x = v.clone().requires_grad_()
    for _ in range(2):
        attention(q, k, x, **given).sum().backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() == x.numel()


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_gradients_are_looked_at_in_each_call(name: str) -> None:
    given = {x: torch.ones(1, 1, 2, 8) for x in ("q", "k_cache", "v_cache")}
    lens = torch.tensor([1])
    decode(**given, cache_lens=lens, factors=ONE)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: decode has no gradient"):
        decode(**given, cache_lens=lens, factors=ONE)
    with torch.no_grad():
        decode(**given, cache_lens=lens, factors=ONE)
