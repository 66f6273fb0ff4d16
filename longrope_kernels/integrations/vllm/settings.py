"""What a server was started with: whether its rope is one of ours, mode and policy, refusals.

It reads vLLM's config objects and imports nothing of vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...rope.files import SIDECAR
from ...rope.hf_config import LONGROPE_TYPES, read_rotary_dim, rope_type
from ...rope.value import Rope
from .policies import POLICIES, Policies, check_names, check_policy

# vLLM's name of an architecture: its module in vllm.model_executor.models, and the one that makes
# the rotary modules of its layers.
FAMILIES = {
    "Phi3ForCausalLM": ("phi3", "llama"),
    "PhiMoEForCausalLM": ("phimoe", "phimoe"),
    "LlamaForCausalLM": ("llama", "llama"),
    "MistralForCausalLM": ("mistral", "llama"),
    "Qwen2ForCausalLM": ("qwen2", "qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "qwen3"),
}
FORCE = "LONGROPE_VLLM_FORCE"
SCHEDULER = "longrope_kernels.integrations.vllm.scheduler.LongRopeScheduler"
DRAFTS = ("ngram", "draft_model", "eagle")  # speculative_config's methods that are served
_SETTINGS = ("mode", "policy")
_VARIABLES = (*(f"LONGROPE_VLLM_{key.upper()}" for key in _SETTINGS), FORCE)
_WITHOUT = ". VLLM_PLUGINS='' starts vLLM without this plugin"  # ends a refusal


def policies_of(vllm_config: Any) -> Policies | None:
    """The rope and the policy of a server; None where the rope is none of ours.

    A model that makes drafts keeps vLLM's rope: what it is wrong about the server's model corrects.

    Raises:
        ValueError: naming the setting that is out of range, or the field of the rope.
    """
    if vllm_config.model_config.runner_type == "draft":
        return None
    rope = rope_of(vllm_config.model_config)
    if rope is None:
        return None
    check_names("the environment", os.environ, _VARIABLES, begin="LONGROPE_VLLM")
    name, mode = _given(vllm_config, "mode", default_mode(vllm_config))
    if mode not in POLICIES:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, POLICIES))}, got {mode!r}")
    policy = _given(vllm_config, "policy", POLICIES[mode][0])
    return Policies(rope, check_policy(*policy, mode), mode)


def default_mode(vllm_config: Any) -> str:
    """The mode of a server that names none.

    vLLM's own attention on GPUs, where ours has not been timed, and for float8 caches, which ours
    reads slowly on a CPU.
    """
    on_cpu = vllm_config.device_config.device_type == "cpu"
    float8 = vllm_config.cache_config.cache_dtype.startswith("fp8")
    return "unrotated" if on_cpu and not float8 else "rotated"


def rope_of(model_config: Any) -> Rope | None:
    """The rope of a model that we serve: a ``longrope.json`` beside it, else its config's.

    Beside it is in its folder, or in its repository of the Hub at its revision.

    None for other architectures, and for other ropes of a config, which stay vLLM's own. The
    architecture is the one that vLLM builds: of a model inside another one it is the outer one's,
    which tells nobody of steps.

    Raises:
        ValueError: the file's rope rotates other dimensions than the model; or whether a
            repository has the file is not known.
    """
    if model_config.architecture not in FAMILIES:
        return None
    file, config = _sidecar(model_config), model_config.hf_text_config
    if file is not None:
        rope, rotated = Rope.load(file), read_rotary_dim(config)
        if rotated is not None and rope.rotary_dim != rotated:
            raise ValueError(
                f"{file}: expected {rotated} rotary dimensions, which the model "
                f"rotates, got {rope.rotary_dim}; is it another model's?"
            )
        return rope
    try:
        kind = rope_type(config)
    except ValueError:  # none that this package knows
        return None
    return Rope.from_config(config) if kind in LONGROPE_TYPES else None


def _sidecar(model_config: Any) -> Path | None:
    """The ``longrope.json`` of a model, as `rope_of` says, downloaded where it is not cached."""
    model = model_config.model
    if Path(model).exists() or os.environ.get("VLLM_USE_MODELSCOPE", "").lower() == "true":
        file = Path(model) / SIDECAR
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    revision = getattr(model_config.revision, "resolved", model_config.revision)  # a commit
    found: object = try_to_load_from_cache(model, SIDECAR, revision=revision)
    if found is None:  # neither the file nor that there is none
        try:
            found = hf_hub_download(model, SIDECAR, revision=revision, token=model_config.hf_token)
        except RemoteEntryNotFoundError:
            return None
        except (OSError, HfHubHTTPError) as error:
            raise ValueError(
                f"model: expected the Hub to say whether {model} has a {SIDECAR}, got {error} "
                "HF_HUB_OFFLINE=1 takes what is downloaded, a folder what it has"
            ) from error
    return Path(found) if isinstance(found, str) else None


def _given(vllm_config: Any, key: str, default: str) -> tuple[str, Any]:
    """A setting and where it comes from: additional_config, the environment, the default."""
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        kind = type(additional).__name__
        raise ValueError(f"additional_config: expected a dict, got {kind}")
    # The second is what `models` adds.
    check_names("additional_config", additional, ("longrope", "longrope_kernels"))
    ours = additional.get("longrope", {})
    where = "additional_config['longrope']"
    if not isinstance(ours, Mapping) or not ours.keys() <= set(_SETTINGS):
        raise ValueError(f"{where}: expected keys among {', '.join(_SETTINGS)}, got {ours!r}")
    if key in ours:
        return f"{where}['{key}']", ours[key]
    variable = f"LONGROPE_VLLM_{key.upper()}"
    return variable, os.environ.get(variable, default)


def has_scheduler(vllm_config: Any) -> bool:
    """Whether the engine was given our scheduler, by its name or as a class."""
    given = vllm_config.scheduler_config.scheduler_cls
    if isinstance(given, type):
        given = f"{given.__module__}.{given.__qualname__}"
    return bool(given == SCHEDULER)


def refuse(vllm_config: Any, policies: Policies) -> None:
    """Raise a ValueError that names what of this server would give other results, or was not tried.

    Before anything of the model is built.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, config = vllm_config.parallel_config, model.hf_text_config
    add = f"add --scheduler-cls {SCHEDULER} (scheduler_cls= in Python)"
    if not has_scheduler(vllm_config):
        if cache.enable_prefix_caching:
            raise ValueError(
                "enable_prefix_caching: cached blocks of one factor set would serve requests of "
                f"another; {add}, or --no-enable-prefix-caching and the policy "
                f"{policies.without_scheduler}"
            )
        if policies.default == "recompute":
            raise ValueError(
                f"policy: 'recompute' needs a scheduler that knows of it; {add}, or take the "
                f"policy {policies.without_scheduler}"
            )
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method not in DRAFTS:
        methods = ", ".join(map(repr, DRAFTS))
        raise ValueError(
            f"speculative_config: expected method {methods}, got {drafts.method!r}; LongRoPE in "
            f"vLLM does not serve it{_WITHOUT}"
        )
    refused = {
        "runner_type": (model.runner_type, "generate"),
        "is_causal": (getattr(config, "is_causal", True), True),
        "dual_chunk_attention_config": (
            getattr(config, "dual_chunk_attention_config", None),
            None,
        ),
        "enable_prompt_embeds": (model.enable_prompt_embeds, False),
        "kv_transfer_config": (vllm_config.kv_transfer_config, None),
        "kv_sharing_fast_prefill": (cache.kv_sharing_fast_prefill, False),
        "data_parallel_size": (parallel.data_parallel_size, 1),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, 1),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, 1),
        "enable_dbo": (parallel.enable_dbo, False),
        "ubatch_size": (parallel.ubatch_size > 1, False),
    }
    of_both = set(refused)
    if policies.mode == "unrotated":  # which is an attention backend of its own
        backend = vllm_config.attention_config.backend
        refused["attention_backend"] = (backend and backend.name, None)
        if drafts is not None:  # a step ahead, drafts that may be refused are counted as tokens
            refused["async_scheduling"] = (vllm_config.scheduler_config.async_scheduling, False)
    for name, (found, served) in refused.items():
        if found != served:
            shown = found if isinstance(found, str | int) else type(found).__name__
            raise ValueError(
                f"{name}: expected {served!r}, got {shown}; LongRoPE in vLLM does not serve it"
                + (_WITHOUT if name in of_both else " in mode 'unrotated'; mode 'rotated' does")
            )
