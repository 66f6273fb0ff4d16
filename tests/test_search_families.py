"""The search on models of other families than Llama, from a folder: pairs, heads, logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from search_cases import ORIGINAL, flags, make_texts, one_thread
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from longrope_kernels import FactorSet, Rope, cli
from longrope_kernels.integrations.transformers import enable
from longrope_kernels.integrations.transformers.models import cache_of
from longrope_kernels.integrations.transformers.probe import tiny
from longrope_kernels.integrations.transformers.settings import Cache
from longrope_kernels.integrations.transformers.shrunk import shrunk
from longrope_kernels.search.documents import Document
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.needles import Needle
from longrope_kernels.search.source import open_source, write_config
from longrope_kernels.search.tune import TuneSettings, tune

LENGTH = 96
IDS = torch.arange(3, 3 + ORIGINAL)[None] % 64
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# What differs: interleaved pairs of a part of each head, logits that are scaled or capped, a part
# of each head by another name, experts, sinks.
FIELDS: dict[str, dict[str, Any]] = {
    "glm4": {},
    "cohere": {},
    "gemma2": {},
    "granite": {"logits_scaling": 8.0},
    "gpt_neox": {},
    "mixtral": {"sliding_window": None},
    "gpt_oss": {"rope_parameters": PLAIN},
    "deepseek_v3": {},
    "falcon": {"alibi": False},
    "hunyuan_v1_dense": {},
}
INTERLEAVED = ("glm4", "cohere", "deepseek_v3")
ROTATED = (
    "deepseek_v3",
    "falcon",
    "hunyuan_v1_dense",
)  # alone: latent keys, another interface, norms
__all__ = ["one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(name: str) -> PreTrainedModel:
    """A tiny one with random weights that know 64 bytes."""
    config = CONFIG_MAPPING[name](**FIELDS.get(name, {}), max_position_embeddings=ORIGINAL)
    cls = AutoModelForCausalLM._model_mapping[type(config)]
    return tiny(cls, config)


def llava() -> PreTrainedModel:
    """A model of text and images, of whose text a search is."""
    text = shrunk(CONFIG_MAPPING["llama"](max_position_embeddings=ORIGINAL)).to_dict()
    vision = {
        "model_type": "clip_vision_model",
        **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), 16),
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=1)
    ).eval()


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def search(model: Path, folder: Path) -> Any:
    texts = make_texts(folder / "texts", count=1)
    for text in texts.iterdir():  # of bytes that the model knows
        text.write_text("".join(chr(ord(letter) - 64) for letter in text.read_text()), "utf-8")
    given = flags(documents=texts, tokenizer="bytes", samples=1, length=LENGTH)
    few = flags(population=4, iterations=1, mutants=1, crossovers=1, parents=2)
    found = run("search", model, *given, *few, *flags(out=folder / "found"))
    if found.exit_code == 0:
        rope = folder / "found" / "longrope.json"
        judged = run("evaluate", model, *given, *flags(out=folder / "judged", rope=rope))
        assert judged.exit_code == 0, judged.stderr
    return found


@pytest.mark.parametrize("name", [*FIELDS, "llava"])
def test_a_search_from_a_folder(name: str, tmp_path: Path) -> None:
    model = llava() if name == "llava" else model_of(name)
    model.save_pretrained(tmp_path / "model")
    result = search(tmp_path / "model", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "written: " in result.stdout
    assert "no config.json" not in result.stdout
    found = Rope.load(tmp_path / "found")
    assert found.interleaved == (name in INTERLEAVED)
    # transformers reads from the new config what the search wrote beside it.
    written = json.loads((tmp_path / "found" / "config.json").read_text("utf-8"))
    of_text = written.get("text_config", written)
    assert of_text["max_position_embeddings"] == LENGTH
    config = CONFIG_MAPPING[written["model_type"]].from_dict(written)
    twin = type(model)(config).eval()
    assert {key for key in written if "rope" in key} <= {key for key in of_text if "rope" in key}
    twin.load_state_dict(model.state_dict())
    ids = torch.arange(LENGTH)[None] % 64
    cache: Cache = "rotated" if name in ROTATED else "unrotated"
    with torch.no_grad():
        expected = enable(model, rope=found, cache=cache)(input_ids=ids).logits
        assert torch.allclose(enable(twin, cache=cache)(input_ids=ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ROTATED)
def test_rows_of_models_with_rotated_keys_alone(name: str) -> None:
    """Each has its own rope, and positions that jump are one sequence: as the model alone says."""
    model, ids = model_of(name), IDS.expand(2, -1)
    positions = torch.arange(ORIGINAL)[None] + 40 * (torch.arange(ORIGINAL) > 20)
    given = {"position_ids": positions, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False, **given).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, IDS[:, 1:], reduction="none")
    losses = TransformersLosses(model, batch_tokens=10 * ORIGINAL)
    other = replace(losses.rope, sets=(FactorSet((3.0,) * losses.rope.pairs),))
    found = losses([losses.rope, other], ids, positions=positions.expand(2, -1))
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=1e-4)
    alone = losses(other, IDS, positions=positions)
    assert torch.equal(found[1:], alone)
    assert not torch.allclose(alone, expected, atol=1e-3)
    needle = Needle((), tuple(IDS[0, :3].tolist()), tuple(IDS[0, 3:5].tolist()))
    (answer,) = losses.answers(losses.rope, IDS[0], [needle], length=ORIGINAL + 5)
    whole = torch.cat([IDS[0], torch.tensor([*needle.question, *needle.answer])])[None]
    torch.testing.assert_close(answer.losses, losses(losses.rope, whole, last=2)[0])


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "llama"])
def test_the_cache_of_a_version_that_nobody_tried(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm behind the rotation, which no probe shows, and a trial does."""
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    assert cache_of(model_of(name)) == ("unrotated" if name == "llama" else "rotated")


