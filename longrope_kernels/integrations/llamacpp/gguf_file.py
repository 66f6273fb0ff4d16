"""GGUF files as llama.cpp reads them: what one says, and a copy with other metadata and tensors.

The package `gguf` finds the parts. Those that stay are copied byte by byte, whatever their types.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np

_FLOAT32 = 0  # of tensors; GGMLQuantizationType.F32
_UINT32, _FLOAT, _STRING = 4, 6, 8  # of values; GGUFValueType
_OWN = "GGUF."  # the reader's names for what stands in the header


class GgufFile:
    """A GGUF file that is whole.

    Attributes:
        path: where it lies.
        architecture: llama.cpp's name for the model's family.
        tensors: names.
    """

    def __init__(self, path: Path) -> None:
        """Read metadata and tensor infos; the weights stay on the disk.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no GGUF file, it is cut short, or it is a part of a model.
        """
        from gguf import GGUFReader

        self.path = path
        with open(path, "rb") as file:
            self._magic = file.read(4)
        if self._magic not in (b"GGUF", b"FUGG"):  # of big-endian ones
            raise ValueError(f"{path}: expected a GGUF file, which begins with GGUF")
        try:
            self._reader = GGUFReader(path)
            self.architecture = str(self["general.architecture"])
        # What the reader says of places that are not there, or numbers that can't be.
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"{path}: expected a whole GGUF file, got {error}") from None
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        end = max((int(t.data_offset + t.n_bytes) for t in self._reader.tensors), default=0)
        if path.stat().st_size < end:
            raise ValueError(
                f"{path}: expected a whole GGUF file of {end} bytes, got {path.stat().st_size}"
            )
        parts = self.get("split.count", 1)
        if parts > 1:
            raise ValueError(
                f"{path}: expected a model in one file, got one of {parts} parts; "
                "llama-gguf-split --merge makes them one"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the metadata, or the default."""
        field = self._reader.fields.get(name)
        return default if field is None else field.contents()

    @property
    def names(self) -> list[str]:
        """Of all metadata."""
        return [name for name in self._reader.fields if not name.startswith(_OWN)]

    def __getitem__(self, name: str) -> Any:
        if name not in self._reader.fields:
            raise ValueError(f"{self.path}: expected {name} in its metadata, got none")
        return self.get(name)

    def copy(
        self,
        target: Path,
        metadata: Mapping[str, int | float | str],
        tensors: Mapping[str, np.ndarray[Any, Any]],
        without: Collection[str] = (),
        over: bool = True,
    ) -> None:
        """Write a copy in which some is otherwise; it is there whole or not at all.

        Args:
            target: the file to write; may be this one.
            metadata: values by name, in place of those of that name or beside the others.
            tensors: (n,) float32 by name, in place of those of that name or before the others.
            without: names of metadata and tensors to leave out.
            over: write over a ``target`` that is there.

        Raises:
            FileExistsError: there is a ``target`` in the end.
            OSError: it could not be written. What was there before is as it was.
        """
        order = ">" if self._reader.endianess.name == "BIG" else "<"
        gone = {*metadata, *tensors, *without}
        values = [
            b"".join(part.tobytes() for part in field.parts)
            for field in map(self._reader.fields.__getitem__, self.names)
            if field.name not in gone
        ]
        values += [_text(n, order) + _value(v, order) for n, v in metadata.items()]
        kept = [tensor for tensor in self._reader.tensors if tensor.name not in gone]
        new = {n: np.ascontiguousarray(x, f"{order}f4") for n, x in tensors.items()}

        align = int(self._reader.alignment)
        infos, at = [], 0
        for name, array in new.items():
            shape = struct.pack(f"{order}IQI", 1, len(array), _FLOAT32)
            infos.append(_text(name, order) + shape + struct.pack(f"{order}Q", at))
            at += _up(array.nbytes, align)
        for tensor in kept:
            *info, _ = tensor.field.parts  # the last is the place of its data
            raw = b"".join(part.tobytes() for part in info)
            infos.append(raw + struct.pack(f"{order}Q", at))
            at += _up(int(tensor.n_bytes), align)
        version = int(self._reader.fields[f"{_OWN}version"].parts[0][0])
        head = self._magic + struct.pack(f"{order}IQQ", version, len(infos), len(values))
        with _whole(target, over) as file:
            _write(file, b"".join([head, *values, *infos]), align)
            for data in (*new.values(), *(tensor.data for tensor in kept)):
                _write(file, data.reshape(-1).view(np.uint8).data, align)


def _text(text: str, order: str) -> bytes:
    raw = text.encode()
    return struct.pack(f"{order}Q", len(raw)) + raw


def _value(value: int | float | str, order: str) -> bytes:
    """Its type and itself."""
    if isinstance(value, str):
        return struct.pack(f"{order}I", _STRING) + _text(value, order)
    if isinstance(value, int):
        return struct.pack(f"{order}II", _UINT32, value)
    return struct.pack(f"{order}If", _FLOAT, value)


def _up(size: int, align: int) -> int:
    return -(-size // align) * align


def _write(file: BinaryIO, data: bytes | memoryview, align: int) -> None:
    file.write(data)
    file.write(bytes(_up(len(data), align) - len(data)))


@contextmanager
def _whole(target: Path, over: bool) -> Iterator[BinaryIO]:
    """A file to write beside ``target`` that takes its place at the end, or goes.

    It is in a folder of its own, where no other process writes and no file of the user is.
    """
    with TemporaryDirectory(prefix=f"{target.name}.new-", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_free(target, over)  # another process may have written it meanwhile
        os.replace(draft, target)


def check_free(target: Path, over: bool) -> None:
    """Refuse a file that is there already, unless it is to be written ``over``."""
    if target.exists() and not over:
        raise FileExistsError(f"{target}: there is such a file; --replace writes over it")
