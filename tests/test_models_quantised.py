"""Models whose linear layers bitsandbytes quantised, and adapters over them (QLoRA)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SWITCH, family_model, max_diff, tokens
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from longrope_kernels.integrations.transformers import disable, enable
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.source import load_model

if sys.platform != "linux":
    pytest.skip("the environment of the tests has bitsandbytes on Linux", allow_module_level=True)

CLOSE = 2e-5
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}
both_widths = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(autouse=True)
def _products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 bits: where a processor multiplies bfloat16 their inputs are rounded to it.

    A last bit makes a step of difference then, in the untouched model too.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("phi3", "llama yarn")}
    for name, folder in made.items():
        family_model(name).save_pretrained(folder)
    return made


def quantised(folder: Path, bits: int) -> Any:
    config = BitsAndBytesConfig(**BITS[bits])
    given = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    assert type(model.model.layers[0].self_attn.o_proj) is not torch.nn.Linear
    return model


@torch.no_grad()
def results(model: Any) -> tuple[torch.Tensor, ...]:
    """Logits of both factor sets, and tokens that come across the switch."""
    short, long = tokens(2, SWITCH - 8), tokens(2, 2 * SWITCH)
    made = model.generate(short, max_new_tokens=6, do_sample=False)
    return model(short).logits, model(long).logits, made


@both_widths
@pytest.mark.parametrize("name", ["phi3", "llama yarn"])
def test_a_quantised_model_gives_what_it_gave(folders, name, bits):
    model = quantised(folders[name], bits)
    expected = results(model)
    lost = max_diff(expected[0], results(family_model(name))[0])
    assert lost > 1e-2
    found = results(enable(model))
    for a, b in zip(found[:2], expected[:2], strict=True):
        # Products in 8 bits round their inputs so, where a last bit can make a step of difference.
        assert max_diff(a, b) < (CLOSE if bits == 4 else 0.1 * lost)
    assert torch.equal(found[2], expected[2])
    assert all(torch.equal(a, b) for a, b in zip(results(disable(model)), expected, strict=True))


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(model)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = tokens(2, 2 * SWITCH)
    model.train()(ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("first", ["enable", "adapters"])
def test_gradients_of_adapters_over_four_bits(folders, first):
    expected = gradients(adapted(quantised(folders["phi3"], 4)))
    model = quantised(folders["phi3"], 4)
    model = adapted(enable(model)) if first == "enable" else enable(adapted(model))
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert max_diff(found[name], gradient) < CLOSE * gradient.abs().max(), name


@both_widths
def test_a_quantised_folder_is_searched(folders, tmp_path, bits):
    """It is loaded as it is, and candidates are judged on it."""
    model = quantised(folders["llama yarn"], bits)
    model.save_pretrained(tmp_path)
    losses = TransformersLosses(load_model(tmp_path))
    ids = tokens(1, 2 * SWITCH)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert float(losses(losses.rope, ids).mean()) == pytest.approx(float(expected), abs=1e-5)
