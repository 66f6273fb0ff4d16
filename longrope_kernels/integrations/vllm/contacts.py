"""What of vLLM the plugin relies on beside its public registry of models, in one place.

- ``get_rope`` of the modelling modules makes the rotary module of each layer: while a model of ours
  is built, it makes ours.
- ``InputProcessor.process_inputs`` takes each request where it comes in: there a bad policy is an
  error of the caller, ``VLLMValidationError``.
- ``GPUModelRunner._prepare_inputs`` (the V1 runner, on CPUs too) begins each step: after it the
  rotary module is told by which lengths. Under the V2 runner the model names its ``ModelState``,
  which is told of requests and steps (`state`).
- ``get_attn_backend`` of vLLM's attention layer: while a model of ours is built in mode
  "unrotated", it gives ours (`backend`), a subclass of ``AttentionBackend``.
- The scheduler, of which `scheduler` is a subclass.

What is put in place stays there, and changes nothing for other models.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import vllm
from vllm import ModelRegistry

from .policies import KEY, Policies, check_names
from .settings import FAMILIES, FORCE, has_scheduler, policies_of

TESTED = ("0.32", "0.33")
_NAMED = " and ".join(TESTED)
_OURS = "longrope_watches"


class Contact(NamedTuple):
    """A function of vLLM, and the parameters of it that we name or hand on by place."""

    module: str
    name: str
    parameters: tuple[str, ...]


_SCHEDULER = "vllm.v1.core.sched.scheduler"
_BACKEND = "vllm.v1.attention.backend"
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
GET_ATTN_BACKEND = Contact(
    "vllm.model_executor.layers.attention.attention",
    "get_attn_backend",
    ("head_size", "use_mla", "use_per_head_quant_scales"),
)
STEP = Contact("vllm.v1.core.sched.output", "CachedRequestData", ("req_ids", "num_output_tokens"))
BAD_REQUEST = Contact("vllm.exceptions", "VLLMValidationError", ("message", "parameter"))
STATE = (
    Contact(_STATE, "DefaultModelState.add_request", ("self", "req_index", "new_req_data")),
    Contact(_STATE, "DefaultModelState.prepare_attn", ("self", "input_batch", "for_capture")),
)
SCHEDULER = (
    Contact(_SCHEDULER, "Scheduler.schedule", ("self",)),
    Contact(_SCHEDULER, "Scheduler._preempt_request", ("self", "request", "timestamp")),
    Contact(_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", ("self", "request")),
    Contact(_SCHEDULER, "Scheduler.get_num_unfinished_requests", ("self",)),
    Contact("vllm.v1.request", "Request.update_block_hashes", ("self",)),
)
ATTENTION = (
    GET_ATTN_BACKEND,
    Contact(_BACKEND, "AttentionImpl.forward", ("layer", "query", "attn_metadata", "output")),
    Contact(_BACKEND, "AttentionMetadataBuilder.build", ("self", "common_attn_metadata")),
    Contact(
        _BACKEND,
        "CommonAttentionMetadata",
        ("query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "block_table_tensor"),
    ),
)
CONTACTS = (
    *GET_ROPE,
    PROCESS_INPUTS,
    BAD_REQUEST,
    PREPARE_INPUTS,
    STEP,
    *STATE,
    *SCHEDULER,
    *ATTENTION,
)


def untested() -> str | None:
    """Why this vLLM is refused, or None: no test has run with it and nobody forces it."""
    minor = ".".join(vllm.__version__.split(".")[:2])
    if minor in TESTED or os.environ.get(FORCE) == "1":
        return None
    return (
        f"vLLM {vllm.__version__}: LongRoPE in vLLM was tested with {_NAMED}; {FORCE}=1 takes "
        "this one, VLLM_PLUGINS='' starts vLLM without the plugin"
    )


def missing(what: str) -> RuntimeError:
    """The error of a contact that is not there."""
    return RuntimeError(
        f"vLLM {vllm.__version__}: {what}, which LongRoPE in vLLM relies on; it was tested with "
        f"{_NAMED}"
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


def check_registered(name: str) -> None:
    """That vLLM builds our class under this name of `settings.FAMILIES`, in this process.

    Raises:
        RuntimeError: not so; nothing would turn requests by their sets.
    """
    found = getattr(ModelRegistry.models.get(name), "module_name", None)
    if found != f"{__package__}.models":
        plugins = os.environ.get("VLLM_PLUGINS")
        raise RuntimeError(
            f"scheduler_cls: LongRopeScheduler needs the models of its plugin, got {name} of "
            f"{found}; expected 'longrope' among VLLM_PLUGINS, or none set, got {plugins!r}"
        )


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
    check_names("extra_args", getattr(params, "extra_args", None) or (), (KEY,))
    if policies.of(params) == "recompute" and not has_scheduler(vllm_config):
        raise ValueError(
            "longrope_policy: this server was started without the scheduler that 'recompute' "
            f"needs; expected {policies.without_scheduler}"
        )


# ------------------------------------------------------------------------------------------ steps


def watch_steps() -> None:
    """Have the V1 runner tell a model of ours, in each step, by which lengths to choose sets."""
    _watch(PREPARE_INPUTS, _prepare_inputs)


def _prepare_inputs(original: Any, self: Any, scheduler_output: Any, counts: Any) -> Any:
    prepared = original(self, scheduler_output, counts)
    longrope = getattr(self.get_model(), "longrope", None)
    if longrope is not None:
        # Of a request that is prefilled again a stage of a pipeline may lack the latest tokens.
        old = scheduler_output.scheduled_cached_reqs
        made = dict(zip(old.req_ids, old.num_output_tokens, strict=True))
        lengths = []
        for name, count in zip(self.input_batch.req_ids, counts, strict=True):
            request = self.requests[name]
            prompt = request.num_prompt_tokens
            lengths.append(
                longrope.policies.lengths(
                    request.sampling_params,
                    prompt=prompt,
                    begun=max(request.num_tokens, prompt + made.get(name, 0)),
                    end=request.num_computed_tokens + int(count),
                    limit=self.max_model_len,
                )
            )
        longrope.rotary.choose(lengths, counts)
    return prepared


# ---------------------------------------------------------------------------------------- layers


@contextmanager
def _exchanged(contacts: Iterable[Contact], function: Callable[..., Any]) -> Iterator[None]:
    """A function in place of those of modules, inside."""
    modules = [importlib.import_module(contact.module) for contact in contacts]
    originals = [find(contact) for contact in contacts]
    for module, contact in zip(modules, contacts, strict=True):
        setattr(module, contact.name, function)
    try:
        yield
    finally:
        for module, contact, original in zip(modules, contacts, originals, strict=True):
            setattr(module, contact.name, original)


def rotary_modules(make: Callable[..., Any]) -> AbstractContextManager[None]:
    """While a model is built, ``make(head_size, ...)`` gives its layers their rotary modules."""
    return _exchanged(GET_ROPE, make)


def attention_backend(backend: type) -> AbstractContextManager[None]:
    """While a model is built, its layers take this attention backend."""

    def chosen(*_: Any, **wants: Any) -> type:
        for name, value in wants.items():
            if value is True and name != "has_sliding_window":
                raise ValueError(
                    f"{name}: expected False, got True; LongRoPE in vLLM does not serve it in mode "
                    "'unrotated'"
                )
        return backend

    return _exchanged((GET_ATTN_BACKEND,), chosen)
