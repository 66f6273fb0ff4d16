"""Small models, an engine over one, and what transformers says of the same tokens."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from longrope_kernels.integrations.vllm.settings import SCHEDULER
from longrope_kernels.rope.published import published_configs

ORIGINAL = 256  # where the short set of the small models ends, in tokens
VOCABULARY = 512
MODES = ("rotated", "unrotated")

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "initializer_range": 0.06,
}


def published(original: int = ORIGINAL, **parameters: Any) -> dict[str, Any]:
    """rope_parameters with Phi-3-mini's published lists, for heads of 96 dimensions."""
    return {
        **published_configs()["phi-3-mini-128k"]["rope_scaling"],
        "rope_theta": 10000.0,
        "factor": 32.0,
        "original_max_position_embeddings": original,
        **parameters,
    }


def save_model(folder: Path, family: str = "phi3", original: int = ORIGINAL, **fields: Any) -> str:
    """A random model of a family of transformers, float32; where it lies."""
    torch.manual_seed(0)
    fields = {
        **_SHARED,
        "max_position_embeddings": 32 * original,
        "original_max_position_embeddings": original,
        "rope_parameters": published(original),
        **fields,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    with torch.no_grad():  # so that attention is far from uniform, and rotation matters
        for name, weight in model.named_parameters():
            if "o_proj" in name:
                weight.mul_(2)
    model.float().save_pretrained(folder)
    if family == "phimoe":  # transformers' name and vLLM's of one architecture
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"architectures": ["PhiMoEForCausalLM"]}))
    return str(folder)


def reference(folder: str, held: str | None = None) -> Any:
    """transformers' model; held to its "short" or "long" list, where one is named."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if held is None:
        return model
    parameters = model.config.rope_parameters
    one = {f"{each}_factor": parameters[f"{held}_factor"] for each in ("short", "long")}
    model.config.rope_parameters = {**parameters, **one}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()


@contextmanager
def engine(
    model: str, mode: str = "rotated", policy: str = "recompute", **arguments: Any
) -> Iterator[Any]:
    """vLLM over a model, with our scheduler, while inside."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    chosen = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4 * ORIGINAL,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
        "block_size": 32,
        "skip_tokenizer_init": True,
        "scheduler_cls": SCHEDULER,
        "additional_config": {"longrope": {"mode": mode, "policy": policy}},
        **arguments,
    }
    made = LLM(model, **chosen)
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def in_a_process(script: str, environment: dict[str, str] | None = None, **given: Any) -> Any:
    """What a script leaves as RESULT, given these names: for what a process can do only once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.pt"
        lines = [f"{name} = {value!r}" for name, value in given.items()]
        save = f"import torch\ntorch.save(RESULT, {str(path)!r})"
        done = subprocess.run(
            [sys.executable, "-c", "\n".join([*lines, script, save])],
            env={**os.environ, "PYTHONPATH": _path(), **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return torch.load(path)


def _path() -> str:
    """Where a process of its own finds this module, before all that it would find without."""
    return os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))


def asked_for(
    prompts: Sequence[Sequence[int]],
    new: int = 1,
    salts: Sequence[str] = (),
    scored: bool = True,
    policies: Sequence[str | None] = (),
) -> tuple[list[Any], list[Any]]:
    """What ``LLM.generate`` is given: greedy, with log-probabilities."""
    from vllm import SamplingParams

    policies = policies or [None] * len(prompts)
    parameters = [
        SamplingParams(
            max_tokens=new,
            temperature=0.0,
            logprobs=0,
            prompt_logprobs=0 if scored else None,
            detokenize=False,
            ignore_eos=True,
            extra_args=None if policy is None else {"longrope_policy": policy},
        )
        for policy in policies
    ]
    asked: list[Any] = [{"prompt_token_ids": list(one)} for one in prompts]
    for one, salt in zip(asked, salts, strict=False):
        one["cache_salt"] = salt
    return asked, parameters


def run(made: Any, prompts: Sequence[Sequence[int]], **how: Any) -> list[Any]:
    """Greedy continuations, with the log-probabilities of prompts and new tokens (`asked_for`)."""
    return made.generate(*asked_for(prompts, **how), use_tqdm=False)  # type: ignore[no-any-return]


def drafting(
    folder: str,
    mode: str,
    drafts: dict[str, Any],
    asked: Sequence[Sequence[int]],
    policies: Sequence[str],
    new: int,
) -> tuple[list[int], list[int], list[tuple[list[int], torch.Tensor]]]:
    """Drafts verified in each step of each request, tokens it made, and what `of_new` finds."""
    verified: list[int] = []
    made: list[int] = []
    with engine(folder, mode, speculative_config=drafts) as served:
        scheduler: Any = served.llm_engine.engine_core.engine_core.scheduler
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            verified.extend(map(len, out.scheduled_spec_decode_tokens.values()))
            return out

        def updated(step: Any, output: Any) -> Any:
            made.extend(map(len, output.sampled_token_ids))
            return update(step, output)

        scheduler.schedule, scheduler.update_from_output = scheduled, updated
        outs = run(served, asked, new=new, policies=policies, scored=False)
    return verified, made, [of_new(out) for out in outs]


def of_prompt(out: Any) -> torch.Tensor:
    """Log-probabilities of the tokens of a prompt, after the first."""
    found = zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)
    return torch.tensor([each[token].logprob for each, token in found])


def of_new(out: Any) -> tuple[list[int], torch.Tensor]:
    """The tokens that were made, and their log-probabilities."""
    made = out.outputs[0]
    found = zip(made.logprobs, made.token_ids, strict=True)
    return list(made.token_ids), torch.tensor([each[token].logprob for each, token in found])


@torch.no_grad()
def scores(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' log-probabilities of all tokens after the first, in one forward."""
    logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(list(tokens))[1:, None])[:, 0]


@torch.no_grad()
def fresh(model: Any, begun: Sequence[int], made: Sequence[int]) -> torch.Tensor:
    """The same of each token in ``made``, by a forward of what was there before it."""
    tokens, found = [*begun, *made], []
    for at in range(len(begun), len(tokens)):
        logits = model(torch.tensor([tokens[:at]]), use_cache=False).logits[0, -1]
        found.append(logits.log_softmax(-1)[tokens[at]])
    return torch.stack(found)


@torch.no_grad()
def stepped(model: Any, begun: Sequence[int], made: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of each token in ``made``, one step after the other over one cache."""
    cache, tokens, found = DynamicCache(config=model.config), list(begun), []
    for token in made:
        logits = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits
        found.append(logits[0, -1].log_softmax(-1)[token])
        tokens = [token]
    return torch.stack(found)
