"""Write a rope as the fields of a Hugging Face config, or say why no type there is that rope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import formulas
from .factor_set import FactorSet, is_int
from .hf_config import N_HAT_KEY


def write_config(
    sets: Sequence[FactorSet],
    base: float,
    interleaved: bool,
    *,
    version: int,
    head_dim: int | None,
    original_max_position_embeddings: int | None,
    max_position_embeddings: int | None,
) -> dict[str, Any]:
    """The fields `Rope.to_config` describes.

    Raises:
        ValueError: no type of transformers says exactly what the rope is, and why; an argument
            that contradicts it.
    """
    if version not in (4, 5):
        raise ValueError(f"version: expected 4 or 5, of transformers, got {version!r}")
    _check_writable(sets, interleaved)
    for name, length in (
        ("original_max_position_embeddings", original_max_position_embeddings),
        ("max_position_embeddings", max_position_embeddings),
    ):
        if length is not None and not (is_int(length) and length > 0):
            raise ValueError(f"{name}: expected a whole number of tokens above 0, got {length!r}")
    original = original_max_position_embeddings
    short, long = sets[0], sets[-1]
    if len(sets) == 2:
        if original not in (None, short.max_length):
            raise ValueError(
                f"original_max_position_embeddings: expected None or {short.max_length}, the "
                f"bound of the short set, got {original!r}"
            )
        original = short.max_length

    fields: dict[str, Any] = {}
    uniform = len(set(long.factors)) == 1 and long.attention_factor == 1
    if len(sets) == 1 and uniform and long.factors[0] == 1:
        parameters: dict[str, Any] = {"rope_type": "default"}
    elif len(sets) == 1 and uniform:
        parameters = {"rope_type": "linear", "factor": long.factors[0]}
    else:
        if original is None:
            raise ValueError(
                "original_max_position_embeddings: expected the number of tokens, which type "
                "longrope needs and a rope of one set does not hold, got None"
            )
        parameters = {
            "rope_type": "longrope",
            "short_factor": list(short.factors),
            "long_factor": list(long.factors),
            **_attention_fields(short, long, original, max_position_embeddings),
        }
        fields["original_max_position_embeddings"] = original
    if max_position_embeddings is not None:
        fields["max_position_embeddings"] = max_position_embeddings
    thresholds = [factor_set.n_hat for factor_set in sets]
    fields[N_HAT_KEY] = thresholds if len(set(thresholds)) > 1 else thresholds[0] or None
    return _placed(2 * len(long.factors), base, parameters, fields, version, head_dim)


def _placed(
    rotary_dim: int,
    base: float,
    parameters: dict[str, Any],
    fields: dict[str, Any],
    version: int,
    head_dim: int | None,
) -> dict[str, Any]:
    """Each field where that version of transformers looks for it, and None where another would."""
    shared: dict[str, Any] = {"rope_theta": base}
    if head_dim is not None:
        fields["head_dim"] = head_dim
        shared["partial_rotary_factor"] = _partial_rotary_factor(rotary_dim, head_dim)
    if version == 5:
        if "original_max_position_embeddings" in fields:
            original = fields["original_max_position_embeddings"]
            parameters["original_max_position_embeddings"] = original
        # First: objects of transformers 5 have one attribute for both, in which the last one stays.
        return {"rope_scaling": None, **fields, "rope_parameters": {**shared, **parameters}}
    # Phi-3's own check in transformers 4 takes exactly "type" and the two lists.
    kind = parameters.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **parameters}
    return {"rope_parameters": None, **fields, **shared, "rope_scaling": scaling}


def _check_writable(sets: Sequence[FactorSet], interleaved: bool) -> None:
    instead = "Rope.save keeps everything"
    if interleaved:
        raise ValueError(
            "interleaved: a config has no field for the pairing, which is the model code's; write "
            f"dataclasses.replace(rope, interleaved=False), and {instead}"
        )
    if len(sets) > 2:
        raise ValueError(
            f"sets: no rope type has more than two, a short and a long one; got "
            f"{len(sets)}; {instead}"
        )
    if sets[-1].max_length is not None:
        raise ValueError(
            "sets: a config has no field for the bound of the last set, got max_length = "
            f"{sets[-1].max_length}; {instead}"
        )


def _attention_fields(
    short_set: FactorSet,
    long_set: FactorSet,
    original: int,
    max_position_embeddings: int | None,
) -> dict[str, float]:
    """Nothing where the formula gives it from ``max_position_embeddings``, else as it stands."""
    short, long = float(short_set.attention_factor), float(long_set.attention_factor)
    if short != long:
        return {"short_mscale": short, "long_mscale": long}
    if max_position_embeddings is not None and long == formulas.extension_attention_factor(
        max_position_embeddings, original
    ):
        return {}
    return {"attention_factor": long}


def _partial_rotary_factor(rotary_dim: int, head_dim: int) -> float:
    if not isinstance(head_dim, int) or head_dim < rotary_dim:
        raise ValueError(
            f"head_dim: expected at least the {rotary_dim} rotary dimensions, got {head_dim!r}"
        )
    share = rotary_dim / head_dim
    # Readers truncate the product, which may have been rounded down below the whole number.
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 2.0)
