"""What all benchmarks turn by: one pair of factor sets, as a `Rope` and as transformers has it."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch

from longrope_kernels import Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q_HEADS, K_HEADS = 32, 8


def factor_sets(head_dim: int) -> dict[str, list[float]]:
    """A short and a long set, as a model has them."""
    pairs = head_dim // 2
    return {
        "short_factor": [1.0 + i / pairs for i in range(pairs)],
        "long_factor": [1.0 + i / 2 for i in range(pairs)],
    }


@lru_cache
def rope(head_dim: int) -> Rope:
    """1 as attention factor: rotating in place again and again keeps the norms."""
    return Rope.longrope(
        **factor_sets(head_dim), original_max_position_embeddings=4096, attention_factor=1.0
    )


@lru_cache
def transformers_rotary(head_dim: int) -> Any:
    """`longrope_kernels.demo.peers.TransformersRotary` with the same factors."""
    from longrope_kernels.demo.peers import TransformersRotary, phi3_config

    scaling = {"rope_type": "longrope", "attention_factor": 1.0, "factor": 32.0}
    config = phi3_config(
        "phi-3-mini-128k",
        hidden_size=Q_HEADS * head_dim,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=K_HEADS,
        rope_scaling={**scaling, **factor_sets(head_dim)},
    )
    return TransformersRotary(config, DEVICE)


def not_importable(module: str) -> str | None:
    """Why a peer's module does not import, or None."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def allowed_error(dtype: torch.dtype, tokens: int, exact_angles: bool) -> float:
    """The largest error of a rotation, relative to the largest value.

    Two roundings of the output's type for the result, two for the products of those that
    multiply in it; and for float32 angles what their rounding makes of the largest one.
    """
    rounding = 4 * torch.finfo(dtype).eps
    return rounding if exact_angles else rounding + tokens * torch.finfo(torch.float32).eps


def assert_right(
    name: str, what: str, result: torch.Tensor, right: torch.Tensor, allowed: float
) -> None:
    """A wrong result fails here instead of being timed; errors are relative to the largest."""
    assert result.shape == right.shape
    error = float((result.double() - right).abs().max() / right.abs().max())
    assert error <= allowed, f"{name}, {what}: error {error:.1e}, allowed {allowed:.1e}"
