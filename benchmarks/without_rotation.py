"""The Triton kernels with nothing to rotate: what the rotation costs is told against them."""

from __future__ import annotations

from typing import Any

import torch

from longrope_kernels.backends import triton_launch
from longrope_kernels.calls import Rotation, Scoring
from longrope_kernels.masks import Mask


class _WithoutRotation(torch.autograd.Function):
    """The launches of `backends.triton_attention`, for a rope of no pairs; no pre-passes."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        from longrope_kernels.kernels import attention

        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        scoring, arch = _scoring(q, causal), triton_launch.arch_of(q)
        launch = attention.plan(q, k, v, out, lse, scoring, rotated=True, arch=arch)
        triton_launch.run_launch(launch)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from longrope_kernels.kernels import attention_backward

        q, k, v, out, lse = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        delta = torch.empty_like(lse)
        tensors = (d_out, q, k, v, lse, delta, *gradients)
        rest = (_scoring(q, ctx.causal), triton_launch.arch_of(q))
        launches = attention_backward.plan(*tensors, *rest)
        for launch in (attention_backward.plan_delta(d_out, None, out, lse, delta), *launches):
            triton_launch.run_launch(launch)
        return (*gradients, None)


def attend_without_rotation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    """Attention of q (B, S, Hq, D) to k and v (B, S, Hk, D) as they are; like q."""
    return _WithoutRotation.apply(q, k, v, causal)  # type: ignore[no-any-return]


def _scoring(q: torch.Tensor, causal: bool) -> Scoring:
    """Of tokens at position 0 with no pairs to rotate."""
    positions = torch.zeros(1, 1, dtype=torch.int64, device=q.device).expand(q.shape[:2])
    none = torch.zeros(1, dtype=torch.int64, device=q.device)
    rotation = Rotation(none.new_empty((1, 2, 0)), none, none.double(), none)
    return Scoring(positions, positions, rotation, Mask(causal), q.shape[3] ** -0.5, 0.0)
