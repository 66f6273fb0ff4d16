"""``longrope serve-check`` on a model of two layers, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import ORIGINAL, save_model
from test_lengths import CLOSE
from typer.testing import CliRunner

from longrope_kernels.cli import app
from longrope_kernels.integrations.vllm.check import check
from longrope_kernels.integrations.vllm.settings import SCHEDULER


def test_a_short_and_a_long_prompt(tmp_path: Path) -> None:
    """vLLM alone is wrong for the short one, with the plugin for neither."""
    folder = save_model(tmp_path)
    done = CliRunner().invoke(app, ["serve-check", folder])
    assert done.exit_code == 0, done.output
    assert f"factor sets for up to {ORIGINAL}, more tokens" in done.output
    lines = [line.split() for line in done.output.splitlines() if " tokens  " in line]
    far = {(int(line[0]), line[2]): float(line[-2]) for line in lines}
    assert set(far) == {(n, who) for n in (64, ORIGINAL + 64) for who in ("vLLM", "with")}
    assert far[64, "vLLM"] > 1
    assert far[64, "with"] < CLOSE
    assert far[ORIGINAL + 64, "with"] < CLOSE
    served = f"vllm serve {folder} --scheduler-cls {SCHEDULER} --max-model-len {32 * ORIGINAL}"
    assert served in done.output


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve-check", str(tmp_path)])
    assert done.exit_code == 1
    assert f"MODEL: expected the folder of a model, got {tmp_path}" in done.output


def test_a_rope_that_is_none_of_ours(tmp_path: Path) -> None:
    plain = {"rope_parameters": {"rope_type": "default"}, "head_dim": 96}
    save_model(tmp_path / "llama", "llama", **plain)
    with pytest.raises(ValueError, match=r"^MODEL: expected a rope of type longrope .*'default'"):
        check(tmp_path / "llama")
    save_model(tmp_path / "gemma", "gemma", **plain)
    with pytest.raises(ValueError, match=r"^MODEL: expected one of Phi3For.*'GemmaForCausalLM'"):
        check(tmp_path / "gemma")


def test_an_engine_that_ends(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^vLLM without plugins ended:.*dtype"):
        check(Path(save_model(tmp_path)), dtype="float17")
