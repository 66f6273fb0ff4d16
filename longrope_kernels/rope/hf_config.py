"""Read RoPE parameters from Hugging Face configs; knows the field names and their rules.

What a field means, and which one goes first, is as in transformers 5 (``modeling_rope_utils``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import formulas
from .factor_set import is_int, is_number
from .formulas import LARGEST

LONGROPE_TYPES = ("longrope", "su")  # "su" is the name of the April 2024 release of Phi-3
_TYPES = ("default", "linear", "dynamic", "yarn", *LONGROPE_TYPES, "llama3", "proportional")
# Of the May 2024 release of Phi-3, whose type "yarn" is longrope, and the original length that
# transformers has for them where the file has none.
_PHI3 = ("phi3", "phi4_multimodal")
_PHI3_ORIGINAL = 4096
_MOST_DIMENSIONS = 2**16  # of a head; more is a mistake, and lists of that length fill the memory
# What files that name it in their own way have in place of a field, Phi-3-small's and GPT-NeoX's.
_OTHER_NAMES = {
    "rope_theta": ("rope_embedding_base", "rotary_emb_base"),
    "partial_rotary_factor": ("rotary_pct",),
}
# Of ``rope_parameters``, what ropes of all types are made of, and a length that some repeat there.
ROPE_FIELDS = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "alpha"),
    *("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
    *("low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "max_position_embeddings"),
)
# On the top level, beside the fields of transformers, which has none for it: there any config
# class keeps a key it does not know, where validation of rope_parameters complains.
N_HAT_KEY = "longrope_n_hat"


def rope_type(config: Any) -> str:
    """The type named by ``rope_parameters`` or ``rope_scaling``; "default" where there is none.

    Raises:
        ValueError: a type this package does not know.
    """
    parameters = _rope_parameters(config)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind == "yarn" and _is_old_phi3(config, parameters):
        return "longrope"
    if kind not in _TYPES:
        raise ValueError(
            "config: expected rope_parameters or rope_scaling of type "
            f"{', '.join(_TYPES)}, got {kind!r}"
        )
    return kind


def read_n_hat(config: Any) -> int | tuple[int, int]:
    """``longrope_n_hat``: a threshold for all sets or [short, long]; 0 where there is none.

    Raises:
        ValueError: it is neither.
    """
    n_hat = _get(config, N_HAT_KEY)
    if n_hat is None:
        return 0
    values = n_hat if isinstance(n_hat, list | tuple) and len(n_hat) == 2 else (n_hat,)
    if not all(map(is_int, values)):
        raise ValueError(
            f"config: expected {N_HAT_KEY} to be one or two whole numbers, got {n_hat!r}"
        )
    return values[0] if len(values) == 1 else (values[0], values[1])


def read_base(config: Any) -> float:
    """``rope_theta``, from ``rope_parameters`` or the top level; 10000 where there is none."""
    base = _shared(config, "rope_theta")
    return 10000.0 if base is None else float(base)


def read_alpha(config: Any) -> float | None:
    """``alpha`` of HunYuan's type dynamic: a plain NTK without a factor, the same at every length.

    None elsewhere; models of other names don't read it.
    """
    if rope_type(config) != "dynamic" or "hunyuan" not in (_get(config, "model_type") or "hunyuan"):
        return None
    return _number(_rope_parameters(config), "alpha") or None


def read_set(config: Any, length: int | None = None) -> dict[str, Any]:
    """The arguments of the one `FactorSet` of a config of any type but longrope.

    Args:
        config: as in `Rope.from_config`.
        length: for type dynamic, whose factors hold for one length.

    Raises:
        ValueError, TypeError: naming the field or argument that is missing or out of range.
    """
    if length is not None:
        formulas.check_positive("length", length)
    kind, parameters, base = rope_type(config), _rope_parameters(config), read_base(config)
    rotary_dim = read_rotary_dim(config, partial=kind != "proportional")
    if rotary_dim is None:
        raise ValueError("config: expected head_dim, or hidden_size and num_attention_heads")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"config: expected an even number of rotary dimensions, got {rotary_dim}")
    pairs = rotary_dim // 2
    try:
        return _read_set(config, kind, parameters, base, pairs, length)
    except (TypeError, ValueError, ArithmeticError) as error:
        text = str(error)
        if ": expected " not in text:  # what the arithmetic itself says
            text = (
                f"expected rope_parameters and rope_theta whose factors of type {kind} are in "
                f"float64's range, got {dict(parameters)} with rope_theta = {base}: {text}"
            )
        raise ValueError(text if text.startswith("config: ") else f"config: {text}") from None


def _read_set(
    config: Any,
    kind: str,
    parameters: Mapping[str, Any],
    base: float,
    pairs: int,
    length: int | None,
) -> dict[str, Any]:
    if kind == "default":
        return {"factors": formulas.linear_factors(pairs, 1.0)}
    if kind == "proportional":
        factor = _number(parameters, "factor")
        factor = 1.0 if factor is None else factor
        return {"factors": formulas.proportional_factors(pairs, _share(config), factor)}
    if kind == "yarn":
        return _read_yarn(config, parameters, base, pairs)
    alpha = read_alpha(config)
    if alpha is not None:
        return {"factors": formulas.ntk_factors(pairs, alpha)}

    factor = _required(parameters, "factor")
    if kind == "linear":
        return {"factors": formulas.linear_factors(pairs, factor)}
    if kind == "dynamic":
        limit = _required_length(config)
        length = limit if length is None else max(length, limit)
        factors = formulas.dynamic_ntk_factors(pairs, factor, limit, length)
        return {"factors": factors, "max_length": length}
    low, high = (_required(parameters, name) for name in ("low_freq_factor", "high_freq_factor"))
    original = original_length(config)
    return {"factors": formulas.llama3_factors(pairs, base, factor, low, high, original)}


def _read_yarn(
    config: Any, parameters: Mapping[str, Any], base: float, pairs: int
) -> dict[str, Any]:
    original, factor = original_length(config), _number(parameters, "factor")
    if factor is None:
        factor = _required_length(config) / original
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"config: expected truncate to be a bool, got {truncate!r}")
    factors = formulas.yarn_factors(
        pairs,
        base,
        factor,
        original,
        _number(parameters, "beta_fast") or 32,
        _number(parameters, "beta_slow") or 1,
        truncate,
    )
    attention_factor = _number(parameters, "attention_factor")
    if attention_factor is None:
        attention_factor = formulas.yarn_attention_factor(
            factor, _number(parameters, "mscale"), _number(parameters, "mscale_all_dim")
        )
    return {"factors": factors, "attention_factor": attention_factor}


def read_longrope_config(config: Any) -> dict[str, Any]:
    """The arguments of `Rope.longrope` for a config of type longrope, but for ``n_hat``.

    The attention factor is, in this order: ``short_mscale`` and ``long_mscale`` (Phi-3.5-MoE),
    ``attention_factor``, the formula with ``factor`` or with ``max_position_embeddings``
    over ``original_max_position_embeddings``, as in transformers.

    Raises:
        ValueError: naming the field that is missing, of another type or of the wrong length.
    """
    parameters = _rope_parameters(config)
    arguments: dict[str, Any] = {"base": read_base(config)}
    rotary_dim = read_rotary_dim(config)
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if factors is None:
            raise ValueError(f"config: expected {name} in rope_parameters, got none")
        if not isinstance(factors, list | tuple) or not all(map(is_number, factors)):
            raise ValueError(f"config: expected a list of numbers in {name}, got {factors!r}")
        if rotary_dim is not None and len(factors) != rotary_dim // 2:
            raise ValueError(
                f"config: expected {rotary_dim // 2} numbers in {name} for {rotary_dim} rotary "
                f"dimensions, got {len(factors)}"
            )
        arguments[name] = factors

    original = original_length(config)
    arguments["original_max_position_embeddings"] = original
    short_mscale, long_mscale = (_number(parameters, f"{x}_mscale") for x in ("short", "long"))
    attention_factor, factor = (_number(parameters, x) for x in ("attention_factor", "factor"))
    if short_mscale is not None and long_mscale is not None:
        arguments["attention_factor"] = (float(short_mscale), float(long_mscale))
    elif attention_factor is not None:
        arguments["attention_factor"] = float(attention_factor)
    elif factor is not None:
        # In transformers nothing is extended by a factor up to 1, whatever it is.
        arguments["max_position_embeddings"] = max(factor, 1) * original
    else:
        arguments["max_position_embeddings"] = _required_length(config)
    return arguments


def extension_ratio(config: Any) -> float | None:
    """``s`` of type longrope, linear or yarn: ``factor``, or the ratio of both lengths, or None."""
    factor = _number(_rope_parameters(config), "factor")
    if factor is None:
        longest = _number(config, "max_position_embeddings")
        factor = None if longest is None else longest / original_length(config)
    return None if factor is None else float(factor)


def _get(config: Any, name: str) -> Any:
    if isinstance(config, str):  # the name of a model
        raise TypeError(f"config: expected a config object or dict, got {config!r}")
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _rope_parameters(config: Any) -> Mapping[str, Any]:
    parameters = _get(config, "rope_scaling") or _get(config, "rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config: expected rope_parameters to be a dict, got {parameters!r}")
    # A kind of layers may have none, and rope_theta beside them was written by transformers 5.0.
    kinds = [str(name) for name, value in parameters.items() if isinstance(value, Mapping)]
    if kinds:
        raise ValueError(
            "config: expected one set of rope_parameters for all layers, got one for each of "
            f"{', '.join(kinds)}"
        )
    return parameters


def _is_old_phi3(config: Any, parameters: Mapping[str, Any]) -> bool:
    """Whether type "yarn" is that of Phi-3's May 2024 release: longrope under another name."""
    model = _get(config, "model_type")
    if model is not None:
        return model in _PHI3
    return all(parameters.get(f"{x}_factor") is not None for x in ("short", "long"))


