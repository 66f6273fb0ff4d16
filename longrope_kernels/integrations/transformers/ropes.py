"""The ropes of a model: what its config says, held to the frequencies its rotary modules have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from ...rope.factor_set import FactorSet
from ...rope.formulas import UNROTATED
from ...rope.hf_config import N_HAT_KEY, read_alpha, rope_type
from ...rope.value import Rope
from .probe import frequencies

_CLOSE = 1e-2  # relative: what bfloat16 leaves of a frequency, where .to() has rounded it


def kinds(rotary: nn.Module) -> list[str | None]:
    """The types of layers that a rotary module turns each by its own rope; [None] where by one."""
    parameters = getattr(rotary.config, "rope_parameters", None) or {}
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        return [None]
    names = [str(name) for name, value in parameters.items() if isinstance(value, Mapping)]
    return [name for name in names if hasattr(rotary, f"{name}_inv_freq")]


def rope_of(rotary: Any, kind: str | None, interleaved: bool, length: int | None = None) -> Rope:
    """The rope of a rotary module of transformers, for one type of layers.

    ``length`` is of the longest sequence to come, which type dynamic needs.

    Raises:
        ValueError: its config gives other frequencies than it has, or needs a length.
    """
    fields = _fields(rotary, kind)
    if rope_type(fields) == "dynamic" and length is None and read_alpha(fields) is None:
        raise ValueError(
            "model: its rope type 'dynamic' has other factors at each length; give "
            "rope=Rope.from_config(model.config, length=...) for the longest sequence to come"
        )
    rope = Rope.from_config(fields, interleaved=interleaved, length=length)
    has = frequencies(rotary, kind)
    if has.is_meta:
        return rope
    scale = None
    if "short_mscale" not in fields["rope_parameters"]:  # PhiMoE's, which its forward reads
        prefix = "" if kind is None else f"{kind}_"
        scale = getattr(rotary, f"{prefix}attention_scaling", None)
    # Of two sets transformers may hold either, whichever its last forward took.
    found = [_differs(rope.base, one, has.double().tolist(), scale) for one in rope.sets]
    if all(found):
        raise ValueError(
            f"model: its {type(rotary).__name__} {found[0]}; expected a rotation that its config "
            "says"
        )
    return rope


def _differs(base: float, one: FactorSet, has: list[float], scale: float | None) -> str:
    """What a rotary module does that a set does not say; "" where they agree."""
    pairs = len(one.factors)
    gives = [base ** (-i / pairs) / factor for i, factor in enumerate(one.factors)]
    for i, (own, given) in enumerate(zip(has, gives, strict=True)):
        if abs(own - given) > _CLOSE * given + 1e-6:
            return f"turns pair {i} by {own:.6g} a token, where its config gives {given:.6g}"
    if scale is not None and abs(scale - one.attention_factor) > _CLOSE * one.attention_factor:
        return (
            f"has attention_scaling {scale:.6g}, where its config gives {one.attention_factor:.6g}"
        )
    return ""


def _fields(rotary: Any, kind: str | None) -> dict[str, Any]:
    """What `Rope.from_config` reads, whatever the config calls the size of a head."""
    config = rotary.config
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if kind is not None:
        parameters = dict(parameters[kind])
    names = (
        *("rope_theta", "max_position_embeddings", "original_max_position_embeddings"),
        *("model_type", N_HAT_KEY),
    )
    fields = {name: getattr(config, name, None) for name in names}
    # What stands beside the parameters of several kinds is of none that has its own.
    own = set() if kind is None else parameters.keys()
    fields = {name: x for name, x in fields.items() if x is not None and name not in own}
    fields |= {"head_dim": 2 * frequencies(rotary, kind).numel()}
    if parameters.get("rope_type") != "proportional":
        parameters["partial_rotary_factor"] = 1.0
    return fields | {"rope_parameters": parameters}


def with_pairing(rope: Rope, interleaved: bool) -> Rope:
    """A rope with the pairs of the model's code, which no config says, or those it names itself."""
    return dataclasses.replace(rope, interleaved=True) if interleaved else rope


@cache
def still(dim: int) -> Rope:
    """For heads that are not rotated."""
    return Rope((FactorSet((UNROTATED,) * (dim // 2)),))


def head_dim(attention: nn.Module, config: Any) -> int | None:
    """Of the heads of an attention module, where it says so."""
    for owner in (attention, config):
        found = getattr(owner, "head_dim", None)
        if isinstance(found, int) and found > 0:
            return found
    hidden, heads = (getattr(config, x, None) for x in ("hidden_size", "num_attention_heads"))
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def given(
    rope: Rope | Mapping[str, Rope] | None, own: Mapping[str, Rope], interleaved: bool
) -> dict[str, Rope]:
    """The ropes that a caller wants, those of the model where nothing is said.

    Raises:
        ValueError: one rope for layers of several kinds, a kind that the model has not.
        TypeError: not a rope, or several where all layers have one.
    """
    if rope is None:
        return dict(own)
    if isinstance(rope, Mapping) and list(own) == [""] != list(rope):
        raise TypeError(
            f"rope: expected a Rope or None, got {type(rope).__name__}; all layers of this model "
            "have one"
        )
    wanted = rope if isinstance(rope, Mapping) else dict.fromkeys(own, rope)
    if not isinstance(rope, Mapping) and len(own) > 1:
        raise ValueError(
            f"rope: expected a dict with a Rope for some of {', '.join(own)}, the layers of which "
            "have each their own in this model, got one Rope"
        )
    for kind, one in wanted.items():
        if kind not in own:
            raise ValueError(f"rope: expected kinds of layers, {', '.join(own)}, got {kind!r}")
        if not isinstance(one, Rope):
            raise TypeError(f"rope: expected a Rope or None, got {type(one).__name__}")
    return {kind: with_pairing(wanted.get(kind, has), interleaved) for kind, has in own.items()}
