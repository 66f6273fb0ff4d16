"""Which factor set a request takes: the policies, and the length that each goes by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...rope.value import Rope

KEY = "longrope_policy"  # in the extra_args of a request, vllm_xargs over HTTP
# By mode, the default first. Keys that lie rotated can not take another set: none switches there.
POLICIES = {
    "rotated": ("recompute", "final", "prompt"),
    "unrotated": ("switch", "final", "prompt", "recompute"),
}


def check_names(
    where: str, given: Iterable[object], expected: Sequence[str], begin: str = "longrope"
) -> None:
    """Raise a ValueError for a name that begins like ours and is none: one that was misspelt."""
    for name in given:
        if str(name).lower().startswith(begin.lower()) and name not in expected:
            raise ValueError(f"{where}: expected {' or '.join(expected)}, got {name!r}")


def check_policy(name: str, value: object, mode: str) -> str:
    """A policy from outside, or a ValueError that begins with ``name``."""
    served = POLICIES[mode]
    if isinstance(value, str) and value in served:
        return value
    shown = ", ".join(map(repr, served))
    why = ", which needs mode 'unrotated'" if value == "switch" else ""
    raise ValueError(f"{name}: expected one of {shown} in mode {mode!r}, got {value!r}{why}")


@dataclass(frozen=True)
class Policies:
    """The rope of a server, and what its requests choose a factor set by.

    Scheduler and workers ask the same question, in processes of their own: the answer depends on
    nothing but what both know of a request.

    Attributes:
        rope: with its factor sets.
        default: the policy of requests that name none.
        mode: how keys lie in the cache, "rotated" or "unrotated".
    """

    rope: Rope
    default: str
    mode: str

    @property
    def without_scheduler(self) -> str:
        """The policies that need no scheduler of ours, as an error shows them."""
        return " or ".join(repr(name) for name in POLICIES[self.mode] if name != "recompute")

    def of(self, params: Any) -> str:
        """The policy of a request with these sampling parameters.

        Raises:
            ValueError: naming ``longrope_policy``, which is none of those of the mode.
        """
        given = (getattr(params, "extra_args", None) or {}).get(KEY)
        return self.default if given is None else check_policy(KEY, given, self.mode)

    def lengths(
        self, params: Any, prompt: int, begun: int, end: int, limit: int
    ) -> tuple[int, int]:
        """Between which lengths a query of a request chooses its set by the tokens up to it.

        Args:
            params: sampling parameters of the request.
            prompt: tokens of its prompt.
            begun: tokens that it had before this step of the engine, or before its prefill: all
                chunks of a prefill take the set of its end.
            end: tokens that it has with those that this step computes; drafts that may yet be
                refused may be among them.
            limit: the most tokens that a request may have here.

        Returns:
            The least and the greatest length. They are the same but under "switch", where only what
            a prefill computes is held to its end. Under "recompute" all cached keys were computed
            under the set of a length as long, which is what the scheduler sees to.
        """
        policy = self.of(params)
        known = max(begun, end)
        if policy == "switch":
            return (begun if end <= begun else 0), known
        if policy == "recompute":
            # The last token of a request is never computed, what is drafted beyond it is no token.
            known = min(known, prompt + params.max_tokens - 1)
            return known, known
        length = prompt if policy == "prompt" else min(prompt + params.max_tokens, limit)
        return length, length

    def index(self, params: Any, prompt: int, known: int, limit: int) -> int:
        """The factor set of the last of a request's ``known`` tokens; see `lengths`."""
        return self.rope.set_index(self.lengths(params, prompt, known, known, limit)[1])
