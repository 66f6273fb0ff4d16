"""`attention` against the truth: every feature, on every backend that serves it."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    BACKENDS,
    REFERENCE,
    Backend,
    Case,
    check,
    every_case,
    every_forward,
    forwards_of_scores,
)
from attention_truth import Call, assert_lse_close, bf16, fp16, fp32, fp64, visible
from cases import DTYPE_NAMES, factors, positions_for
from tolerance import assert_close

from longrope_kernels import FactorSet, Rope, attention

# Each value of each axis several times, and the pairs of values that share code.
SHAPES = [
    Case(2, 63, 0, 4, 2, 96, dtype=bf16),
    Case(2, 33, 0, 3, 1, 64, layout="bhsd"),
    Case(1, 130, 0, 2, 2, 128, layout="thd", dtype=fp16),
    Case(2, 35, 0, 8, 2, 80, 16, dtype=bf16, layout="bhsd", interleaved=True),
    Case(3, 1, 0, 4, 4, 128, layout="bhsd"),
    Case(1, 65, 0, 6, 2, 96, 36, dtype=fp16, interleaved=True, causal=False),
    Case(2, 63, 0, 2, 1, 64, 12, causal=False),
    Case(1, 18, 0, 5, 5, 80, layout="thd", dtype=bf16, causal=False),
    Case(2, 17, 0, 2, 1, 6, interleaved=True),
    Case(1, 20, 0, 2, 1, 33, 7, dtype=fp16),
    Case(1, 40, 0, 2, 1, 256, dtype=bf16, causal=False),
]
CHUNKS = [
    Case(2, 7, 40, 4, 2, 96, dtype=bf16),
    Case(2, 7, 40, 4, 2, 64, causal=False),
    Case(1, 1, 63, 8, 1, 80, layout="bhsd", dtype=fp16),
    Case(2, 31, 32, 2, 2, 32, layout="bhsd"),
    Case(1, 65, 130, 2, 1, 128, dtype=bf16, layout="bhsd", interleaved=True),
    Case(1, 9, 33, 4, 4, 64, 8, layout="thd"),
    Case(2, 5, 40, window=9),
    Case(2, 33, 70, window=5, causal=False, dtype=bf16),
]
# More queries than keys: with a causal mask the first ones see none.
EMPTY_ROWS = [
    Case(2, 20, 9, 4, 2, 64, dtype=bf16),
    Case(1, 70, 3, 2, 1, 32, layout="bhsd"),
    Case(2, 20, 9, causal=False, dtype=fp16),
    Case(2, 40, 9, window=4, causal=False),
    Case(1, 20, 9, layout="thd", window=2),
]
WINDOWS = [
    Case(window=1),
    Case(window=2, dtype=bf16, layout="bhsd"),
    Case(1, 70, window=17, dim=64, kv_heads=1, dtype=bf16),
    Case(1, 130, window=64, heads=2, dtype=fp16, layout="thd"),
    Case(window=18),
    Case(window=19),
    Case(window=10**6, dtype=bf16),
    Case(window=1, causal=False, layout="thd", dtype=fp16),
    Case(1, 70, window=17, dim=96, causal=False),
    Case(window=100, causal=False, dtype=bf16),
]
PADDING = [
    Case(3, kv_start=(0, 5, 18)),
    Case(3, 40, kv_start=(39, 0, 33), dtype=bf16, dim=96, layout="bhsd"),
    Case(3, kv_start=(19, 100, 4), dtype=fp16),
    Case(2, kv_start=(7, 19), causal=False),
    Case(2, 3, 30, kv_start=(29, 11), dtype=bf16),
    Case(2, 30, 20, kv_start=(3, 20), causal=False, window=6),
    Case(2, 50, kv_start=(20, 0), window=6, layout="bhsd"),
]
SCORES = [
    Case(scale=0.5),
    Case(scale=1e-3, causal=False, dtype=bf16),
    Case(scale=1.0, layout="thd", dtype=fp16, dim=64),
    Case(softcap=0.7),
    Case(softcap=30.0, dtype=bf16, dim=64, layout="bhsd", window=5),
    Case(softcap=1.5, scale=2.0, causal=False, kv_start=(3, 19), return_lse=True),
    Case(2, 5, 23, softcap=5.0, dtype=fp16, layout="thd", counts=(3, 2), counts_k=(11, 12)),
]
LSE = [
    Case(return_lse=True),
    Case(2, 35, 0, 8, 2, 80, return_lse=True, dtype=bf16, layout="bhsd"),
    Case(return_lse=True, dtype=fp16, layout="thd", counts=(7, 0, 12), heads=3, kv_heads=1),
    Case(2, 9, 20, return_lse=True, window=3, causal=False, layout="bhsd"),
    Case(2, 20, 9, return_lse=True, dtype=bf16),
    Case(3, return_lse=True, kv_start=(0, 19, 4)),
    Case(return_lse=True, scale=0.3),
]
ROPES = [
    Case(n_hat=0, attention_factor=1.0),
    Case(n_hat=0, attention_factor=1.4, dtype=bf16, pairs=8),
    Case(n_hat=1, attention_factor=0.8, dim=64, pairs=32),
    Case(n_hat=4097, interleaved=True, dtype=fp16),
    Case(2, 9, 30, n_hat=4096, pairs=3, interleaved=True, layout="bhsd"),
]


@pytest.mark.full
@every_case([Case(1, 1000, 0, 1, 1, 16, dtype=bf16)])
def test_a_thousand_tokens(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_case(SHAPES, both_ways=True)
def test_shapes(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_case([*CHUNKS, *EMPTY_ROWS])
def test_more_keys_or_fewer(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_case([*WINDOWS, *PADDING])
def test_masks(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_case([*SCORES, *LSE])
def test_scores_and_log_sum_exp(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_case(ROPES)
def test_thresholds_and_attention_factors(backend: Backend, case: Case) -> None:
    check(backend, case)


def test_the_mask_of_the_truth_written_out() -> None:
    """The rule of slots, by hand: the last query stands at the last key."""

    def shown(*args: object) -> list[str]:
        return ["".join(".x"[int(seen)] for seen in row) for row in visible(*args)]

    assert shown(2, 4, True, None, 0) == ["xxx.", "xxxx"]
    assert shown(4, 2, True, None, 0) == ["..", "..", "x.", "xx"]
    assert shown(3, 3, True, 2, 0) == ["x..", "xx.", ".xx"]
    assert shown(3, 3, False, 2, 0) == ["xx.", "xxx", ".xx"]
    assert shown(4, 2, False, 2, 0) == ["..", "x.", "xx", "xx"]
    assert shown(3, 3, True, None, 1) == ["...", ".x.", ".xx"]


def test_the_low_precision_truth_is_the_truth_in_float64() -> None:
    """Its backward is written by hand: autograd of the formula says the same."""
    case = Case(2, 6, 9, softcap=1.3, window=7, kv_start=(0, 8), dtype=fp64, pairs=9)
    arguments = case.arguments()
    call = Call(*case.tensors(), arguments.pop("positions"), case.rope(), **arguments)
    grads_out = torch.randn(2, 6, 4, 32, dtype=fp64), torch.randn(2, 4, 6, dtype=fp64)
    for ref64, low, _ in (call.expected().out, *call.expected_grads(*grads_out)):
        assert ref64.any()
        assert (low - ref64).abs().max() <= 64 * torch.finfo(fp64).eps * ref64.abs().max()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in BACKENDS if backend.of_scores for dtype in backend.dtypes],
    ids=lambda x: DTYPE_NAMES.get(x, str(x)),
)
def test_lse_has_no_less_than_float32(backend: Backend, dtype: torch.dtype) -> None:
    """(batch, heads, Sq) in both dense layouts and (heads, tokens) packed."""
    for layout, shape in (("bshd", (2, 4, 5)), ("bhsd", (2, 4, 5)), ("thd", (4, 5))):
        case = Case(2, 5, layout=layout, counts=(2, 3) if layout == "thd" else (), dtype=dtype)
        args = (*case.tensors(), case.arguments().pop("positions"), case.rope())
        out, lse = backend.attend(*args, layout=layout, return_lse=True)
        assert out.dtype == dtype
        assert out.shape == args[0].shape
        assert lse.dtype == (fp64 if dtype == fp64 else fp32)
        assert tuple(lse.shape) == shape


@pytest.mark.parametrize("pairs", [0, 9], ids=["full", "partial"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_float64_in_the_reference(causal: bool, pairs: int) -> None:
    """Angles of float64 are off by 3 * 2**-53 of their size; scores and output follow."""
    case = Case(2, 20, 33, 4, 2, 48, pairs, dtype=fp64, causal=causal, softcap=3.0)
    q, k, v = case.tensors()
    arguments = case.arguments()
    arguments["positions"] = torch.randint(-300, 4200, (2, 20))
    arguments["key_positions"] = torch.randint(-300, 4200, (2, 33))
    positions = arguments.pop("positions")
    out, lse = REFERENCE.attend(q, k, v, positions, case.rope(), **arguments, return_lse=True)
    expected = Call(q, k, v, positions, case.rope(), **arguments).expected()
    longest = 1.19**2 * 48**-0.5 * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    off = longest * (2 * 3 * 2.0**-53 * 4200 + 48 * torch.finfo(fp64).eps)
    assert (lse - expected.lse.ref64).abs().max() <= off
    assert (out - expected.out.ref64).abs().max() <= 2 * off * v.abs().max()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_stays_nan(backend: str) -> None:
    """Its log-sum-exp is none of a query that sees no key."""
    q, k, v = torch.randn(3, 1, 9, 2, 16)
    q[0, 4, 0, 0] = torch.nan
    args = torch.arange(9), Rope.plain(16)
    out, lse = attention(q, k, v, *args, return_lse=True, backend=backend)
    for x in (out[0, :, :, 0].T, lse[0]):
        assert x.isnan().nonzero().tolist() == [[0, 4]]
    sinks = torch.tensor([0.0, torch.nan])
    out, lse = attention(k, k, v, *args, sinks=sinks, return_lse=True, backend=backend)
    assert out.isnan().all((0, 1, 3)).tolist() == lse.isnan().all(2)[0].tolist() == [False, True]
    assert not out[:, :, 0].isnan().any()


def test_padding_may_hold_anything_in_the_reference() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 16)
    k[:, :3] = v[:, :3] = torch.nan
    k.requires_grad_()
    args = torch.arange(9), Rope.plain(16)
    out = attention(q, k, v, *args, kv_start=torch.tensor([3]), backend="reference")
    out.sum().backward()
    assert not out.isnan().any()
    assert not k.grad.isnan().any()


@every_forward
def test_a_query_that_sees_no_key_gets_zeros(backend: Backend) -> None:
    """Exactly, by each of the ways to hide everything; also where memory held NaN."""
    ways = [
        (Case(1, 20, 9), slice(0, 11)),
        (Case(1, 20, kv_start=(20,)), slice(None)),
        (Case(1, 20, kv_start=(7,)), slice(0, 7)),
        (Case(1, 20, kv_start=(1000,), causal=False), slice(None)),
        (Case(1, 20, 9, causal=False, window=3), slice(0, 9)),
    ]
    for case, rows in ways:
        for dtype in backend.dtypes:
            case = Case(**{**vars(case), "dtype": dtype})
            args = case.arguments()
            out = backend.attend(*case.tensors(), args.pop("positions"), case.rope(), **args)
            assert not out[:, rows].any(), case
            assert not out.isnan().any(), case
            if rows.stop:
                assert out[:, rows.stop :].any(-1).all(), case


@pytest.mark.parametrize("start", [2**31 - 1, 2**33 + 2])
@every_forward
def test_keys_that_start_past_all_slots_are_seen_by_nobody(backend: Backend, start: int) -> None:
    """Also where the slot and a tile, or the slot itself, take more than 32 bits."""
    q = torch.randn(1, 4, 2, 16).to(backend.dtypes[0])
    kv_start = torch.tensor([start], dtype=torch.int32 if start < 2**31 else torch.int64)
    for window in (None, 3):
        kwargs = {"kv_start": kv_start, "window": window}
        assert not backend.attend(q, q, q, torch.arange(4), Rope.plain(16), **kwargs).any()


@forwards_of_scores
def test_log_sum_exp_of_no_key_is_minus_infinity(backend: Backend) -> None:
    case = backend.nearest(Case(3, 8, kv_start=(0, 3, 8), return_lse=True))
    args = case.arguments()
    _, lse = backend.attend(
        *case.tensors(), args.pop("positions"), case.rope(), **args, return_lse=True
    )
    wanted = [0, 3, 8]
    for b, hidden in enumerate(wanted):
        assert (lse[b, :, :hidden] == -torch.inf).all()
        assert lse[b, :, hidden:].isfinite().all()


@every_case(
    [
        Case(0, 5),
        Case(2, 0),
        Case(0, 5, layout="bhsd", dtype=bf16),
        Case(1, 0, layout="thd"),
        Case(counts=(0, 0), layout="thd", dtype=fp16),
        Case(counts=(0, 0), counts_k=(3, 2), layout="thd"),
        Case(0, 5, return_lse=True),
        Case(2, 0, return_lse=True, layout="bhsd"),
    ]
)
def test_nothing_to_attend(backend: Backend, case: Case) -> None:
    check(backend, case)


@every_forward
def test_no_keys_at_all(backend: Backend) -> None:
    """A cache that is still empty: zeros, in each layout, whatever q holds."""
    for layout, sizes in (
        ("bshd", ((2, 5, 4, 16), (2, 0, 2, 16))),
        ("bhsd", ((2, 4, 5, 16), (2, 2, 0, 16))),
        ("thd", ((5, 4, 16), (0, 2, 16))),
    ):
        q, k = (torch.randn(size).to(backend.dtypes[0]) for size in sizes)
        q[..., 0] = torch.inf
        keys = torch.arange(0)
        for causal in (True, False):
            kwargs = {"key_positions": keys, "layout": layout, "causal": causal}
            out = backend.attend(q, k, k, torch.arange(5), Rope.plain(16), **kwargs)
            assert out.shape == q.shape
            assert torch.equal(out.cpu(), torch.zeros_like(q))


@every_forward
def test_no_heads_at_all(backend: Backend) -> None:
    none = torch.empty(2, 5, 0, 16, dtype=backend.dtypes[0])
    out = backend.attend(none, none, none, torch.arange(5), Rope.plain(16))
    assert out.shape == none.shape


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@every_forward
def test_views_of_packed_qkv(backend: Backend, layout: str) -> None:
    """q, k and v are slices of one projection: strides that no copy makes right first."""
    sizes = {"bshd": (2, 19, 8, 32), "bhsd": (2, 19, 8, 32), "thd": (19, 8, 32)}[layout]
    qkv = torch.randn(sizes).to(backend.dtypes[0])
    parts = list(qkv.split([4, 2, 2], -2))
    if layout == "bhsd":
        parts = [x.transpose(1, 2) for x in parts]
    case = Case(1 if layout == "thd" else 2, 19, layout=layout, dtype=qkv.dtype)
    check(backend, case, parts)


@every_forward
def test_expanded_and_sliced_keys(backend: Backend) -> None:
    """One head of keys seen as two (stride 0), and a cache longer than what is used."""
    case = Case(2, 9, 12, dtype=backend.dtypes[0])
    q, k, v = case.tensors()
    check(backend, case, [q, k[:, :, :1].expand(2, 12, 2, 32), v])
    k, v = (torch.randn(2, 20, 2, 48).to(q.dtype)[:, 3:15, :, 16:] for _ in range(2))
    check(backend, case, [q, k, v])


@every_forward
def test_windows_that_slide_over_memory(backend: Backend) -> None:
    """The stride of tokens is 1, as that of dimensions, and outputs have their own memory."""
    case = Case(1, 9, heads=1, kv_heads=1, dtype=backend.dtypes[0])
    x = torch.randn(3, 1, 40).to(case.dtype).unfold(-1, 32, 1)[..., None, :]
    check(backend, case, list(x))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sequence"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@every_forward
def test_positions_of_each_sequence(backend: Backend, dtype: torch.dtype, shared: bool) -> None:
    """(Sq,) and (Sk,) for all sequences or one row each, in both integer dtypes."""
    case = backend.nearest(Case(3, 12, 18))
    tensors, rope = case.tensors(), case.rope()
    rows = 1 if shared else 3
    at = positions_for(30 * rows, 128, dtype).reshape(rows, 30)
    at = at[0] if shared else at
    arguments = {"key_positions": at[..., 12:]}
    out = backend.attend(*tensors, at[..., :12], rope, **arguments)
    assert_close(out, Call(*tensors, at[..., :12], rope, **arguments).expected().out)


@every_forward
def test_key_positions_are_taken_where_counts_agree(backend: Backend) -> None:
    """As many keys as queries, and yet at other places (cross attention)."""
    case = backend.nearest(Case(2, 12, causal=False))
    tensors, rope = case.tensors(), case.rope()
    at = positions_for(24, 128)
    arguments = {"key_positions": at[12:], "causal": False}
    out = backend.attend(*tensors, at[:12], rope, **arguments)
    assert_close(out, Call(*tensors, at[:12], rope, **arguments).expected().out)
    assert not torch.equal(out, backend.attend(*tensors, at[:12], rope, causal=False))


@pytest.mark.parametrize("kind", ["list", "tensor"])
@every_forward
def test_raw_factors_are_the_rope_they_describe(backend: Backend, kind: str) -> None:
    case = backend.nearest(Case(2, 19, interleaved=True, pairs=12))
    tensors, at = case.tensors(), positions_for(19, 128)
    values = factors(12)
    given = torch.tensor(values, dtype=fp64) if kind == "tensor" else list(values)
    raw = {"base": 5e5, "interleaved": True, "attention_factor": 1.3}
    out = backend.attend(*tensors, at, given, 128, **raw)
    rope = Rope(FactorSet(values, 128, 1.3), base=5e5, interleaved=True)
    assert_close(out, Call(*tensors, at, rope).expected().out)


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=DTYPE_NAMES.get)
def test_the_default_backend_serves_everything(dtype: torch.dtype) -> None:
    """backend=None: whatever it picks is right, softcap and lse included."""
    for case in (
        Case(dtype=dtype, dim=64),
        Case(3, dtype=dtype, window=5, kv_start=(0, 4, 19)),
        Case(dtype=dtype, softcap=2.0, return_lse=True, layout="bhsd"),
        Case(dtype=dtype, counts=(4, 0, 9), layout="thd", return_lse=True),
    ):
        tensors, arguments = case.tensors(), case.arguments()
        positions = arguments.pop("positions")
        args = (*tensors, positions, case.rope())
        outs = attention(*args, **arguments, return_lse=case.return_lse)
        expected = Call(*args, **arguments).expected()
        assert_close(outs[0] if case.return_lse else outs, expected.out)
        if case.return_lse:
            assert_lse_close(outs[1], expected.lse)


def test_the_default_backend_takes_float64() -> None:
    case = Case(1, 5, dtype=fp64)
    args = (*case.tensors(), torch.arange(5), case.rope())
    assert torch.equal(attention(*args), REFERENCE.attend(*args))


@every_forward
def test_huge_scores_do_not_overflow(backend: Backend) -> None:
    """Scores of some 1e4, where exp alone is infinite: still a mean of values.

    Which key gets all the weight hangs on the last bit of a score, so the truth is no measure.
    """
    case = backend.nearest(Case(2, 19, scale=2000.0))
    (q, k, v), arguments = case.tensors(), case.arguments()
    out = backend.attend(q, k, v, arguments.pop("positions"), case.rope(), **arguments)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 4 * torch.finfo(v.dtype).eps)
