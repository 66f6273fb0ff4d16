"""LongRoPE in vLLM, each request by its own length: a plugin that vLLM loads by its entry point.

Importing this imports no vLLM. See docs/vllm.md.
"""

from __future__ import annotations

import logging

__all__ = ["register"]


def register() -> None:
    """What vLLM calls in each of its processes (entry point ``vllm.general_plugins``).

    Models of the families in `settings.FAMILIES` become classes of ours, which build vLLM's own
    where the rope is none of ours. In a vLLM that no test has run with nothing else is touched,
    and a model with a rope of ours is refused as it is built, unless ``LONGROPE_VLLM_FORCE=1``.

    Raises:
        RuntimeError: vLLM has not what this relies on.
    """
    from . import contacts

    contacts.register_models()
    if contacts.untested() is None:
        contacts.check_requests()
    else:
        logging.getLogger("vllm.longrope").debug(contacts.untested())
