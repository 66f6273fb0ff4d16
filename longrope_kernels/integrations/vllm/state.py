"""The V2 runner's own hook: the state that a model names is told of requests and of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class LongRopeState(DefaultModelState):
    """Tells the rotary module, in each step, the set of each token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: dict[int, tuple[Any, int]] = {}  # slot: sampling parameters, prompt tokens

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request takes a slot, new or after a preemption."""
        super().add_request(req_index, new_req_data)
        prompt = len(new_req_data.prompt_token_ids)
        self.requests[req_index] = (new_req_data.sampling_params, prompt)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """Before the forward pass of a step."""
        longrope, n = self.model.longrope, input_batch.num_reqs
        counts = np.diff(input_batch.query_start_loc_np[: n + 1])
        known = np.maximum(
            input_batch.prefill_len_np[:n], input_batch.num_computed_tokens_np[:n] + counts
        )
        sets = []
        for slot, tokens in zip(input_batch.idx_mapping_np[:n], known, strict=True):
            params, prompt = self.requests[int(slot)]
            sets.append(
                longrope.policies.index(
                    params, prompt=prompt, known=int(tokens), limit=self.max_model_len
                )
            )
        longrope.rotary.choose(sets, counts.tolist())
        return super().prepare_inputs(input_batch, req_states)
