"""What the plugin refuses, by name, before anything is built: over vLLM's own config objects."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import vllm
from engines import MODES, ORIGINAL, published, save_model
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine.input_processor import InputProcessor

from longrope_kernels.integrations.vllm import contacts, models
from longrope_kernels.integrations.vllm.policies import POLICIES
from longrope_kernels.integrations.vllm.settings import (
    FAMILIES,
    SCHEDULER,
    policies_of,
    refuse,
    rope_of,
)
from longrope_kernels.rope.value import Rope


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("phi3"))


def config_of(folder: str, **arguments: Any) -> Any:
    chosen = {
        "dtype": "float32",
        "max_model_len": 4 * ORIGINAL,
        "skip_tokenizer_init": True,
        "scheduler_cls": SCHEDULER,
        **arguments,
    }
    return EngineArgs(folder, **chosen).create_engine_config()


def refused(config: Any, match: str) -> None:
    policies = policies_of(config)
    assert policies is not None
    with pytest.raises(ValueError, match=match):
        refuse(config, policies)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_served_is_not_refused(folder: str, mode: str) -> None:
    settings: dict[str, Any] = {"longrope": {"mode": mode}}
    refuse(config := config_of(folder, additional_config=settings), policies_of(config))
    alone = {"scheduler_cls": None, "enable_prefix_caching": False}
    for policy in set(POLICIES[mode]) - {"recompute"}:
        settings = {"longrope": {"mode": mode, "policy": policy}}
        config = config_of(folder, **alone, additional_config=settings)
        policies = policies_of(config)
        assert policies is not None
        assert (policies.mode, policies.default) == (mode, policy)
        refuse(config, policies)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("rotated", "'final' or 'prompt'"), ("unrotated", "'switch' or 'final' or 'prompt'")],
)
def test_without_the_scheduler(folder: str, mode: str, expected: str) -> None:
    settings = {"longrope": {"mode": mode, "policy": "recompute"}}
    config = config_of(folder, scheduler_cls=None, additional_config=settings)
    ending = f"add --scheduler-cls {SCHEDULER} .*policy {expected}$"
    refused(config, f"^enable_prefix_caching: .*{ending}")
    config.cache_config.enable_prefix_caching = False
    refused(config, f"^policy: 'recompute' needs .*{ending}")


def test_the_defaults(folder: str) -> None:
    """vLLM's own attention where ours has not been timed, or is slow."""
    config = config_of(folder)
    for device, cache, expected in (
        ("cpu", "auto", ("unrotated", "switch")),
        ("cpu", "fp8", ("rotated", "recompute")),
        ("cuda", "auto", ("rotated", "recompute")),
    ):
        config.device_config.device_type, config.cache_config.cache_dtype = device, cache
        policies = policies_of(config)
        assert policies is not None
        assert (policies.mode, policies.default) == expected


def test_another_attention_under_unrotated(folder: str) -> None:
    config = config_of(folder, additional_config={"longrope": {"mode": "unrotated"}})
    config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    refused(config, "^attention_backend: expected None, got TRITON_ATTN; .*mode 'rotated' does$")


def test_drafts_a_step_ahead_under_unrotated(folder: str) -> None:
    config = config_of(folder, additional_config={"longrope": {"mode": "unrotated"}})
    config.speculative_config = SimpleNamespace(method="ngram")
    config.scheduler_config.async_scheduling = True
    refused(config, "^async_scheduling: expected False, got True; .*mode 'rotated' does$")


def test_lengths_of_a_request_that_switches(folder: str) -> None:
    """All of a prompt takes its end's set, drafts each their own, whatever was counted before."""
    config = config_of(folder, additional_config={"longrope": {"mode": "unrotated"}})
    policies = policies_of(config)
    assert policies is not None
    params = SimpleNamespace(extra_args=None, max_tokens=8)
    for end, expected in ((10, (20, 20)), (20, (20, 20)), (23, (0, 23))):
        assert policies.lengths(params, 20, 20, end, 100) == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_policy_of_a_request(folder: str, mode: str) -> None:
    settings = {"longrope": {"mode": mode}}
    policies = policies_of(config_of(folder, additional_config=settings))
    assert policies is not None
    for policy in POLICIES[mode]:
        params = SimpleNamespace(extra_args={"longrope_policy": policy})
        assert policies.of(params) == policy


def test_switch_needs_unrotated(folder: str) -> None:
    policies = policies_of(config_of(folder, additional_config={"longrope": {"mode": "rotated"}}))
    assert policies is not None
    with pytest.raises(ValueError, match=r"^longrope_policy: .* got 'switch', which needs mode 'u"):
        policies.of(SimpleNamespace(extra_args={"longrope_policy": "switch"}))


