"""Triton's interpreter, without what it does over and over: two fifths of its time.

For each launch it puts functions of its own into `triton.language`, by a walk over all names there.
It does the same again for each call of a device function, of which a tile makes hundreds, though
what it would put in is in already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any


def patch_once() -> None:
    """Have device functions leave `triton.language` as the launch has patched it."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:  # then nothing is interpreted
        return
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another Triton, as slow as it is
        return

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
