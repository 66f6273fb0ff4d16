"""benchmarks/switch.py in small sizes: it measures what it says, whatever the times are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.full
def test_switch_script(tmp_path: Path) -> None:
    file = tmp_path / "switch.json"
    command = [sys.executable, str(ROOT / "benchmarks/switch.py"), "--quick", "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text("utf-8"))
    sizes = results["sizes"]

    crossing = {row["name"]: row for row in results["crossing"]}
    assert list(crossing) == ["transformers", "switch", "rotated"]
    half = sizes["new"] // 2
    # The token after `half` others is the first that is made under the long factors.
    assert crossing["rotated"]["same_tokens"] == crossing["transformers"]["same_tokens"]
    assert half <= crossing["switch"]["same_tokens"]
    assert half <= crossing["transformers"]["same_tokens"]  # all, from transformers 5.20 on
    for row in crossing.values():
        assert len(row["tokens_ms"]) == sizes["new"]
        assert row["tokens_ms"][half] == row["crossing_ms"]
        assert row["ratio"] == row["crossing_ms"] / row["neighbour_ms"] > 0
        assert row["name"] in done.stdout

    short, long = sizes["rows"]
    assert short <= sizes["switch"] < long
    errors = {(row["name"], row["tokens"]): row["relative_error"] for row in results["batch"]}
    assert errors["transformers", short] > 1e-2 > 1e-5 > errors["enabled", short]
    assert max(errors["transformers", long], errors["enabled", long]) < 1e-5

    assert [row["tokens"] for row in results["forward"]] == sizes["forwards"]
    assert all(row["ratio"] > 0 for row in results["forward"])
    assert results["machine"]["torch"]
