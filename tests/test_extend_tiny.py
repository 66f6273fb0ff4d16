"""examples/extend_tiny, shrunken: every step runs, a second run repeats none, the page is whole."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
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


def test_searches_by_a_prefix_by_windows_and_by_neither(
    tmp_path: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse, small = (importlib.import_module(name) for name in ("coarse", "run"))
    sizes = replace(small.SMALL, ratios=(2, 8), population=16)
    monkeypatch.setattr(coarse, "Sizes", lambda recipe: sizes)
    ways = {coarse.FULL: None, coarse.FEW: None, "coarse first": 128, "windows first": 256}
    known = coarse.compare(tmp_path, 8, [0], sizes.recipe.steps, list(ways))
    rows = {one["way"]: one for one in known["searches"].values() if "way" in one}
    assert list(rows) == list(ways)
    for (way, tokens), one in zip(ways.items(), rows.values(), strict=True):
        folder = tmp_path / f"{way} at 1024, seed 0".replace(" ", "-")
        told = json.loads((folder / "state.json").read_text("utf-8"))["config"]["settings"]
        assert told["parents"] == (4 if way == coarse.FEW else 8)
        assert (one["windows"] > 0) == (tokens is not None)
        assert one["tokens"] == 1024 * one["forwards"] + (tokens or 0) * one["windows"]
    assert coarse.page(known).count("seed 0") == len(ways)
    again = coarse.compare(tmp_path, 8, [0], sizes.recipe.steps, list(ways))
    assert again["searches"] == known["searches"]


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
