"""Tensor parallelism: a process for each half of the heads, which all choose the same sets."""

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


def test_two_processes(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    truth = reference(folder)
    asked = [prompt(tokens, tokens) for tokens in (10, ORIGINAL - 2, ORIGINAL + 1, 500)]
    with engine(folder, tensor_parallel_size=2) as served:
        outs = run(served, asked, new=4)
    for out, one in zip(outs, asked, strict=True):
        ids, found = of_new(out)
        assert far(of_prompt(out), scores(truth, one)) < CLOSE
        assert far(found, fresh(truth, one, ids)) < CLOSE
