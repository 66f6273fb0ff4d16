"""What of transformers `enable` relies on, put in place where an enabled model is made or loaded.

- ``AttentionInterface`` and ``AttentionMaskInterface``, which are public, take our two functions.
- ``apply_rotary_pos_emb`` of the modelling module, which layers call with what the rotary module
  returned: a dispatcher knows our markers, and calls the original on anything else.
- ``prepare_inputs_for_generation`` of Phi-3's models, which drops the cache where a sequence
  outgrows its original length: an enabled model is shown to it as one that never does.

They stay once they are there, and change nothing for models that are not enabled, so that enabled
ones may be copied, pickled and unpickled without anybody counting them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from types import FunctionType
from typing import Any

import transformers
from torch import nn

from .architectures import Architecture
from .attention import NAME, Enabled, longrope_attention
from .markers import Rotated, Unrotated
from .masks import slots_of_mask

TESTED = "5.6 to 5.24"
_OURS = "longrope_dispatches"


class MissingError(RuntimeError):
    """A contact is not there, or not what it was: ``what``."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"transformers {transformers.__version__}: {what}, which longrope_kernels' enable "
            f"relies on; it was tested with transformers {TESTED}"
        )


def contact(owner: Any, name: str) -> Any:
    """An attribute of transformers, or `MissingError`."""
    found = getattr(owner, name, None)
    if found is None:
        of = getattr(owner, "__name__", type(owner).__name__)
        raise MissingError(f"{of} has no {name}")
    return found


def install(architecture: Architecture) -> None:
    """Put all contacts of an architecture in place."""
    contact(transformers, "AttentionInterface").register(NAME, longrope_attention)
    contact(transformers, "AttentionMaskInterface").register(NAME, slots_of_mask)
    _dispatch_rotation(architecture.module, architecture.function)
    for found in list(vars(architecture.module).values()):
        if isinstance(found, type) and found.__module__ == architecture.module.__name__:
            _keep_cache(found)


def _dispatch_rotation(module: Any, name: str) -> None:
    """Give the function another body and keep the object: models hold it, pickled by its name.

    Its arguments stay as they are, since dynamo keeps those of each object it has traced.
    """
    function = contact(module, name)
    if getattr(function, _OURS, False):
        return
    original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    parameters = list(inspect.signature(original).parameters)
    axis_at = parameters.index("unsqueeze_dim") if "unsqueeze_dim" in parameters else None

    def longrope_rotation(*given: Any) -> Any:
        q, k, cos, sin = given[:4]
        if isinstance(sin, Unrotated):
            sin.note(sin.positions, sin.keywords)
            return q, k
        if isinstance(sin, Rotated):
            heads_axis = 1 if axis_at is None else given[axis_at]
            return sin.rotate(q, k, cos, sin.length, heads_axis)
        return original(*given)

    ours = f"longrope_{name}"
    function.__globals__[ours] = longrope_rotation
    listed = ", ".join(parameters)
    function.__code__ = eval(f"lambda {listed}: {ours}({listed})").__code__
    setattr(function, _OURS, True)


def check_own(architecture: Architecture) -> None:
    """Refuse layers that do not rotate by what is in their file any more, naming what they met.

    Raises:
        ValueError: another package has put its own rotation, or its own layers, in the place.
    """
    module, name = architecture.module, architecture.function
    met = [(f"{module.__name__}.{name}", contact(module, name))]
    met += [
        (f"{cls.__module__}.{cls.__name__}.forward", contact(cls, "forward"))
        for cls in (architecture.rotary, *architecture.attention)
    ]
    for place, function in met:
        function = inspect.unwrap(function)
        at = getattr(function, "__module__", None) or type(function).__module__
        if at.partition(".")[0] not in {"transformers", module.__name__.partition(".")[0]}:
            package = at.partition(".")[0]
            found = getattr(function, "__qualname__", type(function).__name__)
            raise ValueError(
                f"model: expected {place} of transformers, got {at}.{found}, which {package} has "
                f"put there; load the model without {package}, or switch its rotation off "
                "(Liger: apply_liger_kernel_to_...(rope=False))"
            )


def check_dispatch(architecture: Architecture) -> None:
    """Refuse, as `check_own`, a rotation that another package has put there since `enable`."""
    if not getattr(contact(architecture.module, architecture.function), _OURS, False):
        check_own(architecture)
        install(architecture)


def _keep_cache(model: Any) -> None:
    original = vars(model).get("prepare_inputs_for_generation")
    if original is None or getattr(original, _OURS, False):
        return
    if "original_max_position_embeddings" not in inspect.unwrap(original).__code__.co_names:
        return

    @functools.wraps(original)
    def prepare_inputs_for_generation(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        base = getattr(self, "base_model", self)
        enabled: Enabled | None = getattr(base, "longrope", None)
        if enabled is not None and enabled.settings.cache == "unrotated":
            self = _without_end(self)
        return original(self, *args, **kwargs)

    setattr(prepare_inputs_for_generation, _OURS, True)
    model.prepare_inputs_for_generation = prepare_inputs_for_generation


def _without_end(model: Any) -> Any:
    """A view of a model, all of it shared but a config whose original length nothing outgrows."""
    view = object.__new__(type(model))
    config = copy.copy(model.config)
    config.original_max_position_embeddings = sys.maxsize
    vars(view).update(vars(model), config=config)
    return view
