"""A server in processes of its own, asked by OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from engines import ORIGINAL, VOCABULARY, fresh, prompt, reference, save_model, stepped
from servers import server
from test_lengths import CLOSE, far
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longrope_kernels.integrations.transformers import enable


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
    lengths = {"max-model-len": str(4 * ORIGINAL), "max-num-batched-tokens": "128"}
    with server(folder, "unrotated", "prompt", **lengths) as asked:
        yield asked


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


def test_a_misspelt_argument_is_a_bad_request(client: openai.OpenAI, folder: str) -> None:
    extra = {"vllm_xargs": {"longrope_polcy": "final"}}
    with pytest.raises(openai.BadRequestError, match="expected longrope_policy, got 'longrope_pol"):
        client.completions.create(model=folder, prompt=prompt(8), extra_body=extra)
