"""``longrope search | extend | readjust | evaluate | plot``; imports wait until one runs."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

if TYPE_CHECKING:
    from .find import Options

# ------------------------------------------------------------------- what several commands take

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a local Hugging Face model.")
]
Texts = Annotated[
    list[Path],
    typer.Option(
        "--documents",
        help="Text file, .jsonl (key text) or folder of them; repeat for several. Not the texts "
        "the model was trained on.",
    ),
]
Samples = Annotated[
    int, typer.Option(min=1, help="Documents to take, the first ones (the paper: 5).")
]
Tokens = Annotated[
    str | None, typer.Option(help="Folder of a tokenizer, or bytes. [default: the model's]")
]
Original = Annotated[
    int | None, typer.Option(help="Tokens the model was first trained for. [default: its config's]")
]
Last = Annotated[
    int | None, typer.Option(help="Score the last so many tokens of each document alone.")
]
Stride = Annotated[
    int | None, typer.Option(help="Slide a window over whole documents in steps of so many tokens.")
]
Out = Annotated[
    Path, typer.Option(help="Folder for the results. The same command goes on where it stopped.")
]


class TextOptions(NamedTuple):
    """Of the texts that candidates are measured on."""

    samples: Samples = 5
    skip_short: Annotated[
        bool, typer.Option("--skip-short", help="Leave out documents that are too short.")
    ] = False
    tokenizer: Tokens = None
    original_length: Original = None


class SearchOptions(NamedTuple):
    """Of the search itself."""

    fitness: Annotated[
        str,
        typer.Option(help="perplexity, or needle: that of the answers about hidden numbers alone."),
    ] = "perplexity"
    last: Last = None
    stride: Stride = None
    optimizer: Annotated[
        str, typer.Option(help="evolution (LongRoPE's) or cmaes, to compare with.")
    ] = "evolution"
    population: Annotated[int, typer.Option(min=1, help="Candidates of the first iteration.")] = 64
    iterations: Annotated[int, typer.Option(min=1, help="How many, with the first.")] = 40
    mutants: Annotated[int, typer.Option(min=0, help="Made in each later iteration.")] = 16
    crossovers: Annotated[int, typer.Option(min=0, help="Made in each later iteration.")] = 16
    probability: Annotated[float, typer.Option(help="Of a mutation to draw a gene again.")] = 0.3
    parents: Annotated[
        int, typer.Option(min=1, help="How many of the best so far have children.")
    ] = 32
    seed: Annotated[int, typer.Option(min=0, help="Of all random choices.")] = 0
    monotone: Annotated[
        bool, typer.Option(help="Whether factors must not fall from one pair to the next.")
    ] = True
    attention: Annotated[
        str,
        typer.Option(help="Attention factor: fixed (the paper's formula), searched, or a number."),
    ] = "fixed"
    n_hat: Annotated[
        list[int] | None,
        typer.Option(help="Threshold to try; repeat for several. [default: the paper's fourteen]"),
    ] = None
    race: Annotated[
        bool,
        typer.Option(
            "--race/--no-race",
            help="Give up on candidates that have lost for certain: same result.",
        ),
    ] = True
    margin: Annotated[
        float | None,
        typer.Option(
            help="Also give up on candidates so many nats per token behind; may change the result."
        ),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Candidates to measure in one forward.")] = 1

    def options(self, critical: int | None = None) -> Options:
        """What the search takes; ``critical`` as there."""
        from .find import Options

        given = self._asdict()
        n_hats = given.pop("n_hat")
        given["n_hats"] = tuple(sorted(set(n_hats))) if n_hats else None
        given["attention"] = _attention(self.attention)
        return Options(**given, critical=critical)


class MachineOptions(NamedTuple):
    """Of where the model runs, and in what."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"


# ---------------------------------------------------------------------------------- the commands


