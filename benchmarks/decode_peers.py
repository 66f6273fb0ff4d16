"""What else decodes: torch's SDPA and FlashInfer, mostly over keys that were rotated before.

Each function makes one of no arguments to time, which returns (batch, queries, heads, dim).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from ropes import DEVICE

from longrope_kernels.calls.records import Keys

Run = Callable[[], torch.Tensor]


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lens: torch.Tensor,
    lengths: tuple[int, ...],
) -> Run:
    """torch's SDPA over a dense cache of rotated keys."""
    queries, alike = q.shape[1], len(set(lengths)) == 1
    if alike:
        k, v = (x[:, : lengths[0]] for x in (k, v))
    mask = None if alike and queries == 1 else _seen(lens, queries, k.shape[1])
    of_heads = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: _attend(*of_heads, mask)


def gathered(
    turned_q: Run,
    turned_k: Callable[[torch.Tensor], torch.Tensor],
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
    queries: int,
    slots: int,
) -> Run:
    """A chunk of a prompt without a paged kernel: its keys copied out of their blocks, rotated."""
    table, mask = table.long(), _seen(lens, queries, slots)

    def run() -> torch.Tensor:
        k, v = (x[table].flatten(1, 2)[:, :slots] for x in (k_pages, v_pages))
        q, k, v = (x.transpose(1, 2) for x in (turned_q(), turned_k(k), v))
        return _attend(q, k, v, mask)

    return run


def _seen(lens: torch.Tensor, queries: int, slots: int) -> torch.Tensor:
    """Which slots each query sees: (batch, 1, queries, slots)."""
    last = lens[:, None] + torch.arange(-queries, 0, device=DEVICE)
    return (torch.arange(slots, device=DEVICE) <= last[..., None])[:, None]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Of q, k and v, (batch, heads, tokens, dim) each."""
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def flashinfer_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> Run:
    """Its decode of one sequence with the rotation fused: plain RoPE, of the same base."""
    import flashinfer

    q, k, v = q[0, 0], k[0, :count], v[0, :count]

    def run() -> torch.Tensor:
        out = flashinfer.single_decode_with_kv_cache(
            *(q, k, v),
            kv_layout="NHD",
            pos_encoding_mode="ROPE_LLAMA",
            rope_theta=10000.0,
        )
        return out[None, None]

    return run


def flashinfer_paged(q: torch.Tensor, cache: Keys, lengths: tuple[int, ...]) -> Run:
    """Its decode of q (batch, heads, dim) from a paged cache of rotated keys, planned before."""
    import flashinfer

    assert cache.block_table is not None
    (_, heads, dim), (block, kv_heads) = q.shape, cache.k.shape[1:3]
    used = [-(-length // block) for length in lengths]
    last = [n - block * (blocks - 1) for n, blocks in zip(lengths, used, strict=True)]
    pages = [row[:blocks] for row, blocks in zip(cache.block_table, used, strict=True)]
    # From four query heads to a KV head on, as SGLang chooses.
    decoder = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_tensor_cores=heads // kv_heads >= 4
    )
    decoder.plan(
        torch.tensor([0, *accumulate(used)], dtype=torch.int32, device=DEVICE),
        torch.cat(pages),
        torch.tensor(last, dtype=torch.int32, device=DEVICE),
        *(heads, kv_heads, dim, block),
        pos_encoding_mode="NONE",
        q_data_type=q.dtype,
        kv_data_type=cache.k.dtype,
    )

    def run() -> torch.Tensor:
        out: torch.Tensor = decoder.run(q, (cache.k, cache.v))
        return out[:, None]

    return run


@cache
def _workspace() -> torch.Tensor:
    """Where FlashInfer keeps what its splits found, as many bytes as it recommends.

    All its rows share it, as the layers of a model do: it is scratch of one call at a time.
    """
    return torch.zeros(128 * 2**20, dtype=torch.uint8, device=DEVICE)
