"""Triton's interpreter, without what it does for nothing: half of its time.

For each launch it puts functions of its own into `triton.language`, by a walk over all names there.
It does the same again for each call of a device function, of which a tile makes hundreds, though
what it would put in is in already. And of each sum, difference and product of int32 it works out
whether it overflows, for an assertion that only ``debug`` turns on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any


def hasten() -> None:
    """Have launches alone patch `triton.language`, and arithmetic work out what is asserted."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:  # then nothing is interpreted
        return
    patch = getattr(interpreter, "_patch_lang", None)
    builder = getattr(interpreter, "interpreter_builder", None)
    if patch is None or builder is None:  # another Triton, as slow as it is
        return
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)

    @cache
    def languages(function: Callable[..., Any]) -> list[ModuleType]:
        """What of Triton's language the function knows by name: the interpreter patches that."""
        names = function.__globals__.values()
        return [x for x in (language, language.core) if any(name is x for name in names)]

    def patch_what_is_not(function: Callable[..., Any]) -> Any:
        if any(language.core.is_builtin(module.load) for module in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not
