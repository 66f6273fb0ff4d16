"""What of vLLM the plugin relies on beside its public registry of models, in one place.

- ``get_rope`` of the modelling modules makes the rotary module of each layer: while a model of ours
  is built, it makes ours.
- ``InputProcessor.process_inputs`` takes each request where it comes in: there a bad policy is an
  error of the caller, ``VLLMValidationError``.
- ``GPUModelRunner._prepare_inputs`` (the V1 runner, on CPUs too) begins each step: after it the
  rotary module is told the set of each token. Under the V2 runner the model names its
  ``ModelState``, which is told of requests and steps (`state`).
- The scheduler, of which `scheduler` is a subclass.

What is put in place stays there, and changes nothing for other models.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import vllm
from vllm import ModelRegistry

from .policies import Policies
from .settings import FAMILIES, has_scheduler, policies_of

TESTED = "0.32"
FORCE = "LONGROPE_VLLM_FORCE"
_OURS = "longrope_watches"


class Contact(NamedTuple):
    """A function of vLLM, and the parameters of it that we name or hand on by place."""

    module: str
    name: str
    parameters: tuple[str, ...]


_SCHEDULER = "vllm.v1.core.sched.scheduler"
_STATE = "vllm.v1.worker.gpu.model_states.default"
GET_ROPE = tuple(
    Contact(f"vllm.model_executor.models.{module}", "get_rope", ("head_size",))
    for module in dict.fromkeys(rotary for _, rotary in FAMILIES.values())
)
PROCESS_INPUTS = Contact(
    "vllm.v1.engine.input_processor",
    "InputProcessor.process_inputs",
    ("self", "request_id", "prompt", "params", "resumable"),
)
PREPARE_INPUTS = Contact(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._prepare_inputs",
    ("self", "scheduler_output", "num_scheduled_tokens"),
)
BAD_REQUEST = Contact("vllm.exceptions", "VLLMValidationError", ("message", "parameter"))
STATE = (
    Contact(_STATE, "DefaultModelState.add_request", ("self", "req_index", "new_req_data")),
    Contact(_STATE, "DefaultModelState.prepare_inputs", ("self", "input_batch", "req_states")),
)
SCHEDULER = (
    Contact(_SCHEDULER, "Scheduler.schedule", ("self",)),
    Contact(_SCHEDULER, "Scheduler._preempt_request", ("self", "request", "timestamp")),
    Contact(_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", ("self", "request")),
    Contact("vllm.v1.request", "Request.update_block_hashes", ("self",)),
)
CONTACTS = (*GET_ROPE, PROCESS_INPUTS, BAD_REQUEST, PREPARE_INPUTS, *STATE, *SCHEDULER)


def untested() -> str | None:
    """Why this vLLM is refused, or None: no test has run with it and nobody forces it."""
    if f"{vllm.__version__}.".startswith(f"{TESTED}.") or os.environ.get(FORCE) == "1":
        return None
    return (
        f"vLLM {vllm.__version__}: LongRoPE in vLLM was tested with {TESTED}; {FORCE}=1 takes "
        "this one, VLLM_PLUGINS='' starts vLLM without the plugin"
    )


def missing(what: str) -> RuntimeError:
    """The error of a contact that is not there."""
    return RuntimeError(
        f"vLLM {vllm.__version__}: {what}, which LongRoPE in vLLM relies on; it was tested with "
        f"{TESTED}"
    )


def find(contact: Contact) -> Any:
    """The function, or `missing`."""
    try:
        owner: Any = importlib.import_module(contact.module)
    except ImportError as error:
        raise missing(f"there is no {contact.module}") from error
    for part in contact.name.split("."):
        owner = getattr(owner, part, None)
    if owner is None:
        raise missing(f"{contact.module} has no {contact.name}")
    lacking = set(contact.parameters) - set(inspect.signature(owner).parameters)
    if lacking:
        raise missing(f"{contact.name} takes no {', '.join(sorted(lacking))}")
    return owner


def register_models() -> None:
    """Put our classes in place of vLLM's, by name: imported where one is built."""
    for name in FAMILIES:
        ModelRegistry.register_model(name, f"{__package__}.models:{name}")


def _watch(contact: Contact, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper(original, self, ...)`` in place of a method, once."""
    original = find(contact)
    if getattr(original, _OURS, False):
        return

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(watched, _OURS, True)
    owner, _, name = contact.name.partition(".")
    setattr(getattr(importlib.import_module(contact.module), owner), name, watched)


# --------------------------------------------------------------------------------------- requests


def check_requests() -> None:
    """Have each request checked where it comes in."""
    _watch(PROCESS_INPUTS, _process_inputs)


def _process_inputs(
    original: Any, self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    if not hasattr(self, "longrope"):
        self.longrope = policies_of(self.vllm_config)
    if self.longrope is not None:
        try:
            _check_request(self.longrope, self.vllm_config, params, kwargs.get("resumable", False))
        except ValueError as error:
            named = str(error).partition(":")[0]
            raise find(BAD_REQUEST)(str(error), parameter=named) from error  # 400 over HTTP
    return original(self, request_id, prompt, params, *args, **kwargs)


def _check_request(policies: Policies, vllm_config: Any, params: Any, resumable: bool) -> None:
    if resumable:
        raise ValueError("resumable: LongRoPE in vLLM does not serve prompts that go on growing")
    if policies.of(params) == "recompute" and not has_scheduler(vllm_config):
        raise ValueError(
            "longrope_policy: this server was started without the scheduler that 'recompute' "
            "needs; expected 'final' or 'prompt'"
        )


# ------------------------------------------------------------------------------------------ steps


def watch_steps() -> None:
    """Have the V1 runner tell a model of ours, in each step, the set of each token."""
    _watch(PREPARE_INPUTS, _prepare_inputs)


def _prepare_inputs(original: Any, self: Any, scheduler_output: Any, counts: Any) -> Any:
    prepared = original(self, scheduler_output, counts)
    longrope = getattr(self.get_model(), "longrope", None)
    if longrope is not None:
        requests = [self.requests[name] for name in self.input_batch.req_ids]
        sets = [
            longrope.policies.index(
                request.sampling_params,
                prompt=request.num_prompt_tokens,
                known=max(request.num_tokens, request.num_computed_tokens + int(count)),
                limit=self.max_model_len,
            )
            for request, count in zip(requests, counts, strict=True)
        ]
        longrope.rotary.choose(sets, counts)
    return prepared


# ---------------------------------------------------------------------------------------- layers


@contextmanager
def rotary_modules(make: Callable[..., Any]) -> Iterator[None]:
    """While a model is built, ``make(head_size, ...)`` gives its layers their rotary modules."""
    modules = [importlib.import_module(contact.module) for contact in GET_ROPE]
    originals = [find(contact) for contact in GET_ROPE]
    for module in modules:
        module.get_rope = make  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.get_rope = original  # type: ignore[attr-defined]
