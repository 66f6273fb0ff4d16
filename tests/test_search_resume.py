"""A search that is killed, finds the disk full or another run's folder: nothing lost, same result.

Children are forked: they have the imports, so that a hundred of them take seconds.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from space_cases import SMALL, measure, small_space

from longrope_kernels.search import (
    EvolutionarySearch,
    EvolutionSettings,
    Search,
    SearchSpace,
    run_search,
    state,
)
from longrope_kernels.search.cmaes import CmaEsSearch, CmaEsSettings
from longrope_kernels.search.coarse import Sieve

# An odd number of genes: a generator of normal numbers keeps every second one for later.
SPACE = small_space(dim=14, attention="searched")
Make = Callable[[Path | None], Search]


def evolution(folder: Path | None) -> Search:
    return EvolutionarySearch(SPACE, SMALL, folder, {"documents": "abc"})


def short_evolution(folder: Path | None) -> Search:
    return EvolutionarySearch(SPACE, replace(SMALL, iterations=3), folder)


def sifted(folder: Path | None) -> Search:
    """With formulas, and a coarse fitness before the full one."""
    settings = replace(SMALL, iterations=3)
    return EvolutionarySearch(SPACE, settings, folder, None, ("PI", "YaRN"), Sieve(0.4))


def cma_es(folder: Path | None) -> Search:
    return CmaEsSearch(SPACE, CmaEsSettings(population=6, iterations=6, seed=2), folder)


def short_cma_es(folder: Path | None) -> Search:
    return CmaEsSearch(SPACE, CmaEsSettings(population=6, iterations=4, seed=2), folder)


BOTH = pytest.mark.parametrize("make", [evolution, cma_es])


def finish(make: Make, folder: Path | None) -> Search:
    with make(folder) as search:
        run_search(search, measure, coarse=lambda cs, _: measure(cs), batch=3)
    return search


def assert_same(search: Search, make: Make, folder: Path) -> None:
    """As if it had never been stopped; and so the folder says."""
    whole = finish(make, None)
    assert search.done
    assert search.evaluations == whole.evaluations
    assert search.best == whole.best
    assert search.history == whole.history
    rows = [json.loads(line) for line in (folder / state.JOURNAL).read_text().splitlines()]
    names = ("stage", "formula", "factors", "n_hat", "attention")
    assert len(rows) == len({json.dumps([row.get(name) for name in names]) for row in rows})
    assert sum(row["stage"] == "full" for row in rows) == whole.evaluated
    assert len({(row["stage"] == "formulas", row["iteration"], row["place"]) for row in rows}) == (
        whole.judged
    )
    assert not (folder / (state.STATE + ".new")).exists()


def forked(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """The exit status of a child that does ``work``, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            work()
        except OSError as error:
            os._exit(error.errno or 99)
        except BaseException:
            os._exit(98)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("make", [evolution, cma_es, sifted])
def test_killed_at_random_moments(make: Make, tmp_path: Path) -> None:
    rng = Random(4)

    def work() -> None:
        with make(tmp_path) as search:
            slow = lambda cs, *_: (time.sleep(1e-3), measure(cs))[1]  # noqa: E731
            run_search(search, slow, coarse=slow)

    for _ in range(20):
        status = forked(work, kill_after=rng.uniform(0, 0.1))
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert_same(finish(make, tmp_path), make, tmp_path)


