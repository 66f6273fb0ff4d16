"""Bad input to `append`, and to `decode` with new keys: by name, and nothing is written."""

from __future__ import annotations

import time

import pytest
import torch
from append_truth import every_backend, fp8
from cases import KERNELS, REFERENCE, Target
from test_attention_errors import bad, bad_type
from test_decode_errors import ints, meta
from test_errors import Arguments, Bad, assert_says, by_id, checked, message

from longrope_kernels import KVCache, Rope, append, decode
from longrope_kernels.backends import choose as backends

__all__ = ["checked"]  # the fixture


def good() -> Arguments:
    """Two tokens each for sequences of 5 and 20 keys."""
    return {
        **{name: torch.randn(2, 2, 2, 16) for name in "kv"},
        **{name: torch.randn(2, 24, 2, 16) for name in ("k_cache", "v_cache")},
        "cache_lens": ints(5, 20),
    }


def paged(*rows: list[int], **values: object) -> Arguments:
    """In blocks of 8 slots."""
    made = {name: torch.randn(6, 8, 2, 16) for name in ("k_cache", "v_cache")}
    return {**made, "block_table": torch.tensor(rows).int(), **values}


def mapped(*rows: list[int], **values: object) -> Arguments:
    return {"cache_lens": None, "slot_mapping": torch.tensor(rows), **values}


def float8(**values: object) -> Arguments:
    made = {name: torch.zeros(2, 24, 2, 16).to(fp8) for name in ("k_cache", "v_cache")}
    return {**made, **values}


WHOLE = torch.zeros(2, 26, 2, 16)
# A storage of its own over the same memory, from another address on.
WITHIN = torch.from_numpy(WHOLE[0].numpy()[4:8]).view(2, 2, 2, 16)
NEW = [
    bad_type("list", "k", "list|tensor", k=[1.0]),
    bad_type("none", "v", "NoneType|tensor", v=None),
    bad("rank", "k", "(2, 16)|batch, seq", k=torch.randn(2, 16)),
    bad("packed", "k", "(4, 2, 16)|batch", k=torch.randn(4, 2, 16)),
    bad_type("int", "k", "int32|float32", k=torch.ones(2, 2, 2, 16).int()),
    bad("strided", "k", "unit stride|contiguous", k=torch.randn(2, 2, 2, 32)[..., ::2]),
    bad("heads", "k", "(2, 2, 3, 16)|(2, 2, 2, 16)", k=torch.randn(2, 2, 3, 16)),
    bad("shape", "v", "(2, 3, 2, 16)|(2, 2, 2, 16)", v=torch.randn(2, 3, 2, 16)),
    bad_type("dtype", "k_cache", "float32|bfloat16", k=torch.randn(2, 2, 2, 16).bfloat16()),
    bad_type("dtype", "v", "float32|bfloat16", v=torch.randn(2, 2, 2, 16).bfloat16()),
    bad("device", "v", "meta|cpu", v=meta(2, 2, 2, 16)),
    bad("grad", "k", "append|grad", k=torch.randn(2, 2, 2, 16, requires_grad=True)),
]
CACHES = [
    bad_type("list", "k_cache", "list|tensor", k_cache=[1.0]),
    bad("rank", "k_cache", "capacity|(24, 2, 16)", k_cache=torch.randn(24, 2, 16)),
    bad("dim", "v_cache", "16|(2, 24, 2, 8)", v_cache=torch.randn(2, 24, 2, 8)),
    bad(
        "batch",
        "k_cache",
        "2|(3, 24, 2, 16)",
        **{name: torch.randn(3, 24, 2, 16) for name in ("k_cache", "v_cache")},
    ),
    bad("shape", "v_cache", "(2, 23, 2, 16)", v_cache=torch.randn(2, 23, 2, 16)),
    bad("grad", "v_cache", "append|grad", v_cache=torch.randn(2, 24, 2, 16, requires_grad=True)),
    bad(
        "expanded",
        "v_cache",
        "share memory",
        v_cache=torch.zeros(1, 24, 2, 16).expand(2, -1, -1, -1),
    ),
    bad("same", "k_cache", "overlaps v_cache", k_cache=WHOLE[:, :24], v_cache=WHOLE[:, 1:25]),
    bad("own", "k", "overlaps k_cache", k=WHOLE[:, 4:6], k_cache=WHOLE[:, :24]),
    bad("other", "v", "overlaps k_cache", v=WHOLE[:, 4:6], k_cache=WHOLE[:, :24]),
    bad("buffer", "k", "overlaps k_cache", k=WITHIN, k_cache=WHOLE[:, :24]),
]
PLACES = [
    bad("neither", "cache_lens", "slot_mapping|neither", cache_lens=None),
    bad("both", "cache_lens", "both", slot_mapping=torch.zeros(2, 2).long()),
    bad("shape", "cache_lens", "(3,)|(2,)", cache_lens=ints(1, 2, 3)),
    bad_type("float", "cache_lens", "float32|int64", cache_lens=torch.ones(2)),
    bad("negative", "cache_lens", "-1|0 to 24|sequence 1", cache_lens=ints(5, -1)),
    bad("beyond", "cache_lens", "25|0 to 24|sequence 0", cache_lens=ints(25, 3)),
    bad(
        "table",
        "block_table",
        "slot_mapping",
        block_table=torch.zeros(2, 3).int(),
        **mapped([0, 1], [2, 3]),
    ),
    bad_type(
        "long",
        "block_table",
        "int64|int32",
        **paged([0, 1, 2], [3, 4, 5], block_table=torch.zeros(2, 3).long()),
    ),
    bad("shape", "block_table", "(2, max_blocks)|(1, 3)", **paged([0, 1, 2])),
    bad("id", "block_table", "0 to 5|6|block 2 of sequence 1", **paged([0, 1, 2], [3, 4, 6])),
    bad(
        "negative", "block_table", "0 to 5|-1|block 0 of sequence 0", **paged([-1, 1, 2], [3, 4, 5])
    ),
    bad(
        "twice",
        "block_table",
        "two tokens|slot 3 of block 0",
        **paged([0, 1, 2], [3, 4, 0], cache_lens=ints(5, 21)),
    ),
    bad("shape", "slot_mapping", "(2, 2)|(1, 2)", **mapped([0, 1])),
    bad_type("float", "slot_mapping", "float32", cache_lens=None, slot_mapping=torch.ones(2, 2)),
    bad("beyond", "slot_mapping", "48|negative", **mapped([0, 1], [2, 48])),
    bad(
        "no slots",
        "slot_mapping",
        "below 0",
        **mapped([0, -1], [-1, -1]),
        **{name: torch.zeros(2, 0, 2, 16) for name in ("k_cache", "v_cache")},
    ),
    bad("twice", "slot_mapping", "two tokens|slot 1 of row 1", **mapped([0, 25], [-1, 25])),
]
SCALES = [
    bad("alone", "k_scale", "float8", k_scale=torch.ones(2)),
    bad("shape", "v_scale", "(4,)|(2,)", **float8(v_scale=torch.ones(4))),
    bad_type("dtype", "v_scale", "float64|float32", **float8(v_scale=torch.ones(2).double())),
    bad("device", "k_scale", "meta|cpu", **float8(k_scale=meta(2))),
]
CHOICES = [bad("unknown", "backend", "cudnn|reference", backend="cudnn")]
CASES = [*NEW, *CACHES, *PLACES, *SCALES, *CHOICES]