def _number(config: Any, name: str) -> Any:
    """The number of that name, or None where there is none.

    Raises:
        ValueError: it is no number, or not a finite one.
    """
    value = _get(config, name)
    if value is None:
        return None
    if not is_number(value) or not abs(value) < LARGEST:
        raise ValueError(f"config: expected {name} to be a finite number, got {value!r}")
    return value


def _required(parameters: Mapping[str, Any], name: str) -> Any:
    value = _number(parameters, name)
    if value is None:
        raise ValueError(f"config: expected {name} in rope_parameters, got none")
    return value


def _required_length(config: Any) -> int:
    """``max_position_embeddings``, above 0."""
    value = read_length(config, "max_position_embeddings")
    if value is None:
        raise ValueError("config: expected max_position_embeddings in config, got none")
    return value


def original_length(config: Any) -> int:
    """``original_max_position_embeddings`` as transformers finds it.

    On the top level, where Phi-3's config class has one for files without, else in
    ``rope_parameters``; where there is none the present maximum.
    """
    name = "original_max_position_embeddings"
    length = read_length(config, name)
    if length is None and _get(config, "model_type") in _PHI3:
        return _PHI3_ORIGINAL
    return length or read_length(_rope_parameters(config), name) or _required_length(config)


def read_length(config: Any, name: str) -> int | None:
    """A number of tokens above 0; None where there is none."""
    value = _number(config, name)
    if value is None:
        return None
    if value <= 0 or value != int(value):
        raise ValueError(f"config: expected {name} to be a number of tokens, got {value!r}")
    return int(value)


