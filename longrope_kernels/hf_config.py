"""Read LongRoPE parameters from a Hugging Face config; knows the field names and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LONGROPE_TYPES = ("longrope", "su")  # "su" is the name of the April 2024 release of Phi-3


def rope_type(config: Any) -> str:
    """The type named by ``rope_parameters`` or ``rope_scaling``; "default" where there is none."""
    parameters = _rope_parameters(config)
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def read_plain_config(config: Any) -> dict[str, Any]:
    """The arguments of `Rope.plain` for a config without scaling.

    Raises:
        ValueError: the config has no ``head_dim`` and nothing to derive it from.
    """
    rotary_dim = _rotary_dim(config)
    if rotary_dim is None:
        raise ValueError("config: expected head_dim, or hidden_size and num_attention_heads")
    return {"rotary_dim": rotary_dim, "base": _base(config)}


def read_longrope_config(config: Any) -> dict[str, Any]:
    """The arguments of `Rope.longrope` for a config of type longrope.

    The attention factor is, in this order: ``short_mscale`` and ``long_mscale`` (Phi-3.5-MoE),
    ``attention_factor``, the formula with ``factor`` or with ``max_position_embeddings``
    over ``original_max_position_embeddings``, as in transformers.

    Raises:
        ValueError: naming the field that is missing, of another type or of the wrong length.
    """
    kind = rope_type(config)
    if kind not in _LONGROPE_TYPES:
        raise ValueError(
            "config: expected rope_parameters or rope_scaling of type "
            f"{', '.join(_LONGROPE_TYPES)} or default, got {kind!r}"
        )
    parameters = _rope_parameters(config)
    arguments: dict[str, Any] = {"base": _base(config)}
    rotary_dim = _rotary_dim(config)
    for name in ("short_factor", "long_factor"):
        factors = _required(parameters, name, "rope_parameters")
        if not isinstance(factors, list | tuple):
            raise ValueError(f"config: expected a list of numbers in {name}, got {factors!r}")
        if rotary_dim is not None and len(factors) != rotary_dim // 2:
            raise ValueError(
                f"config: expected {rotary_dim // 2} numbers in {name} for {rotary_dim} rotary "
                f"dimensions, got {len(factors)}"
            )
        arguments[name] = factors

    original = _get(config, "original_max_position_embeddings") or _required(
        parameters, "original_max_position_embeddings", "rope_parameters"
    )
    arguments["original_max_position_embeddings"] = original
    short_mscale, long_mscale = parameters.get("short_mscale"), parameters.get("long_mscale")
    if short_mscale is not None and long_mscale is not None:
        arguments["attention_factor"] = (float(short_mscale), float(long_mscale))
    elif parameters.get("attention_factor") is not None:
        arguments["attention_factor"] = float(parameters["attention_factor"])
    elif parameters.get("factor") is not None:
        arguments["max_position_embeddings"] = parameters["factor"] * original
    else:
        arguments["max_position_embeddings"] = _get(config, "max_position_embeddings") or _required(
            parameters, "max_position_embeddings", "config"
        )
    return arguments


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _rope_parameters(config: Any) -> Mapping[str, Any]:
    parameters = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config: expected rope_parameters to be a dict, got {parameters!r}")
    if parameters and all(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(
            "config: expected one set of rope_parameters for all layers, got one for each of "
            f"{', '.join(parameters)}"
        )
    return parameters


def _required(parameters: Mapping[str, Any], name: str, where: str) -> Any:
    value = parameters.get(name)
    if value is None:
        raise ValueError(f"config: expected {name} in {where}, got none")
    return value


def _base(config: Any) -> float:
    base = _rope_parameters(config).get("rope_theta")
    if base is None:
        base = _get(config, "rope_theta")
    return 10000.0 if base is None else float(base)


def _rotary_dim(config: Any) -> int | None:
    head_dim = _get(config, "head_dim")
    if head_dim is None:
        hidden, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
        if hidden is None or heads is None:
            return None
        head_dim = hidden // heads
    partial = _rope_parameters(config).get("partial_rotary_factor")
    if partial is None:
        partial = _get(config, "partial_rotary_factor")
    return int(head_dim * (1.0 if partial is None else partial))