SERVED = {
    "runner_type": ("model_config", "pooling"),
    "enable_prompt_embeds": ("model_config", True),
    "kv_sharing_fast_prefill": ("cache_config", True),
    "data_parallel_size": ("parallel_config", 2),
    "decode_context_parallel_size": ("parallel_config", 2),
    "prefill_context_parallel_size": ("parallel_config", 2),
    "enable_dbo": ("parallel_config", True),
    "ubatch_size": ("parallel_config", 2),
    "speculative_config": ("", SimpleNamespace(method="medusa")),
    "kv_transfer_config": ("", object()),
}


@pytest.mark.parametrize("name", SERVED)
def test_refused_by_name(folder: str, name: str) -> None:
    config = config_of(folder)
    part, value = SERVED[name]
    owner = getattr(config, part) if part else config
    assert hasattr(owner, name)
    object.__setattr__(owner, name, value)
    refused(config, f"^{name}: expected .*VLLM_PLUGINS=''")


@pytest.mark.parametrize(
    ("policy", "resumable", "match"),
    [
        (
            "recompute",
            False,
            "^longrope_policy: .* 'recompute' needs; expected 'final' or 'prompt'",
        ),
        ("final", True, "^resumable: .* does not serve prompts that go on growing"),
    ],
    ids=["recompute", "resumable"],
)
def test_requests_refused_by_name(folder: str, policy: str, resumable: bool, match: str) -> None:
    """As errors of the caller, on a server without our scheduler; its own policy is served."""
    config = config_of(
        folder,
        scheduler_cls=None,
        enable_prefix_caching=False,
        additional_config={"longrope": {"mode": "rotated", "policy": "final"}},
    )
    contacts.check_requests()
    take = partial(InputProcessor(config).process_inputs, "0", {"prompt_token_ids": [3, 4]})
    assert take(SamplingParams(), ("generate",)).prompt_token_ids == [3, 4]
    params = SamplingParams(extra_args={"longrope_policy": policy})
    with pytest.raises(VLLMValidationError, match=match):
        take(params, ("generate",), resumable=resumable)


@pytest.mark.parametrize(
    ("name", "value"), [("is_causal", False), ("dual_chunk_attention_config", {"chunk_size": 8})]
)
def test_models_refused_by_name(folder: str, name: str, value: Any) -> None:
    config = config_of(folder)
    setattr(config.model_config.hf_text_config, name, value)
    refused(config, f"^{name}: expected ")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "fast"}, "'mode'.: expected one of 'rotated', 'unrotated', got 'fast'$"),
        ({"mode": "rotated", "policy": "switch"}, "'policy'.: .* got 'switch', which needs mode"),
        ({"policy": 3}, "'policy'.: expected one of 'switch', .* in mode 'unrotated', got 3$"),
        ({"polcy": "final"}, "expected keys among mode, policy, got"),
        ("final", "expected keys among mode, policy, got 'final'"),
    ],
)
def test_settings(folder: str, settings: Any, match: str) -> None:
    config = config_of(folder, additional_config={"longrope": settings})
    with pytest.raises(ValueError, match=rf"^additional_config\['longrope'\].*{match}"):
        policies_of(config)


