"""Drafts across the switch, verified under the set of their request; each policy, each mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    MODES,
    ORIGINAL,
    drafting,
    engine,
    fresh,
    in_a_process,
    of_new,
    prompt,
    reference,
    run,
    save_model,
    stepped,
)
from safetensors.torch import load_file, save_file
from test_lengths import CLOSE, far

from longrope_kernels.integrations.transformers import enable
from longrope_kernels.integrations.vllm.policies import POLICIES

FIELDS: dict[str, Any] = {"family": "llama", "head_dim": 96}
PLAIN: dict[str, Any] = {**FIELDS, "rope_parameters": {"rope_type": "default"}}
HELD = {"recompute": None, "final": "long", "prompt": "short"}
NEW = 24

Made = list[tuple[list[int], torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("served"), **FIELDS)


@pytest.fixture(scope="module", params=MODES)
def mode(request: Any) -> str:
    return request.param  # type: ignore[no-any-return]


def asked(mode: str) -> list[list[int]]:
    """A row for each policy, below the switch, with a third of all tokens to be looked up."""
    return [prompt(ORIGINAL - 8, row) for row in range(len(POLICIES[mode]))]


@pytest.fixture(scope="module")
def plain(folder: str, mode: str) -> list[list[int]]:
    """The tokens that the same requests make without drafts."""
    with engine(folder, mode) as served:
        outs = run(served, asked(mode), new=NEW, policies=POLICIES[mode], scored=False)
    return [of_new(out)[0] for out in outs]


def agree(folder: str, mode: str, plain: list[list[int]], made: Made) -> None:
    assert [ids for ids, _ in made] == plain
    for (ids, found), one, policy in zip(made, asked(mode), POLICIES[mode], strict=True):
        if policy == "switch":
            expected = stepped(enable(reference(folder)), one, ids)
        else:
            expected = fresh(reference(folder, HELD[policy]), one, ids)
        assert far(found, expected) < CLOSE


LOOKED_UP = """
from engines import drafting
drafts = dict(
    method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1
)
RESULT = drafting(FOLDER, MODE, drafts, ASKED, POLICIES, NEW)
"""


def test_looked_up_in_the_text(folder: str, mode: str, plain: list[list[int]]) -> None:
    """In a process of its own: vLLM's lookup imports numba.

    After that vLLM starts no further engine in a process: its search for kernels in all modules
    stumbles over llvmlite's library.
    """
    given = {"FOLDER": folder, "MODE": mode, "NEW": NEW}
    verified, _, found = in_a_process(
        LOOKED_UP, ASKED=asked(mode), POLICIES=POLICIES[mode], **given
    )
    assert max(verified) == 3
    agree(folder, mode, plain, found)


@pytest.mark.parametrize("rope", ["plain", "longrope"])
def test_by_a_model(
    rope: str, folder: str, mode: str, plain: list[list[int]], tmp_path: Path
) -> None:
    """The same weights with a rope of their own; or the same model, under vLLM's one set of it."""
    drafter = save_model(tmp_path, **PLAIN) if rope == "plain" else folder
    drafts = {"method": "draft_model", "model": drafter, "num_speculative_tokens": 3}
    verified, made, found = drafting(folder, mode, drafts, asked(mode), POLICIES[mode], NEW)
    assert max(verified) == 3
    assert max(made) > 1  # some are taken
    agree(folder, mode, plain, found)


def test_by_a_head(folder: str, mode: str, plain: list[list[int]], tmp_path: Path) -> None:
    """EAGLE's: a layer over the hidden states of the served model."""
    head = Path(save_model(tmp_path, num_hidden_layers=1, **PLAIN))
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
    verified, _, found = drafting(folder, mode, drafts, asked(mode), POLICIES[mode], NEW)
    assert max(verified) == 3
    agree(folder, mode, plain, found)
