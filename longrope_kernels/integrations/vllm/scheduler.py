"""The scheduler of an engine whose requests have factor sets of their own.

Blocks of the prefix cache hold keys of one set, so they serve requests of that set alone: the set
goes into the salt of a request's block hashes. A request under "recompute" that grows into the next
set is preempted, so that vLLM prefills it again under the new one.

``--scheduler-cls longrope_kernels.integrations.vllm.scheduler.LongRopeScheduler``
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from . import contacts
from .settings import policies_of


class LongRopeScheduler:
    """What an engine is given: makes the one below that its config asks for.

    On a model whose rope is none of ours, vLLM's own.
    """

    def __new__(cls, *args: Any, vllm_config: Any, **kwargs: Any) -> Any:
        """As vLLM calls its scheduler class.

        Raises:
            RuntimeError: the model is none that the plugin built: vLLM was told to leave it out.
        """
        asynchronous = vllm_config.scheduler_config.async_scheduling
        if policies_of(vllm_config) is None:
            kind = AsyncScheduler if asynchronous else Scheduler
        else:
            contacts.check_registered(vllm_config.model_config.architecture)
            kind = _AsyncBySet if asynchronous else _BySet
        return kind(*args, vllm_config=vllm_config, **kwargs)


class _BySet(Scheduler):
    """Salts each request with its set, and preempts what grows into another."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        policies = policies_of(vllm_config)
        assert policies is not None
        self.policies = policies

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Preempt first what would grow into another set in this step; cut drafts that would."""
        for request in reversed(self.running):
            if self._switches(request):
                continue  # each query has a set of its own
            known = request.num_tokens + request.num_output_placeholders  # what is in flight counts
            if self._set_of(request, known) != request.longrope_set:
                self.running.remove(request)
                self._preempt_request(request, time.monotonic())
                # It may be resumed in this very step: its tokens are sent again then.
                self.prev_step_scheduled_req_ids.discard(request.request_id)
            else:
                # With the token that verifying makes: a step ahead, all of it counts as known.
                drafts = len(request.spec_token_ids)
                while drafts and self._set_of(request, known + drafts + 1) != request.longrope_set:
                    drafts -= 1
                request.spec_token_ids = request.spec_token_ids[:drafts]
        if self.pause_state == PauseState.PAUSED_NEW:
            # What was preempted has begun, but vLLM resumes then what holds blocks alone.
            for request in (preempted := self._preempted()):
                self.kv_holding_waiting.add_request(request)
            self.waiting.remove_requests(preempted)
        return super().schedule(*args, **kwargs)

    def get_num_unfinished_requests(self) -> int:
        """A pause that waits is over at 0: what was preempted is to be finished, too."""
        unfinished: int = super().get_num_unfinished_requests()
        paused = self.pause_state == PauseState.PAUSED_NEW
        return unfinished + (len(self._preempted()) if paused else 0)

    def _preempted(self) -> list[Any]:
        """Of those that wait without blocks."""
        return [one for one in self.waiting if one.status == RequestStatus.PREEMPTED]

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any) -> Any:
        """Where a request is about to be prefilled, for the first time or again."""
        index = self._set_of(request, request.num_tokens)
        if getattr(request, "longrope_set", None) != index:
            if not hasattr(request, "longrope_set"):
                request.longrope_salt = request.cache_salt or ""
            request.longrope_set = index
            # Keys that a request computes after its switch are of hidden states of both sets: they
            # serve none that holds to one.
            kind = f"{index}+" if self._switches(request) else index
            request.cache_salt = f"longrope:{kind}:{request.longrope_salt}"
            request.block_hashes = []
            request.update_block_hashes()
        return super()._get_local_prefix_cache_hit(request, *args)

    def _switches(self, request: Any) -> bool:
        return self.policies.of(request.sampling_params) == "switch"

    def _set_of(self, request: Any, known: int) -> int:
        index: int = self.policies.index(
            request.sampling_params,
            prompt=request.num_prompt_tokens,
            known=known,
            limit=self.max_model_len,
        )
        return index


class _AsyncBySet(_BySet, AsyncScheduler):
    """The same over the scheduler that runs a step ahead."""
