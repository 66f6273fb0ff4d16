"""Stand-ins for flash-attn 2, 3 and 4: their signatures, on the CPU, in float64.

They keep to what the real ones demand and return: aligned rows, int32 borders, +inf or -inf where
nothing is seen, a window's side that is dropped where it is longer than the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

bf16, fp16 = torch.bfloat16, torch.float16
Window = tuple[int | None, int | None]


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: Window,
    softcap: float,
    of_nothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence, (S, heads, D), as all three libraries document their masks."""
    groups = q.shape[1] // k.shape[1]
    x, y, z = (t.double().transpose(0, 1) for t in (q, k, v))
    scores = x @ y.repeat_interleave(groups, 0).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window[0], 0 if causal else window[1]
    slot = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0])
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if left is not None and left >= 0:
        seen &= j >= slot - left
    if right is not None and right >= 0:
        seen &= j <= slot + right
    alive = seen.any(-1)
    weights = scores.masked_fill(~seen, -torch.inf)[:, alive].softmax(-1)
    out = torch.zeros(x.shape, dtype=torch.float64)
    out[:, alive] = weights @ z.repeat_interleave(groups, 0)
    lse = scores.detach().masked_fill(~seen, -torch.inf).logsumexp(-1)
    lse = lse.masked_fill(~alive, of_nothing).float()
    return out.transpose(0, 1).to(q.dtype), lse


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    _demand(q, k, v)
    outs, lses = zip(*(_one(*one, *rest) for one in zip(q, k, v, strict=True)), strict=True)
    return torch.stack(outs), torch.stack(lses)


def _packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, cu_k: torch.Tensor, *rest
) -> Any:
    _demand(q, k, v)
    assert cu.dtype == cu_k.dtype == torch.int32
    assert cu.is_contiguous()
    assert cu_k.is_contiguous()
    sizes, sizes_k = cu.diff().tolist(), cu_k.diff().tolist()
    parts = zip(q.split(sizes), k.split(sizes_k), v.split(sizes_k), strict=True)
    outs, lses = zip(*(_one(*part, *rest) for part in parts), strict=True)
    return torch.cat(outs), torch.cat(lses, -1)


def _demand(*tensors: torch.Tensor) -> None:
    """What a load of 16 bytes needs."""
    for x in tensors:
        assert x.dtype in (bf16, fp16)
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert all(
            s % 8 == 0 and s for n, s in zip(x.shape, x.stride()[:-1], strict=False) if n > 1
        )


def flash_attn_2() -> tuple[Callable[..., Any], ...]:
    def dropped(window: Window, longest_k: int) -> Window:
        left, right = window  # a side longer than the keys is taken for none
        return (-1 if left >= longest_k else left), (-1 if right >= longest_k else right)

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        window = dropped(window_size, k.shape[1])
        out, lse = _dense(q, k, v, softmax_scale, causal, window, softcap, torch.inf)
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        borders = (cu_seqlens_q, cu_seqlens_k)
        window = dropped(window_size, max_seqlen_k)
        out, lse = _packed(q, k, v, *borders, softmax_scale, causal, window, softcap, torch.inf)
        return (out, lse, None) if return_attn_probs else out

    return flash_attn_func, flash_attn_varlen_func


def flash_attn_3() -> tuple[Callable[..., Any], ...]:
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        out, lse = _dense(q, k, v, softmax_scale, causal, window_size, softcap, -torch.inf)
        return (out, lse) if return_attn_probs else out

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        borders, rest = (cu_seqlens_q, cu_seqlens_k), (softcap, -torch.inf)
        out, lse = _packed(q, k, v, *borders, softmax_scale, causal, window_size, *rest)
        return (out, lse) if return_attn_probs else out

    return flash_attn_func, flash_attn_varlen_func


def flash_attn_4() -> tuple[Callable[..., Any], ...]:
    """Only what follows v by keyword is the same in all versions; all return a pair."""

    def flash_attn_func(
        q,
        k,
        v,
        *,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        pack_gqa=None,
        deterministic=False,
        return_lse=False,
    ):
        assert not softcap
        out, lse = _dense(q, k, v, softmax_scale, causal, window_size, 0.0, -torch.inf)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        pack_gqa=None,
        deterministic=False,
        return_lse=False,
    ):
        borders = (cu_seqlens_q, cu_seqlens_k)
        out, lse = _packed(q, k, v, *borders, softmax_scale, causal, window_size, 0.0, -torch.inf)
        return out, lse if return_lse else None

    return flash_attn_func, flash_attn_varlen_func


STAND_INS = {
    "flash-attn-2": flash_attn_2,
    "flash-attn-3": flash_attn_3,
    "flash-attn-4": flash_attn_4,
}
