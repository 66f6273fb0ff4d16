"""Each example runs as its docstring says, and prints what it is there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def printed(name: str, *arguments: str, processes: int = 0) -> str:
    """What the example prints; with a number of processes, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes else []), str(EXAMPLES / name), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if processes else None
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    names = re.findall(r'printed\("(\w+\.py)"\)', Path(__file__).read_text("utf-8"))
    assert sorted(names) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_phi3_from_config() -> None:
    out = printed("phi3_from_config.py")
    same = re.findall(r"^(.+?) +the first (\d+) of 12 tokens are those", out, re.MULTILINE)
    first = {name: int(count) for name, count in same}
    assert list(first) == ["untouched", "enabled, unrotated", "enabled, rotated"]
    # The sixth token comes of 4096 tokens, the last that are short: all differ from there on.
    assert first["enabled, unrotated"] >= 6
    assert first["enabled, rotated"] == first["untouched"] >= 6  # 12, from transformers 5.20 on


def test_own_model() -> None:
    out = printed("own_model.py")
    assert out.count("alone the same tokens: True") == 3
    for crossing in ("long set, at the end long", "short set, at the end short"):
        assert crossing in out
    assert "short set, at the end long" in out


def test_fine_tuning() -> None:
    out = printed("fine_tuning.py")
    rows = re.findall(r"^(.{40}) +(\d\.\d+) +(\d\.\d+)$", out, re.MULTILINE)
    trained, enabled, tuned, loaded = ((float(short), float(long)) for _, short, long in rows)
    assert enabled[0] == trained[0]  # short texts keep their factors
    assert tuned[1] < min(trained[1], enabled[1])
    assert loaded == tuned


@pytest.mark.full
def test_context_parallel() -> None:
    """Weights over four processes, sequences over pairs: three steps of one process."""
    name = "context_parallel/train.py"
    alone = printed(name, processes=1)
    assert len(re.findall(r"^loss \d\.\d{4}, gradient norm \d\.\d{4}$", alone, re.MULTILINE)) == 3
    shared = printed(name, "--context", "2", processes=4)
    one, other = (list(map(float, re.findall(r"\d\.\d+", text))) for text in (alone, shared))
    assert other == pytest.approx(one, abs=2e-4)
