"""The V2 runner, GPUs' default, on a CPU: its own kernels in Triton's interpreter.

In a process of its own, where Triton is told of a device that it has no compiler for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import (
    MODES,
    ORIGINAL,
    fresh,
    in_a_process,
    prompt,
    reference,
    save_model,
    stepped,
)
from test_lengths import CLOSE, far

from longrope_kernels.integrations.transformers import enable

SCRIPT = """
from types import SimpleNamespace
from triton.backends import backends
driver = SimpleNamespace(is_active=lambda: True)
backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
from engines import engine, of_new, run
with engine(FOLDER, MODE) as served:
    core = served.llm_engine.engine_core.engine_core
    state = core.model_executor.driver_worker.worker.model_runner.model_state
    outs = run(served, ASKED, new=10, scored=False, policies=POLICIES)
RESULT = type(state).__name__, [of_new(out) for out in outs]
"""


@pytest.mark.parametrize("mode", MODES)
def test_the_v2_runner(mode: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    lengths = (10, ORIGINAL - 4, ORIGINAL + 1, 250, 250, 250, 400)
    asked = [prompt(tokens, tokens) for tokens in lengths]
    last = {"rotated": "recompute", "unrotated": "switch"}[mode]
    policies = ["recompute", "recompute", "recompute", "final", "prompt", last, last]
    truth, long, short = (reference(folder, held) for held in (None, "long", "short"))
    state, found = in_a_process(
        SCRIPT,
        {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"},
        FOLDER=folder,
        MODE=mode,
        ASKED=asked,
        POLICIES=policies,
    )
    assert state == "LongRopeState"
    for (ids, each), one, policy in zip(found, asked, policies, strict=True):
        if policy == "switch":
            expected = stepped(enable(reference(folder)), one, ids)
        else:
            true = {"recompute": truth, "final": long, "prompt": short}[policy]
            expected = fresh(true, one, ids)
        assert far(each, expected) < CLOSE
