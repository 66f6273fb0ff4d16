"""Peers in benchmarks/ are asked for what they document, and compiled ones for what was meant."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from benchmark_modules import (
    WrongResultError,
    attention_peers,
    attention_rows,
    attentions,
    decode_rows,
    decodes,
    forget_inputs,
    measure,
    models,
    parameters,
    rotary_rows,
    rotations,
)

from longrope_kernels import Rope, apply_rotary, attention

# What their documentation says they do, with their signatures, in float32 on the CPU: that our
# rows ask for the right thing. Nothing here is ever timed.


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def install(**modules: dict[str, Any]) -> None:
        for path, names in modules.items():
            path = path.replace("__", ".")
            parts = path.split(".")
            for i in range(1, len(parts)):
                parent = ".".join(parts[:i])
                if parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            module = types.ModuleType(path)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, path, module)

    yield install
    forget_inputs()


class Mask:
    """xformers' BlockDiagonalCausalWithOffsetPaddedKeysMask, what it is made of."""

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_padding: int,
        kv_seqlen: list[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> Mask:
        mask = cls()
        mask.q, mask.padding, mask.kv = q_seqlen, kv_padding, kv_seqlen
        return mask


def rope_padded(
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    attn_bias: Any,
    *,
    theta: float = 10000.0,
    adjacents: bool = True,
) -> torch.Tensor:
    (count,), (total,) = attn_bias.q, attn_bias.kv
    assert xq.shape[1] == xk.shape[1] == count
    assert cache_k.shape[1] == attn_bias.padding
    positions = torch.arange(total - count, total, device=xq.device)
    rope = Rope.plain(xq.shape[3], base=theta, interleaved=adjacents)
    q, k = apply_rotary(xq, xk, positions, rope, backend="reference")
    cache_k[:, total - count : total] = k
    cache_v[:, total - count : total] = xv
    return q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_xformers_is_asked_for_a_cache_of_rotated_keys(
    on_cpu: Callable[..., None], dtype: torch.dtype
) -> None:
    on_cpu(
        xformers__ops={"rope_padded": rope_padded},
        xformers__ops__fmha__attn_bias={"BlockDiagonalCausalWithOffsetPaddedKeysMask": Mask},
    )
    inputs = rotations.make_copies(40, dtype, parameters.LLAMA).all[0]
    run, arguments = rotary_rows._prepared_cache_write(rotations.XFORMERS, inputs)
    q, k, v = run(*arguments())
    assert (q.shape, k.shape, v.shape) == (inputs.q.shape, inputs.k.shape, inputs.v.shape)


def test_a_wrong_cache_is_not_timed(on_cpu: Callable[..., None]) -> None:
    def forgets(*args: Any, **kwargs: Any) -> torch.Tensor:
        cache_v = args[4].clone()
        q = rope_padded(*args, **kwargs)
        args[4].copy_(cache_v)
        return q

    on_cpu(
        xformers__ops={"rope_padded": forgets},
        xformers__ops__fmha__attn_bias={"BlockDiagonalCausalWithOffsetPaddedKeysMask": Mask},
    )
    inputs = rotations.make_copies(40, torch.bfloat16, parameters.LLAMA).all[0]
    with pytest.raises(WrongResultError, match="v: error"):
        rotary_rows._prepared_cache_write(rotations.XFORMERS, inputs)


def by_table(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """flashinfer.rope.apply_rope_with_cos_sin_cache."""
    assert cos_sin_cache.dtype == torch.float32
    assert is_neox
    rotated = cos_sin_cache.shape[1]
    cos, sin = (x[:, None] for x in cos_sin_cache[positions].chunk(2, -1))

    def rotate(flat: torch.Tensor) -> torch.Tensor:
        x = flat.view(flat.shape[0], -1, head_size).float()
        a, b, rest = x.split([rotated // 2, rotated // 2, head_size - rotated], -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
        return out.flatten(1).to(flat.dtype)

    return rotate(query), rotate(key)


def by_table_inplace(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any
) -> None:
    for x, y in zip((query, key), by_table(positions, query, key, *rest), strict=True):
        x.copy_(y)


@pytest.mark.parametrize("direction", ["forward", "in place"])
@pytest.mark.parametrize("geometry", [parameters.LLAMA, parameters.PHI4], ids=lambda g: g.name)
def test_flashinfer_is_asked_for_our_rotation(
    on_cpu: Callable[..., None], direction: str, geometry: Any
) -> None:
    names = {"apply_rope_with_cos_sin_cache": by_table}
    names["apply_rope_with_cos_sin_cache_inplace"] = by_table_inplace
    on_cpu(flashinfer__rope=names)
    inputs = rotations.make_copies(40, torch.bfloat16, geometry).all[0]
    rotary_rows._prepared(direction, "flashinfer", inputs)


def llama(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, theta: float
) -> torch.Tensor:
    """Attention of the last queries to all keys, rotated by plain RoPE."""
    positions = torch.arange(k.shape[0], device=k.device)
    return attention(  # type: ignore[return-value]
        *(x[None] for x in (q, k, v)),
        positions[-q.shape[0] :],
        Rope.plain(q.shape[2], base=theta),
        key_positions=positions,
        causal=causal,
        backend="reference",
    )[0]


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    rope_theta: float | None = None,
) -> torch.Tensor:
    assert (kv_layout, pos_encoding_mode) == ("NHD", "ROPE_LLAMA")
    return llama(q, k, v, causal, rope_theta or 1e4)


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    *,
    rope_theta: float | None = None,
) -> torch.Tensor:
    assert (kv_layout, pos_encoding_mode) == ("NHD", "ROPE_LLAMA")
    return llama(q[None], k, v, True, rope_theta or 1e4)[0]


@pytest.mark.parametrize("causal", [True, False])
def test_flashinfer_is_asked_for_prefill_by_plain_rope(
    on_cpu: Callable[..., None], causal: bool
) -> None:
    on_cpu(flashinfer={"single_prefill_with_kv_cache": single_prefill_with_kv_cache})
    inputs = attentions.make_copies(attentions.Shape(64, 64, causal)).all[0]
    run, arguments = attention_rows._prepared("forward", attentions.FLASHINFER, inputs)
    assert run(*arguments()).shape == inputs.q.shape
    with pytest.raises(WrongResultError):  # which is not the rotation of the other rows
        attention_rows._check_rows("x", "out", run(*arguments()), inputs.turned.out, inputs)


def test_flashinfer_is_asked_for_decoding_by_plain_rope(on_cpu: Callable[..., None]) -> None:
    on_cpu(flashinfer={"single_decode_with_kv_cache": single_decode_with_kv_cache})
    inputs = decodes.make_copies(decodes.Shape((70,), torch.bfloat16)).all[0]
    out = decodes.implementation(decodes.FLASHINFER, inputs)()
    right = inputs.plain_truth
    assert out.shape == inputs.q.shape
    error = (out[:, :, inputs.q_heads].double() - right).abs().max() / right.abs().max()
    assert error <= decodes.allowed(decodes.FLASHINFER, inputs)
    assert not torch.allclose(right, inputs.truth, atol=1e-3)


class PagedDecode:
    """flashinfer.BatchDecodeWithPagedKVCacheWrapper, without rotation."""

    made: ClassVar[list[PagedDecode]] = []

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()  # it asks for zeros
        assert (kv_layout, use_cuda_graph) == ("NHD", False)
        self.use_tensor_cores = use_tensor_cores
        self.plans = 0
        self.made.append(self)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        assert pos_encoding_mode == "NONE"
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        assert indptr.shape == (last_page_len.shape[0] + 1,)
        assert int(indptr[0]) == 0
        assert indices.shape == (int(indptr[-1]),)
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())
        self.indptr, self.indices, self.last_page_len = indptr, indices, last_page_len
        self.heads = num_qo_heads, num_kv_heads, head_dim
        self.page_size, self.dtypes = page_size, (q_data_type, kv_data_type or q_data_type)
        self.plans += 1

    def lengths(self) -> list[int]:
        pages = self.indptr.diff()
        return ((pages - 1) * self.page_size + self.last_page_len).tolist()

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        q_heads, kv_heads, dim = self.heads
        assert q.is_contiguous()
        assert q.shape == (self.last_page_len.shape[0], q_heads, dim)
        for pages in paged_kv_cache:
            assert pages.shape[1:] == (self.page_size, kv_heads, dim)
            assert (q.dtype, pages.dtype) == self.dtypes
        out = []
        for i, length in enumerate(self.lengths()):
            mine = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
            k, v = (x[mine].flatten(0, 1)[:length].double() for x in paged_kv_cache)
            k, v = (x.repeat_interleave(q_heads // kv_heads, 1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", q[i].double(), k) * dim**-0.5
            out.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
        return torch.stack(out).to(q.dtype)


@pytest.mark.parametrize(
    ("lengths", "geometry", "tensor_cores"),
    [
        # One page, whole pages, a token more and less, and both sides of the switch.
        ((70,), parameters.LLAMA, True),
        ((64, 1, 129, 128, 63), parameters.LLAMA, True),
        ((300, 4096, 4097), parameters.LLAMA, True),
        ((70, 200), parameters.PHI3, False),
        ((70, 200), parameters.PHI4, False),
    ],
    ids=str,
)
def test_flashinfer_is_asked_for_a_paged_cache_of_rotated_keys(
    on_cpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    geometry: Any,
    tensor_cores: bool,
) -> None:
    monkeypatch.setattr(PagedDecode, "made", [])
    on_cpu(flashinfer={"BatchDecodeWithPagedKVCacheWrapper": PagedDecode})
    shape = decodes.Shape(lengths, torch.bfloat16, geometry)
    inputs = decodes.make_copies(shape).all[0]
    run, arguments = decode_rows._prepared(decodes.FLASHINFER_PAGED, inputs)
    assert run(*arguments()).shape == inputs.q.shape
    (decoder,) = PagedDecode.made
    assert decoder.plans == 1  # for the check and what is timed
    assert decoder.lengths() == list(lengths)
    assert decoder.page_size == decodes.BLOCK
    assert decoder.use_tensor_cores == tensor_cores


@pytest.mark.parametrize("wrong", ["indptr", "indices", "last_page_len"])
def test_a_wrong_page_table_is_not_timed(on_cpu: Callable[..., None], wrong: str) -> None:
    class Misled(PagedDecode):
        def plan(self, *args: Any, **kwargs: Any) -> None:
            super().plan(*args, **kwargs)
            changed = {
                "indptr": self.indptr.new_tensor([0, 1, 4]),
                "indices": self.indices.flip(0),
                "last_page_len": self.last_page_len - 1,
            }
            setattr(self, wrong, changed[wrong])

    on_cpu(flashinfer={"BatchDecodeWithPagedKVCacheWrapper": Misled})
    inputs = decodes.make_copies(decodes.Shape((70, 100), torch.bfloat16)).all[0]
    with pytest.raises(WrongResultError, match=f"{decodes.FLASHINFER_PAGED}, sequence 0: error"):
        decode_rows._prepared(decodes.FLASHINFER_PAGED, inputs)


def test_flashinfer_decodes_each_batch_from_pages() -> None:
    steps = [decodes.Shape((4096,) * 32, torch.bfloat16), decodes.Shape((8192,), torch.bfloat16)]
    assert [decodes.serves(decodes.FLASHINFER_PAGED, step) for step in steps] == [True, True]
    assert [decodes.serves(decodes.FLASHINFER, step) for step in steps] == [False, True]
    assert not decodes.serves(decodes.FLASHINFER_PAGED, steps[0]._replace(dtype=torch.float32))
    assert steps[0].traffic(decodes.FLASHINFER_PAGED) == steps[0].traffic("triton, paged")
    assert decodes.FLASHINFER_PAGED in decodes.PEERS


@pytest.mark.parametrize("name", ["SDPA math, no rotation", "SDPA flash, no rotation"])
def test_kernels_of_sdpa_attend_without_rotation(name: str) -> None:
    inputs = attentions.make_copies(attentions.Shape(64, 64, True)).all[0]
    attention_rows._prepared("backward", name, inputs)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch.compile without the compiler, which takes half a minute; what it was given."""
    given: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        given.append(function)
        return plain(function, backend="eager", **options)

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    forget_inputs()
    attention_peers.compiled.cache_clear()
    yield given
    forget_inputs()
    attention_peers.compiled.cache_clear()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rotation_and_sdpa_are_compiled_as_one(traced: list[Any], direction: str) -> None:
    inputs = attentions.make_copies(attentions.Shape(64, 128, True)).all[0]
    name = attentions.COMPILED
    counts = torch._dynamo.utils.counters
    counts.clear()
    run, arguments = attention_rows._prepared(direction, name, inputs)
    run(*arguments())
    assert len(traced) == 1
    assert counts["frames"]["total"]
    assert not counts["graph_break"]


def test_the_model_is_compiled_for_a_forward(traced: list[Any]) -> None:
    at = models.Step("forward", 20)
    assert [name for name in models.NAMES if models.serves(name, at)] == [
        *("transformers", models.COMPILED, "enabled, switch")
    ]
    models.model.cache_clear()
    expected = models.step("transformers", at, False)()
    assert torch.allclose(models.step(models.COMPILED, at, False)(), expected, atol=1e-4)
    assert traced == [models.model("transformers", False)]
    models.model.cache_clear()
    at = models.Step(models.KINDS[1], 20)
    assert not models.serves(models.COMPILED, at)


def test_the_budget_drops_what_is_compiled_first(
    traced: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "deadline", time.monotonic() + measure.COMPILING - 1)
    rotation = rotations.make_copies(40, torch.float32, parameters.LLAMA).all[0]
    attention = attentions.make_copies(attentions.Shape(64, 128, True)).all[0]
    for call in (
        lambda: rotations.rotation(rotations.COMPILED, rotation, False),
        lambda: attentions.implementation(attentions.COMPILED, attention),
        lambda: models.step(models.COMPILED, models.Step("forward", 20), False),
    ):
        with pytest.raises(measure.NotMeasuredError, match=measure.SPENT):
            call()
    assert traced == []
    attentions.implementation(attentions.EAGER, attention)


def test_generate_of_transformers_is_timed_where_it_prefills_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = models.Step("generate", models.SWITCH - 1)
    monkeypatch.setattr("transformers.__version__", "5.20.0")
    models.step("transformers", at, False)
    monkeypatch.setattr("transformers.__version__", "5.19.0")
    with pytest.raises(measure.NotMeasuredError, match=r"5\.19\.0 goes on from one token"):
        models.step("transformers", at, False)
    models.step("transformers", at._replace(tokens=48), False)  # which does not cross
    models.step("enabled, recompute", at, False)


def test_few_shapes_are_compiled() -> None:
    shapes = [attentions.Shape.of(*call) for _, call in parameters.PROMPTS]
    compiled = [s for s in shapes if attentions.serves(attentions.COMPILED, s, "forward")]
    assert [(s.dim, s.causal, s.geometry) for s in compiled] == [(128, True, None)]
