"""A server under load, long texts, two engines, one compile cache, and what is rounded."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
def test_under_load(
    requests: int, most: int, mode: str, measured: dict[str, Any], tmp_path: Path
) -> None:
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
        scheduler = server.engine_core.engine_core.scheduler
        served_again: list[str] = []
        preempt = scheduler._preempt_request

        def counted(request: Any, *args: Any, **kwargs: Any) -> None:
            served_again.append(request.request_id)
            preempt(request, *args, **kwargs)

        scheduler._preempt_request = counted
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
        preempted, most_off = len(served_again), 0.0
        for row in sorted(done.keys() - cancelled):
            (alone,) = run(served, [asked[row]], policies=[policies[row]], **how)
            ids, found = of_new(done[row])
            assert ids == of_new(alone)[0]
            most_off = max(most_off, far(found, of_new(alone)[1]))
        assert most_off < CLOSE
    measured[f"{requests} requests of 20 to {most} tokens, {mode}"] = {
        "finished": requests - len(cancelled),
        "cancelled": len(cancelled),
        "prefilled_again": preempted,
        "largest_difference_to_the_run_alone": most_off,
    }


@pytest.mark.full
def test_a_long_text(measured: dict[str, Any], tmp_path: Path) -> None:
    """12,000 tokens, original length 4096, beside `enable`: exact angles, unlike vLLM's."""
    folder, tokens = save_model(tmp_path, original=4096), 12_000
    long = {"max_model_len": tokens + 32, "max_num_batched_tokens": 2048}
    truth = scores(enable(reference(folder)), prompt(tokens, 1))
    ours = served([(folder, {"mode": mode, **long}) for mode in MODES], "longrope", tokens)
    found = dict(zip(MODES, ours, strict=True))
    (found["vLLM"],) = served([(folder, long)], "", tokens)
    errors = {way: float((each - truth).abs().mean()) for way, each in found.items()}
    measured["a text of 12000 tokens"] = {"mean_error": errors}
    assert max(errors[mode] for mode in MODES) < 2e-5 < errors["vLLM"]


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
RESULT = []
for folder, arguments in ENGINES:
    with engine(folder, **arguments) as served:
        (out,) = run(served, [prompt(TOKENS, 1)])
    RESULT.append(of_prompt(out))
"""


def served(
    engines: Sequence[tuple[str, dict[str, Any]]],
    plugins: str,
    tokens: int,
    environment: dict[str, str] | None = None,
) -> list[torch.Tensor]:
    """What vLLM with these plugins says of a prompt on each model, in a process of its own."""
    environment = {"VLLM_PLUGINS": plugins, **(environment or {})}
    if not plugins:
        alone: dict[str, Any] = {"scheduler_cls": None, "additional_config": {}}
        engines = [(folder, {**alone, **how}) for folder, how in engines]
    return in_a_process(SERVED, environment, ENGINES=list(engines), TOKENS=tokens)  # type: ignore[no-any-return]


def test_one_compile_cache(tmp_path: Path) -> None:
    """vLLM, with the plugin in both modes, and without it again: no graph serves another."""
    folder = save_model(tmp_path / "model", num_hidden_layers=1)
    caches = {
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    compiled = {"enforce_eager": False}
    (before,) = served([(folder, compiled)], "", 100, caches)
    ours = served([(folder, {"mode": mode, **compiled}) for mode in MODES], "longrope", 100, caches)
    (after,) = served([(folder, compiled)], "", 100, caches)
    truth = scores(reference(folder), prompt(100, 1))
    for each in ours:
        assert far(each, truth) < CLOSE
    assert torch.equal(before, after)
    assert far(before, truth) > 0.1


ROUNDED: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}
if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):  # else vLLM refuses them
    ROUNDED["float8 cache"] = {"kv_cache_dtype": "fp8"}


def test_what_is_rounded_is_no_worse_than_vllms(tmp_path: Path) -> None:
    """On a long prompt, for which all have the long set, beside float32."""
    folders = {name: save_model(tmp_path / name) for name in ROUNDED}
    for name, how in ROUNDED.items():
        if "dtype" in how:
            model = reference(folders[name]).to(getattr(torch, how["dtype"]))
            model.save_pretrained(folders[name])
    stock = served([(folders[name], how) for name, how in ROUNDED.items()], "", 900)
    asked = prompt(900, 1)
    for (name, how), theirs in zip(ROUNDED.items(), stock, strict=True):
        truth = scores(reference(folders[name]), asked)
        least = error(theirs, truth)
        assert least > 1e-8  # it is rounded
        for mode in MODES:
            with engine(folders[name], mode, **how) as made:
                (out,) = run(made, [asked])
            assert error(of_prompt(out), truth) < 1.1 * least, (name, mode)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).square().mean())
