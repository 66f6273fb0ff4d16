"""Who understands what of a rope, each asked: the table of docs/llamacpp.md.

    python tools/understands.py "this package" transformers llama.cpp
    VLLM_CPU_KVCACHE_SPACE=1 python tools/understands.py "vLLM" "vLLM, our plugin"   where it is

Each is given a tiny Llama with a rope, and prompts in one batch or server. What it says of the last
token is compared with transformers' model whose cosines and sines are put in from the formula in
float64; reports/understands.json gets how far off each is, or why it refuses.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longrope_kernels import FactorSet, Rope

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "reports" / "understands.json"
ORIGINAL, LENGTH, VOCABULARY = 256, 512, 259
PROMPTS = (60, 200, 400)  # tokens

_SHORT = tuple(1 + i / 80 for i in range(32))
_LONG = tuple(1 + i / 8 for i in range(32))
_TWO = Rope.longrope(_SHORT, _LONG, ORIGINAL, attention_factor=1.2)
ROPES = {
    "two sets": _TWO,
    "an attention factor for each set": Rope.longrope(
        _SHORT, _LONG, ORIGINAL, attention_factor=(1.0, 1.2)
    ),
    "a threshold": Rope.longrope(_SHORT, _LONG, ORIGINAL, attention_factor=1.2, n_hat=32),
    "three sets": Rope(
        (FactorSet((1.0,) * 32, attention_factor=1.2, max_length=128), *_TWO.sets), _TWO.base
    ),
}
Answers = list[list[float]]  # of each prompt, the log-probability of each token after the first


def model_of(folder: Path, rope: Rope | None) -> LlamaForCausalLM:
    """Random weights; a rope, where a config can say it, stands in that, or else beside it.

    Raises:
        ValueError: no config says the rope, and ``rope`` is not to stand beside it.
    """
    torch.manual_seed(5)
    fields = {} if rope is None else rope.to_config(max_position_embeddings=LENGTH)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.12,  # so that rotation matters
        bos_token_id=1,
        eos_token_id=2,
        **({"max_position_embeddings": LENGTH} | fields),
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS]


@torch.no_grad()
def scores(model: Any, rows: Sequence[Sequence[int]]) -> Answers:
    """Of a batch, padded on the left."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    told = model(tokens, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    found = []
    for row, one in zip(rows, told, strict=True):
        ahead = one[longest - len(row) : -1]
        found.append(ahead.gather(1, torch.tensor(row)[1:, None])[:, 0].tolist())
    return found


def truth(rope: Rope) -> Answers:
    """Each prompt alone, its cosines and sines by the formula in float64."""
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(Path(folder), None)
    found = []
    for row in prompts():
        one = rope.sets[rope.set_index(len(row))]
        place = torch.arange(len(row), dtype=torch.float64)[:, None]
        theta = rope.base ** (-torch.arange(32, dtype=torch.float64) / 32)
        far = place >= one.n_hat
        angle = place * torch.where(far, theta / torch.tensor(one.factors).double(), theta)
        angle, a = torch.cat([angle, angle], 1), torch.where(far, float(one.attention_factor), 1.0)
        tables = ((angle.cos() * a).float()[None], (angle.sin() * a).float()[None])
        model.model.rotary_emb.forward = lambda *_, tables=tables, **__: tables  # type: ignore[method-assign]
        found += scores(model, [row])
    return found


# ------------------------------------------------------------------------------------- who is asked


def by_us(rope: Rope, folder: Path) -> Answers:
    from longrope_kernels.integrations.transformers import enable

    return scores(enable(model_of(folder, None), rope=rope), prompts())


def by_transformers(rope: Rope, folder: Path) -> Answers:
    model_of(folder, rope)
    return scores(AutoModelForCausalLM.from_pretrained(folder).eval(), prompts())


def by_llama_cpp(rope: Rope, folder: Path) -> Answers:
    """In one context, that of the longest; of the last token alone, among the likeliest."""
    sys.path.append(str(ROOT / "tests"))
    from gguf_cases import write_gguf

    from longrope_kernels.integrations.llamacpp import export
    from longrope_kernels.integrations.llamacpp.engine import log_probabilities

    source = write_gguf(model_of(folder, None), folder / "model.gguf")
    out = export(rope, source, folder / "out.gguf", length=LENGTH).path
    found = []
    for row in prompts():
        told = log_probabilities(out, LENGTH, row[:-1], VOCABULARY)
        found.append([told[row[-1]]])
    return found


def by_vllm(rope: Rope, folder: Path, plugins: str = "") -> Answers:
    from longrope_kernels.integrations.vllm.check import _ask
    from longrope_kernels.integrations.vllm.settings import SCHEDULER

    try:
        model_of(folder, rope)
    except ValueError:
        if not plugins:
            raise
        model_of(folder, None)
        rope.save(folder)
    asked = {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": LENGTH,
        "prompts": prompts(),
        "scheduler_cls": SCHEDULER if plugins else None,
    }
    answers = _ask(asked, plugins)
    return [told[: len(row) - 1] for (_, told), row in zip(answers, prompts(), strict=True)]


ASKED: dict[str, Callable[[Rope, Path], Answers]] = {
    "this package": by_us,
    "transformers": by_transformers,
    "vLLM": by_vllm,
    "vLLM, our plugin": lambda rope, folder: by_vllm(rope, folder, "longrope"),
    "llama.cpp": by_llama_cpp,
}
_PACKAGES = {
    "this package": "longrope-kernels",
    "transformers": "transformers",
    "vLLM": "vllm-cpu",
    "vLLM, our plugin": "vllm-cpu",
    "llama.cpp": "xllamacpp",
}


def tried(name: str, rope: Rope) -> dict[str, Any]:
    """How far off each prompt is at its last token, by length; or why the rope is refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = ASKED[name](rope, Path(folder))
        except ValueError as error:
            return {"refused": str(error)}
    pairs = zip(PROMPTS, found, truth(rope), strict=True)
    return {str(n): round(abs(one[-1] - right[-1]), 6) for n, one, right in pairs}


def changed(name: str) -> list[str]:
    """What the record says otherwise than is told now: refused or not, right to 1e-2 or not."""

    def kind(told: dict[str, Any]) -> dict[str, bool]:
        return {key: key == "refused" or told[key] < 1e-2 for key in told}

    known = json.loads(RECORD.read_text("utf-8"))[name]
    now = {what: tried(name, rope) for what, rope in ROPES.items()}
    return [
        f"{what}: {known[what]} in the record, {told} now"
        for what, told in now.items()
        if kind(told) != kind(known[what])
    ]


def main(names: Sequence[str]) -> None:
    if not names or not set(names) <= set(ASKED):
        known_names = ", ".join(map(repr, ASKED))
        sys.exit(f"{__doc__}\nexpected some of {known_names}, got {', '.join(names) or 'none'}")
    known = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for name in names:
        row = {what: tried(name, rope) for what, rope in ROPES.items()}
        known[name] = {"version": metadata.version(_PACKAGES[name]), **row}
        RECORD.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        print(name, known[name], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
