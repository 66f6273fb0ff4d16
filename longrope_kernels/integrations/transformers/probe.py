"""What a decoder of transformers does with its rotation, found out by running a tiny one.

Nothing is taken from names: the rotary module is the one that the layers' rotation gets its cosines
from, which dimensions make a pair is what that rotation does to unit vectors, and the attention
modules are those that call transformers' attention interface.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers.masking_utils import sdpa_mask

from .architectures import Architecture
from .shrunk import VOCABULARY, WINDOW, shrunk

_NAME = "longrope_probe"  # among transformers' attention implementations
_ARGUMENTS = ["q", "k", "cos", "sin"]
TOKENS = 12  # of a row that is tried


class UnfitError(ValueError):
    """Why a decoder can't be enabled."""


class UnmadeError(ValueError):
    """Where no tiny model can be made of any config."""

    def __init__(self) -> None:
        super().__init__(
            "model: expected weights that can be made, got meta ones alone, as within accelerate's "
            "init_empty_weights; call enable outside of it"
        )


@dataclass
class Seen:
    """What a forward called, in order."""

    rotary: list[tuple[nn.Module, Any, dict[str, Any], tuple[Any, ...]]] = field(
        default_factory=list
    )
    rotations: list[tuple[str, nn.Module | None, int]] = field(default_factory=list)
    attention: list[tuple[nn.Module, dict[str, Any], int | None]] = field(default_factory=list)


def tiny(base: type, config: Any) -> Any:
    """A decoder of that class and config at tiny sizes, all its weights random, on the CPU."""
    with on_the_cpu():
        torch.manual_seed(0)
        small = shrunk(config)
        small._attn_implementation = "sdpa"
        try:
            model = base(small)
        except ValueError:  # one that has no other
            small._attn_implementation = "eager"
            model = base(small)
        if any(weight.is_meta for weight in model.parameters()):
            raise UnmadeError
        model = model.float().eval()
        for weight in model.parameters():
            # Norms with a weight of 1 each would not show what they do to a rotated key.
            scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
            weight.add_(torch.randn_like(weight), alpha=scale)
    return model


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Nothing of the caller's is changed or has a say: random numbers, devices, modes."""
    with (
        torch.random.fork_rng(devices=()),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        _default_dtype(),
    ):
        yield


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rotations(module: Any) -> dict[str, Callable[..., Any]]:
    """The functions of a modelling file that take q, k, cosines and sines."""
    return {
        name: found
        for name, found in vars(module).items()
        if inspect.isfunction(found)
        and "rotary" in name
        and list(inspect.signature(found).parameters)[:4] == _ARGUMENTS
    }


def probe(base: type, config: Any) -> Architecture:
    """The `Architecture` of a decoder.

    Args:
        base: its class, a ``PreTrainedModel`` without a head.
        config: its config, of which a tiny one is made.

    Raises:
        UnfitError: it can't be enabled, and why.
    """
    module = sys.modules[base.__module__]
    if not rotations(module):
        raise UnfitError(
            f"{module.__name__} has no function that rotates by (q, k, cos, sin, ...), as "
            "apply_rotary_pos_emb of most models"
        )
    try:
        model = tiny(base, config)
    except UnmadeError:
        raise
    except Exception as error:
        raise UnfitError(f"a tiny {base.__name__} can't be made: {on_one_line(error)}") from error
    with on_the_cpu():
        seen, lacks = _watch(model)
        found = _judge(module, seen, lacks)
        return _with_window(found, base, config, seen)


def _with_window(found: Architecture, base: type, config: Any, seen: Seen) -> Architecture:
    """Where this config has no sliding window but might: what layers do with one."""
    has_none = getattr(config, "sliding_window", 0) is None and not any(
        window for *_, window in seen.attention
    )
    if found.unrotated or not has_none:
        return found
    other = copy.deepcopy(config)
    other.sliding_window = WINDOW
    try:
        seen, lacks = _watch(tiny(base, other))
    except Exception:
        return found  # nobody can have a model with one
    windowed = _judge(sys.modules[base.__module__], seen, lacks)
    return dataclasses.replace(found, hands_on_window=windowed.hands_on_window)


