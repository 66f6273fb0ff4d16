"""Each measured number that README and docs show comes from a file under reports/."""

from __future__ import annotations

import re
from pathlib import Path

import figures
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
