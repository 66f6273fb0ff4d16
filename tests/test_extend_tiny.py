"""examples/extend_tiny, shrunken: every step runs, a second run repeats none, the page is whole."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/extend_tiny"
RESULTS = ROOT / "reports/extend_tiny"

pytestmark = pytest.mark.slow


def run(out: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "run.py"), "--small", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_small_run_and_a_second_one(tmp_path: Path) -> None:
    first = run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))["results"]
    assert first.count(" s\n") >= len(results)
    policies = results["policies"]
    assert list(policies) == ["switch", "pin", "recompute"]
    # Right after the crossing, the cache under "switch" is all from the short set.
    assert policies["switch"] != policies["pin"]
    assert policies["switch"] != policies["recompute"]
    page = (tmp_path / "results.md").read_text("utf-8")
    assert len(re.findall("^## ", page, re.MULTILINE)) == 8
    for name in ("perplexity.png", "factors.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"

    assert " s\n" not in run(tmp_path)
    assert (tmp_path / "results.md").read_text("utf-8") == page


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the folder of the example, whose files import one another by their names."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for path in EXAMPLE.glob("*.py"):
        monkeypatch.setitem(sys.modules, path.stem, None)  # what is there comes back afterwards
        del sys.modules[path.stem]


def test_the_committed_page_is_of_the_committed_results(
    tmp_path: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_bytes((RESULTS / "results.json").read_bytes())
    monkeypatch.setattr(sys, "argv", ["page.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLE / "page.py"), run_name="__main__")
    assert (tmp_path / "results.md").read_text("utf-8") == (RESULTS / "results.md").read_text(
        "utf-8"
    )


def test_the_committed_page_of_coarse_searches_is_of_their_results(beside: None) -> None:
    coarse = importlib.import_module("coarse")
    folder = ROOT / "reports/search_coarse"
    page = coarse.page(json.loads((folder / "coarse.json").read_text("utf-8")))
    assert page.strip() == (folder / "coarse.md").read_text("utf-8").strip()


def test_windows_with_keys(beside: None) -> None:
    text = importlib.import_module("text")
    windows = text.Windows(text.read_corpus(), 256, seed=0, with_keys=0.5)
    rows = [bytes(row.tolist()) for row in windows.batch(8)]
    assert [len(row) for row in rows] == [256] * 8
    for row in rows[:4]:
        keys = dict(re.findall(rb"\nKEY_([A-Z]) = (\d{5})\n", row))
        asked = dict(re.findall(rb"\nprint\(KEY_([A-Z])\)  # (\d{5})\n", row))
        assert len(keys) == 3
        assert keys == asked