@pytest.mark.parametrize("wrong", by_id(CASES))
def test_bad_input(wrong: Bad) -> None:
    arguments = good()
    arguments.update(wrong.change(arguments) or {})
    assert_says(wrong, message(wrong, append, arguments))


@every_backend
def test_nothing_is_written(backend: Target, checked: None) -> None:
    """Of what only values show, whatever the backend."""
    for wrong in PLACES:
        arguments = {**good(), "backend": backend.backend}
        arguments.update(wrong.change(arguments) or {})
        moved = {name: backend.move(x) for name, x in arguments.items()}
        assert_says(wrong, message(wrong, append, moved))


def test_a_slot_for_two_of_many_tokens_is_found_soon() -> None:
    k, caches, places = (
        torch.zeros(30000, 1, 2),
        torch.zeros(2, 1, 30000, 1, 2),
        torch.arange(30000),
    )
    places[-1] -= 1
    before = time.monotonic()
    with pytest.raises(ValueError, match=r"slot_mapping: .* slot 29998 of row 0"):
        append(k, k, *caches, slot_mapping=places)
    assert time.monotonic() - before < 5  # comparing each with each takes 20


@pytest.mark.parametrize("slots", [0, 8])
@every_backend
def test_where_no_slot_is_nothing_is_written(backend: Target, slots: int) -> None:
    k, cache = torch.ones(2, 1, 2, 16), torch.zeros(6, slots, 2, 16)
    table = torch.zeros(2, 0 if slots else 3).int()
    args = (backend.move(x) for x in (k, k, cache, cache.clone(), ints(0, 0)))
    append(*args, block_table=backend.move(table), backend=backend.backend)
    assert not cache.any()


def test_entries_of_blocks_that_are_not_written_are_not_read() -> None:
    append(**{**good(), **paged([0, -1, 9], [-1, 77, 1])})


