"""A server in processes of its own, asked by OpenAI's client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from engines import ORIGINAL, VOCABULARY, fresh, prompt, reference, save_model, stepped
from test_lengths import CLOSE, far
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longrope_kernels.integrations.transformers import enable
from longrope_kernels.integrations.vllm.settings import SCHEDULER


def save_tokenizer(folder: Path) -> None:
    """A word for each token: w3, w4 and so on."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("phi3")
    save_tokenizer(path)
    return save_model(path)


@pytest.fixture(scope="module")
def client(folder: str) -> Iterator[openai.OpenAI]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    arguments = {
        "--model": folder,
        "--port": str(port),
        "--host": "127.0.0.1",
        "--dtype": "float32",
        "--max-model-len": str(4 * ORIGINAL),
        "--max-num-batched-tokens": "128",
        "--scheduler-cls": SCHEDULER,
        "--additional-config": '{"longrope": {"mode": "unrotated", "policy": "prompt"}}',
    }
    flat = [part for pair in arguments.items() for part in pair]
    log = Path(folder) / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flat, "--enforce-eager"],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    asked = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                asked.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text())
        yield asked
        assert "LongRoPE, mode 'unrotated', policy 'prompt'" in log.read_text()
    finally:
        server.terminate()
        server.wait(60)


def complete(client: openai.OpenAI, folder: str, tokens: list[int], policy: Any = None) -> Any:
    extra = {} if policy is None else {"vllm_xargs": {"longrope_policy": policy}}
    (choice,) = client.completions.create(
        model=folder,
        prompt=tokens,
        max_tokens=8,
        temperature=0.0,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
    ).choices
    return choice.token_ids, torch.tensor(choice.logprobs.token_logprobs)


def test_policies_over_http(client: openai.OpenAI, folder: str) -> None:
    asked = prompt(ORIGINAL - 4, 80)
    for policy, held in ((None, "short"), ("final", "long"), ("recompute", None)):
        ids, found = complete(client, folder, asked, policy)
        assert far(found, fresh(reference(folder, held), asked, ids)) < CLOSE
    ids, found = complete(client, folder, asked, "switch")
    assert far(found, stepped(enable(reference(folder)), asked, ids)) < CLOSE


@pytest.mark.parametrize("policy", ["shrt", 4])
def test_a_bad_policy_is_a_bad_request(client: openai.OpenAI, folder: str, policy: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="longrope_policy: expected one of") as caught:
        complete(client, folder, prompt(8), policy)
    assert caught.value.status_code == 400
    assert repr(policy) in caught.value.message
    assert complete(client, folder, prompt(8))[0]
