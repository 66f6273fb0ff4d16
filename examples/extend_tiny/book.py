"""Results in a file, each made once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longrope_kernels.search.source import read_json, write_json


class Book:
    """The results so far, in a file: what is in it is not done again."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        """Open or begin it.

        Args:
            path: of the file.
            head: ``sizes``, ``text`` and the facts of the ``machine``, with a ``dtype`` where it
                computes in another than the sizes name.
        """
        self.path, self.machine = path, head["machine"]
        self.content: dict[str, Any] = {**head, "results": {}, "seconds": {}}
        if path.exists():
            known = read_json(path)
            for name in ("sizes", "text"):
                if known[name] != json.loads(json.dumps(head[name])):
                    raise SystemExit(f"{path}: it has another {name}; name another --out")
            self.content = known
        for name in ("commits", "machines"):
            self.content.setdefault(name, {})

    @property
    def at_home(self) -> bool:
        """Whether this is the machine that began the file; others are named at what they make."""
        return self.called == _called(self.content["machine"])

    @property
    def called(self) -> str:
        """The machine's name."""
        return _called(self.machine)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name, made where it is missing."""
        if name not in self.content["results"]:
            begin = time.perf_counter()
            self.content["results"][name] = make()
            # Of the run that made it; what an earlier one had done of it is in its own folder.
            self.content["seconds"][name] = round(time.perf_counter() - begin, 1)
            self.content["commits"][name] = self.machine["commit"]
            if not self.at_home:
                self.content["machines"][name] = self.called
            write_json(self.path, self.content)
            print(f"{name}: {self.content['seconds'][name]} s", flush=True)
        return self.content["results"][name]


def _called(machine: Mapping[str, Any]) -> str:
    name = str(machine["gpu"]["name"] if "gpu" in machine else machine["cpu"])
    return f"{name}, {machine['dtype']}" if "dtype" in machine else name
