"""Each contact of `enable` with transformers, by its name: it is there, or one error says which.

The same tests on the oldest, the locked and the newest transformers that are supported.
"""

import inspect
import itertools
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from model_cases import ONE_OF_EACH, SWITCH, family_model, generated, logits, max_diff, tokens
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache
from transformers.models.phi3 import modeling_phi3

from longrope_kernels.integrations.transformers import contacts, disable, enable, trial
from longrope_kernels.integrations.transformers.parts import slots_of

CLOSE = 2e-5
every_family = pytest.mark.parametrize("name", ONE_OF_EACH)
VERSION = rf"transformers {transformers.__version__}: .*tested with transformers 5\.6 to 5\.24"


@pytest.fixture(autouse=True)
def anew():
    """No result of a trial goes from test to test."""
    trial.passed.clear()
    yield
    trial.passed.clear()


def refused(model: Any, what: str) -> None:
    """`enable` says which contact is missing, and changes nothing."""
    rotary, implementation = model.model.rotary_emb, model.config._attn_implementation
    with pytest.raises(RuntimeError, match=VERSION) as caught:
        enable(model)
    assert what in str(caught.value)
    assert model.model.rotary_emb is rotary
    assert model.config._attn_implementation == implementation
    assert not hasattr(model.model, "longrope")


@pytest.mark.parametrize("cache", ["rotated", "unrotated"])
@every_family
def test_trial(name, cache):
    """As each `enable` tries it; the caller's random numbers stay."""
    (slot,) = slots_of(family_model(name), probing=True)
    before = torch.random.get_rng_state()
    trial.check_contacts(slot.architecture, type(slot.base), slot.base.config, cache)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_trial_finds_other_results(monkeypatch):
    from longrope_kernels.integrations.transformers.rotary import ExactRotaryEmbedding

    def shifted(self: Any, x: Any, position_ids: Any) -> Any:
        return position_ids, contacts.Unrotated(position_ids, lambda *_: None), None

    monkeypatch.setattr(
        "longrope_kernels.integrations.transformers.sequences.last_positions",
        lambda positions, *_: positions[:, 0],
    )
    monkeypatch.setattr(ExactRotaryEmbedding, "forward", shifted)
    refused(family_model("phi3"), "phi3: ")


def test_apply_rotary_pos_emb(monkeypatch):
    monkeypatch.delattr(modeling_phi3, "apply_rotary_pos_emb")
    refused(family_model("phi3"), "modeling_phi3 has no apply_rotary_pos_emb")


