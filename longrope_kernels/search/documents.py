"""Texts in files as token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

BYTES = "bytes"
JSON_LINES = (".jsonl", ".ndjson")
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, eq=False)
class Document:
    """One text: its name (file, or file and line) and tokens, (length,) int64."""

    name: str
    tokens: torch.Tensor


@dataclass(frozen=True)
class Encoder:
    """Text to ids, without special tokens; ``start`` are those that stand before a document.

    Raises where a text has ids of ``known`` or more, which no embedding of the model is for.
    """

    encode: Encode
    start: tuple[int, ...] = ()
    known: int | None = None

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        ids = self.encode(text)
        largest = max([*self.start, *ids], default=0)
        if self.known is not None and largest >= self.known:
            raise ValueError(
                f"--tokenizer: expected ids below {self.known}, which the model knows, got "
                f"{largest}"
            )
        return ids


def encoder(tokenizer: str, known: int | None = None) -> Encoder:
    """The `Encoder` of a tokenizer.

    Args:
        tokenizer: "bytes" for the UTF-8 bytes of a text, of models with a vocabulary of 256, or a
            folder (or name) that ``AutoTokenizer.from_pretrained`` takes.
        known: how many ids the model knows; None where it is not asked.

    Raises:
        ValueError: there is no tokenizer.
    """
    if tokenizer == BYTES:
        return Encoder(lambda text: list(text.encode()), known=known)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"tokenizer: found none in {tokenizer} ({first}); name the folder of one, or {BYTES!r} "
            "for a model over bytes"
        ) from None

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.encode(text, add_special_tokens=False)
        return ids

    whole, plain = loaded.encode("a"), encode("a")
    ends = (i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain)
    return Encoder(encode, tuple(whole[: next(ends, 0)]), known)


def texts(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, files of a folder in the order of their names.

    Args:
        paths: text files (one document each), JSON lines (``.jsonl``, ``.ndjson``; a document in
            each line, an object with the key "text"), and folders of both.

    Raises:
        ValueError: a file or folder that is not there, empty or not UTF-8, a file that is there
            twice, or a line that is no such object; named in the message.
    """
    seen: set[str] = set()
    for path in paths:
        if path.is_dir():
            files = sorted(_files(path))
            if not files:
                raise ValueError(f"{path}: expected texts, got a folder without files")
        elif path.is_file():
            files = [path]
        else:
            raise ValueError(f"{path}: there is no such file or folder")
        for file in files:
            place = os.path.abspath(file)
            if place in seen:
                raise ValueError(f"{file}: expected each text once, got it twice")
            seen.add(place)
            try:
                content = file.read_text("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: expected text in UTF-8, got {error}") from None
            if file.suffix.lower() in JSON_LINES:
                yield from _json_lines(file, content)
            else:
                yield str(file), content


def _files(folder: Path) -> Iterator[Path]:
    """Those in it, where no name has a dot in front; links are followed, to each folder once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files = (Path(place, name) for name in names if name[0] != ".")
        yield from (file for file in files if file.is_file())


def _json_lines(file: Path, content: str) -> Iterator[tuple[str, str]]:
    # Not splitlines, which also splits at characters that JSON leaves as they are.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        name = f"{file}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{name}: expected JSON, got {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise ValueError(f'{name}: expected an object with "text", got {line[:60]}')
        try:
            value["text"].encode()
        except UnicodeEncodeError as error:  # JSON can name halves of characters
            raise ValueError(f"{name}: expected text that UTF-8 can say, got {error}") from None
        yield name, value["text"]


def read_documents(
    paths: Sequence[Path],
    encode: Encode,
    length: int = 2,
    *,
    most: int | None = None,
    short: Literal["error", "skip"] = "error",
) -> list[Document]:
    """The documents of `texts` as tokens.

    Args:
        paths: as in `texts`.
        encode: of `encoder`, whose ``start`` each document begins with, or any other.
        length: the fewest tokens a document must have, those a model is measured at.
        most: how many documents to read; the rest is left. None for all.
        short: "error", or "skip" to leave out documents with fewer tokens.

    Raises:
        ValueError: as `texts`; a document is too short, named with its tokens; none is left.
    """
    documents: list[Document] = []
    longest = 0
    for name, text in texts(paths):
        if most is not None and len(documents) == most:
            break
        tokens = torch.tensor([*getattr(encode, "start", ()), *encode(text)], dtype=torch.int64)
        longest = max(longest, len(tokens))
        if len(tokens) >= length:
            documents.append(Document(name, tokens))
        elif short == "error":
            raise ValueError(
                f"{name}: expected at least {length} tokens, the length to measure at, got "
                f"{len(tokens)}; short='skip' (--skip-short, not of extend) leaves such out"
            )
    if not documents:
        shown = ", ".join(map(str, paths))
        raise ValueError(
            f"{shown}: expected a document of {length} tokens or more, the longest has {longest}"
        )
    return documents


def tails(
    documents: Sequence[Document], longest: int, length: int, start: int = 0
) -> list[Document]:
    """The same ends of documents, after more or less of what stands before them.

    Args:
        documents: each of at least ``longest`` tokens.
        longest: where all end, in tokens of the documents.
        length: of the results, in tokens, up to ``longest``.
        start: how many tokens each document begins with that are no text (`Encoder.start`); they
            stay in front, since models are trained with them there.

    Returns:
        Documents of ``length`` tokens.
    """
    return [
        Document(
            one.name,
            torch.cat([one.tokens[:start], one.tokens[longest - length + start : longest]]),
        )
        for one in documents
    ]
