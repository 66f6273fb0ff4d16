"""The Triton kernels with nothing to rotate: what the rotation costs is told against them."""

from __future__ import annotations

from typing import Any

import torch

from longrope_kernels.backends.triton import device
from longrope_kernels.calls.records import AttentionCall, Keys, Scores, Selection
from longrope_kernels.rope.tables import no_pairs


class _WithoutRotation(torch.autograd.Function):
    """The launches of `backends.triton.attention`, for a rope of no pairs; no pre-passes."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        from longrope_kernels.backends.triton.launch import run_launch
        from longrope_kernels.kernels import attention

        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        call, arch = unrotated(q, k, v, causal), device.arch_of(q)
        run_launch(attention.plan(call, out, lse, rotated=True, arch=arch))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from longrope_kernels.backends.triton.launch import run_launch
        from longrope_kernels.kernels import attention_backward

        q, k, v, out, lse = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        delta = torch.empty_like(lse)
        call, arch = unrotated(q, k, v, ctx.causal), device.arch_of(q)
        launches = attention_backward.plan(call, d_out, lse, delta, *gradients, arch)
        for launch in (attention_backward.plan_delta(d_out, None, out, lse, delta), *launches):
            run_launch(launch)
        return (*gradients, None)


def attend_without_rotation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    """Attention of q (B, S, Hq, D) to k and v (B, S, Hk, D) as they are; like q."""
    return _WithoutRotation.apply(q, k, v, causal)  # type: ignore[no-any-return]


def unrotated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> AttentionCall:
    """Of tokens at position 0 with no pairs to rotate."""
    positions = torch.zeros(1, 1, dtype=torch.int64, device=q.device).expand(q.shape[:2])
    keys, scores = Keys(k, v, positions), Scores(causal, q.shape[3] ** -0.5)
    return AttentionCall(q, positions, keys, no_pairs(q.device), Selection(), scores)
