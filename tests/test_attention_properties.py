"""Laws of `attention`, and shapes and features nobody wrote down together."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attention_cases import (
    Backend,
    Case,
    backends_of_scores,
    check,
    check_grads,
    every_backend,
    every_case,
)
from attention_truth import Call, assert_lse_close, bf16, fp16, fp32
from cases import factors, positions_for, two_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope, apply_rotary


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Any sizes from nothing on, and any features that can meet."""
    kv_heads, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    layout = draw(st.sampled_from(["bshd", "bhsd", "thd"]))
    batch, counts, counts_k = draw(st.integers(0, 3)), (), ()
    if layout == "thd":
        batch = draw(st.integers(1, 5))
        some = st.lists(st.integers(0, 9), min_size=batch, max_size=batch)
        counts = tuple(draw(some))
        counts_k = tuple(draw(st.one_of(st.just(()), some)))
    maybe = st.one_of(st.none(), st.integers(1, 30))
    return Case(
        batch,
        draw(st.integers(0, 21)),
        draw(st.sampled_from([0, 0, 1, 5, 21, 30])),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        2 * pairs + draw(st.sampled_from([0, 0, 1, 6])),
        pairs,
        layout,
        draw(st.sampled_from([fp32, bf16, fp16])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(maybe),
        draw(st.sampled_from([None, None, 0.5, 20.0])),
        draw(st.sampled_from([None, 0.2])),
        tuple(draw(st.lists(st.integers(0, 25), min_size=batch, max_size=batch)))
        if draw(st.booleans())
        else (),
        counts,
        counts_k,
        tuple(draw(st.lists(st.sampled_from([4096, 4097]), min_size=batch, max_size=batch)))
        if batch and draw(st.booleans())
        else (),
        (),
        draw(st.sampled_from([0, 1, 128, 4096])),
        draw(st.sampled_from([1.0, 1.19])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


# A GPU compiles for each, and the interpreter takes some seconds.
@settings(max_examples=60 if os.environ.get("LONGROPE_FULL") == "1" else 15)
@given(any_case(), st.booleans())
@every_backend
@pytest.mark.examples
def test_any_case(backend: Backend, case: Case, forward: bool) -> None:
    """Forward or backward, of what the backend serves."""
    torch.manual_seed(0)
    if not backend.of_scores:
        case = replace(case, softcap=None, return_lse=False)
    # Sinks of so few heads don't show what rounding does to their gradients: test_sinks.py.
    case = backend.nearest(replace(case, sinks=case.sinks and forward))
    (check if forward else check_grads)(backend, case)


FEATURES = [
    Case(2, 33, dim=64, dtype=bf16),
    Case(2, 9, 40, window=12, layout="bhsd"),
    Case(3, kv_start=(0, 5, 19), causal=False, dtype=fp16),
    Case(counts=(9, 0, 4), counts_k=(3, 2, 9), lengths=(5, 5000, 7), layout="thd", dtype=bf16),
]


@every_case(FEATURES)
def test_rotating_then_attending_equals_attending(backend: Backend, case: Case) -> None:
    """Tokens rotated before stand at position 0 of a plain embedding, which turns nothing."""
    (q, k, v), arguments = case.tensors(), case.arguments()
    positions, layout = arguments.pop("positions"), case.layout
    expected = Call(q, k, v, positions, case.rope(), **arguments).expected()
    keys = arguments.pop("key_positions", positions)
    lengths = arguments.pop("lengths", None)
    rotated = []
    for x, at, borders in ((q, positions, "cu_seqlens"), (k, keys, "cu_seqlens_k")):
        borders = arguments.get(borders) if lengths is not None else None
        turned, _ = apply_rotary(
            x, None, at, case.rope(), layout=layout, lengths=lengths, cu_seqlens=borders
        )
        rotated.append(turned)
    plain = Rope.plain(case.dim)
    zeros = {"key_positions": torch.zeros_like(keys)}
    out = backend.attend(*rotated, v, torch.zeros_like(positions), plain, **arguments, **zeros)
    assert_close(out, expected.out)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("shift", [1, 4096, 131072, 2**21, 2**31 - 200, -(2**30)])
@every_backend
def test_shifting_all_positions_changes_nothing(
    backend: Backend, shift: int, interleaved: bool
) -> None:
    """With no threshold and one set; the expected output is that of the positions unshifted."""
    rope = Rope(FactorSet(factors(32), 0, 1.19), interleaved=interleaved)
    case = backend.nearest(Case(1, 19, 33, dim=64))
    tensors = case.tensors()
    queries, keys = torch.arange(14, 33) * 3, torch.arange(33) * 3
    expected = Call(*tensors, queries, rope, key_positions=keys).expected()
    out = backend.attend(*tensors, queries + shift, rope, key_positions=keys + shift)
    assert_close(out, expected.out)


@every_backend
def test_shifting_across_the_threshold_changes_much(backend: Backend) -> None:
    """The law above is not true of everything."""
    case = backend.nearest(Case(1, 19, n_hat=128))
    args, at = case.tensors(), torch.arange(19)
    low, high = (backend.attend(*args, at + shift, case.rope()) for shift in (0, 128))
    assert (low - high).abs().max() > 0.01


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@every_backend
def test_a_batch_equals_its_sequences_one_by_one(backend: Backend, layout: str) -> None:
    """Bitwise: neither the batch nor a neighbour's set or padding may touch a sequence."""
    case = Case(4, 19, 30, dim=48, layout=layout, dtype=bf16)
    tensors, rope = case.tensors(), two_sets(24)
    at = torch.randint(-100, 2**31 - 1, (4, 49))
    features = {
        "key_positions": at[:, 19:],
        "lengths": torch.tensor([5, 5000, 4097, 4096]),
        "kv_start": torch.tensor([0, 7, 30, 2]),
    }
    batch = backend.attend(*tensors, at[:, :19], rope, layout=layout, **features)
    for i in range(4):
        part = slice(i, i + 1)
        alone = {name: x[part] for name, x in features.items()}
        one = (x[part] for x in tensors)
        out = backend.attend(*one, at[part, :19], rope, layout=layout, **alone)
        assert torch.equal(out, batch[part])


@pytest.mark.parametrize("layout", ["bhsd", "thd"])
@every_backend
def test_layouts_and_packing_do_not_matter(backend: Backend, layout: str) -> None:
    """A layout not a bit; packed sequences may take other tiles, so they take the rule."""
    case = backend.nearest(Case(3, 11, heads=4, kv_heads=2))
    tensors, rope = case.tensors(), two_sets(16)
    at, lengths = torch.randint(-100, 2**31 - 1, (3, 11)), torch.tensor([5, 5000, 4097])
    for window in (None, 4):
        wanted = backend.attend(*tensors, at, rope, lengths=lengths, window=window)
        kwargs = {"layout": layout, "lengths": lengths, "window": window}
        if layout == "bhsd":
            out = backend.attend(*(x.transpose(1, 2) for x in tensors), at, rope, **kwargs)
            assert torch.equal(out.transpose(1, 2), wanted)
        else:
            kwargs["cu_seqlens"] = torch.tensor([0, 11, 22, 33])
            packed = (x.flatten(0, 1) for x in tensors)
            out = backend.attend(*packed, at.flatten(), rope, **kwargs).view_as(wanted)
            expected = Call(*tensors, at, rope, lengths=lengths, window=window).expected()
            assert_close(out, expected.out)


CHUNKED = [
    ((0, 35, 70), None),
    ((0, 1, 30, 33, 70), 20),
    ((0, 64, 70), 20),
    pytest.param((0, 35, 70), 20, marks=pytest.mark.full),
    pytest.param((0, 1, 30, 33, 70), None, marks=pytest.mark.full),
    pytest.param((0, 64, 70), None, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("bounds", "window"), CHUNKED, ids=str)
@every_backend
def test_a_prompt_in_chunks_equals_the_prompt_whole(
    backend: Backend, bounds: tuple[int, ...], window: int | None
) -> None:
    """Each chunk sees the keys so far, with the set of the whole prompt pinned."""
    case = backend.nearest(Case(2, 70, dim=64))
    (q, k, v), rope = case.tensors(), two_sets(32)
    at, starts = torch.arange(4060, 4130), torch.tensor([0, 9])
    lengths = torch.tensor([4130, 4096])
    features = {"lengths": lengths, "kv_start": starts, "window": window}
    expected = Call(q, k, v, at, rope, **features).expected()
    chunks = [
        backend.attend(
            q[:, a:b], k[:, :b], v[:, :b], at[a:b], rope, key_positions=at[:b], **features
        )
        for a, b in pairwise(bounds)
    ]
    assert_close(torch.cat(chunks, 1), expected.out)
    assert_close(backend.attend(q, k, v, at, rope, **features), expected.out)


@backends_of_scores
def test_two_halves_of_the_keys_merge_by_their_lse(backend: Backend) -> None:
    """out and lse of parts make those of the whole: what split caches rely on."""
    case = Case(2, 9, 40, causal=False, dtype=fp32 if fp32 in backend.dtypes else bf16)
    (q, k, v), rope = case.tensors(), case.rope()
    at, keys = positions_for(49, 128)[:9], positions_for(49, 128)[9:]
    parts = []
    for part in (slice(0, 13), slice(13, 40)):
        kwargs = {"key_positions": keys[part], "causal": False, "return_lse": True}
        out, lse = backend.attend(q, k[:, part], v[:, part], at, rope, **kwargs)
        parts.append((out.cpu().double(), lse.cpu().double()))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [torch.exp(x - lse).transpose(1, 2)[..., None] for _, x in parts]
    out = sum(w * x for w, (x, _) in zip(weights, parts, strict=True))
    expected = Call(q, k, v, at, rope, key_positions=keys, causal=False).expected()
    assert_close(out.to(q.dtype), expected.out)
    assert_lse_close(lse.float(), expected.lse)


@every_backend
def test_hidden_keys_do_not_matter(backend: Backend) -> None:
    """Not a bit, whatever finite values they hold: padding, the future, beyond the window."""
    case = backend.nearest(Case(2, 19))
    tensors, at, rope = case.tensors(), positions_for(19, 128), case.rope()
    starts = torch.tensor([6, 6])
    for kwargs, hidden, rows in (
        ({"kv_start": starts}, slice(0, 6), slice(None)),
        ({}, slice(10, 19), slice(0, 10)),
        ({"window": 4}, slice(0, 7), slice(10, 19)),
        ({"window": 4, "causal": False}, slice(0, 7), slice(10, 19)),
        ({"window": 4, "causal": False}, slice(14, 19), slice(0, 11)),
    ):
        out = backend.attend(*tensors, at, rope, **kwargs)
        other = [x.clone() for x in tensors]
        for x in other[1:]:
            x[:, hidden] = 1000 * torch.randn_like(x[:, hidden])
        assert torch.equal(backend.attend(*other, at, rope, **kwargs)[:, rows], out[:, rows])
        assert not torch.equal(backend.attend(*other, at, rope, causal=False), out)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@every_backend
def test_masks_that_hide_nothing(backend: Backend, causal: bool) -> None:
    case = backend.nearest(Case(2, 12, 19, causal=causal))
    tensors, arguments = case.tensors(), case.arguments()
    args = (arguments.pop("positions"), case.rope())
    expected = Call(*tensors, *args, **arguments).expected().out
    for more in ({"window": 19}, {"window": 2**40}, {"kv_start": torch.zeros(2).int()}):
        assert_close(backend.attend(*tensors, *args, **arguments, **more), expected)


@every_backend
def test_the_order_of_the_keys_does_not_matter(backend: Backend) -> None:
    """Without a mask, where keys go with their values and positions."""
    case = backend.nearest(Case(2, 9, 40, causal=False))
    (q, k, v), at, keys = case.tensors(), positions_for(9, 128), positions_for(40, 128)
    order = torch.randperm(40)
    expected = Call(q, k, v, at, case.rope(), key_positions=keys, causal=False).expected().out
    out = backend.attend(
        q, k[:, order], v[:, order], at, case.rope(), key_positions=keys[order], causal=False
    )
    assert_close(out, expected)


@every_backend
def test_shared_heads_equal_repeated_heads(backend: Backend) -> None:
    """Query heads g * n to g * n + n - 1 share head g of k and v, in this order."""
    case = backend.nearest(Case(1, 19, heads=4, kv_heads=2))
    (q, k, v), at, rope = case.tensors(), positions_for(19, 128), case.rope()
    repeated = backend.attend(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), at, rope)
    expected = Call(q, k, v, at, rope).expected().out
    assert_close(repeated, expected)
    assert_close(backend.attend(q, k, v, at, rope), expected)


@every_backend
def test_equal_scores_give_the_mean_of_what_is_seen(backend: Backend) -> None:
    """q = 0: row i of a causal mask is the mean of the first i + 1 values."""
    case = backend.nearest(Case(1, 40, heads=2, kv_heads=1))
    (q, k, v), at = case.tensors(), positions_for(40, 128)
    out = backend.attend(torch.zeros_like(q), k, v, at, case.rope())
    expected = Call(torch.zeros_like(q), k, v, at, case.rope()).expected().out
    counts = torch.arange(1, 41)[None, :, None, None]
    means = (v.double().cumsum(1) / counts).expand(1, 40, 2, 32)
    assert_close(out, type(expected)(means, expected.low))
