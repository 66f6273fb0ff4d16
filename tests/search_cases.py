"""A tiny byte model and texts in a folder, and the commands of the search on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from longrope_kernels import Rope, cli
from longrope_kernels.search.documents import encoder, read_documents
from longrope_kernels.search.fitness import Perplexity
from longrope_kernels.search.model import TransformersLosses

ORIGINAL = 32  # tokens the model is for
LENGTH = 96  # that it is extended to
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # what makes the last bits the same
SMALL = {"population": 6, "iterations": 3, "mutants": 3, "crossovers": 2, "parents": 4}


def make_model(folder: Path, **fields: Any) -> Path:
    """A random Llama over bytes, 8 pairs, saved in ``folder``."""
    torch.manual_seed(5)
    config = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": ORIGINAL,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.3,  # so that rotation matters
    }
    LlamaForCausalLM(LlamaConfig(**(config | fields))).save_pretrained(folder)
    return folder


def make_texts(folder: Path, count: int = 2, length: int = 300) -> Path:
    """Text files of ``length`` characters."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        letters = (chr(97 + j * j * (index + 3) % 26) for j in range(length))
        (folder / f"{index}.txt").write_text("".join(letters), "utf-8")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """More threads only wait for one another in sizes like these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(**values: Any) -> list[str]:
    """``--name value`` for each."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_model(folder / "model")
    make_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def searched(work: Path) -> Path:
    """The folder of a search that was not disturbed."""
    result = search(work, work / "searched")
    assert result.exit_code == 0, result.stderr
    return work / "searched"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def given(work: Path) -> list[Any]:
    return [work / "model", *flags(documents=work / "texts", tokenizer="bytes", samples=2)]


def search(work: Path, out: Path, *more: Any, **settings: Any) -> Any:
    settings = {"length": LENGTH, "out": out, **SMALL, **settings}
    return run("search", *given(work), *flags(**settings), *more)


def measured(work: Path, rope: Rope, length: int = LENGTH, model: str = "model") -> float:
    losses = TransformersLosses(AutoModelForCausalLM.from_pretrained(work / model))
    texts = read_documents([work / "texts"], encoder("bytes"), length)
    return Perplexity(losses, texts, length)(rope)


def pictures(folder: Path) -> list[str]:
    signature = b"\x89PNG"
    found = sorted(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(signature) for path in found)
    return [path.name for path in found]
