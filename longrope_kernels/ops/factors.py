"""From what a caller gives as ``factors`` to the tables on the device of q."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..calls import values
from ..rope import phase, raw
from ..rope.factor_set import FactorSet
from ..rope.tables import Tables
from ..rope.value import Rope
from ..torch_private import fake_mode_of
from .library import LIBRARY, NAMESPACE, TAGS


def resolve(
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None,
    base: float | None,
    interleaved: bool,
    attention_factor: float | None,
    q: torch.Tensor,
) -> Tables:
    """The tables on the device of q from a `Rope` or from raw factors.

    Raw factors on the host go through a cached `Rope`, in extended precision; factors on a device
    go through float64 there, without a sync, or where it has none through the host.
    """
    if isinstance(factors, Rope):
        beside = base not in (None, 10000.0) or attention_factor not in (None, 1.0)
        if beside or n_hat is not None or interleaved:
            raise ValueError(
                "factors: got a Rope, which holds n_hat, base, interleaved and attention_factor; "
                "expected none of them beside it"
            )
        tables = factors.tables(q.device)
    elif n_hat is None:
        raise TypeError("n_hat: expected an int beside raw factors (0 for no threshold), got None")
    else:
        base = 10000.0 if base is None else base
        attention_factor = 1.0 if attention_factor is None else attention_factor
        of_set = factors, n_hat, base, interleaved, attention_factor
        tables = raw.tables_of(*of_set, q.device, _checked_frequencies)
    return like(tables, q)


def like(tables: Tables, q: torch.Tensor) -> Tables:
    """The tables as fake tensors where q is one."""
    if type(q) is torch.Tensor or torch.compiler.is_compiling():
        return tables
    mode = fake_mode_of(q)
    return tables if mode is None else tables.convert(mode.from_tensor)


def _checked_frequencies(factors: torch.Tensor, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    values.check_factors(factors)
    return _frequencies(factors, base)  # type: ignore[no-any-return]


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
