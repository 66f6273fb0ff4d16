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


def missing(what: str) -> RuntimeError:
    """The error of a contact that is not there."""
    return RuntimeError(
        f"transformers {transformers.__version__}: {what}, which longrope_kernels' enable relies "
        f"on; it was tested with transformers {TESTED}"
    )


def contact(owner: Any, name: str) -> Any:
    """An attribute of transformers, or `missing`."""
    found = getattr(owner, name, None)
    if found is None:
        of = getattr(owner, "__name__", type(owner).__name__)
        raise missing(f"{of} has no {name}")
    return found


def install(architecture: Architecture) -> None:
    """Put all contacts of an architecture in place."""
    contact(transformers, "AttentionInterface").register(NAME, longrope_attention)
    contact(transformers, "AttentionMaskInterface").register(NAME, slots_of_mask)
    _dispatch_rotation(architecture.module)
    for found in list(vars(architecture.module).values()):
        if isinstance(found, type) and found.__module__ == architecture.module.__name__:
            _keep_cache(found)


def _dispatch_rotation(module: Any) -> None:
    """Give the function another body and keep the object: models hold it, pickled by its name.

    Its arguments stay as they are, since dynamo keeps those of each object it has traced.
    """
    function = contact(module, "apply_rotary_pos_emb")
    if getattr(function, _OURS, False):
        return
    original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )

    def longrope_rotation(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sin, Unrotated):
            return q, k
        if isinstance(sin, Rotated):
            return sin.rotate(q, k, cos, sin.length)
        return original(q, k, cos, sin, *args, **kwargs)

    module.longrope_rotation = longrope_rotation
    given = ", ".join(inspect.signature(original).parameters)
    function.__code__ = eval(f"lambda {given}: longrope_rotation({given})").__code__
    setattr(function, _OURS, True)


def _keep_cache(model: Any) -> None:
    original = vars(model).get("prepare_inputs_for_generation")
    if original is None or getattr(original, _OURS, False):
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
