"""lm-evaluation-harness with LongRoPE: the model class ``longrope``, found where this is imported.

The harness pads the rows of a batch on the right and tells the model nothing of it, so that in its
own class ``hf`` the longest row decides the factor set of all. In this one each row gets what it
gets alone, whatever the batch:

    python -m longrope_kernels.integrations.lm_eval --model longrope \\
        --model_args pretrained=FOLDER --tasks ... --batch_size 8

takes the arguments of ``lm_eval``, which itself finds no classes of other packages. In Python:
``import longrope_kernels.integrations.lm_eval``, then ``lm_eval.simple_evaluate("longrope", ...)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        "longrope_kernels.integrations.lm_eval needs lm_eval: "
        "pip install 'longrope-kernels[lm-eval]'"
    ) from error

from ..rope.files import SIDECAR
from ..rope.value import Rope
from .transformers import ExactRotaryEmbedding, enable

__all__ = ["LongRopeLM"]

_Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context and continuation


@register_model("longrope")
class LongRopeLM(HFLM):
    """A causal model of transformers, enabled with this package.

    Attributes:
        rope: what it is rotated by; the first, where its layers are of several types.
    """

    rope: Rope

    def __init__(self, pretrained: Any, rope: str | Rope | None = None, **arguments: Any) -> None:
        """Load the model and enable it.

        Args:
            pretrained: a folder or name that transformers loads, or a model; of a family that
                `enable` knows.
            rope: a `Rope`, or a file or folder of `Rope.load`. None takes the ``longrope.json`` in
                the folder of the model, which is not looked for on the Hub, or else what its
                config says, as `enable` does.
            arguments: as of the harness's ``hf``, ``max_length`` among them.

        Raises:
            ValueError: what `enable` refuses, as dynamic NTK in a config; ``batch_size`` is auto
                where several processes share requests of a rope of several sets: each would measure
                its batches another number of times, and wait for the others.
        """
        super().__init__(pretrained, **arguments)
        if rope is None and isinstance(pretrained, str):
            folder = Path(pretrained, arguments.get("subfolder") or "")
            rope = str(folder) if (folder / SIDECAR).is_file() else None
        model = enable(self.model, rope=Rope.load(rope) if isinstance(rope, str) else rope)
        found = next(one for one in model.modules() if isinstance(one, ExactRotaryEmbedding))
        self.rope, self._ropes = found.rope, tuple(found.settings.ropes.values())
        sets = max(len(one.sets) for one in self._ropes)
        if sets > 1 and self.world_size > 1 and str(self.batch_size).startswith("auto"):
            raise ValueError(
                "batch_size: expected a number, since several processes share requests of a rope "
                f"of {sets} sets, got {self.batch_size}"
            )

    def _loglikelihood_tokens(
        self, requests: list[_Request], *arguments: Any, **named: Any
    ) -> list[tuple[float, bool]]:
        """As in the harness, with rows of one factor set in a batch.

        Tokens behind a row's end change nothing in it but the set, and that they cannot among rows
        of the same one.
        """
        of_sets: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            length = min(len(context) + len(continuation) - 1, self.max_length)
            sets = tuple(rope.set_index(length) for rope in self._ropes)
            of_sets.setdefault(sets, []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for indices in of_sets.values():
            chosen = [requests[index] for index in indices]
            found = super()._loglikelihood_tokens(chosen, *arguments, **named)
            answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(requests))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
