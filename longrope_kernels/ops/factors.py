"""From what a caller gives as ``factors`` to the tables on the device of q."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..calls import values
from ..rope import phase
from ..rope.factor_set import FactorSet, check_attention_factor, check_n_hat, floats
from ..rope.tables import UNBOUNDED, Tables, has_float64
from ..rope.value import Rope, check_base
from ..torch_private import fake_mode_of
from .library import LIBRARY, NAMESPACE, TAGS


def resolve(
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None,
    base: float,
    interleaved: bool,
    attention_factor: float,
    q: torch.Tensor,
) -> Tables:
    """The tables on the device of q from a `Rope` or from raw factors.

    Raw factors on the host go through a cached `Rope`, in extended precision; factors on a device
    go through float64 there, without a sync, or where it has none through the host.
    """
    device = q.device
    if isinstance(factors, Rope):
        if n_hat is not None or base != 10000.0 or interleaved or attention_factor != 1.0:
            raise ValueError(
                "factors: got a Rope, which holds n_hat, base, interleaved and attention_factor; "
                "expected none of them beside it"
            )
        return like(factors.tables(device), q)

    if n_hat is None:
        raise TypeError("n_hat: expected an int beside raw factors (0 for no threshold), got None")
    if isinstance(factors, torch.Tensor):
        _check_factors_tensor(factors)
        if not has_float64(factors.device):
            factors = _on_host(factors, device)
        on_host = factors.device.type == "cpu" and values.is_plain(factors)
    else:
        factors, on_host = _listed("factors", factors), True
    if on_host and not torch.compiler.is_compiling():
        rope = _rope_of(floats(factors), n_hat, base, interleaved, attention_factor)
        return like(rope.tables(device), q)

    if not isinstance(factors, torch.Tensor):
        factors = torch.tensor(factors, dtype=torch.float64, device="cpu")
    check_n_hat(n_hat)
    check_base(base)
    check_attention_factor(attention_factor)
    _check_device(factors, device)
    values.check_factors(factors)
    inv_freq, steps = _frequencies(factors, float(base))
    at = factors.device
    return Tables(
        steps,
        torch.full((1,), n_hat, dtype=torch.int64, device=at),
        torch.full((1,), attention_factor, dtype=torch.float64, device=at),
        torch.full((1,), UNBOUNDED, dtype=torch.int64, device=at),
        inv_freq,
        interleaved,
    ).to(device)


def _on_host(factors: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Factors of a device without float64, which costs a sync."""
    _check_device(factors, device)
    return factors.cpu()


@lru_cache(maxsize=256, typed=True)
def _rope_of(
    factors: tuple[float, ...], n_hat: int, base: float, interleaved: bool, attention_factor: float
) -> Rope:
    return Rope((FactorSet(factors, n_hat, attention_factor),), base, interleaved)


def like(tables: Tables, q: torch.Tensor) -> Tables:
    """The tables as fake tensors where q is one."""
    if type(q) is torch.Tensor or torch.compiler.is_compiling():
        return tables
    mode = fake_mode_of(q)
    return tables if mode is None else tables.convert(mode.from_tensor)


def _check_factors_tensor(factors: torch.Tensor) -> None:
    if factors.dim() != 1 or factors.shape[0] == 0:
        raise ValueError(
            f"factors: expected shape (P,) with one factor per pair, got {tuple(factors.shape)}"
        )
    if not factors.dtype.is_floating_point:
        raise TypeError(f"factors: expected a floating dtype, got {factors.dtype}")
    if factors.requires_grad:
        raise ValueError("factors: expected a tensor without grad; no gradient reaches factors")


def _check_device(factors: torch.Tensor, device: torch.device) -> None:
    if factors.device.type != "cpu" and factors.device != device:
        raise ValueError(f"factors: expected them on the host or on {device}, got {factors.device}")


def _listed(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = floats(values)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected a Rope, a tensor or a sequence of numbers, got {values!r}"
        ) from None
    except OverflowError as error:
        raise ValueError(f"{name}: expected finite numbers above 0, got {error}") from None
    if not numbers:
        raise ValueError(f"{name}: expected shape (P,) with one factor per pair, got (0,)")
    return numbers


# -------------------------------------------------------------------------------------------- op

LIBRARY.define("frequencies(Tensor factors, float base) -> (Tensor, Tensor)", tags=TAGS)
_frequencies = torch.ops.longrope_kernels.frequencies.default


def _host_frequencies(factors: torch.Tensor, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    tables = Rope((FactorSet(tuple(factors.tolist())),), base).tables(torch.device("cpu"))
    return tables.inv_freq.clone(), tables.steps.clone()


def _device_frequencies(factors: torch.Tensor, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    original = phase.frequencies_on_device(base, torch.ones_like(factors))
    scaled = phase.frequencies_on_device(base, factors)
    inv_freq = torch.stack((original, scaled))[None]
    return inv_freq, phase.fixed_point_steps_on_device(inv_freq)


def _fake_frequencies(factors: torch.Tensor, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, 2, factors.shape[0])
    return (
        factors.new_empty(shape, dtype=torch.float64),
        factors.new_empty(shape, dtype=torch.int64),
    )


LIBRARY.impl("frequencies", _host_frequencies, "CPU")
LIBRARY.impl("frequencies", _device_frequencies, "CUDA")
torch.library.register_fake(f"{NAMESPACE}::frequencies", _fake_frequencies, lib=LIBRARY)
