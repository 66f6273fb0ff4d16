"""Padding by a mask alone: a row gives what it gives alone, wherever its padding stands."""

import pytest
import torch
from model_cases import ONE_OF_EACH, SWITCH, family_config, family_model, max_diff, tokens
from test_models_forward import true_model
from transformers import AutoModelForSequenceClassification, DynamicCache, StaticCache

from longrope_kernels import Rope
from longrope_kernels.integrations.transformers import enable

CLOSE = 2e-5
LENGTHS = (8, 20, SWITCH + 12)
SIDES = ("left", "right", "both")


def batch(side: str, width: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of the rows of `LENGTHS`: (3, width)."""
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(LENGTHS):
        at = {"left": width - n, "right": 0, "both": (width - n) // 2}[side]
        ids[i, at : at + n], mask[i, at : at + n] = tokens(1, n, seed=n)[0], 1
    return ids, mask


def alone(name: str, rope: Rope | None = None) -> list[torch.Tensor]:
    model = true_model(name, rope)
    with torch.no_grad():
        return [model(tokens(1, n, seed=n), use_cache=False).logits[0] for n in LENGTHS]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "mistral sliding", "qwen2 sliding"])
def test_a_row_is_as_alone(name, side, use_cache):
    ids, mask = batch(side)
    with torch.no_grad():
        out = enable(family_model(name))(ids, attention_mask=mask, use_cache=use_cache).logits
    for of_row, real, expected in zip(out, mask.bool(), alone(name), strict=True):
        assert max_diff(of_row[real], expected) < CLOSE


@pytest.mark.parametrize("side", SIDES)
def test_a_threshold_counts_real_tokens(side):
    rope = Rope.from_config(family_config("phi3"), n_hat=6)
    ids, mask = batch(side)
    with torch.no_grad():
        out = enable(family_model("phi3"), rope=rope)(ids, attention_mask=mask).logits
    for of_row, real, expected in zip(out, mask.bool(), alone("phi3", rope), strict=True):
        assert max_diff(of_row[real], expected) < CLOSE


@pytest.mark.parametrize("n_hat", [0, 6])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("phi3", "dynamic"),
        ("phi3", "static"),
        ("phi3", "static, all slots in the mask"),
        ("phi3 sliding", "dynamic"),
        ("qwen2 sliding", "dynamic"),
    ],
)
def test_steps_by_a_mask_alone(name, kind, n_hat):
    """Behind left padding, where transformers counts positions by slots; windows drop some.

    A mask of all slots of a static cache, for shapes that stay, calls tokens to come real.
    """
    rope = Rope.from_config(family_config(name), n_hat=n_hat)
    ids, mask = batch("left", 50)
    model, parts, seen = enable(family_model(name), rope=rope), [], 0
    cache = DynamicCache(config=model.config)
    if kind.startswith("static"):
        cache = StaticCache(config=model.config, max_cache_len=64)
    of_all_slots = torch.nn.functional.pad(mask, (0, 14), value=1)
    for size in (44, 1, 3, 1, 1):
        at = slice(seen, seen + size)
        seen += size
        given = of_all_slots if kind.endswith("mask") else mask[:, :seen]
        with torch.no_grad():
            out = model(ids[:, at], attention_mask=given, past_key_values=cache)
        parts.append(out.logits)
    # The last row is long from the first chunk on, the others are short to the end.
    for of_row, real, expected in zip(
        torch.cat(parts, 1), mask.bool(), alone(name, rope), strict=True
    ):
        assert max_diff(of_row[real], expected) < CLOSE


def test_far_positions_of_the_caller_are_honoured():
    """Their angles, their set and, by a mask, the places of tokens."""
    ids, mask = batch("left")
    start = 1_000_000
    positions = (mask.cumsum(1) - 1).clamp(min=0) + start
    with torch.no_grad():
        out = enable(family_model("phi3", torch.float64))(
            ids, attention_mask=mask, position_ids=positions
        ).logits
        for of_row, real, n in zip(out, mask.bool(), LENGTHS, strict=True):
            expected = true_model("phi3")(
                tokens(1, n, seed=n), position_ids=torch.arange(start, start + n)[None]
            ).logits[0]
            assert max_diff(of_row[real], expected) < 1e-5


def test_a_classifier_reads_the_last_real_token():
    """Reward models give a mask and no positions."""
    ids, mask = batch("right")
    model = AutoModelForSequenceClassification.from_config(family_config("phi3", num_labels=3))
    model.load_state_dict(family_model("phi3").state_dict(), strict=False)
    model.eval()
    with torch.no_grad():
        expected = [model(tokens(1, n, seed=n)).logits[0] for n in LENGTHS]
        actual = enable(model)(ids, attention_mask=mask).logits
    for a, e in zip(actual, expected, strict=True):
        assert max_diff(a, e) < CLOSE
