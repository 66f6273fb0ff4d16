"""The Triton kernels with nothing to rotate: what the rotation costs is told against them."""

from __future__ import annotations

from typing import Any

import torch

from longrope_kernels.backends import triton_attention, triton_launch


class _WithoutRotation(torch.autograd.Function):
    """The launches of `backends.triton_attention`, for a rope of no pairs; no pre-passes."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        launch = triton_attention._plan_rotated(q, k, v, out, lse, *_rest(q, causal))
        triton_launch.run_launch_with_scratch(launch, q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from longrope_kernels.kernels import attention_backward

        q, k, v, out, lse = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        delta = torch.empty_like(lse)
        positions, tables, of_sequences, scores = _rest(q, ctx.causal)
        launches = attention_backward.plan(
            *(d_out, q, k, v, lse, delta, *gradients),
            *(positions, positions, *tables, *of_sequences, *scores),
        )
        for launch in (attention_backward.plan_delta(d_out, None, out, lse, delta), *launches):
            triton_launch.run_launch(launch)
        return (*gradients, None)


def attend_without_rotation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    """Attention of q (B, S, Hq, D) to k and v (B, S, Hk, D) as they are; like q."""
    return _WithoutRotation.apply(q, k, v, causal)  # type: ignore[no-any-return]


def _rest(q: torch.Tensor, causal: bool) -> tuple[Any, ...]:
    """Positions; tables of one set of no pairs; what sequences have; how scores are made."""
    positions = torch.zeros(1, 1, dtype=torch.int64, device=q.device).expand(q.shape[:2])
    none = torch.zeros(1, dtype=torch.int64, device=q.device)
    tables = (none.new_empty((1, 2, 0)), none, none.double(), none)
    scores = (False, causal, q.shape[3] ** -0.5, 0, 0.0, triton_launch.arch_of(q))
    return positions, tables, (None,) * 5, scores