def search(
    model: Model,
    documents: Texts,
    length: Annotated[int, typer.Option(min=2, help="Tokens to extend the model to.")],
    out: Out = Path("longrope-search"),
    start: Annotated[
        Path | None,
        typer.Option(
            help="longrope.json of an earlier stage, or its folder; factors multiply its."
        ),
    ] = None,
    start_length: Annotated[
        int | None, typer.Option(help="Tokens that stage was for; needed with --start.")
    ] = None,
    critical: Annotated[
        int | None,
        typer.Option(min=0, help="LongRoPE2: search from this pair on; 0 takes the theory's."),
    ] = None,
    *,
    texts: TextOptions,
    how: SearchOptions,
    machine: MachineOptions,
) -> None:
    """Find factors for a longer context by LongRoPE's search.

    \b
    longrope search ~/models/llama --documents held-out.jsonl --length 32768 --out search-32k

    Candidates are judged by perplexity over the first documents, cut to the length. The result is
    in the folder: longrope.json (Rope.load), the model's config.json with the new factors,
    result.json, factors.png and history.png. evaluations.jsonl has every candidate. Several
    processes share the candidates: torchrun --nproc-per-node 8 --no-python longrope search ...
    """
    from . import commands

    given = commands.Given(model, documents, *texts, *machine)
    commands.search(given, length, how.options(critical), out, start, start_length)


def readjust(
    model: Model,
    documents: Texts,
    length: Annotated[
        list[int], typer.Option(help="Tokens up to which a set is wanted; repeat for several.")
    ],
    rope: Annotated[
        Path | None, typer.Option(help="Rope JSON of the extended model. [default: the folder's]")
    ] = None,
    out: Out = Path("longrope-readjust"),
    upper: Annotated[
        float | None,
        typer.Option(help="The largest factor. [default: the root of the long set's, >= 1.25]"),
    ] = None,
    *,
    texts: TextOptions,
    how: SearchOptions,
    machine: MachineOptions,
) -> None:
    """Find factors for the short lengths of a model that was extended.

    \b
    longrope readjust extended --documents held-out.jsonl --length 4096 --length 8192

    Short sequences then take their own set, and long ones the set they had. A length whose search
    finds nothing better than before gets none. --attention fixed is here the attention factor of
    the set that served the length. Files as those of longrope search; each length has a folder.
    """
    from . import commands

    given = commands.Given(model, documents, *texts, *machine)
    commands.readjust(given, rope, sorted(set(length)), upper, how.options(), out)


def extend(
    model: Model,
    documents: Texts,
    stage: Annotated[
        list[str],
        typer.Option(
            metavar="LENGTH[:STEPS]",
            help="A length in tokens, and how many steps to fine-tune there; repeat, ascending.",
        ),
    ],
    train: Annotated[
        list[Path] | None,
        typer.Option(help="Texts to fine-tune on, like --documents and not the same."),
    ] = None,
    short: Annotated[
        list[int] | None,
        typer.Option(help="Length that gets a set of its own at the end; repeat for several."),
    ] = None,
    out: Out = Path("longrope-extend"),
    rate: Annotated[float, typer.Option(help="Learning rate (the paper: 2e-5).")] = 2e-5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of warm-up (the paper: 20).")] = 20,
    rows: Annotated[
        int, typer.Option(min=1, help="Windows of text in a forward, in each process.")
    ] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="Forwards in a step.")] = 1,
    short_share: Annotated[
        float,
        typer.Option(help="LongRoPE2: share of forwards over short windows, not rescaled."),
    ] = 0.0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Gradient checkpointing: less memory.")
    ] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="In steps.")] = 50,
    upper: Annotated[
        float | None,
        typer.Option(help="The largest factor of the sets for --short, as in longrope readjust."),
    ] = None,
    samples: Samples = 5,
    tokenizer: Tokens = None,
    original_length: Original = None,
    *,
    how: SearchOptions,
    machine: MachineOptions,
) -> None:
    """Extend a model step by step: search, fine-tune, readjust.

    \b
    longrope extend ~/models/llama --documents held-out.jsonl --train books.jsonl \\
      --stage 131072:400 --stage 262144:600 --stage 2097152 --short 4096 --short 8192

    Each stage starts from the model and the factors of the one before. plan.json says what is done;
    each step has a folder with its result, and a finished one is not repeated. The folder model has
    the extended model: weights, tokenizer, longrope.json, config.json.
    """
    from . import commands
    from .extend import ExtendPlan, Stage
    from .tune import TuneSettings

    plan = ExtendPlan(
        model=str(model),
        documents=tuple(map(str, documents)),
        stages=tuple(Stage(*_numbers(text)) for text in stage),
        training=tuple(map(str, train or ())),
        short=tuple(sorted(set(short or ()))),
        samples=samples,
        tokenizer=tokenizer,
        original=original_length,
        upper=upper,
        options=how.options(),
        tuning=TuneSettings(
            rate, warmup, rows, accumulate, short_share, recompute, checkpoint_every, how.seed
        ),
    )
    commands.extend(plan, out, *machine)


