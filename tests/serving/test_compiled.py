"""Through torch.compile, as vLLM does without ``enforce_eager``: one graph, by Inductor."""

from __future__ import annotations

from pathlib import Path

from engines import (
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


def test_compiled(tmp_path: Path) -> None:
    """The graph is traced once, at the start; each step's sets are read from the buffer."""
    folder = save_model(tmp_path)
    truth = reference(folder)
    asked = [prompt(tokens, tokens) for tokens in (10, ORIGINAL - 2, ORIGINAL, ORIGINAL + 1, 500)]
    with engine(folder, enforce_eager=False) as served:
        assert served.llm_engine.vllm_config.compilation_config.backend == "inductor"
        outs = run(served, asked, new=4)
    for out, one in zip(outs, asked, strict=True):
        ids, found = of_new(out)
        assert far(of_prompt(out), scores(truth, one)) < CLOSE
        assert far(found, fresh(truth, one, ids)) < CLOSE
