"""Engines of their own: one with too few blocks for its requests, one with longer ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import (
    MODES,
    ORIGINAL,
    engine,
    fresh,
    of_new,
    of_prompt,
    prompt,
    reference,
    run,
    save_model,
    scores,
)
from test_lengths import CLOSE, far

from longrope_kernels.integrations.transformers import enable

each_mode = pytest.mark.parametrize("mode", MODES)


@contextmanager
def short_of_blocks(folder: str, mode: str, tokens: int, blocks: int) -> Iterator[Any]:
    """An engine, and the (request, tokens) that it preempts while inside."""
    preempted: list[tuple[str, int]] = []
    chosen = {"max_model_len": tokens, "num_gpu_blocks_override": blocks}
    with engine(folder, mode, **chosen) as served:
        scheduler: Any = served.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(request: Any, *args: Any, **kwargs: Any) -> None:
            preempted.append((request.request_id.partition("-")[0], request.num_tokens))
            preempt(request, *args, **kwargs)

        scheduler._preempt_request = counted
        yield served, preempted


@each_mode
def test_preemption_before_and_at_the_switch(mode: str, tmp_path: Path) -> None:
    """Two rows of 220 tokens fill all blocks; the next token of each wants one more."""
    folder = save_model(tmp_path)
    truth, long, short = (reference(folder, held) for held in (None, "long", "short"))
    lengths = (220, 220, 284, 220, 220)
    policies = ["recompute", "recompute", "recompute", "final", "prompt"]
    asked = [prompt(tokens, row) for row, tokens in enumerate(lengths)]
    with short_of_blocks(folder, mode, 14 * 32, 15) as (served, preempted):
        outs = run(served, asked, new=44, policies=policies, scored=False)
    at_the_switch = [row for row, tokens in preempted if tokens == ORIGINAL + 1]
    assert {"0", "1"} <= set(at_the_switch)
    assert any(tokens < ORIGINAL for _, tokens in preempted)
    for out, one, true in zip(outs, asked, (truth, truth, truth, long, short), strict=True):
        ids, found = of_new(out)
        assert far(found, fresh(true, one, ids)) < CLOSE


@each_mode
def test_preemption_after_the_switch(mode: str, tmp_path: Path) -> None:
    """Two of three long prompts fit; their 288th token wants a block that is not there."""
    folder = save_model(tmp_path)
    truth = reference(folder)
    asked = [prompt(280, row) for row in range(3)]
    policies = ["recompute", "final", "recompute"]
    with short_of_blocks(folder, mode, 16 * 32, 19) as (served, preempted):
        outs = run(served, asked, new=44, policies=policies, scored=False)
    assert any(tokens > ORIGINAL + 1 for _, tokens in preempted)
    for out, one in zip(outs, asked, strict=True):
        ids, found = of_new(out)
        assert far(found, fresh(truth, one, ids)) < CLOSE


@each_mode
def test_with_the_published_original_length(mode: str, tmp_path: Path) -> None:
    """4096 tokens are short, 4097 long, though the server takes 131072.

    There transformers' own angles are off by more.
    """
    folder = save_model(tmp_path, original=4096)
    truth = enable(reference(folder))
    asked = [prompt(tokens, 8) for tokens in (100, 4096, 4097)]
    with engine(folder, mode, max_model_len=131_072, max_num_batched_tokens=2048) as made:
        outs = run(made, asked, new=2)
    for out, one in zip(outs, asked, strict=True):
        ids, found = of_new(out)
        assert far(of_prompt(out), scores(truth, one)) < CLOSE
        assert far(found, fresh(truth, one, ids)) < CLOSE
