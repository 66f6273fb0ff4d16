"""What each command of the search is told: its help, and its options (options.py says how)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .extend import ExtendPlan
from .find import Options
from .options import Given, Last, Machine, Out, Read, Stride, Upper, ascending, paths

_LENGTHS = Read(list[int], ascending)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find factors for a longer context by LongRoPE's search.

    \b
    longrope search ~/models/llama --documents held-out.jsonl --length 32768 --out search-32k

    Candidates are judged by perplexity over the first documents, cut to the length. The result is
    in the folder: longrope.json (Rope.load), the model's config.json with the new factors,
    result.json, factors.png and history.png. evaluations.jsonl has every candidate. Several
    processes share the candidates: torchrun --nproc-per-node 8 --no-python longrope search ...
    """

    length: Annotated[int, typer.Option(min=2, help="Tokens to extend the model to.")]
    out: Out = Path("longrope-search")
    start: Annotated[
        Path | None,
        typer.Option(
            help="longrope.json of an earlier stage, or its folder; factors multiply its."
        ),
    ] = None
    start_length: Annotated[
        int | None, typer.Option(help="Tokens that stage was for; needed with --start.")
    ] = None
    critical: Annotated[
        int | None,
        typer.Option(min=0, help="LongRoPE2: search from this pair on; 0 takes the theory's."),
    ] = None
    given: Given
    options: Options


@dataclass(frozen=True, kw_only=True)
class Readjust:
    """Find factors for the short lengths of a model that was extended.

    \b
    longrope readjust extended --documents held-out.jsonl --length 4096 --length 8192

    Short sequences then take their own set, and long ones the set they had. A length whose search
    finds nothing better than before gets none. --attention fixed is here the attention factor of
    the set that served the length. Files as those of longrope search; each length has a folder.
    """

    lengths: Annotated[
        tuple[int, ...],
        typer.Option("--length", help="Tokens up to which a set is wanted; repeat for several."),
        _LENGTHS,
    ]
    rope: Annotated[
        Path | None, typer.Option(help="Rope JSON of the extended model. [default: the folder's]")
    ] = None
    out: Out = Path("longrope-readjust")
    upper: Upper = None
    given: Given
    options: Options


@dataclass(frozen=True, kw_only=True)
class Extend:
    """Extend a model step by step: search, fine-tune, readjust.

    \b
    longrope extend ~/models/llama --documents held-out.jsonl --train books.jsonl \\
      --stage 131072:400 --stage 262144:600 --stage 2097152 --short 4096 --short 8192

    Each stage starts from the model and the factors of the one before. plan.json says what is done;
    each step has a folder with its result, and a finished one is not repeated. The folder model has
    the extended model: weights, tokenizer, longrope.json, config.json.
    """

    out: Out = Path("longrope-extend")
    plan: ExtendPlan
    machine: Machine


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure perplexity at several lengths, under several ropes.

    \b
    longrope evaluate ~/models/llama --documents held-out.jsonl --rope search-32k \\
      --length 4096 --length 8192 --length 16384 --length 32768

    Every method sees the same documents at every length; the formulas extend to the longest.
    Prints a table; the folder gets evaluation.json and perplexity.png.
    """

    lengths: Annotated[
        tuple[int, ...], typer.Option("--length", help="Tokens; repeat for several."), _LENGTHS
    ]
    ropes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--rope", help="Rope JSON, or a folder with one, to compare; repeat for several."
        ),
        Read(list[Path] | None, paths),
    ] = ()
    baselines: Annotated[
        bool, typer.Option(help="Compare with no scaling, PI, NTK, dynamic NTK and YaRN.")
    ] = True
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Also the share of hidden numbers it finds.")
    ] = False
    out: Out = Path("longrope-evaluate")
    last: Last = None
    stride: Stride = None
    given: Given


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the pictures of a folder again.

    \b
    longrope plot search-32k

    It may be that of a search that is still running. factors.png: lambda by pair, beside PI, NTK
    and YaRN; history.png: the best perplexity so far; perplexity.png: against length. Only those
    that the folder has the numbers for.
    """

    folder: Annotated[
        Path, typer.Argument(help="Of longrope search, readjust, extend or evaluate.")
    ]
