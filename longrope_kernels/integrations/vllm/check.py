"""``longrope serve-check``: vLLM without and with the plugin beside transformers, on one model.

Each engine has a process of its own, `_serve` below, and is over before the next model is loaded.
Importing this imports no vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...rope.files import SIDECAR
from ...rope.hf_config import rope_type
from ...rope.value import Rope
from .settings import FAMILIES, SCHEDULER, rope_of

_SHORT = 64  # tokens of the short prompt
_BEYOND = 64  # of the long one, above the first set's length
_NEW = 8  # made after each


@dataclass(frozen=True)
class Row:
    """How far log-probabilities of a prompt and of new tokens are from transformers'.

    Attributes:
        tokens: of the prompt.
        server: "vLLM" or "with the plugin".
        most: the largest difference.
        mean: the mean difference.
    """

    tokens: int
    server: str
    most: float
    mean: float


def check(folder: Path, dtype: str = "float32") -> tuple[Rope, list[Row]]:
    """Ask both servers and transformers for the same tokens; offline, greedy, without a tokenizer.

    Args:
        folder: the model, as ``save_pretrained`` wrote it.
        dtype: of weights and activations in all three.

    Raises:
        ValueError: the folder has no model, or its rope is none that the plugin serves.
        RuntimeError: an engine ended; with the end of what it wrote.
    """
    rope, config = _served(folder)
    first = rope.sets[0].max_length or _SHORT
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(config.vocab_size, (tokens,), generator=generator).tolist()
        for tokens in (min(_SHORT, first), first + _BEYOND)
    ]
    asked = {
        "model": str(folder),
        "dtype": dtype,
        "max_model_len": first + _BEYOND + _NEW,
        "prompts": prompts,
    }
    servers = {
        "vLLM": _ask({**asked, "scheduler_cls": None}, plugins=""),
        "with the plugin": _ask({**asked, "scheduler_cls": SCHEDULER}, plugins="longrope"),
    }
    model = _transformers(folder, rope, dtype)
    rows = []
    for index, prompt in enumerate(prompts):
        for server, answers in servers.items():
            made, found = answers[index]
            far = (torch.tensor(found) - _scores(model, prompt, made)).abs()
            rows.append(Row(len(prompt), server, float(far.max()), float(far.mean())))
    return rope, rows


def command_line(folder: Path) -> str:
    """What starts a server of the model, in a shell."""
    served = f"vllm serve {folder} --scheduler-cls {SCHEDULER}"
    if (folder / SIDECAR).is_file():
        return f"VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 {served} --max-model-len LENGTH"
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    return f"{served} --max-model-len {longest}"


def _served(folder: Path) -> tuple[Rope, Any]:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL: expected the folder of a model, got {folder} without config.json")
    config = AutoConfig.from_pretrained(folder)
    architectures = config.architectures or []
    first = next(iter(architectures), None)
    given = SimpleNamespace(model=folder, architecture=first, hf_text_config=config)
    rope = rope_of(given)
    if rope is None:
        if first not in FAMILIES:
            raise ValueError(
                f"MODEL: expected one of {', '.join(FAMILIES)} in config.json, got "
                f"{architectures}; vLLM serves it as ever"
            )
        raise ValueError(
            f"MODEL: expected a rope of type longrope in config.json, or a {SIDECAR} beside it, "
            f"got {rope_type(config)!r}; vLLM serves it as ever"
        )
    return rope, config


def _ask(asked: dict[str, Any], plugins: str) -> list[tuple[list[int], list[float]]]:
    """What an engine with these plugins makes of each prompt: tokens, and all log-probabilities."""
    settings = {
        "VLLM_PLUGINS": plugins,
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "asked.json", Path(folder) / "answers.json"
        given.write_text(json.dumps(asked))
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(given), str(result)],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            kind = "with the plugin" if plugins else "without plugins"
            raise RuntimeError(f"vLLM {kind} ended:\n{done.stdout[-4000:]}")
        answers: list[tuple[list[int], list[float]]] = json.loads(result.read_text())
        return answers


def _serve(given: Path, result: Path) -> None:
    """In a process of its own: start the engine, and write what it makes of each prompt."""
    from vllm import LLM, SamplingParams

    asked = json.loads(given.read_text())
    prompts = [{"prompt_token_ids": one} for one in asked.pop("prompts")]
    engine = LLM(**asked, enforce_eager=True, skip_tokenizer_init=True)
    parameters = SamplingParams(
        max_tokens=_NEW,
        temperature=0.0,
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )
    answers = []
    for out in engine.generate(prompts, parameters, use_tqdm=False):
        made = out.outputs[0]
        steps = [*out.prompt_logprobs[1:], *made.logprobs]
        tokens = [*out.prompt_token_ids[1:], *made.token_ids]
        found = [step[token].logprob for step, token in zip(steps, tokens, strict=True)]
        answers.append((list(made.token_ids), found))
    result.write_text(json.dumps(answers))


def _transformers(folder: Path, rope: Rope, dtype: str) -> Any:
    """Its own model; with the rope of a file beside it, of which transformers knows nothing."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if torch.cuda.is_available():
        model = model.to("cuda")
    if (folder / SIDECAR).is_file():
        from ..transformers import enable

        enable(model, rope=rope)
    return model.eval()


@torch.no_grad()
def _scores(model: Any, prompt: list[int], made: list[int]) -> torch.Tensor:
    """Of all tokens after the first; of each in ``made`` by a forward of what was before it."""

    def last(tokens: list[int], rows: int) -> torch.Tensor:
        logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits
        found: torch.Tensor = logits[0, -rows:].float().log_softmax(-1).cpu()
        return found

    tokens = [*prompt, *made]
    ahead = last(prompt, len(prompt))[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]
    steps = [last(tokens[:at], 1)[0, tokens[at]] for at in range(len(prompt), len(tokens))]
    return torch.cat([ahead, torch.stack(steps)])


if __name__ == "__main__":
    _serve(*map(Path, sys.argv[1:]))
