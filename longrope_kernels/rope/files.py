"""Files of factors: the JSON sidecar with all of a `Rope`, and lists of numbers as CSV.

Formats only; what the numbers mean is in `rope` and `scaling`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .factor_set import FactorSet

SIDECAR = "longrope.json"
_FORMAT, _VERSION = "longrope_kernels.Rope", 1
_KEYS = {"format", "version", "base", "interleaved", "sets"}
_SET_KEYS = {"factors", "n_hat", "attention_factor", "max_length"}

FilePath = str | os.PathLike[str]
_BEGINS_NUMBERS = "+-.0123456789"


def write_sidecar(
    path: FilePath, sets: Sequence[FactorSet], base: float, interleaved: bool
) -> Path:
    """Write a `Rope` of these as JSON, in a folder as ``longrope.json``; gives the path.

    Numbers are written so that reading gives the same float64.
    """
    target = _sidecar_path(path)
    content_of_sets = [
        {
            "factors": list(factor_set.factors),
            "n_hat": factor_set.n_hat,
            "attention_factor": float(factor_set.attention_factor),
            "max_length": factor_set.max_length,
        }
        for factor_set in sets
    ]
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "base": base,
        "interleaved": interleaved,
        "sets": content_of_sets,
    }
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target


def read_sidecar(path: FilePath) -> dict[str, Any]:
    """``base``, ``interleaved`` and ``sets``, a list of the arguments of `FactorSet`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file and what in it is not as `write_sidecar` writes it.
    """
    source = _sidecar_path(path)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of digits, characters and depth too
        raise ValueError(f"{source}: expected JSON, got {error}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f'{source}: expected "format": "{_FORMAT}", a file written by Rope.save')
    if content.get("version") != _VERSION:
        raise ValueError(f"{source}: expected version {_VERSION}, got {content.get('version')!r}")
    _check_keys(f"{source}", content, _KEYS)
    if not isinstance(content["sets"], list):
        raise ValueError(f"{source}: expected a list of sets, got {content['sets']!r}")
    for i, factor_set in enumerate(content["sets"]):
        _check_keys(f"{source}: sets[{i}]", factor_set, _SET_KEYS)
    return {name: content[name] for name in ("base", "interleaved", "sets")}


def _sidecar_path(path: FilePath) -> Path:
    return Path(path) / SIDECAR if Path(path).is_dir() else Path(path)


def _check_keys(where: str, value: Any, keys: set[str]) -> None:
    got = set(value) if isinstance(value, dict) else None
    if got != keys:
        shown = value if got is None else sorted(got)
        raise ValueError(f"{where}: expected exactly the keys {sorted(keys)}, got {shown!r}")


def read_csv(path: FilePath) -> list[float]:
    """The numbers of one row, or of one column, of comma-separated values.

    Rows that repeat the first (Microsoft's files have one for each layer) count once. A first
    line in which nothing begins like a number is a header, and lines that begin with # are
    comments.

    Raises:
        ValueError: naming the file, and the line that is no row of numbers, not finite or unlike
            the first.
    """
    rows: list[tuple[int, list[float]]] = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text, got {error}") from None
    header_allowed = True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = [field.strip() for field in line.split(",")]
        values = [_number(field) for field in fields]
        words = not any(field[:1] in _BEGINS_NUMBERS for field in fields if field)
        if header_allowed and words and all(value is None for value in values):
            header_allowed = False
            continue
        header_allowed = False
        row = []
        for field, value in zip(fields, values, strict=True):
            if value is None or not math.isfinite(value):
                raise ValueError(f"{path}, line {number}: expected finite numbers, got {field!r}")
            row.append(value)
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: expected numbers, got an empty file")

    first_number, first = rows[0]
    if len(first) == 1:
        return [_single(f"{path}, line {number}", row) for number, row in rows]
    for number, row in rows:
        if row != first:
            raise ValueError(
                f"{path}, line {number}: expected the same numbers as in line {first_number}, one "
                "set for all layers; got others"
            )
    return first


def write_csv(path: FilePath, values: Sequence[float]) -> None:
    """One number on each line; reading gives the same float64."""
    lines = "".join(f"{value!r}\n" for value in values)
    Path(path).write_text(lines, encoding="utf-8")


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _single(where: str, row: list[float]) -> float:
    if len(row) != 1:
        raise ValueError(f"{where}: expected one number, as in the lines before, got {len(row)}")
    return row[0]
