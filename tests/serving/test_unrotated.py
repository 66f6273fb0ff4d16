"""Mode "unrotated" over the caches that vLLM offers, and what of its layers it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import ORIGINAL, engine, of_prompt, prompt, reference, run, save_model, scores
from test_lengths import CLOSE, far

from longrope_kernels.integrations.vllm.backend import (
    LongRopeBuilder,
    LongRopeImpl,
    _by_queries,
    _places,
)
from longrope_kernels.integrations.vllm.unrotated import Unrotated
from longrope_kernels.rope.value import Rope


def test_blocks_of_16(tmp_path: Path) -> None:
    """Which vLLM's own attention has not on a CPU."""
    folder = save_model(tmp_path)
    truth = reference(folder)
    asked = [prompt(tokens, tokens) for tokens in (40, ORIGINAL + 1)]
    with engine(folder, "unrotated", block_size=16) as served:
        outs = run(served, asked)
    for out, one in zip(outs, asked, strict=True):
        assert far(of_prompt(out), scores(truth, one)) < CLOSE


REFUSED: dict[str, Any] = {
    "alibi_slopes": [1.0],
    "attn_type": "encoder_only",
    "kv_sharing_target_layer_name": "layers.0",
    "kv_cache_dtype": "fp8_e5m2",
    "sinks": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: LongRoPE in vLLM serves .* 'unrotated', got"):
        LongRopeImpl(2, 96, 1.0, **{name: REFUSED[name]})


def test_a_step_is_cut_into_calls() -> None:
    """Two decodes, a chunk of 35 queries, one without any, two drafts."""
    assert _by_queries([0, 1, 36, 36, 39, 40]) == {1: [(0, 0), (4, 39)], 35: [(1, 1)], 3: [(3, 36)]}


@pytest.mark.parametrize("queries", [1, 3])
def test_what_a_captured_graph_reads_is_of_the_latest_step(queries: int) -> None:
    """Steps of as many queries a request: vLLM's own buffers, and one of ours."""
    rope = Rope.longrope([1.0] * 4, [2.0] * 4, 32, attention_factor=1.0)
    layer = SimpleNamespace(impl=SimpleNamespace(unrotated=Unrotated(rope, 8, 2)))
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
    )
    builder = LongRopeBuilder(None, ["layer"], config, torch.device("cpu"))
    step = SimpleNamespace(
        causal=True,
        num_reqs=2,
        max_query_len=queries,
        num_actual_tokens=2 * queries,
        query_start_loc_cpu=torch.arange(3) * queries,
        block_table_tensor=torch.zeros(2, 2),
        seq_lens=torch.tensor([0, 0]),
    )
    pieces = []
    for lens in ([10, 40], [11, 33]):
        layer.impl.unrotated.choose([(0, length) for length in lens], [queries] * 2)
        step.seq_lens.copy_(torch.tensor(lens))
        pieces += builder.build(0, step)
        own = [[length - back for back in reversed(range(queries))] for length in lens]
        assert [piece.lengths.tolist() for piece in pieces] == [own] * len(pieces)
    for piece in pieces:
        assert piece.cache_lens is step.seq_lens
        assert piece.block_table is step.block_table_tensor


def test_tokens_that_lie_together_are_no_copy() -> None:
    assert _places([3, 5, 7], 2) == slice(3, 9)
    assert _places([3, 7], 2) == [3, 4, 7, 8]
