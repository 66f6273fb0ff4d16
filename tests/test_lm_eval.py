"""The harness's class ``longrope``: each row of a batch gets what it gets alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from longrope_kernels import Rope
from longrope_kernels.integrations.lm_eval import LongRopeLM

ORIGINAL, LONGEST = 64, 256
ROPE = Rope.longrope([1.0] * 8, [1.5 + i for i in range(8)], ORIGINAL, attention_factor=1.2)
LETTERS = [chr(97 + (i * i + 3 * i) % 26) for i in range(400)]
# Shorter than the short set's bound, just at it, and longer.
CONTEXTS = ["".join(LETTERS[:n]) for n in (3, 17, 60, 63, 64, 90, 200)]

pytestmark = pytest.mark.full


def tiny(path: Path, longest: int, tokenizer: Tokenizer) -> Path:
    """A tiny Llama of type longrope, with that tokenizer."""
    torch.manual_seed(3)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    )
    end = wrapped.eos_token_id
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,  # so that rotation matters
        **{"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
        **ROPE.to_config(max_position_embeddings=longest),
    )
    LlamaForCausalLM(config).save_pretrained(path)
    wrapped.save_pretrained(path)
    return path


def of_bytes(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over single bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = of_bytes(models.BPE(vocab=vocabulary, merges=[]))
    return tiny(tmp_path_factory.mktemp("model"), LONGEST, tokenizer)


def alone(folder: Path, context: str, continuation: str) -> float:
    """By an untouched model of transformers, one row of its own length."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encode = HFLM(str(folder), device="cpu").tok_encode
    first, second = encode(context), encode(continuation)
    tokens = torch.tensor([first + second])
    with torch.no_grad():
        told = model(tokens[:, :-1], use_cache=False).logits.log_softmax(-1)[0]
    return float(told.gather(-1, tokens[0, 1:, None])[-len(second) :].sum())


def asked(arguments: list[tuple[Any, ...]], kind: str) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, "auto"])
def test_each_row_gets_what_it_gets_alone(folder: Path, batch_size: int | str) -> None:
    pairs = [(context, "answer") for context in CONTEXTS]
    truth = [alone(folder, *pair) for pair in pairs]
    given: Any = {"device": "cpu", "dtype": "float32", "batch_size": batch_size}
    ours = LongRopeLM(str(folder), **given).loglikelihood(asked(pairs, "loglikelihood"))
    assert [value for value, _ in ours] == pytest.approx(truth, abs=1e-3)
    if batch_size == 7:
        # The harness's own class, with every row under the set of the longest.
        plain = HFLM(str(folder), **given).loglikelihood(asked(pairs, "loglikelihood"))
        off = [abs(value - right) for (value, _), right in zip(plain, truth, strict=True)]
        assert max(off[:4]) > 0.1
        assert max(off[5:]) < 1e-3


