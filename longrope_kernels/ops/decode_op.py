"""The torch.library op of decoding over a cache of unrotated keys: schema and fake. No gradient."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import choose as backends
from ..calls.records import CacheTensors, Rotation

_NAMESPACE = "longrope_kernels"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_library.define(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lens, Tensor? block_table, "
    "Tensor? key_positions, Tensor? k_scale, Tensor? v_scale, "
    "Tensor steps, Tensor n_hat, Tensor attention_factor, Tensor max_length, "
    "Tensor? lengths, Tensor? sets, Tensor? kv_start, "
    "bool interleaved, float softmax_scale, int window, float softcap, str backend) "
    "-> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)

decode = torch.ops.longrope_kernels.decode.default


def _fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _dim = q.shape
    return torch.empty_like(q), q.new_empty((batch, heads, queries), dtype=torch.float32)


def _run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    interleaved: bool,
    softmax_scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _fake(q)
    cache = CacheTensors(
        k_cache, v_cache, cache_lens, block_table, key_positions, k_scale, v_scale, kv_start
    )
    rotation = Rotation(steps, n_hat, attention_factor, max_length, lengths, sets, interleaved)
    backends.run_decode(q, out, lse, cache, rotation, softmax_scale, window, softcap, backend)
    return out, lse


for _key in ("CPU", "CUDA"):
    _library.impl("decode", _run, _key)
torch.library.register_fake(f"{_NAMESPACE}::decode", _fake, lib=_library)