def read_rotary_dim(config: Any, partial: bool = True) -> int | None:
    """Dimensions of a head that the model rotates; None where the config does not say its heads'.

    partial: whether that may be a part of them.
    """
    head_dim = _whole(config, "head_dim") or _whole(config, "kv_channels")  # JetMoe's name
    if head_dim is None:
        # Latent attention rotates a part of its own, of which files of DeepSeek's say no more.
        rotary_dim = _whole(config, "qk_rope_head_dim")
        if rotary_dim is not None:
            return rotary_dim
        hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
        if hidden is None or heads is None:
            return None
        head_dim = hidden // heads
    rotary_dim = head_dim
    if partial and _shared(config, "partial_rotary_factor") is not None:
        rotary_dim = int(head_dim * _share(config))
    elif partial and _get(config, "model_type") == "minimax_m2":  # others have it and don't read it
        rotary_dim = _whole(config, "rotary_dim") or head_dim
    if rotary_dim > _MOST_DIMENSIONS:
        raise ValueError(
            f"config: expected at most {_MOST_DIMENSIONS} rotary dimensions, got {rotary_dim} "
            "by head_dim, or hidden_size and num_attention_heads"
        )
    return rotary_dim


def _whole(config: Any, name: str) -> int | None:
    value = _number(config, name)
    if value is None:
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config: expected {name} to be a whole number above 0, got {value!r}")
    return value


def _share(config: Any) -> float:
    """``partial_rotary_factor``, from ``rope_parameters`` or the top level; 1 without one."""
    share = _shared(config, "partial_rotary_factor")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"config: expected partial_rotary_factor from 0 to 1, got {share}")
    return 1.0 if share is None else float(share)


def _shared(config: Any, name: str) -> Any:
    """The number of that name in ``rope_parameters``, on the top level, or under another name."""
    found = _number(_rope_parameters(config), name)
    for other in (name, *_OTHER_NAMES[name]):
        if found is None:
            found = _number(config, other)
    return found