def test_under_no_grad_a_parameter_is_as_good_as_any_tensor() -> None:
    given = {
        name: torch.nn.Parameter(x) if x.is_floating_point() else x for name, x in good().items()
    }
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            append(**given)
    assert torch.equal(given["k_cache"][1, 18:20], given["k"][1])


@pytest.mark.parametrize("target", KERNELS)
def test_float64_is_for_the_reference(target: Target) -> None:
    given = {n: x.double() if x.is_floating_point() else x for n, x in good().items()}
    with pytest.raises(ValueError, match=r"backend.*float64.*reference"):
        append(**{n: target.move(x) for n, x in given.items()}, backend=target.backend)


@pytest.mark.parametrize("target", KERNELS)
def test_a_backend_that_is_not_there_raises_and_never_falls_back(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: f"{name} needs a frobnicator")
    given = {n: target.move(x) for n, x in good().items()}
    with pytest.raises(RuntimeError, match=f"backend.*{target.backend}.*needs a frobnicator"):
        append(**given, backend=target.backend)


# ------------------------------------------------------------------------------------ in `decode`


def of_decode() -> Arguments:
    made = good()
    new = {f"{name}_new": made.pop(name) for name in "kv"}
    return {"q": torch.randn(2, 2, 4, 16), **made, "factors": Rope.plain(16), **new}


IN_DECODE = [
    bad_type("alone", "v_new", "NoneType|tensor", v_new=None),
    bad_type("alone", "k_new", "NoneType|tensor", k_new=None),
    bad_type(
        "mapping", "k_new", "NoneType|tensor", k_new=None, v_new=None, slot_mapping=ints(1, 2)
    ),
    bad("axes", "k_new", "(batch, seq, heads, dim)|(3,)", k_new=torch.randn(3)),
    bad("shape", "k_new", "(2, 2, 1, 16)|(2, 2, 2, 16)", k_new=torch.randn(2, 2, 1, 16)),
    bad_type("dtype", "v_new", "float16|float32", v_new=torch.randn(2, 2, 2, 16).half()),
    bad("grad", "v_new", "grad", v_new=torch.randn(2, 2, 2, 16, requires_grad=True)),
    bad("own", "k_new", "overlaps k_cache", k_new=WHOLE[:, 4:6], k_cache=WHOLE[:, :24]),
    bad("cache", "q", "overlaps k_cache", q=WHOLE[:, :4].view(2, 2, 4, 16), k_cache=WHOLE[:, :24]),
    bad("shape", "slot_mapping", "(2, 2)|(2,)", slot_mapping=ints(1, 2)),
    bad("beyond", "slot_mapping", "48", slot_mapping=torch.tensor([[0, 1], [2, 48]])),
    bad("beyond", "cache_lens", "25|0 to 24", cache_lens=ints(3, 25)),
    # What has nothing to do with new keys is known before they are written, too.
    bad("window", "window", "0", window=0),
    bad("backend", "backend", "cudnn", backend="cudnn"),
    bad("positions", "key_positions", "2**31", key_positions=torch.full((2, 24), 2**31)),
    bad("start", "kv_start", "-1", kv_start=ints(0, -1)),
]


@pytest.mark.parametrize("wrong", by_id(IN_DECODE))
def test_bad_input_to_decode(wrong: Bad) -> None:
    arguments = of_decode()
    arguments.update(wrong.change(arguments) or {})
    assert_says(wrong, message(wrong, decode, arguments))


def test_caches_of_two_dtypes_are_not_written_as_copies() -> None:
    """Autocast would read casts of them."""
    arguments = of_decode()
    arguments["v_cache"] = arguments["v_cache"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="_cache"):
        decode(**arguments)


def test_a_cache_says_which_of_its_arguments() -> None:
    cache = KVCache(Rope.plain(16), 2, 24, 2, 16, dtype=torch.float32)
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16)
    with pytest.raises(RuntimeError, match="k_new: expected an extend"):
        cache.decode(q, k_new=k, v_new=k)
    cache.extend(1)
    with pytest.raises(ValueError, match="k_new, v_new: expected both"):
        cache.decode(q, k_new=k)
    with pytest.raises(ValueError, match="v_new: expected the shape of k_new"):
        cache.decode(q, k_new=k, v_new=k[:1])
    with pytest.raises(TypeError, match=r"k_new: expected float32, got torch\.float16"):
        cache.decode(q, k_new=k.half(), v_new=k)
    with pytest.raises(ValueError, match="k_new: expected 2 rows of 1 tokens"):
        cache.decode(q, k_new=k[:1], v_new=k[:1])
    assert REFERENCE.backend == "reference"
