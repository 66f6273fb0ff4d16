"""Cached keys keep no positions: tokens that do not follow them are refused, rows may move."""

import pytest
import torch
from model_cases import family_model, logits, max_diff, tokens
from transformers import DynamicCache

from longrope_kernels.integrations.transformers import enable, kept

CLOSE = 2e-5


def drop(cache):
    """As those do who compress a cache."""
    for layer in cache.layers:
        layer.keys, layer.values = (x[:, :, [0, 1, 4, 5, 7]] for x in (layer.keys, layer.values))


SKIPPING = torch.tensor([[0, 1, 2, 3, 9, 10, 11, 12]])
# By the prompt's positions, what happens to its keys, and the position of the next token.
NOT_BEHIND = {
    "a prompt that skips": (SKIPPING, lambda cache: None, 13),
    "a token that skips": (None, lambda cache: None, 9),
    "a token that steps back": (None, lambda cache: None, 7),
    "dropped keys": (None, drop, 8),
}


def step_behind(model, case):
    positions, change, position = case
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(1, 8), position_ids=positions, past_key_values=cache)
        change(cache)
        where = torch.tensor([[position]])
        return model(tokens(1, 1), position_ids=where, past_key_values=cache).logits


@pytest.mark.parametrize("case", NOT_BEHIND)
def test_tokens_that_do_not_follow_the_keys_of_a_cache(case, monkeypatch):
    given = NOT_BEHIND[case]
    message = r"each one more .* cache, which keeps no positions, got .*cache='rotated'"
    with pytest.raises(ValueError, match=message):
        step_behind(enable(family_model("phi3")), given)
    served = step_behind(enable(family_model("phi3"), cache="rotated"), given)
    assert max_diff(served, step_behind(family_model("phi3"), given)) < CLOSE
    if "token" not in case:  # seen by what the host knows
        monkeypatch.setattr(kept, "readable", lambda _: False)
        with pytest.raises(ValueError, match=message):
            step_behind(enable(family_model("phi3")), given)


def test_rows_that_begin_in_a_later_chunk_and_change_their_order():
    """Each row's first token lies elsewhere; in the first chunk one is all padding."""
    model, cache = enable(family_model("phi3")), DynamicCache()
    ids, counts = tokens(2, 12), torch.tensor([10, 4])
    mask = (torch.arange(12) >= 12 - counts[:, None]).long()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        for part in (slice(0, 6), slice(6, 11)):
            given = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            model(ids[:, part], past_key_values=cache, **given)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = {"attention_mask": mask.flip(0), "position_ids": positions[:, 11:].flip(0)}
        last = model(ids[:, 11:].flip(0), past_key_values=cache, **swapped).logits
    for row, of_row in enumerate(last.flip(0)):
        whole = logits(family_model("phi3"), ids=ids[row : row + 1, 12 - counts[row] :])
        assert max_diff(of_row[-1], whole[0, -1]) < CLOSE