def test_misspelt_settings(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of others stay theirs."""
    config = config_of(folder)
    config.additional_config = {"of": "others", "longrope_kernels": "what a built model adds"}
    monkeypatch.setenv("LONGROPE_FULL", "0")
    assert policies_of(config) is not None
    config.additional_config = {"LongRope_policy": "final"}
    with pytest.raises(ValueError, match=r"^additional_config: expected .* got 'LongRope_policy'"):
        policies_of(config)
    config.additional_config = {}
    monkeypatch.setenv("LONGROPE_VLLM_MOED", "rotated")
    with pytest.raises(
        ValueError, match=r"^the environment: expected LONGROPE_VLLM_MODE or .*MOED"
    ):
        policies_of(config)


def test_settings_that_are_no_dict(folder: str) -> None:
    config = config_of(folder)
    config.additional_config = SimpleNamespace(compute_hash=str)
    with pytest.raises(ValueError, match=r"^additional_config: expected a dict, got SimpleNames"):
        policies_of(config)


def test_settings_of_the_environment(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What additional_config says goes first."""
    config = config_of(folder)
    monkeypatch.setenv("LONGROPE_VLLM_POLICY", "final")
    assert policies_of(config).default == "final"
    config.additional_config = {"longrope": {"policy": "prompt"}}
    assert policies_of(config).default == "prompt"
    monkeypatch.setenv("LONGROPE_VLLM_MODE", "rotated")
    assert policies_of(config).mode == "rotated"
    monkeypatch.setenv("LONGROPE_VLLM_MODE", "turned")
    with pytest.raises(ValueError, match=r"^LONGROPE_VLLM_MODE: expected one of 'rotated', 'unro"):
        policies_of(config)


def test_another_version(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a rope of ours is refused as it is built, unless forced; others are not."""
    assert contacts.untested() is None
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(RuntimeError, match=r"^vLLM 0\.99\.1: .*tested with 0\.32 and 0\.33; LONG"):
        models.Phi3ForCausalLM(vllm_config=config_of(folder))
    monkeypatch.setenv("LONGROPE_VLLM_FORCE", "1")
    assert contacts.untested() is None
    monkeypatch.setattr(vllm, "__version__", "0.320.1")
    monkeypatch.delenv("LONGROPE_VLLM_FORCE")
    assert contacts.untested() is not None


def test_which_ropes_are_ours(tmp_path: Path) -> None:
    """A file beside the model goes first; other ropes and other architectures are vLLM's own."""
    folder = save_model(tmp_path, "llama", rope_parameters={"rope_type": "default"}, head_dim=96)
    config = config_of(folder).model_config
    assert rope_of(config) is None
    rope = Rope.longrope(
        **{f"{x}_factor": published()[f"{x}_factor"] for x in ("short", "long")},
        original_max_position_embeddings=ORIGINAL,
        attention_factor=1.2,
        n_hat=4,
    )
    rope.save(tmp_path)
    assert rope_of(config) == rope
    Rope.plain(64).save(tmp_path)
    with pytest.raises(ValueError, match=r"longrope.json: expected 96 rotary dimensions.*got 64"):
        rope_of(config)
    assert rope_of(SimpleNamespace(model=folder, architecture="GPT2LMHeadModel")) is None


def of_the_hub(revision: str | None = None) -> Any:
    config = AutoConfig.for_model("llama", head_dim=8)
    return SimpleNamespace(
        model="someone/a-model",
        revision=revision,
        hf_token="a token",
        architecture="LlamaForCausalLM",
        hf_text_config=config,
    )


def test_a_file_in_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Hub's cache at the model's revision: the file, that there is none, or neither."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--someone--a-model"
    first, second, unknown = (letter * 40 for letter in "abc")
    (snapshot := cache / "snapshots" / first).mkdir(parents=True)
    rope = Rope.longrope([1.0] * 4, [2.0] * 4, 32, attention_factor=1.0)
    rope.save(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(first)
    (cache / ".no_exist" / second).mkdir(parents=True)
    (cache / ".no_exist" / second / "longrope.json").touch()
    assert rope_of(of_the_hub()) == rope_of(of_the_hub(first)) == rope
    assert rope_of(of_the_hub(second)) is None
    pinned = huggingface_hub.ResolvedRevision(resolved=second)  # as vLLM has it, as a str "main"
    assert rope_of(of_the_hub(pinned)) is None
    with pytest.raises(ValueError, match=r"^model: .*whether someone/a-model has a longrope\.json"):
        rope_of(of_the_hub(unknown))  # the tests are offline


def test_a_file_that_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    rope = Rope.longrope([1.0] * 4, [2.0] * 4, 32, attention_factor=1.0)
    rope.save(tmp_path)

    def download(model: str, name: str, *, revision: str, token: str) -> str:
        assert (model, name, token) == ("someone/a-model", "longrope.json", "a token")
        if revision != "there":
            kind = RemoteEntryNotFoundError if revision == "not there" else HfHubHTTPError
            raise kind("why", response=SimpleNamespace(headers={}, request=None))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert rope_of(of_the_hub("there")) == rope
    assert rope_of(of_the_hub("not there")) is None
    with pytest.raises(ValueError, match=r"^model: .*got why"):
        rope_of(of_the_hub("not answered"))
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert rope_of(of_the_hub("there")) is None


def test_a_model_that_is_not_our_class_is_vllms_own(folder: str, tmp_path: Path) -> None:
    """Nobody would tell it of steps: one inside another, or vLLM's class for any of transformers'.

    The first as vLLM's Phi-3-vision makes its Llama.
    """
    outer = config_of(save_model(tmp_path, "olmo"))
    inner = outer.with_hf_config(outer.model_config.hf_config, ["LlamaForCausalLM"])
    assert policies_of(inner) is policies_of(outer) is None
    assert policies_of(config_of(folder, model_impl="transformers")) is None


def test_the_families() -> None:
    assert all(issubclass(vars(models)[name], models._Served) for name in FAMILIES)