@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite", "deepseek_v3"])
def test_fine_tuning_begins_at_the_loss_of_the_model(name: str, tmp_path: Path) -> None:
    """Logits that are scaled or capped behind the head, and rotated keys alone."""
    model = model_of(name)
    with torch.no_grad():
        expected = model(input_ids=IDS, labels=IDS).loss
    rope = Rope.from_config(model.config, interleaved=name in INTERLEAVED)
    document = Document("text", IDS[0])
    tune(model, rope, [document], ORIGINAL, 1, TuneSettings(rows=1), tmp_path, device="cpu")
    (row,) = map(json.loads, (tmp_path / "tuning.jsonl").read_text().splitlines())
    assert row["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_config_of_few_fields_is_read_with_its_class(tmp_path: Path) -> None:
    """As Pythia's, with names of its own; Phi-3's original length is in its class alone."""
    folder = tmp_path / "model"
    model_of("gpt_neox").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["rope_parameters"]
    config |= {"rotary_pct": 0.25, "rotary_emb_base": 5000}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    result = search(folder, tmp_path)
    assert result.exit_code == 0, result.stderr
    found = Rope.load(tmp_path / "found")
    assert found.base == 5000
    written = AutoConfig.from_pretrained(tmp_path / "found")
    assert Rope.from_config(written).sets[-1].factors == found.sets[0].factors

    few = {"model_type": "phi3", "max_position_embeddings": 131072, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(few), "utf-8")
    assert open_source(folder).original == 4096
    few["max_position_embeddings"] = "many"
    (folder / "config.json").write_text(json.dumps(few), "utf-8")
    with pytest.raises(ValueError, match=r"model: .*max_position_embeddings"):
        open_source(folder)


def test_no_config_where_scores_are_scaled_by_the_old_rope(tmp_path: Path) -> None:
    model_of("deepseek_v3").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text("utf-8"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    for all_dim, written in ((None, True), (1.0, False)):
        config["rope_parameters"] |= {**yarn, "mscale": 1.0, "mscale_all_dim": all_dim}
        file.write_text(json.dumps(config), "utf-8")
        source = open_source(tmp_path / "model")
        found = FactorSet((2.0, *(3.0,) * (source.rope.pairs - 1)))
        rope = replace(source.rope, sets=(found,))
        note = write_config(source, rope, LENGTH, tmp_path / "found")
        assert (tmp_path / "found" / "config.json").exists() == written
        assert written == (note is None)
        if written:  # which older versions read whatever the type
            new = json.loads((tmp_path / "found" / "config.json").read_text("utf-8"))
            assert new["rope_parameters"]["factor"] == LENGTH / ORIGINAL
    assert note is not None
    assert "mscale_all_dim" in note


@torch.no_grad()
def test_a_config_keeps_what_attention_reads_beside_the_rope(tmp_path: Path) -> None:
    """Ministral 3 scales queries by it, and by how often the original length is passed."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": ORIGINAL // 2}
    parameters = {**PLAIN, **yarn, "llama_4_scaling_beta": 0.3}
    config = CONFIG_MAPPING["ministral3"](rope_parameters=parameters)
    model = tiny(AutoModelForCausalLM._model_mapping[type(config)], config)
    model.save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    ramp = tuple(1.0 + i for i in range(source.rope.pairs))
    ids = IDS.repeat(1, 2)
    for factors in ((1.0,) * len(ramp), (2.0,) * len(ramp), ramp):  # default, linear, longrope
        rope = replace(source.rope, sets=(FactorSet(factors, attention_factor=1.0),))
        assert write_config(source, rope, LENGTH, tmp_path / "found") is None
        twin = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "found"))
        twin.load_state_dict(model.state_dict())
        expected = enable(model, rope=rope)(input_ids=ids).logits
        assert torch.allclose(twin.eval()(input_ids=ids).logits, expected, atol=1e-4)

    bound = ORIGINAL // 2 + 1
    sets = FactorSet(ramp, max_length=bound), FactorSet(tuple(2 * x for x in ramp))
    note = write_config(source, replace(source.rope, sets=sets), LENGTH, tmp_path / "found")
    assert note is not None
    assert "llama_4_scaling_beta" in note
    assert f"{bound} there" in note
    assert not (tmp_path / "found" / "config.json").exists()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("factor", [1.0, 3.0])  # of all pairs: neither default nor linear there
def test_a_config_of_phimoe_has_the_fields_its_class_wants(
    tmp_path: Path, version: int, factor: float
) -> None:
    model_of("phimoe").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text("utf-8"))
    if version == 4:
        del config["rope_parameters"]
        file.write_text(json.dumps(config), "utf-8")
    source = open_source(tmp_path / "model")
    for attention in (1.0, 1.25):
        one = FactorSet((factor,) * source.rope.pairs, attention_factor=attention)
        rope = Rope((one,), source.rope.base)
        assert write_config(source, rope, LENGTH, tmp_path / "found") is None
        read = AutoConfig.from_pretrained(tmp_path / "found")
        got = Rope.from_config(read)
        assert got.sets[-1] == one
        assert got.base == rope.base
        twin = AutoModelForCausalLM.from_config(read).eval()
        logits = twin(input_ids=IDS.repeat(1, 2)).logits  # by transformers' own code
        assert torch.allclose(enable(twin)(input_ids=IDS.repeat(1, 2)).logits, logits, atol=1e-4)


@pytest.mark.parametrize("name", [*FIELDS, "llava"])
def test_losses_are_those_of_the_untouched_model(name: str) -> None:
    model = llava() if name == "llava" else model_of(name)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, IDS[0, 1:], reduction="none")
    losses = TransformersLosses(model)
    assert torch.allclose(losses(losses.rope, IDS)[0], expected, atol=1e-4)


def test_logits_that_are_something_else_are_refused() -> None:
    model = model_of("gpt_neox")
    forward = model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + 1
        return out

    before = model(IDS).logits
    model.forward = other
    with pytest.raises(ValueError, match=r"^model: expected logits that are .* a GPTNeoXForCausal"):
        TransformersLosses(model)
    model.forward = forward
    assert torch.equal(model(IDS).logits, before)  # as it was


def test_a_model_of_the_config_of_an_enabled_one() -> None:
    """Which says that its attention is this package's."""
    first = TransformersLosses(model_of("llama"))
    second = type(first.model)(first.model.config)
    second.load_state_dict(first.model.state_dict())
    losses = TransformersLosses(second)
    assert torch.equal(losses(losses.rope, IDS), first(first.rope, IDS))


def test_several_ropes_are_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    model_of("gemma3_text").config.save_pretrained(tmp_path / "model")
    result = search(tmp_path / "model", tmp_path)
    assert result.exit_code == 1
    assert "expected one set of rope_parameters for all layers, got one for each" in result.stderr


@pytest.mark.parametrize("name", ["gpt_neox", "llava", "mistral", "lfm2", "falcon_h1", "minimax"])
def test_answers_are_those_of_whole_texts(name: str) -> None:
    """Whatever the layers keep: keys, windows of them, or states, which take no token back."""
    losses = TransformersLosses(llava() if name == "llava" else model_of(name))
    text = torch.randint(3, 30, (40,), generator=torch.Generator().manual_seed(0))
    needles = [Needle((5,), (6, 7, 8), (9, 10, 11)), Needle((5,), (16, 7), (19, 20))]
    told = losses.answers(losses.rope, text, needles, length=60)
    for (_, question, answer), one in zip(needles, told, strict=True):
        whole = torch.cat([text, torch.tensor([*question, *answer])])[None]
        right = losses(losses.rope, whole, last=len(answer))[0]
        torch.testing.assert_close(one.losses, right, rtol=0, atol=1e-5)
