"""A server under load, long texts, two engines, one compile cache, and bfloat16."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    MODES,
    ORIGINAL,
    asked_for,
    engine,
    in_a_process,
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
from longrope_kernels.integrations.vllm.policies import POLICIES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("requests", "most"), [(16, 600), pytest.param(200, 3000, marks=pytest.mark.full)]
)
def test_under_load(requests: int, most: int, mode: str, tmp_path: Path) -> None:
    """Mixed lengths and policies, some taken back: none is lost, none differs from its run alone.

    Blocks are short, so that some wait and some are preempted.
    """
    folder = save_model(tmp_path)
    chosen = random.Random(0)
    # Half end about the switch.
    lengths = [
        chosen.choice((chosen.randint(20, most), chosen.randint(ORIGINAL - 16, ORIGINAL)))
        for _ in range(requests)
    ]
    policies = [chosen.choice(POLICIES[mode]) for _ in lengths]
    cancelled = set(chosen.sample(range(requests), requests // 8))
    asked = [prompt(tokens, row) for row, tokens in enumerate(lengths)]
    limit = most + 64
    with engine(
        folder,
        mode,
        max_model_len=limit,
        max_num_seqs=8,
        num_gpu_blocks_override=2 + 2 * (limit // 32 + 1),
    ) as served:
        how = {"new": 24, "scored": False}
        prompts, parameters = asked_for(asked, policies=policies, **how)
        server = served.llm_engine
        for row, (one, each) in enumerate(zip(prompts, parameters, strict=True)):
            server.add_request(str(row), one, each)
        done: dict[int, Any] = {}
        for step in range(100_000):
            if not server.has_unfinished_requests():
                break
            if step % 4 == 2 and cancelled - done.keys():
                row = min(cancelled - done.keys())
                done[row] = None
                server.abort_request([str(row)])
            done |= {int(out.request_id): out for out in server.step() if out.finished}
        assert done.keys() == set(range(requests))
        for row in sorted(done.keys() - cancelled):
            (alone,) = run(served, [asked[row]], policies=[policies[row]], **how)
            ids, found = of_new(done[row])
            assert ids == of_new(alone)[0]
            assert far(found, of_new(alone)[1]) < CLOSE


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_a_long_text(mode: str, tmp_path: Path) -> None:
    """12,000 tokens, original length 4096, beside `enable`: exact angles in both."""
    folder = save_model(tmp_path, original=4096)
    asked = prompt(12_000, 3)
    with engine(folder, mode, max_model_len=12_032, max_num_batched_tokens=2048) as served:
        (out,) = run(served, [asked])
    truth = scores(enable(reference(folder)), asked)
    assert float((of_prompt(out) - truth).abs().mean()) < 2e-5


@pytest.mark.parametrize("mode", MODES)
def test_two_engines_in_one_process(mode: str, tmp_path: Path) -> None:
    """Each with its own model, sets and lengths, asked in turns."""
    folders = [save_model(tmp_path / str(n), original=n) for n in (ORIGINAL, ORIGINAL // 2)]
    asked = prompt(ORIGINAL - 40, 2)  # short in one, long in the other
    truths = [scores(reference(folder), asked) for folder in folders]
    with engine(folders[0], mode) as one, engine(folders[1], mode, max_model_len=512) as two:
        for served, truth in ((one, truths[0]), (two, truths[1]), (one, truths[0])):
            assert far(of_prompt(run(served, [asked])[0]), truth) < CLOSE


SERVED = """
from engines import engine, of_prompt, prompt, run
with engine(FOLDER, **ARGUMENTS) as served:
    (out,) = run(served, [prompt(TOKENS, 1)])
RESULT = of_prompt(out)
"""


def served(folder: str, plugins: str, tokens: int, environment: dict[str, str], **how: Any) -> Any:
    """What vLLM with these plugins says of a prompt, in a process of its own."""
    environment = {"VLLM_PLUGINS": plugins, **environment}
    if not plugins:
        how = {"scheduler_cls": None, "additional_config": {}, **how}
    return in_a_process(SERVED, environment, FOLDER=folder, TOKENS=tokens, ARGUMENTS=how)


@pytest.mark.parametrize("mode", MODES)
def test_one_compile_cache(mode: str, tmp_path: Path) -> None:
    """vLLM, with the plugin, and without it again: no graph of one serves the other."""
    folder = save_model(tmp_path / "model")
    caches = {
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    compiled = {"enforce_eager": False}
    before = served(folder, "", 100, caches, **compiled)
    ours = served(folder, "longrope", 100, caches, mode=mode, **compiled)
    after = served(folder, "", 100, caches, **compiled)
    assert far(ours, scores(reference(folder), prompt(100, 1))) < CLOSE
    assert torch.equal(before, after)
    assert far(before, ours) > 1


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_is_no_worse_than_vllms(mode: str, tmp_path: Path) -> None:
    """On a long prompt, for which both have the long set, beside float32."""
    folder = save_model(tmp_path)
    model = reference(folder).bfloat16()
    model.save_pretrained(folder)
    truth = scores(reference(folder), prompt(900, 1))
    errors = [
        float((served(folder, plugins, 900, {}, dtype="bfloat16", **how) - truth).square().mean())
        for plugins, how in (("longrope", {"mode": mode}), ("", {}))
    ]
    assert errors[0] < 1.1 * errors[1], errors
