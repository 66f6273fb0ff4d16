"""Which factor set a request takes: the policies, and the length that each goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...rope.value import Rope

KEY = "longrope_policy"  # in the extra_args of a request, vllm_xargs over HTTP
POLICIES = ("final", "prompt", "recompute")


def check_policy(name: str, value: object) -> str:
    """A policy from outside, or a ValueError that begins with ``name``."""
    if isinstance(value, str) and value in POLICIES:
        return value
    why = ", which belongs to mode 'unrotated', which is not built yet" if value == "switch" else ""
    shown = ", ".join(map(repr, POLICIES))
    raise ValueError(f"{name}: expected one of {shown}, got {value!r}{why}")


@dataclass(frozen=True)
class Policies:
    """The rope of a server, and what its requests choose a factor set by.

    Scheduler and workers ask the same question, in processes of their own: the answer depends on
    nothing but what both know of a request.

    Attributes:
        rope: with its factor sets.
        default: the policy of requests that name none.
    """

    rope: Rope
    default: str

    def of(self, params: Any) -> str:
        """The policy of a request with these sampling parameters.

        Raises:
            ValueError: naming ``longrope_policy``, which is none of `POLICIES`.
        """
        given = (getattr(params, "extra_args", None) or {}).get(KEY)
        return self.default if given is None else check_policy(KEY, given)

    def index(self, params: Any, prompt: int, known: int, limit: int) -> int:
        """The factor set of a request in one step of the engine.

        Args:
            params: its sampling parameters.
            prompt: tokens of its prompt.
            known: tokens that it has, those that this step computes included. Under "recompute"
                all cached ones were computed under the set of a length as long, which is what the
                scheduler sees to.
            limit: the most tokens that a request may have here.
        """
        policy = self.of(params)
        if policy == "recompute":
            return self.rope.set_index(known)
        if policy == "prompt":
            return self.rope.set_index(prompt)
        return self.rope.set_index(min(prompt + params.max_tokens, limit))