class Kill:
    """``os``, but the n-th call that changes the disk kills the process, a write in its middle."""

    def __init__(self, at: int) -> None:
        self.left = at
        for name in ("write", "fsync", "replace", "ftruncate"):
            setattr(self, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    handle, data = arguments
                    call(handle, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("make", [short_evolution, short_cma_es, sifted])
def test_killed_at_every_step_to_the_disk(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each child dies at its n-th step, leaving half of a line where that is a write."""
    for at in range(1, 100):
        folder = tmp_path / str(at)

        def work(at: int = at, folder: Path = folder) -> None:
            monkeypatch.setattr(state, "os", Kill(at))
            finish(make, folder)

        status = forked(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert_same(finish(make, folder), make, folder)
    assert 20 < at < 99


@pytest.mark.parametrize("size", range(0, 9000, 1500))
def test_real_limit_of_file_size(size: int, tmp_path: Path) -> None:
    """The system writes a part, then refuses: what a full disk does."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        finish(evolution, tmp_path)

    assert forked(work) == errno.EFBIG
    journal = tmp_path / state.JOURNAL
    assert journal.stat().st_size <= size
    assert journal.read_bytes()[-1:] in (b"", b"\n")
    assert_same(finish(evolution, tmp_path), evolution, tmp_path)


class FullDisk:
    """``os`` with a call that fails when it is ``full``, a write after half of the data."""

    def __init__(self, name: str) -> None:
        self.full = False
        call = getattr(os, name)

        def wrapper(*arguments: Any) -> Any:
            if not self.full:
                return call(*arguments)
            if name == "write":
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        setattr(self, name, wrapper)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@BOTH
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disk_in_the_journal(
    make: Make, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(call)
    monkeypatch.setattr(state, "os", disk)
    with make(tmp_path) as search:
        search.tell(measure(search.ask()[:2]))
        before, known = contents(tmp_path), search.evaluations
        disk.full = True
        with pytest.raises(OSError, match=r"No space left.*intact.*evaluations\.jsonl") as caught:
            search.tell(measure(search.ask()[:1]))
        assert caught.value.errno == errno.ENOSPC
        assert contents(tmp_path) == before
        assert search.evaluations == known
        disk.full = False
        run_search(search, measure)
    assert_same(search, make, tmp_path)


@BOTH
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_in_the_state(
    make: Make, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(call)
    monkeypatch.setattr(state, "os", disk)
    with make(tmp_path) as search:
        search.tell(measure(search.ask()))
        before = contents(tmp_path)
        disk.full = True
        for _ in range(2):
            with pytest.raises(OSError, match=r"No space left.*intact.*state\.json"):
                search.ask()
        assert contents(tmp_path) == before
        assert not search.done
        disk.full = False
        run_search(search, measure)
    assert_same(search, make, tmp_path)


@BOTH
def test_a_finished_search_stays_finished(make: Make, tmp_path: Path) -> None:
    first = finish(make, tmp_path)
    before = contents(tmp_path)
    with make(tmp_path) as again:
        assert again.done
        assert again.ask() == []
        assert (again.best, again.history) == (first.best, first.history)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("space", "settings", "context", "words"),
    [
        (small_space(), SMALL, "abc", 'space.attention is "searched" there and 1.1180'),
        (SPACE, replace(SMALL, mutants=5), "abc", "settings.mutants is 4 there and 5 here"),
        (SPACE, SMALL, "abd", 'context.documents is "abc" there and "abd" here'),
        (SPACE, replace(SMALL, seed=4, parents=5), "abc", "parents is 6 there and 5 here; sett"),
    ],
)
def test_folder_of_another_run(
    space: SearchSpace, settings: EvolutionSettings, context: str, words: str, tmp_path: Path
) -> None:
    with evolution(tmp_path) as search:
        search.tell(measure(search.ask()[:3]))
    with open(tmp_path / state.JOURNAL, "a") as journal:
        journal.write('{"torn')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="the folder is another run's") as caught:
        EvolutionarySearch(space, settings, tmp_path, {"documents": context})
    assert words in str(caught.value)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match='optimizer is "evolution" there and "cmaes" here'):
        cma_es(tmp_path)
    assert contents(tmp_path) == before


def test_one_search_at_a_time(tmp_path: Path) -> None:
    first = evolution(tmp_path)
    first.tell(measure(first.ask()[:3]))
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="another search has this folder open"):
        evolution(tmp_path)
    assert contents(tmp_path) == before
    first.close()
    with pytest.raises(RuntimeError, match="the search is closed"):
        first.tell(measure(first.ask()[:1]))
    assert evolution(tmp_path).evaluated == 3


def damage(folder: Path, name: str, change: Callable[[str], str]) -> None:
    path = folder / name
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (state.STATE, lambda text: text[:-9], "state.json: expected JSON"),
        (state.STATE, lambda text: "{}", 'expected "format": "longrope_kernels.search"'),
        (
            state.STATE,
            lambda text: text.replace('"version": 4', '"version": 3'),
            "expected version 4, got 3",
        ),
        (state.JOURNAL, lambda text: "x" + text, "evaluations.jsonl, line 1: expected JSON"),
        (
            state.JOURNAL,
            lambda text: text.replace('"n_hat"', '"n"', 1),
            "evaluations.jsonl, line 1: expected an evaluation",
        ),
        (state.JOURNAL, lambda text: text.split("\n", 1)[1], "do not belong together"),
        (state.JOURNAL, lambda text: text.replace('"place": 0', '"place": 99'), "belong together"),
        (
            state.JOURNAL,
            lambda text: (
                text + text.splitlines()[0].replace('"iteration": 0', '"iteration": 7') + "\n"
            ),
            "never asked for",
        ),
    ],
)
def test_damage_is_named(
    name: str, change: Callable[[str], str], words: str, tmp_path: Path
) -> None:
    with evolution(tmp_path) as search:
        search.tell(measure(search.ask()))
        search.tell(measure(search.ask()[:2]))
    damage(tmp_path, name, change)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words):
        evolution(tmp_path)
    assert contents(tmp_path) == before


def test_journal_without_state(tmp_path: Path) -> None:
    finish(evolution, tmp_path)
    (tmp_path / state.STATE).unlink()
    with pytest.raises(ValueError, match=r"expected state\.json beside evaluations\.jsonl"):
        evolution(tmp_path)


def test_samples_that_do_not_come_again_are_named(tmp_path: Path) -> None:
    """As with another version of the library or of NumPy."""
    with cma_es(tmp_path) as search:
        search.tell(measure(search.ask()))
        search.tell(measure(search.ask()))
        search.ask()
    rows = (tmp_path / state.JOURNAL).read_text().splitlines()
    changed = json.loads(rows[0]) | {"fitness": 0.0, "factors": json.loads(rows[0])["factors"]}
    (tmp_path / state.JOURNAL).write_text("\n".join([json.dumps(changed), *rows[1:], ""]))
    with pytest.raises(ValueError, match="folder: expected the samples of iteration 1 again"):
        cma_es(tmp_path)
