"""vLLM's models, with our rotation where the rope is one that we serve, else as they are."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any, NamedTuple

import vllm.model_executor.models.llama as llama
import vllm.model_executor.models.mistral as mistral
import vllm.model_executor.models.phi3 as phi3
import vllm.model_executor.models.phimoe as phimoe
import vllm.model_executor.models.qwen2 as qwen2
import vllm.model_executor.models.qwen3 as qwen3

from ..._version import __version__
from . import contacts
from .backend import LongRopeBackend, LongRopeImpl
from .policies import Policies
from .rotary import TokenRotary
from .settings import policies_of, refuse
from .unrotated import Unrotated

_logger = logging.getLogger("vllm.longrope")  # where vLLM's own lines go


class LongRope(NamedTuple):
    """What a served model holds, for the runner to find."""

    rotary: TokenRotary | Unrotated
    policies: Policies


class _Served:
    """What is the same in all families."""

    longrope: LongRope | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        kwargs = {"vllm_config": vllm_config, "prefix": prefix, **kwargs}
        policies = policies_of(vllm_config)
        if policies is None:
            super().__init__(**kwargs)
            return
        untested = contacts.untested()
        if untested is not None:
            raise RuntimeError(untested)
        refuse(vllm_config, policies)
        for contact in contacts.CONTACTS:
            contacts.find(contact)
        contacts.watch_steps()
        # vLLM finds compiled graphs by a hash of its config: theirs and ours must differ.
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            "longrope_kernels": f"{__version__} {policies.mode}",
        }
        made: list[TokenRotary | Unrotated] = []

        def rotary(head_size: int, *_: Any, **__: Any) -> TokenRotary | Unrotated:
            made.append(made[0] if made else _rotary(policies, head_size, vllm_config))
            return made[0]

        with ExitStack() as while_built:
            while_built.enter_context(contacts.rotary_modules(rotary))
            if policies.mode == "unrotated":
                while_built.enter_context(contacts.attention_backend(LongRopeBackend))
            super().__init__(**kwargs)
        if not made:
            raise contacts.missing("its layers did not call get_rope")
        self.longrope = LongRope(made[0], policies)
        if isinstance(made[0], Unrotated):
            _attend(self, made[0], len(made))
        self.get_model_state_cls = _model_state  # of the V2 runner; absent in all other models
        _logger.info(
            "LongRoPE, mode %r, policy %r: factor sets for up to %s tokens",
            policies.mode,
            policies.default,
            [s.max_length or "more" for s in policies.rope.sets],
        )


def _attend(model: Any, unrotated: Unrotated, asked: int) -> None:
    """Have each attention rotate: there is one for each rotary module that a layer asked for.

    Raises:
        RuntimeError: not so, and a layer would rotate what vLLM's own would not.
    """
    layers = [x.impl for x in model.modules() if isinstance(getattr(x, "impl", None), LongRopeImpl)]
    if len(layers) != asked:
        raise contacts.missing(f"{len(layers)} attentions ask for {asked} rotary modules")
    for each in layers:
        each.unrotated = unrotated


def _rotary(policies: Policies, head_size: int, vllm_config: Any) -> TokenRotary | Unrotated:
    scheduler = vllm_config.scheduler_config
    if policies.mode == "unrotated":
        return Unrotated(policies.rope, head_size, scheduler.max_num_seqs)
    return TokenRotary(policies.rope, head_size, scheduler.max_num_batched_tokens)


def _model_state() -> type:
    from .state import LongRopeState

    return LongRopeState


class Phi3ForCausalLM(_Served, phi3.Phi3ForCausalLM):
    """Phi-3, Phi-3.5-mini, Phi-4-mini."""


class PhiMoEForCausalLM(_Served, phimoe.PhiMoEForCausalLM):
    """Phi-3.5-MoE."""


class LlamaForCausalLM(_Served, llama.LlamaForCausalLM):
    """Llama, with a longrope config or a ``longrope.json`` beside it; as are those below."""


class MistralForCausalLM(_Served, mistral.MistralForCausalLM):
    """Mistral."""


class Qwen2ForCausalLM(_Served, qwen2.Qwen2ForCausalLM):
    """Qwen2."""


class Qwen3ForCausalLM(_Served, qwen3.Qwen3ForCausalLM):
    """Qwen3."""
