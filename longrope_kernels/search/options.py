"""What the commands are told: dataclasses whose fields have their help, and each default once.

The command line is made from them: a field that is ``Annotated`` by a `typer.Option` or
`typer.Argument` is an option, and a field that is such a dataclass stands for its options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..rope.files import SIDECAR
from .documents import BYTES, Document, Encode, Encoder, encoder, read_documents
from .model import TransformersLosses
from .ranks import is_main, sequence_group
from .source import Source, load_model, open_source, repeats

_Read = str | Path | None  # a file or folder that is read


class Read(NamedTuple):
    """Of an option whose text is another type than the field: that type, and how it is read."""

    type: Any
    read: Callable[[Any], Any]
    default: Any = None


def ascending(numbers: list[int] | None) -> tuple[int, ...]:
    """Each once."""
    return tuple(sorted(set(numbers or ())))


def paths(given: list[Path] | None) -> tuple[str, ...]:
    """As text."""
    return tuple(map(str, given or ()))


LENGTHS = Read(list[int], ascending)
Upper = Annotated[
    float | None,
    typer.Option(help="The largest factor. [default: the root of the long set's, >= 1.25]"),
]


Out = Annotated[
    Path,
    typer.Option(
        file_okay=False, help="Folder for the results. The same command goes on where it stopped."
    ),
]


def tell(lines: Iterable[str]) -> None:
    """What a user should know, and nobody needs."""
    for line in lines if is_main() else ():
        typer.echo(line, err=True)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A model, and the texts that candidates are measured on."""

    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder of a local Hugging Face model."),
        Read(Path, str),
    ]
    documents: Annotated[
        tuple[str, ...],
        typer.Option(
            help="Text file, .jsonl (key text) or folder of them; repeat for several. Not the "
            "texts the model was trained on."
        ),
        Read(list[Path], paths),
    ]
    samples: Annotated[
        int, typer.Option(min=1, help="Documents to take, the first ones (the paper: 5).")
    ] = 5
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of a tokenizer, or bytes. [default: the model's]")
    ] = None
    original: Annotated[
        int | None,
        typer.Option(
            "--original-length",
            help="Tokens the model was first trained for. [default: its config's]",
        ),
    ] = None

    def check_out(self, out: Path, written: Iterable[str], *others: tuple[str, _Read]) -> None:
        """Refuse a folder of results in which something would be written over what is read.

        Args:
            out: the folder.
            written: the names in it of the files that are written, and of the folders with more.
            others: what else is read, each behind the name of its option.

        Raises:
            ValueError: naming what is read and what is written.
        """
        tokenizer = None if self.tokenizer == BYTES else self.tokenizer
        texts = (("--documents", path) for path in self.documents)
        read = (("the model", self.model), ("--tokenizer", tokenizer), *texts, *others)
        places = {(out / name).resolve(): out / name for name in written}
        for what, given in read:
            if given is not None:
                path = Path(given).resolve()
                path = path / SIDECAR if path.is_dir() else path  # as all write it
                for place in places.keys() & {path, *path.parents}:
                    raise ValueError(
                        f"--out: expected another folder than that of {what}, got {out}: "
                        f"{places[place]} would be written over"
                    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the model runs, and in what."""

    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto: a GPU where there is one.")
    ] = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto: float32 on a CPU, as the weights on a GPU."
        ),
    ] = "auto"
    context_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes of torchrun that share each sequence, in the order of their ranks.",
        ),
    ] = 1


@dataclass(frozen=True, kw_only=True)
class Given(Texts, Machine):
    """What the commands that measure one model are told, and what they read by it."""

    skip_short: Annotated[
        bool, typer.Option("--skip-short", help="Leave out documents that are too short.")
    ] = False

    def open(
        self, out: Path, written: Iterable[str], *others: tuple[str, _Read]
    ) -> tuple[Source, Encoder]:
        """What is beside the weights, and the tokenizer, where `check_out` lets them."""
        self.check_out(out, written, *others)
        source = open_source(Path(self.model), self.original)
        return source, encoder(self.tokenizer or self.model, source.read.vocab_size)

    def measured(self, encode: Encode, length: int) -> tuple[list[Document], TransformersLosses]:
        """Documents of so many tokens or more, and the model on its device."""
        texts = [Path(path) for path in self.documents]
        documents = read_documents(
            texts, encode, length, most=self.samples, short="skip" if self.skip_short else "error"
        )
        tell(repeats(documents))
        model = load_model(Path(self.model), self.device, self.dtype)
        return documents, TransformersLosses(model, group=sequence_group(self.context_parallel))


Last = Annotated[
    int | None, typer.Option(help="Score the last so many tokens of each document alone.")
]
Stride = Annotated[
    int | None, typer.Option(help="Slide a window over whole documents in steps of so many tokens.")
]
