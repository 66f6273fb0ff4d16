"""What `longrope evaluate` measured, on the disk: the same command does not measure it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .ranks import from_main, rank
from .state import config_hash

FILES = "measured-*.jsonl"  # one for each process


class Measurements:
    """JSON values by what decides them, in lines of a folder's files."""

    def __init__(self, folder: Path, told: Mapping[str, Any]) -> None:
        """Read what is there; ``told``, JSON values, decides all that is measured."""
        self.folder, self.told = folder, told
        # By rank 0: processes that share a sequence have to agree on what is known.
        self._known: dict[str, Any] = from_main(self._read)

    def get(self, name: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The value of that name, made and written where it is missing."""
        key = config_hash({**self.told, **name})
        if key not in self._known:
            self._known[key] = make()
            self._write(json.dumps({"key": key, "value": self._known[key]}))
        return self._known[key]

    def _read(self) -> dict[str, Any]:
        files = sorted(self.folder.glob(FILES))
        return dict(filter(None, (_pair(s) for f in files for s in f.read_bytes().splitlines())))

    def _write(self, line: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / FILES.replace("*", str(rank()))).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # behind whatever was torn


def _pair(line: bytes) -> tuple[str, Any] | None:
    """Key and value; None of a line that was torn when its process was killed."""
    try:
        content = json.loads(line)
        return content["key"], content["value"]
    except (ValueError, TypeError, KeyError):
        return None
