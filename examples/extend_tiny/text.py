"""Real long text that every machine has: the sources of Python's standard library, byte by byte."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# Tests are not shipped everywhere; the others are tables and not text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"} | {
    "pydoc_data",
    "__pycache__",
}
LONG_FILE = 40_000  # bytes: a file that can be held out
EVERY = 4  # of the long files, this one is held out


@dataclass(frozen=True)
class Corpus:
    """Texts as uint8 tensors; the long files that are held out are in no training window."""

    training: tuple[torch.Tensor, ...]
    held_out: dict[str, torch.Tensor]

    @property
    def digest(self) -> str:
        """Which bytes these are: the texts differ from one Python to the next."""
        total = hashlib.sha256()
        for text in (*self.training, *self.held_out.values()):
            total.update(text.numpy().tobytes())
        return total.hexdigest()[:16]


def read_corpus(root: Path | None = None) -> Corpus:
    """Every module below ``root`` (default: the standard library), split by file.

    Raises:
        RuntimeError: there is no long file, so nothing could be held out.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    training, held_out, long_files = [], {}, 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts):
            continue
        text = path.read_bytes()
        if len(text) >= LONG_FILE:
            long_files += 1
            if long_files % EVERY == 0:
                held_out[name.as_posix()] = _tensor(text)
                continue
        if text:
            training.append(_tensor(text))
    if not held_out:
        raise RuntimeError(f"{root} holds {long_files} files of {LONG_FILE} bytes; expected 4")
    return Corpus(tuple(training), held_out)


def _tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows:
    """Random windows of the training text, some with keys to remember.

    A window with keys holds lines like ``KEY_Q = 48213`` and, later, ``print(KEY_Q)  # 48213``, so
    that the model learns to look a number up at the length it is trained at.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int, with_keys: float = 0.125) -> None:
        self.text = torch.cat(corpus.training)
        self.length, self.with_keys = length, with_keys
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, rows: int) -> torch.Tensor:
        """(rows, length) int64."""
        starts = self._integers(len(self.text) - self.length, rows)
        windows = self.text[starts[:, None] + torch.arange(self.length)]
        for window in windows[: round(self.with_keys * rows)]:
            self._add_keys(window)
        return windows.long()

    def _add_keys(self, window: torch.Tensor, keys: int = 3) -> None:
        letters = torch.randperm(26, generator=self.generator)[:keys].tolist()
        numbers = (10_000 + self._integers(90_000, keys)).tolist()
        room = self.length - keys * (len(key_line("A", 0)) + len(question_line("A", 0)))
        # The keys come first, each question after all of them, with text between.
        cuts = sorted(self._integers(room + 1, 2 * keys).tolist())
        lines = [key_line(chr(65 + x), n) for x, n in zip(letters, numbers, strict=True)]
        asked = [question_line(chr(65 + x), n) for x, n in zip(letters, numbers, strict=True)]
        order = torch.randperm(keys, generator=self.generator).tolist()
        text, pieces, last = bytes(window.tolist()), [], 0
        for cut, line in zip(cuts, lines + [asked[i] for i in order], strict=True):
            pieces += [text[last:cut], line]
            last = cut
        window.copy_(_tensor(b"".join([*pieces, text[last:room]])))

    def _integers(self, high: int, count: int) -> torch.Tensor:
        return torch.randint(0, high, (count,), generator=self.generator)


def key_line(letter: str, number: int) -> bytes:
    return f"\nKEY_{letter} = {number:05d}\n".encode()


def question_line(letter: str, number: int) -> bytes:
    """The number is the answer: the last ``ANSWER`` bytes but one."""
    return f"\nprint(KEY_{letter})  # {number:05d}\n".encode()


ANSWER = 5  # bytes of a number
