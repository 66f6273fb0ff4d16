"""Policy "switch": each query by the set of its own length, and no key is computed again.

Beside `enable`, whose cache of unrotated keys does the same in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engines import (
    ORIGINAL,
    engine,
    fresh,
    in_a_process,
    of_new,
    of_prompt,
    prompt,
    reference,
    run,
    save_model,
    scores,
    stepped,
)
from test_lengths import CLOSE, far

from longrope_kernels.integrations.transformers import enable
from longrope_kernels.integrations.vllm.unrotated import Unrotated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("phi3"))


@pytest.fixture(scope="module")
def truth(folder: str) -> Any:
    return enable(reference(folder))


@pytest.fixture(scope="module")
def served(folder: str) -> Iterator[Any]:
    with engine(folder, "unrotated", "switch") as made:
        yield made


@pytest.mark.parametrize("tokens", [ORIGINAL - 20, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1])
def test_growth_across_the_switch(served: Any, truth: Any, tokens: int) -> None:
    asked = prompt(tokens, tokens)
    (out,) = run(served, [asked], new=40)
    ids, found = of_new(out)
    assert far(of_prompt(out), scores(truth, asked)) < CLOSE
    assert far(found, stepped(truth, asked, ids)) < CLOSE


def test_it_is_not_a_prefill_under_the_new_set(served: Any, truth: Any) -> None:
    """Above the first layer the old keys are of the short set, in `enable` as here."""
    asked = prompt(ORIGINAL - 6, 6)
    (out,) = run(served, [asked], new=12, scored=False)
    ids, found = of_new(out)
    assert far(found, stepped(truth, asked, ids)) < CLOSE
    assert far(found, fresh(truth, asked, ids)) > CLOSE


def test_prompts_in_one_batch(served: Any, truth: Any) -> None:
    asked = [prompt(tokens, 7 + tokens) for tokens in (10, 200, ORIGINAL, ORIGINAL + 1, 600)]
    for out, one in zip(run(served, asked), asked, strict=True):
        assert far(of_prompt(out), scores(truth, one)) < CLOSE


def test_without_the_lengths_a_chunk_is_wrong(
    served: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here each query of a prompt takes the set of its own length, as those of drafts do."""
    choose = Unrotated.choose

    def own(self: Any, lengths: Any, counts: Any) -> None:
        choose(self, [(0, most) for _, most in lengths], counts)

    monkeypatch.setattr(Unrotated, "choose", own)
    asked = prompt(600, 5)
    assert far(of_prompt(run(served, [asked])[0]), scores(truth, asked)) > 1


def test_policies_in_one_batch(served: Any, truth: Any, folder: str) -> None:
    asked = [prompt(ORIGINAL - 4, 50 + row) for row in range(5)]
    policies = [None, "recompute", "final", "prompt", "switch"]
    outs = run(served, asked, new=10, policies=policies, scored=False)
    for out, one, policy in zip(outs, asked, policies, strict=True):
        ids, found = of_new(out)
        if policy in (None, "switch"):
            expected = stepped(truth, one, ids)
        else:
            held = {"recompute": None, "final": "long", "prompt": "short"}[policy]
            expected = fresh(reference(folder, held), one, ids)
        assert far(found, expected) < CLOSE


def test_the_prefix_cache(served: Any, truth: Any) -> None:
    """Blocks of a request that switched serve what begins as it did, not what goes by one set."""
    begun = prompt(ORIGINAL - 2, 64)
    served.reset_prefix_cache()
    (out,) = run(served, [begun], new=40, scored=False)
    ids, _ = of_new(out)
    asked = ((begun, None, 224), (begun + ids, None, 0), (begun, "prompt", 0), (begun, None, 224))
    for tokens, policy, cached in asked:
        (again,) = run(served, [tokens], new=6, policies=[policy], scored=False)
        made, found = of_new(again)
        assert again.num_cached_tokens == cached
        if policy is None:
            assert far(found, stepped(truth, tokens, made)) < CLOSE


DRAFTS = """
from engines import engine, of_new, run
verified = []
drafts = dict(
    method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1
)
with engine(FOLDER, "unrotated", "switch", speculative_config=drafts) as served:
    scheduler = served.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule
    def counted(*args, **kwargs):
        out = schedule(*args, **kwargs)
        for name, drafts in out.scheduled_spec_decode_tokens.items():
            tokens = scheduler.requests[name].num_computed_tokens
            verified.append((tokens - len(drafts), tokens))
        return out
    scheduler.schedule = counted
    outs = run(served, ASKED, new=24, scored=False)
RESULT = verified, [of_new(out) for out in outs]
"""


def test_drafts_across_the_switch(folder: str, truth: Any) -> None:
    """Of three tokens, looked up in the text: verified together on both sides of the switch."""
    asked = [(prompt(40, row) * 7)[: ORIGINAL - 8 + row] for row in range(4)]
    verified, outs = in_a_process(DRAFTS, FOLDER=folder, ASKED=asked)
    assert any(begin <= ORIGINAL < end for begin, end in verified)
    for (ids, found), one in zip(outs, asked, strict=True):
        assert far(found, stepped(truth, one, ids)) < CLOSE
