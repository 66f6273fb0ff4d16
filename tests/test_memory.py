"""`memory.overlap` decides from strides alone; here brute force over addresses checks it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_kernels.calls import memory
from longrope_kernels.calls.memory import check_apart, overlap, overlaps_itself

STORAGE = 96


def addresses(x: torch.Tensor) -> list[int]:
    """The element index of each element of x in its storage."""
    index = torch.arange(STORAGE).as_strided(x.shape, x.stride(), x.storage_offset())
    return index.flatten().tolist()


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes, strides and an offset of any view that fits a storage of 96 elements."""
    sizes, strides, extent = [], [], 0
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        most = 12 if size == 1 else (STORAGE - 1 - extent) // (size - 1)
        stride = draw(st.integers(0, min(24, most)))
        extent += stride * (size - 1)
        sizes.append(size)
        strides.append(stride)
    return tuple(sizes), tuple(strides), draw(st.integers(0, STORAGE - 1 - extent))


@settings(max_examples=500)
@given(views(), views())
def test_never_misses_shared_elements(x_view: tuple, y_view: tuple) -> None:
    storage = torch.zeros(STORAGE)
    x, y = storage.as_strided(*x_view), storage.as_strided(*y_view)
    if set(addresses(x)) & set(addresses(y)):
        assert overlap(x, y)
        assert overlap(y, x)
        with pytest.raises(ValueError, match=r"y: overlaps x|x: elements share memory"):
            check_apart({"x": x}, {"y": y})
        with pytest.raises(ValueError, match=r": overlaps|: elements share memory"):
            check_apart({"x": x, "y": y}, {})
    own = addresses(x)
    if len(set(own)) != len(own):
        assert overlaps_itself(x)
        with pytest.raises(ValueError, match="x: elements share memory"):
            check_apart({"x": x}, {})


@pytest.mark.parametrize("looks", ["one", "two"])
def test_neighbours_are_apart(monkeypatch: pytest.MonkeyPatch, looks: str) -> None:
    """With one look of the extension, and without it."""
    if looks == "one":
        monkeypatch.setattr(memory, "overlaps_itself", None)
    else:
        monkeypatch.setattr(memory, "clearly_apart", lambda written, read: False)
    x = torch.zeros(STORAGE)
    empty, strided = x[4:4], x[48:].view(8, 6)[:, :3]
    check_apart({"a": x[:24], "b": x[24:48].view(2, 12)}, {"c": strided, "d": strided, "e": empty})


@st.composite
def nested(draw: st.DrawFn) -> torch.Tensor:
    """What slicing, transposing and expanding make of a contiguous tensor."""
    x = torch.zeros(draw(st.sampled_from([(2, 3, 4, 4), (96,), (4, 24), (2, 6, 8)])))
    for axis in range(x.dim()):
        start = draw(st.integers(0, x.shape[axis] - 1))
        stop = draw(st.integers(start + 1, x.shape[axis]))
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, stop, draw(st.integers(1, 3)))
        x = x[tuple(index)]
    x = x.permute(draw(st.permutations(range(x.dim()))))
    return x.unsqueeze(0).expand(draw(st.integers(1, 2)), *x.shape)


@settings(max_examples=300)
@given(nested())
def test_overlaps_itself_is_exact_for_views_that_nest(x: torch.Tensor) -> None:
    own = addresses(x)
    assert overlaps_itself(x) == (len(set(own)) != len(own))


def heads(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, dim))


def packed_views() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """q and k of the usual packings, (batch, seq, heads, dim)."""
    b, s, h, d = 2, 5, 4, 8
    three = torch.zeros(b, s, 3 * h * d)
    gqa = torch.zeros(b, s, (h + 2 + 2) * d)
    per_head = torch.zeros(b, s, h, 3, d)
    three_first = torch.zeros(b, s, 3, h, d)
    per_group = torch.zeros(b, s, 2, 2 + 2, d)  # Falcon, GPT-NeoX with groups: [q q k v] a group
    stacked = torch.zeros(2, b, s, h, d)
    seq_first = torch.zeros(s, b, 3, h, d)
    return {
        "concatenated": tuple(heads(x, d) for x in three.chunk(3, -1)[:2]),
        "concatenated-gqa": tuple(heads(x, d) for x in gqa.split([h * d, 2 * d, 2 * d], -1)[:2]),
        "per-head": (per_head[..., 0, :], per_head[..., 1, :]),
        "qkv-before-heads": (three_first[:, :, 0], three_first[:, :, 1]),
        "one-group": (per_group[:, :, 0, :2], per_group[:, :, 0, 2:3]),
        "stacked": (stacked[0], stacked[1]),
        "seq-first": tuple(seq_first[:, :, i].transpose(0, 1) for i in range(2)),
        "one-batch-each": (per_head[:1, :, :, 0], per_head[1:, :, :, 0]),
        "halves-of-one-head": (per_head[..., 0, : d // 2], per_head[..., 0, d // 2 :]),
        "one-head": (gqa[..., :d].unsqueeze(2), gqa[..., d : 2 * d].unsqueeze(2)),
        "one-token": (heads(gqa[:, :1, : h * d], d), heads(gqa[:, :1, h * d : (h + 2) * d], d)),
    }


@pytest.mark.parametrize("turn", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("kind", sorted(packed_views()))
def test_packed_qkv_does_not_overlap(kind: str, turn: str) -> None:
    q, k = packed_views()[kind]
    if turn == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    elif turn == "thd":
        q, k = q[0], k[0]
    assert not overlap(q, k)
    assert not overlap(k, q)
    assert not overlaps_itself(q)
    assert not overlaps_itself(k)


def test_real_overlaps() -> None:
    x = torch.zeros(2, 5, 4, 8)
    assert overlap(x, x)
    assert overlap(x[:, :, :3], x[:, :, 2:])
    assert overlap(x, x[1, 4, 3, 7:])
    assert overlap(x[..., :5], x[..., 4:])
    assert overlap(x.transpose(1, 2), x)
    assert overlaps_itself(x[:, :1].expand(2, 5, 4, 8))
    assert overlaps_itself(torch.zeros(16).unfold(0, 8, 4))


def test_nothing_overlaps_where_there_is_nothing() -> None:
    x = torch.zeros(2, 5, 4, 8)
    assert not overlap(x[:0], x)
    assert not overlap(x, x[:, :, :0])
    assert not overlaps_itself(x[:, :, :0].expand(2, 5, 0, 8))
    assert not overlap(x, torch.zeros(2, 5, 4, 8))


def test_two_storages_over_one_buffer() -> None:
    """NumPy slices and DLPack peers share memory without sharing a storage."""
    import numpy as np

    array = np.zeros(64, dtype=np.float32)
    whole, low, high = (torch.from_numpy(a) for a in (array, array[:40], array[32:]))
    assert overlap(whole, high)
    assert overlap(low, high)
    assert not overlap(low[:32], high)
    buffer = bytearray(256)
    x = torch.frombuffer(buffer, dtype=torch.float32, count=40)
    y = torch.frombuffer(buffer, dtype=torch.float32, offset=128)
    assert overlap(x, y)
    assert not overlap(x[:32], y)
