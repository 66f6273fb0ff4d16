"""Mode "unrotated" over the caches that vLLM offers, and what of its layers it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ORIGINAL, engine, of_prompt, prompt, reference, run, save_model, scores
from test_lengths import CLOSE, far

from longrope_kernels.integrations.vllm.backend import LongRopeImpl, _cut


@pytest.mark.parametrize("block_size", [16, 128])
def test_blocks(block_size: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    truth = reference(folder)
    asked = [prompt(tokens, tokens) for tokens in (40, ORIGINAL + 1)]
    with engine(folder, "unrotated", block_size=block_size) as served:
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
    """A decode, a chunk of 35 queries, two drafts: each query once, by as many a sequence."""
    parts = _cut([0, 1, 36, 39])
    assert parts == {1: [(0, 0, 0)], 16: [(1, 1, 19), (1, 17, 3)], 3: [(1, 33, 0), (2, 36, 0)]}
    begins = [begin + i for n, each in parts.items() for _, begin, _ in each for i in range(n)]
    assert torch.equal(torch.tensor(sorted(begins)), torch.arange(39))
