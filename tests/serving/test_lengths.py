"""Each request by its own length: an engine in each mode, beside transformers.

Prompts are prefilled in chunks of 128 tokens at most, half of the original length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import (
    MODES,
    ORIGINAL,
    engine,
    fresh,
    of_new,
    of_prompt,
    prompt,
    reference,
    run,
    save_model,
    scores,
)

from longrope_kernels.integrations.vllm.rotary import TokenRotary
from longrope_kernels.integrations.vllm.unrotated import Unrotated

CLOSE = 1e-4
LENGTHS = (10, 200, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("phi3"))


@pytest.fixture(scope="module")
def truth(folder: str) -> Any:
    return reference(folder)


@pytest.fixture(scope="module", params=MODES)
def mode(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def served(folder: str, mode: str) -> Iterator[Any]:
    with engine(folder, mode) as made:
        yield made


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_prompt_alone(served: Any, truth: Any, tokens: int) -> None:
    asked = prompt(tokens, tokens)
    (out,) = run(served, [asked])
    assert far(of_prompt(out), scores(truth, asked)) < CLOSE


def test_prompts_in_one_batch(served: Any, truth: Any) -> None:
    asked = [prompt(tokens, 7 + tokens) for tokens in LENGTHS]
    for out, one in zip(run(served, asked), asked, strict=True):
        assert far(of_prompt(out), scores(truth, one)) < CLOSE


def test_without_the_lengths_it_is_wrong(
    served: Any, mode: str, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the tests above would see it: here every chunk takes the short set."""
    kind = {"rotated": TokenRotary, "unrotated": Unrotated}[mode]
    choose = kind.choose

    def short(self: Any, lengths: Any, counts: Any) -> None:
        choose(self, [(ORIGINAL, ORIGINAL) for _ in lengths], counts)

    monkeypatch.setattr(kind, "choose", short)
    asked = prompt(600, 5)
    served.reset_prefix_cache()
    assert far(of_prompt(run(served, [asked])[0]), scores(truth, asked)) > 1


@pytest.mark.parametrize("tokens", [ORIGINAL - 6, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1])
def test_recompute_is_what_a_fresh_prefill_says(served: Any, truth: Any, tokens: int) -> None:
    """The policy of the server, across the switch."""
    asked = prompt(tokens, 20 + tokens)
    (out,) = run(served, [asked], new=12, scored=False)
    ids, found = of_new(out)
    assert far(found, fresh(truth, asked, ids)) < CLOSE


def test_final_takes_the_set_of_prompt_and_max_tokens(served: Any, folder: str) -> None:
    asked = prompt(ORIGINAL - 6, 41)
    for new, held in ((6, "short"), (7, "long"), (12, "long")):
        (out,) = run(served, [asked], new=new, policies=["final"])
        ids, found = of_new(out)
        truth = reference(folder, held)
        assert far(of_prompt(out), scores(truth, asked)) < CLOSE
        assert far(found, fresh(truth, asked, ids)) < CLOSE


def test_prompt_stays_on_the_set_of_the_prompt(served: Any, folder: str) -> None:
    for tokens, held in ((ORIGINAL - 6, "short"), (ORIGINAL + 1, "long")):
        asked = prompt(tokens, 43)
        (out,) = run(served, [asked], new=12, policies=["prompt"], scored=False)
        ids, found = of_new(out)
        assert far(found, fresh(reference(folder, held), asked, ids)) < CLOSE


def test_policies_in_one_batch(served: Any, truth: Any, folder: str) -> None:
    asked = [prompt(ORIGINAL - 4, 50 + row) for row in range(4)]
    policies = ["recompute", "final", "prompt", None]
    truths = [truth, reference(folder, "long"), reference(folder, "short"), truth]
    outs = run(served, asked, new=10, policies=policies, scored=False)
    for out, one, true in zip(outs, asked, truths, strict=True):
        ids, found = of_new(out)
        assert far(found, fresh(true, one, ids)) < CLOSE


@pytest.mark.parametrize("policy", ["long", "", 3, ["final"]])
def test_a_bad_policy_is_an_error_of_the_caller(served: Any, policy: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"^longrope_policy: expected ") as caught:
        run(served, [prompt(10)], policies=[policy])
    assert repr(policy) in str(caught.value)
    assert len(run(served, [prompt(10)])[0].outputs[0].token_ids) == 1  # the engine lives on


def test_the_prefix_cache_serves_within_a_set_and_never_across(served: Any, truth: Any) -> None:
    """Short, long, short, long, with the first 192 tokens in common."""
    begun = prompt(192, 60)
    short, long = begun + prompt(20, 61), begun + prompt(300, 62)
    served.reset_prefix_cache()
    for asked, cached in ((short, 0), (long, 0), (short, 192), (long, 480)):
        (out,) = run(served, [asked], new=4, scored=False)
        ids, found = of_new(out)
        assert out.num_cached_tokens == cached
        assert far(found, fresh(truth, asked, ids)) < CLOSE


def test_salts_of_users_are_kept(served: Any) -> None:
    asked = prompt(100, 63)
    served.reset_prefix_cache()
    cached = [
        run(served, [asked], scored=False, salts=[salt])[0].num_cached_tokens
        for salt in ("one", "two", "one", "two")
    ]
    assert cached == [0, 0, 96, 96]


def test_blocks_of_a_request_that_crossed_serve_its_new_set(served: Any, truth: Any) -> None:
    asked = prompt(ORIGINAL - 2, 64)
    served.reset_prefix_cache()
    (out,) = run(served, [asked], new=6, scored=False)
    ids, _ = of_new(out)
    for tokens, cached in ((asked + ids, 256), (asked, 224)):
        (again,) = run(served, [tokens], new=2, scored=False)
        made, found = of_new(again)
        assert again.num_cached_tokens == cached
        assert far(found, fresh(truth, tokens, made)) < CLOSE


def test_the_buffers_stay_where_they_are(served: Any) -> None:
    def addresses(model: Any) -> list[int]:
        return [buffer.data_ptr() for buffer in model.longrope.rotary.buffers()]

    before = served.apply_model(addresses)
    run(served, [prompt(300, 70), prompt(20, 71)])
    assert before[0]
    assert served.apply_model(addresses) == before
