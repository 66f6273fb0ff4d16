"""Adapters: with each request its own, beside transformers with the same products added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    MODES,
    ORIGINAL,
    asked_for,
    engine,
    fresh,
    of_new,
    prompt,
    reference,
    save_model,
)
from safetensors.torch import save_file
from test_lengths import CLOSE, far

RANK, ALPHA = 8, 16
TARGETS = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def adapted(folder: str, family: str, at: Path, seed: int) -> Any:
    """transformers' model with an adapter added to its weights; as PEFT writes it at ``at``."""
    model, generator, saved = reference(folder), torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS[family]:
            out, features = module.weight.shape
            a = torch.randn(RANK, features, generator=generator) * features**-0.5
            b = torch.randn(out, RANK, generator=generator) * 0.1
            module.weight.data += ALPHA / RANK * b @ a
            saved[f"base_model.model.{name}.lora_A.weight"] = a
            saved[f"base_model.model.{name}.lora_B.weight"] = b
    at.mkdir()
    save_file(saved, at / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS[family]),
        "bias": "none",
    }
    (at / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TARGETS)
def test_adapters(family: str, mode: str, tmp_path: Path) -> None:
    """Two, in one batch, on both sides of the switch and across it; then none.

    Not beside requests without one: there vLLM's operations for the CPU take the last adapter for
    these (they read place -1), with this plugin or without.
    """
    from vllm.lora.request import LoRARequest

    folder = save_model(tmp_path / "served", family, head_dim=96)
    plain = reference(folder)
    models = [adapted(folder, family, tmp_path / str(seed), seed) for seed in range(2)]
    adapters = [LoRARequest(str(seed), seed + 1, str(tmp_path / str(seed))) for seed in range(2)]
    asked = [prompt(tokens, tokens) for tokens in (20, ORIGINAL - 2, ORIGINAL + 1, 500)]
    with engine(folder, mode, enable_lora=True, max_lora_rank=RANK, max_loras=2) as served:
        for chosen in ((0, 1, 1, 0), (1, 0, 0, 1), (None,) * 4):
            requests = [None if one is None else adapters[one] for one in chosen]
            outs = served.generate(
                *asked_for(asked, new=5, scored=False), use_tqdm=False, lora_request=requests
            )
            for out, one, which in zip(outs, asked, chosen, strict=True):
                ids, found = of_new(out)
                truth = plain if which is None else models[which]
                assert far(found, fresh(truth, one, ids)) < CLOSE