def has_frequencies(module: nn.Module) -> bool:
    """Whether a module looks like a rotary one of a decoder, to be probed."""
    return bool(_frequencies(module)) and hasattr(module, "config")


_probed: dict[tuple[type, str], Architecture | UnfitError] = {}


def probed(base: type, rotary: type, config: Any) -> Architecture:
    """`probe`, once for each class and config in a process.

    Raises:
        UnfitError: also where the model's rotary module is not what its class makes.
    """
    key = base, repr(config)
    if key not in _probed:
        try:
            _probed[key] = probe(base, config)
        except UnfitError as unfit:
            _probed[key] = unfit
    found = _probed[key]
    if isinstance(found, UnfitError):
        raise found
    if found.rotary is not rotary:
        raise UnfitError(
            f"its rotary module is a {rotary.__name__}, where {base.__name__} makes a "
            f"{found.rotary.__name__}"
        )
    return found


def _watch(model: Any) -> tuple[Seen, str]:
    """One forward, with transformers' attention interface where it may be watched."""
    try:
        transformers.AttentionInterface.register(_NAME, _attention)
        transformers.AttentionMaskInterface.register(_NAME, _mask)
        model.set_attn_implementation(_NAME)
        return _seen(model), ""
    except Exception as error:
        lacks = f"its attention can't be watched: {on_one_line(error)}"
    model.set_attn_implementation("eager")
    try:
        return _seen(model), lacks
    except Exception as error:
        raise UnfitError(
            f"a tiny {type(model).__name__} can't run: {on_one_line(error)}"
        ) from error


