"""What the public functions do with their arguments before a backend sees them.

Shapes, dtypes and devices are checked here, always; values in values.py, where that is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal

import torch

from . import ops, values
from .calls import Rotation
from .rope import (
    UNBOUNDED,
    FactorSet,
    Rope,
    check_attention_factor,
    check_base,
    check_n_hat,
    floats,
    is_number,
)
from .scaling_formulas import LARGEST

Layout = Literal["bshd", "bhsd", "thd"]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "bshd": ("batch", "seq", "heads", "dim"),
    "bhsd": ("batch", "heads", "seq", "dim"),
    "thd": ("tokens", "heads", "dim"),
}
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AUTOCAST_DTYPES = FLOAT_DTYPES[:3]
INDEX_DTYPES = (torch.int32, torch.int64)


# ------------------------------------------------------------------------------------------ rope


def resolve_rope(
    factors: torch.Tensor | Sequence[float] | Rope,
    n_hat: int | None,
    base: float,
    interleaved: bool,
    attention_factor: float,
    q: torch.Tensor,
) -> Rotation:
    """The rotation on the device of q, no set chosen, from a `Rope` or from raw factors.

    Raw factors on the host go through a cached `Rope`, in extended precision; factors on a device
    go through float64 there, without a sync.
    """
    device = q.device
    if isinstance(factors, Rope):
        if n_hat is not None or base != 10000.0 or interleaved or attention_factor != 1.0:
            raise ValueError(
                "factors: got a Rope, which holds n_hat, base, interleaved and attention_factor; "
                "expected none of them beside it"
            )
        if _capturing_without(factors, device):
            raise RuntimeError(
                f"factors: this Rope has no tables on {device} yet and a CUDA graph is being "
                f"captured; call rope.to({str(device)!r}) before the capture"
            )
        return like(factors.tables(device), q)

    if n_hat is None:
        raise TypeError("n_hat: expected an int beside raw factors (0 for no threshold), got None")
    if isinstance(factors, torch.Tensor):
        _check_factors_tensor(factors)
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
    if factors.device.type != "cpu" and factors.device != device:
        raise ValueError(f"factors: expected them on the host or on {device}, got {factors.device}")
    values.check_factors(factors)
    inv_freq, steps = ops.frequencies(factors, float(base))
    return Rotation(
        steps.to(device),
        torch.full((1,), n_hat, dtype=torch.int64, device=device),
        torch.full((1,), attention_factor, dtype=torch.float64, device=device),
        torch.full((1,), UNBOUNDED, dtype=torch.int64, device=device),
        interleaved=interleaved,
        inv_freq=inv_freq.to(device),
    )


@lru_cache(maxsize=256, typed=True)
def _rope_of(
    factors: tuple[float, ...], n_hat: int, base: float, interleaved: bool, attention_factor: float
) -> Rope:
    return Rope((FactorSet(factors, n_hat, attention_factor),), base, interleaved)


def like(rotation: Rotation, q: torch.Tensor) -> Rotation:
    """The rotation with fake tensors where q is one."""
    if torch.compiler.is_compiling() or type(q) is torch.Tensor:
        return rotation
    mode = getattr(q, "fake_mode", None)
    return rotation if mode is None else rotation.convert(mode.from_tensor)


def _capturing_without(rope: Rope, device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling() or rope.has_tables(device):
        return False
    return torch.cuda.is_current_stream_capturing()


def _check_factors_tensor(factors: torch.Tensor) -> None:
    if factors.dim() != 1 or factors.shape[0] == 0:
        raise ValueError(
            f"factors: expected shape (P,) with one factor per pair, got {tuple(factors.shape)}"
        )
    if not factors.dtype.is_floating_point:
        raise TypeError(f"factors: expected a floating dtype, got {factors.dtype}")
    if factors.requires_grad:
        raise ValueError("factors: expected a tensor without grad; no gradient reaches factors")


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


# -------------------------------------------------------------------------------------- autocast


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast makes of x: None outside of it, and for what it leaves alone, as float64."""
    if x.dtype not in AUTOCAST_DTYPES or not torch.amp.is_autocast_available(x.device.type):
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of autocast where it is on, as torch casts for its own attention."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def autocast_like(x: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """x in the dtype of what is stored where autocast is on.

    A cache keeps its dtype: to cast all of it at each step would cost more than the step. Beside
    float8 x is in the dtype of autocast.
    """
    if autocast_dtype(x) is None:
        return x
    if stored.dtype == torch.float8_e4m3fn:
        return autocast(x)
    return x.to(stored.dtype) if stored.dtype in AUTOCAST_DTYPES else x


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Where torch's own operators keep the dtypes they are given, on the device of x."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


# ----------------------------------------------------------------------------------- q, k and co.


def check_tensor(name: str, x: object) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    return x


def check_layout(layout: str) -> tuple[str, ...]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout]


def check_heads(name: str, x: torch.Tensor, layout: str, rotary_dim: int) -> None:
    """x is a floating tensor of ``layout`` with a unit last stride and room for the rotation."""
    axes = check_layout(layout)
    if x.dim() != len(axes):
        raise ValueError(
            f"{name}: expected shape ({', '.join(axes)}) for layout {layout!r}, "
            f"got {tuple(x.shape)}"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.shape[-1] < rotary_dim:
        raise ValueError(
            f"{name}: expected a last dimension of at least {rotary_dim} (2 * len(factors)), "
            f"got {x.shape[-1]}"
        )
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name}: expected a unit stride in the last dimension, got strides {x.stride()}; "
            f"pass {name}.contiguous()"
        )


def check_like(
    name: str,
    x: torch.Tensor,
    other_name: str,
    other: torch.Tensor,
    layout: str,
    free: tuple[str, ...] = ("heads",),
) -> None:
    """x goes with the other: same device, dtype ("dtype") and sizes, but for what is ``free``."""
    if x.dtype != other.dtype and "dtype" not in free:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {x.device}"
        )
    for axis, axis_name in enumerate(LAYOUTS[layout]):
        if axis_name not in free and x.shape[axis] != other.shape[axis]:
            raise ValueError(
                f"{name}: expected {axis_name} {other.shape[axis]} as in {other_name}, "
                f"got shape {tuple(x.shape)}"
            )


def as_bshd(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view of x as (batch, seq, heads, dim); packed tokens become a batch of one."""
    if layout == "bshd":
        return x
    return x.transpose(1, 2) if layout == "bhsd" else x.unsqueeze(0)


