"""Factors of other programs: Microsoft's CSV files and the tensors of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import files
from .checks import warn_about
from .factor_set import FactorSet
from .formulas import check_positive
from .value import Rope

if TYPE_CHECKING:
    import numpy as np

_SHORT, _LONG, _SINGLE = (
    "rope_factors_short.weight",
    "rope_factors_long.weight",
    "rope_freqs.weight",
)


def load_csv(
    path: files.FilePath,
    *,
    pairs: int | None = None,
    n_hat_first: bool = False,
    factor: float | None = None,
) -> FactorSet:
    """The set in a file of comma-separated factors, as those of microsoft/LongRoPE.

    One factor on each line, or all in one row; rows for each layer must be equal. A header line
    and lines that begin with # are skipped.

    Args:
        path: the file.
        pairs: P, the number of factors expected; None takes what is there.
        n_hat_first: the first number is the threshold (Microsoft's ``dim_mono_n`` files).
        factor: the extension ratio s, for `scaling.check`; None where it is not known.

    Returns:
        A set with attention factor 1 and no bound, which such a file does not hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file and the line or pair that is wrong.

    Warns:
        FactorWarning: as in `scaling.check`.
    """
    values = files.read_csv(path)
    n_hat = 0.0
    if n_hat_first:
        n_hat, *values = values
        if not n_hat.is_integer():
            raise ValueError(f"{path}: expected n_hat, a whole number, first; got {n_hat}")
    if pairs is not None and len(values) != pairs:
        raise ValueError(f"{path}: expected {pairs} factors, got {len(values)}")
    try:
        result = FactorSet(tuple(values), int(n_hat))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    warn_about([result.factors], factor, where=str(path))
    return result


def save_csv(
    path: files.FilePath, factors: FactorSet | Sequence[float], *, n_hat_first: bool = False
) -> None:
    """Write one factor on each line, so that `load_csv` gives the same numbers.

    Args:
        path: the file.
        factors: a set, or its factors alone. The attention factor and the bound are not written.
        n_hat_first: write the threshold in the first line.

    Raises:
        ValueError: the set has a threshold and ``n_hat_first`` is not set.
    """
    factor_set = factors if isinstance(factors, FactorSet) else FactorSet(tuple(factors))
    if factor_set.n_hat and not n_hat_first:
        raise ValueError(
            f"n_hat_first: expected True for a set with n_hat = {factor_set.n_hat}, got False"
        )
    first = (factor_set.n_hat,) if n_hat_first else ()
    files.write_csv(path, (*first, *factor_set.factors))


def from_arrays(
    arrays: Mapping[str, Any],
    original_max_position_embeddings: int | None = None,
    max_position_embeddings: int | None = None,
    *,
    attention_factor: float | tuple[float, float] | None = None,
    n_hat: int | tuple[int, int] = 0,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """The `Rope` of a GGUF file's factor tensors, by which frequencies are divided there as here.

    Args:
        arrays: by tensor name, (P,) float32 of any kind: ``rope_factors_short.weight`` and
            ``rope_factors_long.weight``, or ``rope_freqs.weight`` alone (one set). Others are
            not read. float32 values mean exactly themselves.
        original_max_position_embeddings: as in `Rope.longrope`; the file's
            ``rope.scaling.original_context_length``. Needed for two sets.
        max_position_embeddings: as in `Rope.longrope`; the file's ``context_length``.
        attention_factor: as in `Rope.longrope`; the file's ``rope.scaling.attn_factor``. One set
            without it has 1.
        n_hat: as in `Rope.longrope`; a GGUF file has none.
        base: the file's ``rope.freq_base``.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + P).

    Raises:
        ValueError, TypeError: naming the array or argument that is missing or wrong.

    Warns:
        FactorWarning: as in `scaling.check`.
    """
    names = [name for name in (_SHORT, _LONG, _SINGLE) if name in arrays]
    lists = {name: _factors_of(name, arrays[name]) for name in names}
    if names == [_SINGLE]:
        a = 1.0 if attention_factor is None else attention_factor
        if isinstance(a, tuple) or isinstance(n_hat, tuple):
            raise ValueError(
                "attention_factor, n_hat: expected one value each for one set, got "
                f"{attention_factor!r}, {n_hat!r}"
            )
        for name, length in (
            ("original_max_position_embeddings", original_max_position_embeddings),
            ("max_position_embeddings", max_position_embeddings),
        ):
            if length is not None:
                check_positive(name, length)
        rope = Rope((FactorSet(lists[_SINGLE], n_hat, a),), base, interleaved)
    elif names == [_SHORT, _LONG]:
        if original_max_position_embeddings is None:
            raise ValueError(
                "original_max_position_embeddings: expected a number of tokens for two sets, got "
                "None"
            )
        rope = Rope.longrope(
            lists[_SHORT],
            lists[_LONG],
            original_max_position_embeddings,
            max_position_embeddings,
            attention_factor=attention_factor,
            n_hat=n_hat,
            base=base,
            interleaved=interleaved,
        )
    else:
        raise ValueError(
            f"arrays: expected {_SHORT} and {_LONG}, or {_SINGLE} alone, got {names or 'none'}"
        )
    ratio = None
    if original_max_position_embeddings and max_position_embeddings:
        ratio = max_position_embeddings / original_max_position_embeddings
    warn_about([s.factors for s in rope.sets], ratio)
    return rope


def to_arrays(rope: Rope, *, numpy: bool = False) -> dict[str, torch.Tensor | np.ndarray]:
    """The factors as the tensors of a GGUF file, the reverse of `from_arrays`.

    Base, attention factors and the original length are metadata there and not among them.

    Args:
        rope: of one or two sets, without threshold.
        numpy: numpy arrays in place of tensors.

    Returns:
        (P,) float32 by name: each factor rounded to the nearest float32.

    Raises:
        ValueError: the tensors cannot say what the rope is, and why.
    """
    if len(rope.sets) > 2:
        raise ValueError(f"rope: expected one or two sets, got {len(rope.sets)}")
    thresholds = [s.n_hat for s in rope.sets]
    if any(thresholds):
        raise ValueError(f"rope: expected n_hat = 0, which GGUF has no field for, got {thresholds}")
    names = (_SINGLE,) if len(rope.sets) == 1 else (_SHORT, _LONG)
    arrays: dict[str, torch.Tensor | np.ndarray] = {}
    for name, factor_set in zip(names, rope.sets, strict=True):
        numbers = torch.tensor(factor_set.factors, dtype=torch.float64, device="cpu")
        array = numbers.to(torch.float32)
        if not bool(array.isfinite().all()):
            raise ValueError(f"rope: expected factors in float32's range, got {factor_set.factors}")
        arrays[name] = array.numpy() if numpy else array
    return arrays


def _factors_of(name: str, array: Any) -> tuple[float, ...]:
    try:
        return FactorSet(array.tolist() if hasattr(array, "tolist") else array).factors
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
