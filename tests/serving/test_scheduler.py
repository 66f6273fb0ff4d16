"""The scheduler alone, one step at a time and a step ahead (as on GPUs), over made-up tokens.

The engine on a CPU runs the first kind alone. What a worker would take for the set of each step is
held to what the scheduler salted the request with.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from engines import ORIGINAL, prompt, save_model
from test_refusals import config_of
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from longrope_kernels.integrations.vllm.scheduler import LongRopeScheduler

BLOCK = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("phi3"))


def make(folder: str, ahead: bool, blocks: int, drafts: int) -> Any:
    by = {"method": "draft_model", "model": folder, "num_speculative_tokens": drafts}
    chosen = {"max_num_batched_tokens": 128, "block_size": BLOCK}
    settings = {"longrope": {"mode": "unrotated"}}  # which has all policies
    config = config_of(
        folder,
        speculative_config=by if drafts else None,
        additional_config=settings,
        **chosen,
    )
    config.scheduler_config.async_scheduling = ahead
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return LongRopeScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )


def ask(name: str, tokens: int, new: int, policy: str) -> Any:
    params = SamplingParams(max_tokens=new, ignore_eos=True, extra_args={"longrope_policy": policy})
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt(tokens, len(name)), params, None, block_hasher=hasher)


def drive(
    scheduler: Any, requests: list[Any], ahead: bool, drafts: int
) -> dict[str, list[tuple[int, int]]]:
    """Run all to their end; for each request the (last token computed, set) of its steps.

    Of the drafts of a step some are taken, none to all in turns.
    """
    by_name = {request.request_id: request for request in requests}
    steps: dict[str, list[tuple[int, int]]] = {name: [] for name in by_name}
    flying: deque[tuple[Any, list[list[int]]]] = deque()
    for request in requests:
        scheduler.add_request(request)
    for step in range(400):
        out = scheduler.schedule()
        old = out.scheduled_cached_reqs
        made = dict(zip(old.req_ids, old.num_output_tokens, strict=True))
        sampled = []
        for name in out.num_scheduled_tokens:
            request = by_name[name]
            prompt = request.num_prompt_tokens
            known = max(prompt + made.get(name, 0), request.num_computed_tokens)
            index = scheduler.policies.index(
                request.sampling_params, prompt, known, scheduler.max_model_len
            )
            if request.request_id == "switch":  # held to no set, nor are its blocks
                assert request.cache_salt == f"longrope:{request.longrope_set}+:"
            else:
                assert index == request.longrope_set
                assert request.cache_salt == f"longrope:{index}:"
            steps[name].append((request.num_computed_tokens, index))
            verified = len(out.scheduled_spec_decode_tokens.get(name, ()))
            taken = step % (verified + 1)
            sampled.append([] if request.is_prefill_chunk else [7] * (1 + taken))
        flying.append((out, sampled))
        if len(flying) > ahead or not sampled:
            done, tokens = flying.popleft()
            names = list(done.num_scheduled_tokens)
            places = {name: row for row, name in enumerate(names)}
            scheduler.update_from_output(done, ModelRunnerOutput(names, places, tokens))
            if drafts and not ahead:
                scheduler.update_draft_token_ids(
                    DraftTokenIds(names, [[7] * drafts for _ in names])
                )
        if not scheduler.has_unfinished_requests() and not any(one for _, one in flying):
            return steps
    raise AssertionError(f"no end: {steps}")


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("blocks", [60, 16])
def test_steps_of_a_request_agree_on_its_set(
    folder: str, ahead: bool, blocks: int, drafts: int
) -> None:
    """Where blocks are short requests are preempted, too."""
    init_none_hash(sha256)
    requests = [
        ask("recompute", ORIGINAL - 10, 30, "recompute"),
        ask("at the end", ORIGINAL - 10, 11, "recompute"),  # its 257th token is the last
        ask("final", ORIGINAL - 10, 30, "final"),
        ask("prompt", ORIGINAL - 10, 30, "prompt"),
        ask("switch", ORIGINAL - 10, 30, "switch"),
    ]
    steps = drive(make(folder, ahead, blocks, drafts), requests, ahead, drafts)
    for request in requests:
        assert request.num_output_tokens == request.max_tokens
    sets = {name: {index for _, index in each} for name, each in steps.items()}
    assert sets.pop("switch") == {0, 1}
    assert sets == {"recompute": {0, 1}, "at the end": {0}, "final": {1}, "prompt": {0}}
    under_long = [end for end, index in steps["recompute"] if index == 1]
    assert min(under_long) <= 128  # from the first chunk on
    if blocks == 60:
        assert [r.num_preemptions for r in requests] == [1, 0, 0, 0, 0]