def test_windows_of_a_long_text_too(folder: Path) -> None:
    texts = ["".join(LETTERS[:n]) for n in (20, 64, 65, 400)]
    found = [
        LongRopeLM(str(folder), device="cpu", dtype="float32", batch_size=size)
        .loglikelihood_rolling(asked([(text,) for text in texts], "loglikelihood_rolling"))
        for size in (1, 8)
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_generates_what_it_generates_alone(folder: Path) -> None:
    until = {"until": ["<end>"], "max_gen_toks": 8, "do_sample": False}
    requests = asked([(context, until) for context in CONTEXTS], "generate_until")
    found = [
        LongRopeLM(str(folder), device="cpu", dtype="float32", batch_size=size).generate_until(
            requests
        )
        for size in (1, 7)
    ]
    assert found[0] == found[1]
    assert all(found[0])


def test_the_rope_is_the_folders_or_the_one_that_is_named(folder: Path, tmp_path: Path) -> None:
    assert LongRopeLM(str(folder), device="cpu").rope == ROPE
    other = Rope.longrope([1.0] * 8, [3.0] * 8, 32, attention_factor=1.0)
    other.save(tmp_path / "longrope.json")
    assert LongRopeLM(str(folder), rope=str(tmp_path), device="cpu").rope == other
    assert LongRopeLM(str(folder), rope=other, device="cpu").rope == other
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert LongRopeLM(str(tmp_path), device="cpu").rope == other
    part, name = tmp_path.parent, tmp_path.name
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    given: Any = {"device": "cpu", "tokenizer": tokenizer}
    assert LongRopeLM(str(part), subfolder=name, **given).rope == other


def test_what_the_config_says_is_read_as_enable_reads_it(folder: Path, tmp_path: Path) -> None:
    wrapped = PreTrainedTokenizerFast.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"model: its rope type 'dynamic' has other factors"):
        LongRopeLM(LlamaForCausalLM(config), tokenizer=wrapped, device="cpu")

    small = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    config = Gemma3TextConfig(
        **{"vocab_size": len(wrapped), "head_dim": 16, "sliding_window": 32, **small},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2},
        layer_types=["sliding_attention", "full_attention"],
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path)
    pair = (CONTEXTS[0], "answer")
    ours = LongRopeLM(str(tmp_path), device="cpu", dtype="float32")
    [(found, _)] = ours.loglikelihood(asked([pair], "loglikelihood"))
    assert found == pytest.approx(alone(tmp_path, *pair), abs=1e-3)


def test_several_processes_need_a_number_of_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFLM, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"batch_size: expected a number.*got auto"):
        LongRopeLM(str(folder), device="cpu", batch_size="auto")


TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["one", "two", "three"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of local files."""
    path = tmp_path_factory.mktemp("tasks")
    lines = (json.dumps({"text": context}) for context in CONTEXTS)
    (path / "data.jsonl").write_text("\n".join(lines), "utf-8")
    (path / "local.yaml").write_text(TASK.replace("DATA", str(path / "data.jsonl")), "utf-8")
    return path


def test_a_task_says_the_same_for_any_batch(folder: Path, tasks: Path) -> None:
    def scores(model: str, size: int) -> list[float]:
        done = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(folder), "dtype": "float32"},
            tasks=["local"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            batch_size=size,
            device="cpu",
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = sorted(done["samples"]["local"], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(CONTEXTS)
        return [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]

    one, many = scores("longrope", 1), scores("longrope", 32)
    assert many == pytest.approx(one, abs=1e-3)
    plain = scores("hf", 32)
    assert max(abs(a - b) for a, b in zip(plain, one, strict=True)) > 0.1


def test_the_command_takes_the_harness_arguments(folder: Path, tasks: Path) -> None:
    command = [sys.executable, "-m", "longrope_kernels.integrations.lm_eval", "--model", "longrope"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "local"]
    command += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|local|" in done.stdout


def test_rulers_tasks_say_the_same_for_any_batch(tmp_path: Path) -> None:
    """Those that need no other data than a package's; they count tokens that are words."""
    words = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = of_bytes(models.BPE())
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    tokenizer.train_from_iterator((page.read_text("utf-8") for page in pages), words)
    path = str(tiny(tmp_path, 8192, tokenizer))

    of_tasks = {"max_seq_lengths": [4096], "pretrained": path}
    names = ["niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe"]
    done = lm_eval.simple_evaluate(
        model="longrope",
        model_args={"pretrained": path, "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(metadata=of_tasks),
        batch_size=8,
        limit=2,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    alone = LongRopeLM(path, device="cpu", dtype="float32", batch_size=1)
    for name in names:
        assert done["results"][name]["4096,none"] >= 0
        samples = done["samples"][name]
        assert len(samples) == 2
        for sample in samples:
            request = asked([tuple(one) for one in sample["arguments"]], "generate_until")
            assert alone.generate_until(request) == sample["filtered_resps"]
