"""What all benchmarks turn by: one pair of factor sets, as a `Rope` and as transformers has it."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from parameters import Geometry

from longrope_kernels import Rope
from longrope_kernels.backends import choose as backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of prompts, models and matrix products. A processor without instructions for products of bfloat16,
# as with AVX2 alone, takes dozens of times as long for them as for float32.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def factor_sets(rotated: int) -> dict[str, list[float]]:
    """A short and a long set, as a model has them."""
    pairs = rotated // 2
    return {
        "short_factor": [1.0 + i / pairs for i in range(pairs)],
        "long_factor": [1.0 + i / 2 for i in range(pairs)],
    }


@lru_cache
def rope(rotated: int) -> Rope:
    """1 as attention factor: rotating in place again and again keeps the norms."""
    return Rope.longrope(
        **factor_sets(rotated), original_max_position_embeddings=4096, attention_factor=1.0
    )


@lru_cache
def plain_rope(rotated: int) -> Rope:
    """What peers turn by that take no factors."""
    return Rope.plain(rotated)


@lru_cache
def transformers_rotary(geometry: Geometry) -> Any:
    """`longrope_kernels.demo.peers.TransformersRotary` with the same factors."""
    from longrope_kernels.demo.peers import TransformersRotary, phi3_config

    scaling = {"rope_type": "longrope", "attention_factor": 1.0, "factor": 32.0}
    config = phi3_config(
        "phi-3-mini-128k",
        hidden_size=geometry.q_heads * geometry.dim,
        num_attention_heads=geometry.q_heads,
        num_key_value_heads=geometry.k_heads,
        partial_rotary_factor=geometry.rotated / geometry.dim,
        rope_scaling={**scaling, **factor_sets(geometry.rotated)},
    )
    return TransformersRotary(config, DEVICE)


def normal(*sizes: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers, made where they are needed."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(sizes, generator=generator, dtype=dtype, device=DEVICE)


def backend_missing(name: str) -> str | None:
    """Why a backend of the rotation and of decoding cannot run on `DEVICE`, or None."""
    row = next(row for row in backends.table() if row["name"] == name)
    if row["missing"] is None and not {"any", DEVICE.type} & set(row["devices"]):
        return f"serves {', '.join(row['devices'])} only"
    return row["missing"]


def not_importable(module: str) -> str | None:
    """Why a peer's module does not import, or None."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed" if error.name else str(error)
    except Exception as error:  # one built for another torch fails in its own ways
        return f"{type(error).__name__}: {error}"
    return None


# Roundings of a float32 angle: ours, transformers', and where a fast power makes the frequency.
EXACT, FLOAT32, FAST = 0, 1, 8


def allowed_error(dtype: torch.dtype, tokens: int, angles: int) -> float:
    """The largest error of a rotation, relative to the largest value.

    Two roundings of the output's type for the result, two for the products of those that
    multiply in it; and what ``angles`` roundings make of the largest float32 angle.
    """
    return 4 * torch.finfo(dtype).eps + angles * tokens * torch.finfo(torch.float32).eps


class WrongResultError(AssertionError):
    """It fails instead of being timed, a peer's too."""


def assert_right(
    name: str, what: str, result: torch.Tensor, right: torch.Tensor, allowed: float
) -> None:
    """Raises `WrongResultError`; errors are relative to the largest value, NaN is one."""
    if result.shape != right.shape:
        raise WrongResultError(f"{name}, {what}: {result.shape}, expected {right.shape}")
    error = float((result.double() - right).abs().max() / right.abs().max())
    if not error <= allowed:
        raise WrongResultError(f"{name}, {what}: error {error:.1e}, allowed {allowed:.1e}")


def assert_each_right(
    name: str, what: str, result: torch.Tensor, right: torch.Tensor, allowed: float
) -> None:
    """`assert_right` of each index of the first axis alone, told by its own largest value."""
    if result.shape != right.shape:
        raise WrongResultError(f"{name}, {what}: {result.shape}, expected {right.shape}")
    for i, (row, of_row) in enumerate(zip(result, right, strict=True)):
        assert_right(name, f"{what} {i}", row, of_row, allowed)
