"""Attention over vLLM's paged cache, where keys lie unrotated: `decode` rotates what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)

from ...calls.caches import FLOAT8
from ...ops.append import append
from ...ops.decode import decode
from .unrotated import Unrotated

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_FLOAT8 = ("fp8", "fp8_e4m3")


class LongRopeBackend(AttentionBackend):
    """What the attention layers of a model of ours are given in mode "unrotated"."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = list(_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *_FLOAT8]

    @staticmethod
    def get_name() -> str:
        """The name that vLLM has for backends that are not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LongRopeImpl]:
        """Of a layer."""
        return LongRopeImpl

    @staticmethod
    def get_builder_cls() -> type[LongRopeBuilder]:
        """Of layers that share their block table."""
        return LongRopeBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Blocks before the window may be gone: they are not read."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """A step is cut into calls by the lengths on the host."""
        return False


@dataclass
class Piece:
    """Sequences of a step with as many queries each: one call of `decode`."""

    tokens: slice | torch.Tensor  # of the step, (sequences * queries,)
    queries: int
    cache_lens: torch.Tensor  # (sequences,)
    block_table: torch.Tensor  # (sequences, max_blocks)
    lengths: torch.Tensor  # (sequences, queries), what chooses the set of each query


class LongRopeBuilder(AttentionMetadataBuilder[list[Piece]]):
    """Cuts each step into calls.

    A step in which all requests have as many queries is one call on vLLM's own buffers and one of
    ours, which stay where they are, so that a captured graph reads what a later step wrote.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        (self.unrotated,) = {layers[name].impl.unrotated for name in layer_names}
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.lengths = torch.zeros(most, dtype=torch.int64, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> list[Piece]:
        """The calls of a step, the same in all layers."""
        step = common_attn_metadata
        if step.causal is not True:
            raise ValueError(f"causal: expected True, got {step.causal!r}")
        begins = step.query_start_loc_cpu.tolist()
        rows, queries = step.num_reqs, step.max_query_len
        uniform = [min(row * queries, begins[-1]) for row in range(rows + 1)]
        if begins == uniform and step.num_actual_tokens == rows * queries:
            tokens = rows * queries
            lengths = self.lengths[:tokens].view(rows, queries)
            lengths.copy_(self._lengths(step.seq_lens, queries, slice(0, rows)))
            table = step.block_table_tensor
            return [Piece(slice(0, tokens), queries, step.seq_lens, table, lengths)]
        return [
            self._piece(step, queries, *map(list, zip(*requests, strict=True)))
            for queries, requests in _by_queries(begins).items()
        ]

    def _piece(self, step: Any, queries: int, rows: list[int], begins: list[int]) -> Piece:
        row = self._on_device(rows)
        lens = step.seq_lens[row]
        lengths = self._lengths(lens, queries, row)
        places = _places(begins, queries)
        tokens = places if isinstance(places, slice) else self._on_device(places)
        return Piece(tokens, queries, lens, step.block_table_tensor[row], lengths)

    def _on_device(self, numbers: list[int]) -> torch.Tensor:
        on_host = torch.tensor(numbers, dtype=torch.int32, device="cpu")
        return on_host.to(self.device, non_blocking=True)

    def _lengths(
        self, cache_lens: torch.Tensor, queries: int, rows: slice | torch.Tensor
    ) -> torch.Tensor:
        """What chooses the set of each query: (sequences, queries) int64."""
        back = torch.arange(1 - queries, 1, device=cache_lens.device)
        least, most = (x[rows, None] for x in (self.unrotated.least, self.unrotated.most))
        return (cache_lens[:, None] + back).clamp(least, most)


def _by_queries(begins: list[int]) -> dict[int, list[tuple[int, int]]]:
    """The requests of a step that has any, with their first query, by how many queries they have.

    begins: where the queries of each request begin, and the end.
    """
    requests: dict[int, list[tuple[int, int]]] = {}
    for row, (begin, end) in enumerate(pairwise(begins)):
        if begin < end:
            requests.setdefault(end - begin, []).append((row, begin))
    return requests


def _places(begins: list[int], queries: int) -> slice | list[int]:
    """The tokens of requests with as many queries each: a slice, where no others lie between."""
    end = begins[0] + queries * len(begins)
    if begins == list(range(begins[0], end, queries)):
        return slice(begins[0], end)
    return [begin + query for begin in begins for query in range(queries)]


class _Cache(NamedTuple):
    """As `append` and `decode` take it; the scales are of float8."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


class LongRopeImpl(AttentionImpl[list[Piece]]):
    """The attention of one layer. The model gives it ``unrotated`` once its layers are built."""

    unrotated: Unrotated

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        dtype = torch.get_default_dtype()  # that of the model, while its layers are built
        expected: dict[str, tuple[object, tuple[object, ...]]] = {
            "dtype": (dtype, tuple(_DTYPES)),
            "kv_cache_dtype": (kv_cache_dtype, ("auto", _DTYPES.get(dtype), *_FLOAT8)),
            "attn_type": (attn_type, (AttentionType.DECODER,)),
            "alibi_slopes": (alibi_slopes, (None,)),
            "kv_sharing_target_layer_name": (kv_sharing_target_layer_name, (None,)),
            **{name: (value, (None,)) for name, value in more.items()},
        }
        for name, (given, served) in expected.items():
            if given not in served:
                shown = ", ".join(map(repr, served))
                raise ValueError(
                    f"{name}: LongRoPE in vLLM serves {shown} in mode 'unrotated', got {given!r}"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.softcap = logits_soft_cap or None  # vLLM has 0 for none
        self.kv_cache_dtype = kv_cache_dtype

    def _cache(self, layer: Any, kv_cache: torch.Tensor) -> _Cache:
        """A layer's (blocks, kv_heads, block_size, 2 * D), values beside their keys."""
        scales = []
        if self.kv_cache_dtype in _FLOAT8:
            kv_cache = kv_cache.view(FLOAT8)
            scales = [
                x.reshape(1).repeat(self.num_kv_heads) for x in (layer._k_scale, layer._v_scale)
            ]
        return _Cache(*kv_cache.transpose(1, 2).split(self.head_size, dim=-1), *scales)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new keys and values, (tokens, kv_heads, D), as they are."""
        cache, n = self._cache(layer, kv_cache), len(slot_mapping)
        append(
            key[:n],
            value[:n],
            cache.k,
            cache.v,
            slot_mapping=slot_mapping,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: list[Piece] | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the cache, which has the keys of these queries, (tokens, heads, D), already."""
        if attn_metadata is None:  # vLLM takes measure of the memory
            return output.fill_(0)
        cache = self._cache(layer, kv_cache)
        for piece in attn_metadata:
            out = decode(
                query[piece.tokens].view(-1, piece.queries, self.num_heads, self.head_size),
                cache.k,
                cache.v,
                piece.cache_lens,
                self.unrotated.rope,
                block_table=piece.block_table,
                lengths=piece.lengths,
                softmax_scale=self.scale,
                window=self.sliding_window,
                softcap=self.softcap,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
            )
            assert isinstance(out, torch.Tensor)
            output[piece.tokens] = out.flatten(0, 1)
        return output
