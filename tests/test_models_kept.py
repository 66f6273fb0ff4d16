"""Cached keys keep no positions: tokens that do not follow them are refused, rows may move."""

import pytest
import torch
from model_cases import family_model, logits, max_diff, tokens
from transformers import DynamicCache, MoshiForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longrope_kernels.integrations.transformers import enable, kept
from longrope_kernels.integrations.transformers.models import cache_of
from longrope_kernels.integrations.transformers.probe import tiny

CLOSE = 2e-5


def drop(cache, layers=slice(None)):
    """As those do who compress a cache."""
    for layer in cache.layers[layers]:
        layer.keys, layer.values = (x[:, :, [0, 1, 4, 5]] for x in (layer.keys, layer.values))


def drop_first(cache):
    drop(cache, slice(1))


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


def test_keys_of_a_rotary_module_of_each_layer():
    model = tiny(MoshiForCausalLM, CONFIG_MAPPING["moshi"]())
    if cache_of(model) == "rotated":  # an older transformers
        return
    enable(model)
    cache, ids = DynamicCache(), tokens(1, 9) % 32
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        drop(cache)
        with pytest.raises(ValueError, match="which keeps no positions, got positions from 8"):
            model(ids[:, 8:], position_ids=torch.tensor([[8]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "change"),
    [("phi3", drop_first), ("phi3 sliding", drop), ("qwen2 sliding", drop), ("llama", drop_first)],
)
def test_keys_that_are_dropped_in_some_layers_or_windows(name, change):
    """Layers with a window count the tokens that they have seen, whatever they keep."""
    model = enable(family_model(name))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 8), past_key_values=cache)
        change(cache)
        with pytest.raises(ValueError, match=r"past_key_values: expected \d keys of \d tokens in"):
            model(tokens(1, 1), past_key_values=cache)


def test_a_crop_behind_a_skip():
    model, cache = enable(family_model("phi3")), DynamicCache()
    ids = tokens(1, 9)
    with torch.no_grad():
        model(ids[:, :8], position_ids=SKIPPING, past_key_values=cache)
        cache.crop(-4)
        last = model(ids[:, 4:5], past_key_values=cache).logits
    assert max_diff(last[0, -1], logits(family_model("phi3"), ids=ids[:, :5])[0, -1]) < CLOSE


def left_padded():
    """Two rows, the second of which is padding in its first eight slots."""
    counts = torch.tensor([10, 4])
    mask = (torch.arange(12) >= 12 - counts[:, None]).long()
    return tokens(2, 12), counts, mask, (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)


def check_rows(last, ids, counts):
    for row, of_row in enumerate(last):
        whole = logits(family_model("phi3"), ids=ids[row : row + 1, 12 - counts[row] :])
        assert max_diff(of_row[-1], whole[0, -1]) < CLOSE


def test_rows_that_begin_in_a_later_chunk_and_change_their_order():
    """Each row's first token lies elsewhere; in the first chunk one is all padding."""
    model, cache = enable(family_model("phi3")), DynamicCache()
    ids, counts, mask, positions = left_padded()
    positions = positions + 100 * torch.arange(2)[:, None]
    with torch.no_grad():
        for part in (slice(0, 6), slice(6, 11)):
            given = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            model(ids[:, part], past_key_values=cache, **given)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = {"attention_mask": mask.flip(0), "position_ids": positions[:, 11:].flip(0)}
        last = model(ids[:, 11:].flip(0), past_key_values=cache, **swapped).logits.flip(0)
    check_rows(last[:1], ids, counts)
    untouched = family_model("phi3")(ids[1:, 8:], position_ids=positions[1:, 8:]).logits
    assert max_diff(last[1, -1], untouched[0, -1]) < CLOSE


@pytest.mark.parametrize("pad", [3, -2])
def test_rows_that_are_aligned_anew(pad):
    """More padding before all rows, or less, as where batches are joined or rejected drafts go."""
    model, cache = enable(family_model("phi3")), DynamicCache()
    ids, counts, mask, positions = left_padded()
    with torch.no_grad():
        given = {"attention_mask": mask[:, :11], "position_ids": positions[:, :11]}
        model(ids[:, :11], past_key_values=cache, **given)
        for layer in cache.layers:
            before = (0, 0, pad, 0)
            layer.keys = torch.nn.functional.pad(layer.keys, before)
            layer.values = torch.nn.functional.pad(layer.values, before)
        mask = torch.nn.functional.pad(mask, (pad, 0))
        given = {"attention_mask": mask, "position_ids": positions[:, 11:]}
        last = model(ids[:, 11:], past_key_values=cache, **given).logits
    check_rows(last, ids, counts)


def test_a_mask_that_hides_the_first_tokens_later():
    """As who lets go of them by the mask; positions that transformers counts by slots."""
    ids, both = tokens(1, 9), []
    for model in (family_model("phi3"), enable(family_model("phi3"))):
        cache, mask = DynamicCache(), torch.ones(1, 9, dtype=torch.long)
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache)
            mask[:, :3] = 0
            both.append(model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits)
    assert max_diff(*both) < CLOSE


def test_enabled_again_the_first_layer_that_is_left_begins_a_forward():
    model, untouched = enable(family_model("phi3")), family_model("phi3")
    for one in (model, untouched):
        one.model.layers = one.model.layers[1:]
        for index, layer in enumerate(one.model.layers):
            layer.self_attn.layer_idx = index
    foreign = DynamicCache()
    with torch.no_grad():
        untouched(tokens(1, 8), past_key_values=foreign)
        with pytest.raises(ValueError, match="past_key_values: expected keys unrotated"):
            enable(model)(tokens(1, 1), past_key_values=foreign)
