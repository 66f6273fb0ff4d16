"""``longrope search | extend | readjust | evaluate | plot``; heavy imports wait until one runs."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from .commands import Extend, Plot, Readjust, Search
from .evaluate import Evaluate


def register(app: typer.Typer) -> None:
    """Add the commands to ``longrope``."""
    for command in (Search, Extend, Readjust, Evaluate, Plot):
        app.command(command.__name__.lower())(_function(command))


def _function(command: type[Any]) -> Callable[..., None]:
    """What Typer reads: a signature in which each option is a parameter."""
    name = command.__name__.lower()

    def run(**values: Any) -> None:
        with _errors(name):
            _made(command, values).run()

    parameters = list(_parameters(command))
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {x.name: x.annotation for x in parameters}
    return run


def _parameters(group: type[Any]) -> Iterator[inspect.Parameter]:
    for name, default, kind, notes in _options(group):
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _parameters(kind)
        elif notes:
            option, *reads = notes
            for read in reads:
                kind, default = read.type, default if default is MISSING else read.default
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=Annotated[kind, option],
            )


def _made(group: type[Any], values: Mapping[str, Any]) -> Any:
    """The group of the values that were given."""
    made = {}
    for name, _, kind, notes in _options(group):
        if isinstance(kind, type) and is_dataclass(kind):
            made[name] = _made(kind, values)
        elif name in values:
            made[name] = notes[1].read(values[name]) if len(notes) > 1 else values[name]
    return group(**made)


def _options(group: type[Any]) -> Iterator[tuple[str, Any, Any, list[Any]]]:
    """The fields: name, default, type, and what it is annotated by."""
    hints = get_type_hints(group, include_extras=True)
    for one in fields(group):
        hint = hints[one.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        yield one.name, one.default, kind, notes


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
