"""Raw factors: numbers on the host become a `Rope` that is kept, a tensor elsewhere its tables."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from ..torch_private import is_plain
from .factor_set import FactorSet, check_attention_factor, check_n_hat, floats
from .tables import UNBOUNDED, Tables, has_float64
from .value import Rope, check_base


def tables_of(
    factors: torch.Tensor | Sequence[float],
    n_hat: int,
    base: float,
    interleaved: bool,
    attention_factor: float,
    device: torch.device,
    frequencies: Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]],
) -> Tables:
    """The tables on a device of one set, as `FactorSet` and `Rope` describe it.

    Args:
        factors: (P,); on the host they go through extended precision.
        n_hat: of the set.
        base: of the rope.
        interleaved: of the rope.
        attention_factor: of the set.
        device: of the tables; a tensor of factors is there or on the host.
        frequencies: of factors that are on a device or traced, and of the base: what `Tables`
            calls ``inv_freq`` and ``steps``, without a sync.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if isinstance(factors, torch.Tensor):
        factors = _checked(factors, device)
        on_host = factors.device.type == "cpu" and is_plain(factors)
    else:
        factors, on_host = _listed(factors), True
    check_n_hat(n_hat)
    check_base(base)
    check_attention_factor(attention_factor)
    if on_host and not torch.compiler.is_compiling():
        rope = _rope_of(floats(factors), n_hat, base, interleaved, attention_factor)
        return rope.tables(device)

    if not isinstance(factors, torch.Tensor):
        factors = torch.tensor(factors, dtype=torch.float64, device="cpu")
    inv_freq, steps = frequencies(factors, float(base))
    at = factors.device
    return Tables(
        steps,
        torch.full((1,), n_hat, dtype=torch.int64, device=at),
        torch.full((1,), attention_factor, dtype=torch.float64, device=at),
        torch.full((1,), UNBOUNDED, dtype=torch.int64, device=at),
        inv_freq,
        interleaved,
    ).to(device)


@lru_cache(maxsize=256, typed=True)
def _rope_of(
    factors: tuple[float, ...], n_hat: int, base: float, interleaved: bool, attention_factor: float
) -> Rope:
    return Rope((FactorSet(factors, n_hat, attention_factor),), base, interleaved)


def _checked(factors: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of factors but for its values; from a device without float64, at a sync, a copy."""
    if factors.dim() != 1 or factors.shape[0] == 0:
        raise ValueError(
            f"factors: expected shape (P,) with one factor per pair, got {tuple(factors.shape)}"
        )
    if not factors.dtype.is_floating_point:
        raise TypeError(f"factors: expected a floating dtype, got {factors.dtype}")
    if factors.requires_grad:
        raise ValueError("factors: expected a tensor without grad; no gradient reaches factors")
    if factors.device.type != "cpu" and factors.device != device:
        raise ValueError(f"factors: expected them on the host or on {device}, got {factors.device}")
    return factors if has_float64(factors.device) else factors.cpu()


def _listed(values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = floats(values)
    except (TypeError, ValueError):
        raise TypeError(
            "factors: expected a Rope (Rope.from_config reads one from a model's config), a tensor "
            f"or a sequence of numbers, got {reprlib.repr(values)}"
        ) from None
    except OverflowError as error:
        raise ValueError(f"factors: expected finite numbers above 0, got {error}") from None
    if not numbers:
        raise ValueError("factors: expected shape (P,) with one factor per pair, got (0,)")
    return numbers
