"""The folder of a search: a journal of evaluations and the state, safe against being killed.

``evaluations.jsonl`` gets a line for each evaluation, synced before anything builds on it.
``state.json`` is replaced whole: it is the old or the new one at every moment. Of the journal only
the last line can be torn, and that is cut off before the next one is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

JOURNAL, STATE = "evaluations.jsonl", "state.json"
_FORMAT, _VERSION = "longrope_kernels.search", 4


class SearchFolder:
    """One search on disk. Only one object at a time has a folder open, in whatever process.

    Args:
        folder: made where it is missing.
        config: JSON values; all that decides what the search does. A folder made under another
            one is refused, unchanged.

    Raises:
        ValueError: the folder is another run's (naming what differs), or no search's, or damaged.
        RuntimeError: another search has it open.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.path = Path(folder)
        # As it reads back: tuples are lists in JSON.
        self._config = json.loads(json.dumps(config))
        self.state: dict[str, Any] | None = self._read_state()
        self.rows: list[dict[str, Any]] = []
        self.path.mkdir(parents=True, exist_ok=True)
        journal = self.path / JOURNAL
        if self.state is None and journal.exists() and journal.stat().st_size:
            raise ValueError(f"{self.path}: expected {STATE} beside {JOURNAL}, which has lines")
        self._journal: int | None = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(self._journal, self.path, "search")
            # Another process may have had it open, and gone on, until now.
            self.state = self._read_state()
            self._size = self._read_journal()
        except BaseException:
            self.close()
            raise

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to the journal, and wait until they are on the disk.

        Raises:
            OSError: naming the file; the journal is as it was.
        """
        if self._journal is None:
            raise RuntimeError(f"{self.path}: the search is closed")
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            self._cut()
            while data:
                data = data[os.write(self._journal, data) :]
            os.fsync(self._journal)
        except OSError as error:
            # If this fails as well, the next append does it.
            with contextlib.suppress(OSError):
                self._cut()
            raise _readable(error, self.path / JOURNAL) from error
        self._size = os.fstat(self._journal).st_size

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state, whole.

        Raises:
            OSError: naming the file; the old state is as it was.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "config_hash": config_hash(self._config),
            "config": self._config,
            "state": state,
        }
        target, draft = self.path / STATE, self.path / (STATE + ".new")
        try:
            with open(draft, "w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
            self._sync_names()
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise _readable(error, target) from error

    def close(self) -> None:
        """Let others open the folder."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def __del__(self) -> None:
        if getattr(self, "_journal", None) is not None:
            self.close()

    def _read_state(self) -> dict[str, Any] | None:
        source = self.path / STATE
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: expected JSON, got {error}") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f'{source}: expected "format": "{_FORMAT}", the state of a search')
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{source}: expected version {_VERSION}, got {content.get('version')!r}"
            )
        if not {"config", "config_hash", "state"} <= set(content):
            raise ValueError(
                f"{source}: expected config, config_hash and state, got {sorted(content)}"
            )
        if content["config_hash"] != config_hash(self._config):
            found = differences(content["config"], self._config)
            raise ValueError(
                f"{self.path}: the folder is another run's: {'; '.join(found)}. Name another "
                "folder, or the same settings to go on"
            )
        state: dict[str, Any] = content["state"]
        return state

    def _read_journal(self) -> int:
        """Read the whole lines, and give their size; the next append cuts off a torn one."""
        content = (self.path / JOURNAL).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            for line in whole.splitlines():
                self.rows.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path / JOURNAL}, line {len(self.rows) + 1}: expected JSON, got {error}"
            ) from None
        return len(whole)

    def _cut(self) -> None:
        """Take away what a failed append left."""
        assert self._journal is not None
        if os.fstat(self._journal).st_size != self._size:
            os.ftruncate(self._journal, self._size)

    def _sync_names(self) -> None:
        """Make a new name in the folder survive a loss of power."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Have a file alone, in whatever process; it and its folder are made where they are missing.

    Args:
        path: of the file. Replacing it lets others have the new one.
        what: has the folder, for the error.

    Raises:
        RuntimeError: another has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(file, path.parent, what)
        yield
    finally:
        os.close(file)


def _lock(file: int, folder: Path, what: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"{folder}: another {what} has this folder open; wait for it, or end it"
        ) from None


def config_hash(config: Any) -> str:
    """SHA-256 of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, by the path of its keys."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(there.get(key), here.get(key), inner)
        return found
    return [] if there == here else [f"{name} is {_short(there)} there and {_short(here)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _readable(error: OSError, path: Path) -> OSError:
    return OSError(
        error.errno,
        f"{error.strerror}; what the search saved before is intact, and the same call goes on "
        "from it",
        str(path),
    )
