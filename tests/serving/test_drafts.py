"""Drafts across the switch, verified under the set of their request; each policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ORIGINAL, drafting, fresh, in_a_process, prompt, reference, save_model
from safetensors.torch import load_file, save_file
from test_lengths import CLOSE, far

FIELDS: dict[str, Any] = {"family": "llama", "head_dim": 96}
PLAIN: dict[str, Any] = {**FIELDS, "rope_parameters": {"rope_type": "default"}}
POLICIES = ["recompute", "final", "prompt"]


def asked() -> list[list[int]]:
    """Three rows below the switch, in which the next token can be looked up."""
    return [(prompt(40, row) * 7)[: ORIGINAL - 8] for row in range(3)]


def agree(folder: str, found: list[tuple[list[int], torch.Tensor]]) -> None:
    truths = [reference(folder, held) for held in (None, "long", "short")]
    for (ids, scored), one, truth in zip(found, asked(), truths, strict=True):
        assert far(scored, fresh(truth, one, ids)) < CLOSE


LOOKED_UP = """
from engines import drafting
drafts = dict(
    method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1
)
RESULT = drafting(FOLDER, drafts, ASKED, POLICIES)
"""


def test_looked_up_in_the_text(tmp_path: Path) -> None:
    """In a process of its own: vLLM's lookup imports numba.

    After that vLLM starts no further engine in a process: its search for kernels in all modules
    stumbles over llvmlite's library.
    """
    folder = save_model(tmp_path)
    verified, _, found = in_a_process(LOOKED_UP, FOLDER=folder, ASKED=asked(), POLICIES=POLICIES)
    assert max(verified) == 3
    agree(folder, found)


@pytest.mark.parametrize("rope", ["plain", "longrope"])
def test_by_a_model(rope: str, tmp_path: Path) -> None:
    """The same weights with a rope of their own; or the same model, under vLLM's one set of it."""
    folder = save_model(tmp_path / "served", **FIELDS)
    drafter = save_model(tmp_path / "drafter", **PLAIN) if rope == "plain" else folder
    drafts = {"method": "draft_model", "model": drafter, "num_speculative_tokens": 3}
    verified, made, found = drafting(folder, drafts, asked(), POLICIES)
    assert max(verified) == 3
    assert max(made) > 1  # some are taken
    agree(folder, found)


def test_by_a_head(tmp_path: Path) -> None:
    """EAGLE's: a layer over the hidden states of the served model."""
    folder = save_model(tmp_path / "served", **FIELDS)
    head = Path(save_model(tmp_path / "head", num_hidden_layers=1, **PLAIN))
    saved = load_file(head / "model.safetensors")
    weights = {
        name.removeprefix("model."): weight
        for name, weight in saved.items()
        if ".layers." in name and "input_layernorm" not in name
    }
    hidden = weights["layers.0.self_attn.o_proj.weight"].shape[0]
    weights["fc.weight"] = torch.randn(hidden, 2 * hidden) * 0.03
    save_file(weights, head / "model.safetensors", metadata={"format": "pt"})
    drafts = {"method": "eagle", "model": str(head), "num_speculative_tokens": 3}
    verified, _, found = drafting(folder, drafts, asked(), POLICIES)
    assert max(verified) == 3
    agree(folder, found)
