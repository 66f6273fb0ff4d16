"""What an engine is started with: by torch.compile, over processes, blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import (
    MODES,
    ORIGINAL,
    engine,
    fresh,
    in_a_process,
    of_new,
    of_prompt,
    prompt,
    reference,
    run,
    save_model,
    scores,
)
from servers import server
from test_http import complete, save_tokenizer
from test_lengths import CLOSE, far

STARTED: dict[str, dict[str, Any]] = {
    # As vLLM does without ``enforce_eager``: one graph, traced at the start.
    "compiled": {"enforce_eager": False},
    # A process for each half of the heads, which all choose the same sets.
    "tensor parallel": {"tensor_parallel_size": 2},
    # One for each half of the layers; this build of vLLM has that compiled alone.
    "pipeline parallel": {"pipeline_parallel_size": 2, "enforce_eager": False},
    "blocks of 128": {"block_size": 128},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STARTED)
def test_an_engine(name: str, mode: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    truth = reference(folder)
    asked = [prompt(tokens, tokens) for tokens in (10, ORIGINAL - 2, ORIGINAL, ORIGINAL + 1, 500)]
    with engine(folder, mode, **STARTED[name]) as served:
        if name == "compiled":
            assert served.llm_engine.vllm_config.compilation_config.backend == "inductor"
        outs = run(served, asked, new=4)
    for out, one in zip(outs, asked, strict=True):
        ids, found = of_new(out)
        assert far(of_prompt(out), scores(truth, one)) < CLOSE
        assert far(found, fresh(truth, one, ids)) < CLOSE


def test_data_parallel(tmp_path: Path) -> None:
    """Two engines, between which the server shares requests out."""
    folder = save_model(tmp_path)
    save_tokenizer(tmp_path)
    held = {None: None, "final": "long", "prompt": "short"}  # of what ends above the switch
    lengths = [10, 100, 301, *3 * [ORIGINAL - 4]]
    policies = [None, None, None, *held]
    asked = [prompt(tokens, tokens) for tokens in lengths]
    chosen = {"max-model-len": str(4 * ORIGINAL), "data-parallel-size": "2"}
    with server(folder, "rotated", "recompute", **chosen) as client, ThreadPoolExecutor() as many:
        outs = list(many.map(partial(complete, client, folder), asked, policies))
    assert (tmp_path / "server.log").read_text().count("LongRoPE, mode") == 2
    for (ids, found), one, policy in zip(outs, asked, policies, strict=True):
        assert far(found, fresh(reference(folder, held[policy]), one, ids)) < CLOSE


WITHOUT = """
from engines import engine
try:
    with engine(FOLDER):
        RESULT = "it serves"
except RuntimeError as error:
    RESULT = str(error)
"""


def test_our_scheduler_without_the_plugin(tmp_path: Path) -> None:
    """Nobody would turn requests by their sets."""
    environment = {"VLLM_PLUGINS": ""}
    found = in_a_process(WITHOUT, environment, FOLDER=save_model(tmp_path))
    assert found.startswith("scheduler_cls: LongRopeScheduler needs the models of its plugin")
    assert found.endswith("expected 'longrope' among VLLM_PLUGINS, or none set, got ''")