def from_bshd(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The inverse of `as_bshd`."""
    if layout == "bshd":
        return x
    return x.transpose(1, 2) if layout == "bhsd" else x.squeeze(0)


def check_positions(
    name: str, positions: torch.Tensor, batch: int, seq: int, q: torch.Tensor
) -> torch.Tensor:
    """Positions as a (batch, seq) view."""
    check_index(name, positions, q)
    shape = tuple(positions.shape)
    if shape == (seq,):
        return positions.unsqueeze(0).expand(batch, seq)
    if shape == (batch, seq):
        return positions
    if shape == (1, seq):
        return positions.expand(batch, seq)
    raise ValueError(f"{name}: expected shape ({seq},) or ({batch}, {seq}), got {shape}")


def check_index(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def check_borders(name: str, cu_seqlens: torch.Tensor, q: torch.Tensor, layout: str) -> int:
    """Borders of packed sequences; returns how many sequences they bound."""
    check_index(name, cu_seqlens, q)
    if layout != "thd":
        raise ValueError(f"{name}: expected with layout 'thd' only, got {layout!r}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name}: expected shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    return cu_seqlens.shape[0] - 1


def choose_sets(
    rotation: Rotation,
    q: torch.Tensor,
    batch: int,
    layout: str,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Rotation:
    """The rotation with ``lengths`` or ``sets``, checked; with one factor set it needs neither."""
    if cu_seqlens is not None:
        batch = check_borders("cu_seqlens", cu_seqlens, q, layout)
    for name, x in (("lengths", lengths), ("sets", sets)):
        if x is not None:
            check_per_sequence(name, x, batch, q)
    if sets is not None and sets.dtype != torch.int32:
        raise TypeError(f"sets: expected int32, got {sets.dtype}")
    count = rotation.max_length.shape[0]
    if count == 1:
        return rotation
    if lengths is None and sets is None:
        raise ValueError(
            f"lengths: expected lengths= or sets= of shape ({batch},) with a Rope of "
            f"{count} factor sets, got neither"
        )
    return Rotation(*rotation[:4], None if sets is not None else lengths, sets, *rotation[6:])


def check_per_sequence(name: str, x: torch.Tensor, count: int, q: torch.Tensor) -> None:
    check_index(name, x, q)
    if tuple(x.shape) != (count,):
        raise ValueError(
            f"{name}: expected shape ({count},), one for each sequence, got {tuple(x.shape)}"
        )


def check_scores(
    softmax_scale: float | None, window: int | None, softcap: float | None, dim: int
) -> float:
    """The softmax scale, once all three are what they should be."""
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise TypeError(f"window: expected a whole number of tokens or None, got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}")
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if value is None:
            continue
        if not is_number(value):
            raise TypeError(f"{name}: expected a number or None, got {value!r}")
        if not 0 < value < LARGEST:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return dim**-0.5 if softmax_scale is None else float(softmax_scale)