@every_family
def test_apply_rotary_pos_emb_is_the_original_on_tables(name):
    model = family_model(name)
    expected = logits(model)
    enable(family_model(name))
    module = sys.modules[type(model).__module__]
    names = list(inspect.signature(module.apply_rotary_pos_emb).parameters)
    assert names == ["q", "k", "cos", "sin", "unsqueeze_dim"]
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_apply_rotary_pos_emb_once_an_untouched_model_was_compiled():
    """Dynamo keeps the arguments of a function that it has traced. In a fresh process."""
    script = (
        "import torch\n"
        "from model_cases import family_model, logits, max_diff\n"
        "caches = {'llama': 'unrotated', 'mistral': 'rotated'}\n"
        "models = [family_model(name) for name in caches]\n"
        "expected = [logits(torch.compile(model, backend='eager')) for model in models]\n"
        "from longrope_kernels.integrations.transformers import enable\n"
        "torch.compiler.reset()\n"
        "for model, cache, wanted in zip(models, caches.values(), expected):\n"
        "    enable(model, cache=cache)\n"
        "    found = logits(torch.compile(model, backend='eager', fullgraph=True))\n"
        "    print('difference', max_diff(found, wanted))\n"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    differences = [float(x) for x in done.stdout.split()[1::2]]
    assert len(differences) == 2
    assert max(differences) < CLOSE


def test_attention_interface(monkeypatch):
    # Not the `transformers` of this file: importing a model may put another object in its place.
    monkeypatch.setattr(contacts.transformers, "AttentionInterface", None)
    refused(family_model("phi3"), "transformers has no AttentionInterface")
    monkeypatch.undo()
    enable(family_model("phi3"))
    assert "longrope" in AttentionInterface().valid_keys()


def test_attention_mask_interface(monkeypatch):
    monkeypatch.setattr(contacts.transformers, "AttentionMaskInterface", None)
    refused(family_model("phi3"), "transformers has no AttentionMaskInterface")
    monkeypatch.undo()
    enable(family_model("phi3"))
    assert "longrope" in AttentionMaskInterface().valid_keys()


def test_position_ids_in_the_attention_function(monkeypatch):
    forward = modeling_phi3.Phi3Attention.forward

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids")
        return forward(self, *args, **kwargs)

    without.__module__ = forward.__module__

    monkeypatch.setattr(modeling_phi3.Phi3Attention, "forward", without)
    expected = logits(family_model("phi3"))
    assert max_diff(logits(enable(family_model("phi3"))), expected) < CLOSE  # from its rotation


def test_a_cache_in_the_attention_module(monkeypatch):
    layer = modeling_phi3.Phi3DecoderLayer
    forward = layer.forward

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = {k: v for k, v in kwargs.items() if not isinstance(v, Cache)}
        return forward(self, *args, **kept)

    monkeypatch.setattr(layer, "forward", without)
    refused(family_model("phi3"), "attention modules are not given the cache")


def test_set_attn_implementation(monkeypatch):
    model = family_model("phi3")
    model.set_attn_implementation("eager")
    enable(model)
    assert model.config._attn_implementation == "longrope"
    disable(model)
    assert model.config._attn_implementation == "eager"
    monkeypatch.setattr(type(model.model), "set_attn_implementation", None)
    refused(model, "has no set_attn_implementation")


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_prepare_inputs_for_generation(name):
    """Its signature stays, and all that it does for models that are not enabled."""
    model, ids = family_model(name), tokens(1, SWITCH - 3)
    enable(family_model(name))
    wrapped = type(model).prepare_inputs_for_generation
    assert inspect.signature(wrapped) == inspect.signature(inspect.unwrap(wrapped))
    expected = generated(model, ids)
    assert torch.equal(generated(disable(enable(model)), ids), expected)
    for one in (family_model(name), enable(model), disable(model)):
        embeds = one.get_input_embeddings()(ids[:, :12]).detach()
        made = one.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
        assert torch.equal(made, generated(one, ids[:, :12])[:, 12:])


def test_prepare_inputs_for_generation_leaves_the_config_alone():
    model = enable(family_model("phi3"))
    fields, config = model.config.to_dict(), model.config
    generated(model, tokens(1, SWITCH - 3))
    assert model.config is model.model.config is config
    assert config.to_dict() == fields


def test_cu_seq_lens_in_the_attention_function():
    """Handed through all layers as they come."""
    ids = torch.cat((tokens(1, 9), tokens(1, 9)), 1)
    borders = torch.tensor([0, 9, 18])
    with torch.no_grad():
        out = enable(family_model("llama"))(ids, cu_seq_lens_q=borders, cu_seq_lens_k=borders)
    assert max_diff(out.logits[:, :9], out.logits[:, 9:]) < CLOSE


def test_a_process_that_knows_transformers_alone(tmp_path):
    """Enabled models, pickled with a cache, go on where nobody has imported this package."""
    ids, models = tokens(1, SWITCH - 3), []
    for name, cache in itertools.product(("phi3", "qwen2"), ("unrotated", "rotated")):
        model = enable(family_model(name), cache=cache)
        own = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=own)
            own.crop(-1)
        file = tmp_path / str(len(models))
        with file.open("wb") as out:
            pickle.dump((model, own), out)
        torch.save(model, file.with_suffix(".pt"))
        models.append(model)
    script = (
        "import pickle, sys, torch, transformers\n"
        "ids = torch.tensor(eval(sys.argv[1]))\n"
        "for path in sys.argv[2:]:\n"
        "    with open(path, 'rb') as file: model, cache = pickle.load(file)\n"
        "    again = torch.load(path + '.pt', weights_only=False)\n"
        "    with torch.no_grad():\n"
        "        logits = [m(ids).logits for m in (model, again)]\n"
        "        step = model(ids[:, -1:], past_key_values=cache).logits\n"
        "    made = model.generate(ids, max_new_tokens=8, do_sample=False)\n"
        "    torch.save((logits, step, made), path)\n"
    )
    files = [str(tmp_path / str(i)) for i in range(len(models))]
    command = [sys.executable, "-c", script, str(ids.tolist()), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for model, file in zip(models, files, strict=True):
        found, step, made = torch.load(file)
        with torch.no_grad():
            expected = model(ids).logits
        for one in found:
            assert max_diff(one, expected) < CLOSE
        assert max_diff(step[:, -1], expected[:, -1]) < CLOSE
        assert torch.equal(made, generated(model, ids))
