"""Every family that is served, beside `enable`; other ropes stay vLLM's own, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    MODES,
    ORIGINAL,
    engine,
    fresh,
    in_a_process,
    of_new,
    of_prompt,
    prompt,
    published,
    reference,
    run,
    save_model,
    scores,
)
from test_lengths import CLOSE, far

from longrope_kernels.integrations.transformers import enable
from longrope_kernels.integrations.vllm import models
from longrope_kernels.rope.factor_set import FactorSet
from longrope_kernels.rope.value import Rope

each_mode = pytest.mark.parametrize("mode", MODES)
SHORT, LONG = (published()[f"{each}_factor"] for each in ("short", "long"))
PARTIAL = {
    **published(partial_rotary_factor=0.75),
    "short_factor": SHORT[:36],
    "long_factor": LONG[:36],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 partial": ("phi3", {"rope_parameters": PARTIAL}),
    "phimoe": (
        "phimoe",
        {
            "rope_parameters": published(short_mscale=1.1, long_mscale=1.3),
            "num_local_experts": 2,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "mistral": ("mistral", {"head_dim": 96, "sliding_window": 64}),
    "qwen2": ("qwen2", {"rope_parameters": published(attention_factor=1.3)}),
    "qwen3": ("qwen3", {"head_dim": 96}),
}


def agrees(folder: str, mode: str, rope: Rope | None = None) -> None:
    """Prompts on both sides of the switch in one batch, of which two grow past it."""
    truth = reference(folder)
    enable(truth, rope=rope or Rope.from_config(truth.config))
    asked = [prompt(tokens, tokens) for tokens in (20, ORIGINAL - 2, ORIGINAL + 1, 500)]
    with engine(folder, mode) as served:
        kind = served.apply_model(lambda model: type(model).__module__)
        outs = run(served, asked, new=5)
    assert kind == [models.__name__]
    for out, one in zip(outs, asked, strict=True):
        ids, found = of_new(out)
        assert far(of_prompt(out), scores(truth, one)) < CLOSE
        assert far(found, fresh(truth, one, ids)) < CLOSE


@each_mode
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str, mode: str, tmp_path: Path) -> None:
    family, fields = FAMILIES[name]
    agrees(save_model(tmp_path, family, **fields), mode)


@each_mode
def test_a_rope_beside_the_model(mode: str, tmp_path: Path) -> None:
    """Three sets, thresholds and interleaved pairs: what no config can say."""
    folder = save_model(tmp_path, "llama", rope_parameters={"rope_type": "default"}, head_dim=96)
    sets = (
        FactorSet(tuple(SHORT), 0, 1.0, ORIGINAL),
        FactorSet(tuple((a + b) / 2 for a, b in zip(SHORT, LONG, strict=True)), 16, 1.1, 400),
        FactorSet(tuple(LONG), 32, 1.2),
    )
    rope = Rope(sets, 10000.0, interleaved=True)
    rope.save(tmp_path)
    agrees(folder, mode, rope)


ALONE = """
from engines import engine, of_new, of_prompt, prompt, run
RESULT = []
for folder in FOLDERS:
    with engine(folder, scheduler_cls=None) as served:
        outs = run(served, [prompt(40), prompt(300)], new=8)
        kind = served.apply_model(lambda model: type(model).__module__)
    RESULT.append(([(of_prompt(out), *of_new(out)) for out in outs], kind[0]))
"""


def alone(plugins: str, *folders: str) -> Any:
    """What vLLM with these plugins says of two prompts, for each model; and where its class is."""
    return in_a_process(ALONE, {"VLLM_PLUGINS": plugins}, FOLDERS=folders)


def test_other_ropes_stay_vllms_own_to_the_bit(tmp_path: Path) -> None:
    """With the plugin and without it, in a process each.

    Without it a longrope model takes the long set for a prompt of 40 tokens.
    """
    plain = {"rope_parameters": {"rope_type": "default"}, "head_dim": 96}
    folder = save_model(tmp_path / "llama", "llama", **plain)
    longrope = save_model(tmp_path / "phi3")
    ((ours, kind),) = alone("longrope", folder)
    assert kind == models.__name__
    (stock, kind), (short, _) = alone("", folder, longrope)
    assert kind == "vllm.model_executor.models.llama"
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a[0], b[0])
        assert a[1] == b[1]
        assert torch.equal(a[2], b[2])
    assert far(short[0][0], scores(reference(longrope), prompt(40))) > 1
    assert far(short[0][0], scores(reference(longrope, "long"), prompt(40))) < CLOSE