def evaluate(
    model: Model,
    documents: Texts,
    length: Annotated[list[int], typer.Option(help="Tokens; repeat for several.")],
    rope: Annotated[
        list[Path] | None,
        typer.Option(help="Rope JSON, or a folder with one, to compare; repeat for several."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Compare with no scaling, PI, NTK, dynamic NTK and YaRN.")
    ] = True,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Also the share of hidden numbers it finds.")
    ] = False,
    out: Out = Path("longrope-evaluate"),
    *,
    texts: TextOptions,
    last: Last = None,
    stride: Stride = None,
    machine: MachineOptions,
) -> None:
    """Measure perplexity at several lengths, under several ropes.

    \b
    longrope evaluate ~/models/llama --documents held-out.jsonl --rope search-32k \\
      --length 4096 --length 8192 --length 16384 --length 32768

    Every method sees the same documents at every length; the formulas extend to the longest.
    Prints a table; the folder gets evaluation.json and perplexity.png.
    """
    from . import commands

    given = commands.Given(model, documents, *texts, *machine)
    commands.evaluate(given, sorted(set(length)), rope or [], baselines, passkey, last, stride, out)


def plot(
    folder: Annotated[
        Path, typer.Argument(help="Of longrope search, readjust, extend or evaluate.")
    ],
) -> None:
    """Draw the pictures of a folder again.

    \b
    longrope plot search-32k

    It may be that of a search that is still running. factors.png: lambda by pair, beside PI, NTK
    and YaRN; history.png: the best perplexity so far; perplexity.png: against length. Only those
    that the folder has the numbers for.
    """
    from . import commands

    commands.plot(folder)


def register(app: typer.Typer) -> None:
    """Add the commands to ``longrope``."""
    for command in (search, extend, readjust, evaluate, plot):
        app.command()(_for_typer(command))


# --------------------------------------------------------------------------------------- arguments


def _for_typer(command: Callable[..., None]) -> Callable[..., None]:
    """The command, its errors as lines, and the fields of its named tuples as options, in place.

    Typer reads a signature, in which each option is a parameter.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups = {x.name: x.annotation for x in own if hasattr(x.annotation, "_fields")}
    parameters = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for x in own
        for option in (_fields(x.annotation) if x.name in groups else (x,))
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        with _errors(command.__name__):
            for name, group in groups.items():
                values[name] = group(**{field: values.pop(field) for field in group._fields})
            command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {x.name: x.annotation for x in parameters}
    return run


def _fields(group: Any) -> Iterator[inspect.Parameter]:
    """The fields of a named tuple, all of which have a default, as parameters."""
    for name, annotation in get_type_hints(group, include_extras=True).items():
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=group._field_defaults[name],
            annotation=annotation,
        )


@contextmanager
def _errors(command: str) -> Iterator[None]:
    """What a user can mend is one line and exit status 1; packages that are missing too."""
    needed = ("transformers", "matplotlib", "tqdm")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise ValueError(f"needs {', '.join(missing)}: pip install 'longrope-kernels[search]'")
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        typer.echo(f"longrope {command}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"longrope {command}: stopped; the same command goes on", err=True)
        raise typer.Exit(130) from None


def _attention(text: str) -> float | str | None:
    if text == "fixed":
        return None
    if text == "searched":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--attention: expected fixed, searched or a number, got {text!r}"
        ) from None


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--stage: expected LENGTH or LENGTH:STEPS, got {text!r}")
    return numbers
