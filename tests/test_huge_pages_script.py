"""benchmarks/huge_pages.py in small sizes: it writes what tests/figures.py reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_huge_pages_script(tmp_path: Path) -> None:
    file = tmp_path / "huge_pages.json"
    command = [sys.executable, str(ROOT / "benchmarks/huge_pages.py"), "--quick"]
    done = subprocess.run([*command, "--out", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text("utf-8"))
    assert results["machine"]["cpu"]
    for dtype in ("float32", "bfloat16"):
        assert list(results[dtype]) == ["clone", "with_huge_pages", "without"]
    assert list(results["decode"]) == ["with_huge_pages", "without"]
    for name in ("float32", "bfloat16", "decode"):
        assert all(ms > 0 for times in results[name].values() for ms in times)
