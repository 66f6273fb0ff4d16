"""Each contact of the plugin with vLLM, by its name: it is there, or one error says which."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from engines import MODES
from torch import nn
from vllm import ModelRegistry
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from longrope_kernels.integrations.vllm import contacts, models, register, scheduler
from longrope_kernels.integrations.vllm.backend import LongRopeBackend
from longrope_kernels.integrations.vllm.policies import Policies
from longrope_kernels.integrations.vllm.rotary import TokenRotary
from longrope_kernels.integrations.vllm.settings import FAMILIES, SCHEDULER
from longrope_kernels.integrations.vllm.unrotated import Unrotated
from longrope_kernels.rope.value import Rope

VERSION = (
    rf"^vLLM {re.escape(vllm.__version__)}: .*, which LongRoPE in vLLM relies on; it was tested "
    r"with 0\.32 and 0\.33$"
)
every_contact = pytest.mark.parametrize(
    "contact", contacts.CONTACTS, ids=lambda contact: f"{contact.module}:{contact.name}"
)


@every_contact
def test_is_there(contact: contacts.Contact) -> None:
    assert callable(contacts.find(contact))


@every_contact
def test_is_missed(contact: contacts.Contact, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = importlib.import_module(contact.module)
    *path, name = contact.name.split(".")
    for part in path:
        owner = getattr(owner, part)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, None)
        with pytest.raises(RuntimeError, match=VERSION) as caught:
            contacts.find(contact)
        assert f"{contact.module} has no {contact.name}" in str(caught.value)
    monkeypatch.setattr(owner, name, lambda: None)
    with pytest.raises(RuntimeError, match=VERSION) as caught:
        contacts.find(contact)
    assert f"{contact.name} takes no " in str(caught.value)


def test_the_entry_point() -> None:
    (found,) = (
        one for one in metadata.entry_points(group="vllm.general_plugins") if one.name == "longrope"
    )
    assert found.load() is register


def test_register_model() -> None:
    register()
    register()  # vLLM may do it more than once in a process
    for name in FAMILIES:
        found = ModelRegistry.models[name]
        assert (found.module_name, found.class_name) == (models.__name__, name)


def test_get_rope() -> None:
    """Ours only while a model of ours is built."""
    modules = [importlib.import_module(contact.module) for contact in contacts.GET_ROPE]
    before = [module.get_rope for module in modules]
    with contacts.rotary_modules(abs):
        assert all(module.get_rope is abs for module in modules)
    assert [module.get_rope for module in modules] == before


def test_get_attn_backend() -> None:
    """Ours only while a model of ours is built, for what it serves."""
    module = importlib.import_module(contacts.GET_ATTN_BACKEND.module)
    before = module.get_attn_backend
    with contacts.attention_backend(LongRopeBackend):
        given = (96, torch.float32, "auto")
        assert module.get_attn_backend(*given, has_sliding_window=True) is LongRopeBackend
        for name in ("use_mla", "has_sink", "use_mm_prefix", "use_per_head_quant_scales"):
            with pytest.raises(ValueError, match=f"^{name}: expected False, got True; .*unrotated"):
                module.get_attn_backend(*given, **{name: True})
    assert module.get_attn_backend is before


def test_the_scheduler_is_the_kind_that_the_config_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls = resolve_obj_by_qualname(SCHEDULER)
    monkeypatch.setattr(Scheduler, "__init__", lambda self, **_: None)
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda self, **_: None)

    class Config:
        def __init__(self, asynchronous: bool) -> None:
            self.scheduler_config = self
            self.async_scheduling = asynchronous
            self.model_config = SimpleNamespace(architecture="LlamaForCausalLM")

    register()
    kinds = {}
    for rope in (None, object()):
        monkeypatch.setattr(scheduler, "policies_of", lambda _, rope=rope: rope)
        for asynchronous in (False, True):
            made = cls(vllm_config=Config(asynchronous))
            kinds[rope is not None, asynchronous] = type(made)
    assert kinds[False, False] is Scheduler
    assert kinds[False, True] is AsyncScheduler
    assert issubclass(kinds[True, False], Scheduler)
    assert not issubclass(kinds[True, False], AsyncScheduler)
    assert issubclass(kinds[True, True], AsyncScheduler)


def test_the_scheduler_of_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plugin's class of the name, or vLLM's own."""
    register()
    contacts.check_registered("Phi3ForCausalLM")
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    for other, shown in ((SimpleNamespace(module_name="theirs"), "theirs"), (object(), "None")):
        monkeypatch.setitem(ModelRegistry.models, "Phi3ForCausalLM", other)
        with pytest.raises(RuntimeError, match=rf"^scheduler_cls: .* {shown}; .*got 'another'$"):
            contacts.check_registered("Phi3ForCausalLM")


@pytest.fixture(params=MODES)
def state(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the V2 runner, for a model of ours that has nothing else."""
    rope = Rope.longrope([1.0] * 4, [2.0] * 4, 32, attention_factor=1.0)
    model = nn.Module()
    rotary = {"rotated": TokenRotary, "unrotated": Unrotated}[request.param](rope, 8, 64)
    model.longrope = models.LongRope(rotary, Policies(rope, "recompute", request.param))
    model.get_model_state_cls = models._model_state
    made = object.__new__(resolve_model_state_cls(None, model))
    made.model, made.requests, made.rope_state = model, {}, None
    made.prompt_embeds_state, made.model_config = None, SimpleNamespace(max_model_len=128)
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda *_, **__: {"of": "vllm"})
    return made


def test_model_state(state: Any) -> None:
    """Requests in slots, steps of some of them: what chooses the sets of each."""
    for slot, prompt, policy, new in ((3, 30, None, 9), (1, 30, "final", 9), (0, 40, None, 9)):
        params = SimpleNamespace(max_tokens=new, extra_args={"longrope_policy": policy})
        data = SimpleNamespace(prompt_token_ids=[1] * prompt, sampling_params=params)
        state.add_request(slot, data)
    batch = SimpleNamespace(
        num_reqs=3,
        idx_mapping_np=np.array([1, 0, 3]),
        query_start_loc_np=np.array([0, 1, 5, 6]),
        prefill_len_np=np.array([30, 40, 30]),
        num_computed_tokens_np=np.array([30, 8, 31]),
    )
    rotary = state.model.longrope.rotary
    assert state.prepare_attn(batch, "a mode") == {"of": "vllm"}
    before = told(rotary)
    batch.num_computed_tokens_np[2] = 32  # the 33rd token
    state.prepare_attn(batch, "a mode")
    if isinstance(rotary, Unrotated):
        assert (before, told(rotary)) == ([39, 40, 32], [39, 40, 33])
        assert torch.equal(rotary.least, rotary.most)
    else:
        assert (before, told(rotary)) == ([1, 1, 1, 1, 1, 0], [1] * 6)


def told(rotary: Any) -> list[int]:
    """Of the three requests, or of their six tokens."""
    found = rotary.most[:3] if isinstance(rotary, Unrotated) else rotary.token_sets[:6]
    return found.tolist()  # type: ignore[no-any-return]


def test_model_state_of_a_dummy(state: Any) -> None:
    """vLLM warms up with requests that were never added."""
    batch = SimpleNamespace(num_reqs=2, idx_mapping_np=np.arange(2))
    assert state.prepare_attn(batch, "a mode", for_capture=True) == {"of": "vllm"}
    assert not any(buffer.any() for buffer in state.model.longrope.rotary.buffers())
