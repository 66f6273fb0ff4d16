"""Where the commands of the search write: never over what they read, and whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from search_cases import LENGTH, SMALL, flags, given, one_thread, run, search, searched, work

from longrope_kernels import Rope
from longrope_kernels.search.source import open_source, write_config, write_json, write_lengths

__all__ = ["one_thread", "searched", "work"]
pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result: Any, of: str, place: Path) -> None:
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f": --out: expected another folder than that of {of}, got " in line
    assert line.endswith(f": {place} would be written over")


@pytest.mark.parametrize("place", ["model", "1-search-64", "2-tune-64/inner"])
def test_extend_refuses_what_lies_where_it_writes(work, tmp_path, place):
    stages = [*flags(stage="64:2", out=tmp_path, train=work / "texts", rate=1e-2), *flags(**SMALL)]
    shutil.copytree(work / "model", tmp_path / place)
    shutil.copytree(work / "texts", tmp_path / place / "texts")
    (tmp_path / "link").symlink_to(tmp_path / place)
    (tmp_path / place / "rope.json").touch()
    before = contents(tmp_path)
    _, *texts = given(work)
    for model in (tmp_path / place, tmp_path / "link"):
        result = run("extend", model, *texts, *stages)
        refused(result, "the model", tmp_path / place.split("/")[0])
    for option in ("--documents", "--train", "--tokenizer"):
        result = run("extend", *given(work), *stages, option, tmp_path / place / "texts")
        refused(result, option, tmp_path / place.split("/")[0])
    assert contents(tmp_path) == before


def test_the_rope_that_is_read_is_not_written_over(work, searched, tmp_path):
    shutil.copytree(searched, tmp_path / "rope")
    shutil.copytree(searched, tmp_path / "readjusted/16")
    before = contents(tmp_path)
    short = [*flags(length=16, **SMALL), "--rope-length", LENGTH]
    for rope in (tmp_path / "rope", tmp_path / "rope/longrope.json"):
        start = ["--start", rope, "--start-length", LENGTH]
        result = search(work, tmp_path / "rope", *start, length=2 * LENGTH)
        refused(result, "--start", tmp_path / "rope/longrope.json")
        command = ["readjust", *given(work), *short, "--rope", rope]
        refused(
            run(*command, "--out", tmp_path / "rope"), "--rope", tmp_path / "rope/longrope.json"
        )
    command = ["readjust", *given(work), *short, "--rope", tmp_path / "readjusted/16"]
    result = run(*command, "--out", tmp_path / "readjusted")
    refused(result, "--rope", tmp_path / "readjusted/16")
    assert contents(tmp_path) == before


def test_what_is_read_may_lie_beside_what_is_written(work, searched, tmp_path):
    """In the folder, under a name that the command has no file of; and it goes on there."""
    shutil.copytree(work / "model", tmp_path / "model")
    shutil.copytree(work / "texts", tmp_path / "texts")
    shutil.copy(searched / "longrope.json", tmp_path / "start.json")
    start = ["--start", tmp_path / "start.json", "--start-length", LENGTH]
    for _ in range(2):
        result = search(tmp_path, tmp_path, *start, length=2 * LENGTH)
        assert result.exit_code == 0, result.stderr


def test_a_full_disk_leaves_the_old_files_and_is_named(work, tmp_path, monkeypatch):
    source = open_source(work / "model")
    write_config(source, Rope.plain(16), 64, tmp_path)
    write_json(tmp_path / "result.json", {})
    before = contents(tmp_path)
    write = Path.write_text

    def full(self: Path, text: str, *arguments: Any, **more: Any) -> int:
        if "longrope.json" in self.name:
            return write(self, text, *arguments, **more)
        write(self, text[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # which names no file

    monkeypatch.setattr(Path, "write_text", full)
    for name, make in (
        ("config.json", lambda: write_config(source, Rope.plain(16), 64, tmp_path)),
        ("config.json", lambda: write_lengths(source, 64, tmp_path)),
        ("result.json", lambda: write_json(tmp_path / "result.json", {"a": 1})),
    ):
        with pytest.raises(OSError, match=f"No space left on device: .*/{name}"):
            make()
        assert contents(tmp_path) == before
