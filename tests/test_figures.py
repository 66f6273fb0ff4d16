"""Each measured number that README and docs show comes from a file under reports/."""

from __future__ import annotations

import re
from pathlib import Path

import figures
import figures_rotation
import pytest

# A number with a unit of speed, time or size of code. Angles and tolerances are promises, which
# other tests hold; so are sizes in bytes and bits.
MEASURED = re.compile(
    r"\d[\d.,]*\s?(?:ms|us|µs|ns|seconds|GB/s|TB/s|TFLOP/s|tokens/s|%|registers|instructions|"
    r"of `(?:clone|copy_)`|(?:x|times)\b)"
)
PAGES = figures.pages()


def flat(text: str) -> str:
    return " ".join(text.split())


def name(page: Path) -> str:
    return page.relative_to(figures.ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_made_from_reports(page: Path) -> None:
    for _, table, shown, _ in figures.BLOCK.findall(page.read_text("utf-8")):
        assert shown == figures.TABLES[table](), "python tests/figures.py --write"


def test_every_table_is_shown() -> None:
    shown = [b[1] for page in PAGES for b in figures.BLOCK.findall(page.read_text("utf-8"))]
    assert sorted(set(shown)) == sorted(figures.TABLES)


def test_sentences_are_on_their_pages() -> None:
    for page, sentence in figures.sentences():
        assert flat(sentence) in flat((figures.ROOT / page).read_text("utf-8")), sentence


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_other_measured_number(page: Path) -> None:
    text = figures.BLOCK.sub("", page.read_text("utf-8"))
    text = flat(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for where, sentence in figures.sentences():
        if where == name(page):
            text = text.replace(flat(sentence), "")
    for promise in figures.PROMISES:
        text = text.replace(promise, "")
    found = [text[max(0, m.start() - 60) : m.end() + 20] for m in MEASURED.finditer(text)]
    assert not found


def test_clone_in_huge_pages_stands_beside_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures_rotation.run_in_huge_pages() or "huge" not in figures_rotation.rotary_short()
    path, read = "reports/cpu-2-cores/2030-01-01/clone.json", figures_rotation.read
    times = {"clone": 0.0142, "clone in huge pages": 0.0081, "native": 0.0069}
    found = [
        {
            "params": {"direction": "forward", "name": name},
            "group": f"forward, S = 4096, {dtype}",
            "stats": {"median": seconds},
        }
        for name, seconds in times.items()
        for dtype in ("float32", "bfloat16")
    ]
    monkeypatch.setattr(figures_rotation, "run_in_huge_pages", lambda: path)
    monkeypatch.setattr(
        figures_rotation, "read", lambda of: {"benchmarks": found} if of == path else read(of)
    )
    head, _, usual, *_, last = figures_rotation.rotary_short().splitlines()
    assert head.split(" | ")[3:6] == ["a `clone` of q and k", "`clone` in huge pages", "`native`"]
    assert usual.split("|")[5].strip() == ""
    assert last == f"| bfloat16, [another run]({path}) | | | 14.2 | 8.1 | 6.9 | | |"
