"""``longrope search | extend | readjust | evaluate | plot``; imports wait until one runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
SkipShort = Annotated[
    bool, typer.Option("--skip-short", help="Leave out documents that are too short.")
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
Fit = Annotated[
    str,
    typer.Option(help="perplexity, or needle: that of the answers about hidden numbers alone."),
]
Optimizer = Annotated[str, typer.Option(help="evolution (LongRoPE's) or cmaes, to compare with.")]
Population = Annotated[int, typer.Option(min=1, help="Candidates of the first iteration.")]
Iterations = Annotated[int, typer.Option(min=1, help="How many, with the first.")]
Mutants = Annotated[int, typer.Option(min=0, help="Made in each later iteration.")]
Crossovers = Annotated[int, typer.Option(min=0, help="Made in each later iteration.")]
Probability = Annotated[float, typer.Option(help="Of a mutation to draw a gene again.")]
Parents = Annotated[int, typer.Option(min=1, help="How many of the best so far have children.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all random choices.")]
Monotone = Annotated[
    bool, typer.Option(help="Whether factors must not fall from one pair to the next.")
]
Attention = Annotated[
    str,
    typer.Option(help="Attention factor: fixed (the paper's formula), searched, or a number."),
]
NHat = Annotated[
    list[int] | None,
    typer.Option(help="Threshold to try; repeat for several. [default: the paper's fourteen]"),
]
Racing = Annotated[
    bool,
    typer.Option(
        "--race/--no-race", help="Give up on candidates that have lost for certain: same result."
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        help="Also give up on candidates so many nats per token behind; may change the result."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Candidates to measure in one forward.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Out = Annotated[
    Path, typer.Option(help="Folder for the results. The same command goes on where it stopped.")
]

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
    samples: Samples = 5,
    skip_short: SkipShort = False,
    tokenizer: Tokens = None,
    original_length: Original = None,
    fitness: Fit = "perplexity",
    last: Last = None,
    stride: Stride = None,
    optimizer: Optimizer = "evolution",
    population: Population = 64,
    iterations: Iterations = 40,
    mutants: Mutants = 16,
    crossovers: Crossovers = 16,
    probability: Probability = 0.3,
    parents: Parents = 32,
    seed: Seed = 0,
    monotone: Monotone = True,
    attention: Attention = "fixed",
    n_hat: NHat = None,
    race: Racing = True,
    margin: Margin = None,
    batch: Batch = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
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

    with _errors("search"):
        options = _options(
            optimizer=optimizer, population=population, iterations=iterations, mutants=mutants,
            crossovers=crossovers, probability=probability, parents=parents, seed=seed,
            monotone=monotone, attention=_attention(attention), critical=critical,
            n_hats=tuple(sorted(set(n_hat))) if n_hat else None, fitness=fitness, last=last,
            stride=stride, race=race, margin=margin, batch=batch,
        )  # fmt: skip
        given = commands.Given(
            model, documents, samples, skip_short, tokenizer, original_length, device, dtype
        )
        commands.search(given, length, options, out, start, start_length)


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
    samples: Samples = 5,
    skip_short: SkipShort = False,
    tokenizer: Tokens = None,
    original_length: Original = None,
    fitness: Fit = "perplexity",
    last: Last = None,
    stride: Stride = None,
    optimizer: Optimizer = "evolution",
    population: Population = 64,
    iterations: Iterations = 40,
    mutants: Mutants = 16,
    crossovers: Crossovers = 16,
    probability: Probability = 0.3,
    parents: Parents = 32,
    seed: Seed = 0,
    monotone: Monotone = True,
    attention: Attention = "fixed",
    n_hat: NHat = None,
    race: Racing = True,
    margin: Margin = None,
    batch: Batch = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find factors for the short lengths of a model that was extended.

    \b
    longrope readjust extended --documents held-out.jsonl --length 4096 --length 8192

    Short sequences then take their own set, and long ones the set they had. A length whose search
    finds nothing better than before gets none. --attention fixed is here the attention factor of
    the set that served the length. Files as those of longrope search; each length has a folder.
    """
    from . import commands

    with _errors("readjust"):
        options = _options(
            optimizer=optimizer, population=population, iterations=iterations, mutants=mutants,
            crossovers=crossovers, probability=probability, parents=parents, seed=seed,
            monotone=monotone, attention=_attention(attention),
            n_hats=tuple(sorted(set(n_hat))) if n_hat else None, fitness=fitness, last=last,
            stride=stride, race=race, margin=margin, batch=batch,
        )  # fmt: skip
        given = commands.Given(
            model, documents, samples, skip_short, tokenizer, original_length, device, dtype
        )
        commands.readjust(given, rope, sorted(set(length)), upper, options, out)


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
    fitness: Fit = "perplexity",
    last: Last = None,
    stride: Stride = None,
    optimizer: Optimizer = "evolution",
    population: Population = 64,
    iterations: Iterations = 40,
    mutants: Mutants = 16,
    crossovers: Crossovers = 16,
    probability: Probability = 0.3,
    parents: Parents = 32,
    seed: Seed = 0,
    monotone: Monotone = True,
    attention: Attention = "fixed",
    n_hat: NHat = None,
    race: Racing = True,
    margin: Margin = None,
    batch: Batch = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
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

    with _errors("extend"):
        options = _options(
            optimizer=optimizer, population=population, iterations=iterations, mutants=mutants,
            crossovers=crossovers, probability=probability, parents=parents, seed=seed,
            monotone=monotone, attention=_attention(attention),
            n_hats=tuple(sorted(set(n_hat))) if n_hat else None, fitness=fitness, last=last,
            stride=stride, race=race, margin=margin, batch=batch,
        )  # fmt: skip
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
            options=options,
            tuning=TuneSettings(
                rate, warmup, rows, accumulate, short_share, recompute, checkpoint_every, seed
            ),
        )
        commands.extend(plan, out, device, dtype)


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
    samples: Samples = 5,
    skip_short: SkipShort = False,
    tokenizer: Tokens = None,
    original_length: Original = None,
    last: Last = None,
    stride: Stride = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure perplexity at several lengths, under several ropes.

    \b
    longrope evaluate ~/models/llama --documents held-out.jsonl --rope search-32k \\
      --length 4096 --length 8192 --length 16384 --length 32768

    Every method sees the same documents at every length; the formulas extend to the longest.
    Prints a table; the folder gets evaluation.json and perplexity.png.
    """
    from . import commands

    with _errors("evaluate"):
        given = commands.Given(
            model, documents, samples, skip_short, tokenizer, original_length, device, dtype
        )
        commands.evaluate(
            given, sorted(set(length)), rope or [], baselines, passkey, last, stride, out
        )


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

    with _errors("plot"):
        commands.plot(folder)


def register(app: typer.Typer) -> None:
    """Add the commands to ``longrope``."""
    for command in (search, extend, readjust, evaluate, plot):
        app.command()(command)


# --------------------------------------------------------------------------------------- arguments


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


def _options(**arguments: Any) -> Options:
    from .find import Options

    return Options(**arguments)


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
