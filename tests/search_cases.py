"""A tiny byte model and texts in a folder, for the commands of the search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ORIGINAL = 32  # tokens the model is for
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
