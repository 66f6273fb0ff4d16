"""The V2 runner's own hook: the state that a model names is told of requests and of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class LongRopeState(DefaultModelState):
    """Tells the rotary module, in each step, by which lengths to choose sets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: dict[int, tuple[Any, int]] = {}  # slot: sampling parameters, prompt tokens

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request takes a slot, new or after a preemption."""
        super().add_request(req_index, new_req_data)
        prompt = len(new_req_data.prompt_token_ids)
        self.requests[req_index] = (new_req_data.sampling_params, prompt)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Before what attention is told of a step, and its forward pass."""
        n = input_batch.num_reqs
        slots = input_batch.idx_mapping_np[:n].tolist()
        if all(slot in self.requests for slot in slots):  # else it is a dummy, to warm up
            self._choose(input_batch, slots)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def _choose(self, input_batch: Any, slots: list[int]) -> None:
        longrope, n = self.model.longrope, len(slots)
        counts = np.diff(input_batch.query_start_loc_np[: n + 1])
        ends = input_batch.num_computed_tokens_np[:n] + counts
        lengths = []
        for slot, begun, end in zip(slots, input_batch.prefill_len_np[:n], ends, strict=True):
            params, prompt = self.requests[slot]
            lengths.append(
                longrope.policies.lengths(
                    params, prompt, int(begun), int(end), limit=self.max_model_len
                )
            )
        longrope.rotary.choose(lengths, counts.tolist())