_now: list[Seen] = []  # the forward that is watched
_windows: dict[int, tuple[Any, int | None]] = {}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends somehow; what it is called with is what matters."""
    window = _windows[id(attention_mask)][1] if id(attention_mask) in _windows else None
    _now[-1].attention.append((module, kwargs, window))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    causal = attention_mask is None
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
    kwargs["allow_is_causal_skip"] = False  # so that each layer's mask says what made it
    mask = sdpa_mask(*args, local_size=local_size, **kwargs)
    _windows[id(mask)] = mask, local_size
    return mask


def _seen(model: Any) -> Seen:
    """Run a tiny decoder, and note what it calls."""
    seen, inside = Seen(), []
    module = sys.modules[type(model).__module__]

    def enter(one: nn.Module, *_: Any) -> None:
        inside.append(one)

    def leave(one: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inside.pop()
        if isinstance(output, tuple) and len(output) == 2 and has_frequencies(one):
            seen.rotary.append((one, args, kwargs, output))

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            seen.rotations.append((name, inside[-1] if inside else None, q.shape[-1]))
            return function(q, k, cos, sin, *args, **kwargs)

        return noted

    ids = torch.arange(3, 3 + TOKENS)[None] % VOCABULARY
    with ExitStack() as stack:
        for name, function in rotations(module).items():
            stack.enter_context(mock.patch.object(module, name, noting(name, function)))
        for one in model.modules():
            hook = one.register_forward_pre_hook(enter)
            stack.callback(hook.remove)
            hook = one.register_forward_hook(leave, with_kwargs=True)
            stack.callback(hook.remove)
        _now.append(seen)
        stack.callback(_now.pop)
        stack.callback(_windows.clear)
        model(input_ids=ids, use_cache=True)
    return seen


def _frequencies(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]


def _judge(module: Any, seen: Seen, lacks: str) -> Architecture:
    if not seen.rotary:
        raise UnfitError("no module of it turns positions into cosines and sines by frequencies")
    if not seen.rotations:
        raise UnfitError(f"its layers call none of {', '.join(rotations(module))}")
    rotary = {type(one) for one, *_ in seen.rotary}
    functions = {name for name, *_ in seen.rotations}
    if len(rotary) > 1 or len(functions) > 1:
        raise UnfitError("its layers rotate in several ways")
    (function,) = functions
    for one, args, kwargs, _ in seen.rotary:
        positions = _positions(args, kwargs)
        if positions.dim() != 2:
            raise UnfitError(
                f"its positions have {positions.dim()} axes (of images and video), expected "
                "(batch, tokens)"
            )
        if getattr(one, "mrope_section", None) is not None:
            raise UnfitError("its positions have several axes (mrope_section), expected one")
    calls = {type(one): None for one, *_ in seen.attention if _is_of(one, module)}
    rotating = {type(one): None for _, one, _ in seen.rotations if one is not None}
    attention = tuple(calls) or tuple(rotating)
    if not attention:
        raise UnfitError("its rotation is not called inside of an attention module")
    if not lacks and not set(rotating) <= set(calls):
        names = ", ".join(cls.__name__ for cls in rotating if cls not in calls)
        lacks = f"{names} does not call transformers' attention interface"
    attends = Counter(id(one) for one, *_ in seen.attention)
    turns = Counter(id(one) for _, one, _ in seen.rotations)
    for one, *_ in seen.attention:
        if attends[id(one)] > turns[id(one)] > 0:
            lacks = lacks or f"{type(one).__name__} attends more than once by one rotation"
    given = [kwargs.get("sliding_window") for _, kwargs, _ in seen.attention]
    masked = [window for _, _, window in seen.attention]
    hands_on = all(w is None or g is not None for g, w in zip(given, masked, strict=True))
    if not hands_on and (any(given) or None in masked):
        lacks = lacks or "some layers keep their sliding window to themselves"
    interleaved = _pairing(module, function, seen)
    (cls,) = rotary
    return Architecture(cls, attention, function, interleaved, hands_on, lacks)


def _is_of(one: nn.Module, module: Any) -> bool:
    return bool(type(one).__module__ == module.__name__)


def _positions(args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    found = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(found)


def _pairing(module: Any, function: str, seen: Seen) -> bool:
    """Whether pairs are (2i, 2i + 1) rather than (i, i + P), seen on unit vectors."""
    one, args, kwargs, _ = seen.rotary[0]
    width = next(width for name, _, width in seen.rotations)
    if "position_ids" in kwargs:
        kwargs = kwargs | {"position_ids": torch.ones(1, 1, dtype=torch.int64)}
    else:
        args = (args[0], torch.ones(1, 1, dtype=torch.int64), *args[2:])
    cos, sin = one(*args, **kwargs)
    layer_type = next((x for x in (*args, *kwargs.values()) if isinstance(x, str)), None)
    angles = frequencies(one, layer_type).double()
    pairs = angles.numel()
    if 2 * pairs > width:
        raise UnfitError(f"{2 * pairs} dimensions of frequencies for heads of {width}")
    unit = torch.eye(width)[None, :, None]
    turned = getattr(module, function)(unit, unit, cos, sin)[0][0, :, 0].double()
    scale = float(turned[0].norm())  # the attention factor, of whatever name
    first = torch.arange(pairs)
    for interleaved in (False, True):
        i, j = (2 * first, 2 * first + 1) if interleaved else (first, first + pairs)
        expected = torch.eye(width, dtype=torch.float64)
        expected[i, i] = expected[j, j] = angles.cos() * scale
        expected[i, j], expected[j, i] = angles.sin() * scale, -angles.sin() * scale
        # The order of the result may be another (halves of what came interleaved): q and k share it
        split = torch.cat((first * 2, first * 2 + 1, torch.arange(2 * pairs, width)))
        for order in (slice(None), split):
            if torch.allclose(turned, expected[:, order], atol=1e-5):
                return interleaved
    raise UnfitError(
        f"{function} of {module.__name__} turns unit vectors neither in pairs (i, i + P) nor in "
        "pairs (2i, 2i + 1)"
    )


def frequencies(rotary: nn.Module, layer_type: str | None) -> torch.Tensor:
    """(P,) in radians a token, of one kind of layers."""
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    found = getattr(rotary, name, None)
    if not isinstance(found, torch.Tensor):
        raise UnfitError(f"{type(rotary).__name__} has no {name}")
    return found


def on_one_line(error: Exception) -> str:
    """An error, for a reason that others read."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
