"""What the public functions do with their arguments before a backend sees them.

Shapes, dtypes and devices are checked here, always; values in values.py, where that is free.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..rope.factor_set import is_int, is_number
from ..rope.formulas import LARGEST
from ..torch_private import has_nested_gradients, has_tangent
from .records import Scores, Selection

Layout = Literal["bshd", "bhsd", "thd"]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "bshd": ("batch", "seq", "heads", "dim"),
    "bhsd": ("batch", "heads", "seq", "dim"),
    "thd": ("tokens", "heads", "dim"),
}
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
_FIRST = Selection()
_FLOAT32 = torch.finfo(torch.float32)


def check_tensor(name: str, x: object) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    return x


def check_flag(name: str, flag: object) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {flag!r}")


def check_no_tangents(does: str, **given: torch.Tensor | None) -> None:
    """``does``, the function or backend, knows nothing of forward-mode differentiation.

    Raises:
        NotImplementedError: naming what has a tangent.
    """
    for name, x in given.items():
        if x is not None and has_tangent(x):
            raise NotImplementedError(
                f"{name}: {does} has no forward-mode derivative, got a tensor with a tangent; "
                "expected attention or apply_rotary by backend='reference'"
            )


def check_first_order(does: str, **given: torch.Tensor | None) -> None:
    """``does``, the backend, has gradients, and no derivative of these or in forward mode.

    Raises:
        NotImplementedError: naming what has a tangent, or ``backend`` where torch.func
            takes a gradient of a gradient.
    """
    check_no_tangents(does, **given)
    if has_nested_gradients(*(x for x in given.values() if x is not None)):
        raise NotImplementedError(
            f"backend: {does} has no second derivative, got {' and '.join(given)} within two "
            "gradients of torch.func; expected 'reference'"
        )


def check_layout(layout: str) -> tuple[str, ...]:
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout]


def check_heads(name: str, x: torch.Tensor, layout: str, rotary_dim: int) -> None:
    """x is a floating tensor of ``layout`` with a unit last stride and room for the rotation."""
    axes = check_layout(layout)
    shape = x.shape
    if len(shape) != len(axes):
        raise ValueError(
            f"{name}: expected shape ({', '.join(axes)}) for layout {layout!r}, got {tuple(shape)}"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if shape[-1] < rotary_dim:
        raise ValueError(
            f"{name}: expected a last dimension of at least {rotary_dim} (2 * len(factors)), "
            f"got {shape[-1]}"
        )
    if x.stride()[-1] != 1 and shape[-1] > 1:
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
    sizes, others = x.shape, other.shape
    if sizes == others:
        return
    for axis, got, wanted in zip(LAYOUTS[layout], sizes, others, strict=True):
        if got != wanted and axis not in free:
            raise ValueError(
                f"{name}: expected {axis} {wanted} as in {other_name}, got shape {tuple(sizes)}"
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
) -> None:
    check_index(name, positions, q)
    shape = positions.shape
    # "in" is false of traced sizes
    if not (shape == (seq,) or shape == (batch, seq) or shape == (1, seq)):
        raise ValueError(f"{name}: expected shape ({seq},) or ({batch}, {seq}), got {tuple(shape)}")


def as_rows(positions: torch.Tensor, batch: int, seq: int) -> torch.Tensor:
    """Positions as a (batch, seq) view."""
    return positions if positions.shape == (batch, seq) else positions.expand(batch, seq)


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


def check_selection(
    count: int,
    q: torch.Tensor,
    batch: int,
    layout: str,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> int:
    """What chooses among ``count`` factor sets; returns how many sequences there are."""
    if cu_seqlens is not None:
        batch = check_borders("cu_seqlens", cu_seqlens, q, layout)
    if lengths is not None:
        check_per_sequence("lengths", lengths, batch, q)
    if sets is not None:
        check_per_sequence("sets", sets, batch, q)
        if sets.dtype != torch.int32:
            raise TypeError(f"sets: expected int32, got {sets.dtype}")
    if count > 1 and lengths is None and sets is None:
        raise ValueError(
            f"lengths: expected lengths= or sets= of shape ({batch},) with a Rope of "
            f"{count} factor sets, got neither"
        )
    return batch


def select(
    count: int,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
) -> Selection:
    """What was checked of ``lengths`` and ``sets``; of one factor set there is no choice."""
    if count == 1:
        lengths = sets = None
    elif sets is not None:
        lengths = None
    if lengths is sets is cu_seqlens is None:
        return _FIRST
    return Selection(lengths, sets, cu_seqlens)


def check_per_sequence(name: str, x: torch.Tensor, count: int, q: torch.Tensor) -> None:
    check_index(name, x, q)
    if x.shape != (count,):
        raise ValueError(
            f"{name}: expected shape ({count},), one for each sequence, got {tuple(x.shape)}"
        )


def check_groups(name: str, heads: int, kv_heads: int) -> None:
    """Each KV head serves the same number of query heads."""
    if heads % max(kv_heads, 1) or (heads and not kv_heads):
        raise ValueError(f"{name}: expected heads that divide the {heads} of q, got {kv_heads}")


def check_sinks(sinks: torch.Tensor, heads: int, q: torch.Tensor) -> None:
    check_tensor("sinks", sinks)
    if sinks.dtype not in FLOAT_DTYPES:
        raise TypeError(f"sinks: expected float32, bfloat16, float16 or float64, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected the device of q, {q.device}, got {sinks.device}")
    if tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"sinks: expected shape ({heads},), one for each head of q, got {tuple(sinks.shape)}"
        )
    if sinks.stride(0) != 1 and heads > 1:
        raise ValueError(
            f"sinks: expected a unit stride, got {sinks.stride(0)}; pass sinks.contiguous()"
        )


def check_scores(
    causal: bool,
    softmax_scale: float | None,
    window: int | None,
    softcap: float | None,
    dim: int,
) -> Scores:
    """How queries score keys, once all of it is what it should be."""
    if window is not None and not is_int(window):
        raise TypeError(f"window: expected a whole number of tokens or None, got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}")
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if value is None:
            continue
        if not is_number(value):
            raise TypeError(f"{name}: expected a number or None, got {value!r}")
        if not _FLOAT32.tiny <= value <= _FLOAT32.max:  # as which kernels take it
            more = ", which float32 does not hold" if 0 < value < LARGEST else ""
            raise ValueError(f"{name}: expected a finite number above 0, got {value}{more}")
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    # No sequence has more slots; kernels count in 32 bits.
    return Scores(causal, scale, min(window or 0, 2**30), float(softcap or 0.0))
