"""`longrope export`: what the file says then, and what llama.cpp itself makes of it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_cases import BASE, CONTEXT, VOCABULARY, make_model, write_gguf
from typer.testing import CliRunner

from longrope_kernels import FactorSet, Rope, cli
from longrope_kernels.integrations.llamacpp import export
from longrope_kernels.integrations.llamacpp import gguf_file as gguf_file_module

LENGTH = 4 * CONTEXT
NEW = {"rope_factors_long.weight", "rope_factors_short.weight"}
SHORT = tuple(1 + i / 40 for i in range(16))
LONG = tuple(1 + i / 4 for i in range(16))
ROPE = Rope.longrope(SHORT, LONG, CONTEXT, attention_factor=1.125, base=BASE)


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.values()
    return {f.name: (f.types, f.contents()) for f in fields if not f.name.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, tuple[Any, list[int], bytes]]:
    found = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in found}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(make_model(), tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "Q4_1"])
@pytest.mark.parametrize("alignment", [None, 128])
def test_the_two_tensors_and_the_metadata_differ_alone(
    tmp_path: Path, quantised: bool, alignment: int | None
) -> None:
    source = write_gguf(make_model(), tmp_path / "model.gguf", quantised, alignment)
    out = tmp_path / "extended.gguf"
    done = export(ROPE, source, out, length=LENGTH)
    assert (done.original, done.length) == (CONTEXT, LENGTH)

    before, after = tensors(source), tensors(out)
    assert any(kind.name == "Q4_1" for kind, *_ in before.values()) == quantised
    assert set(after) - set(before) == NEW
    assert {name: after[name] for name in before} == before
    for name, factors in (("short", SHORT), ("long", LONG)):
        kind, shape, raw = after[f"rope_factors_{name}.weight"]
        assert (kind.name, shape) == ("F32", [16])
        assert raw == np.asarray(factors, np.float32).tobytes()

    old, new = metadata(source), metadata(out)
    changed = {name: value for name, (_, value) in new.items() if old.get(name) != new[name]}
    assert changed == {
        "llama.context_length": LENGTH,
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.original_context_length": CONTEXT,
        "llama.rope.scaling.attn_factor": 1.125,
    }
    assert set(old) <= set(new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["extended.gguf", "model.gguf"]


def test_one_set_stands_in_both_lists(tmp_path: Path, source: Path) -> None:
    rope = Rope((FactorSet(LONG, attention_factor=1.125),), BASE)
    export(rope, source, tmp_path / "out.gguf", length=LENGTH)
    short, long = (tensors(tmp_path / "out.gguf")[name] for name in sorted(NEW))
    assert short == long
    assert metadata(tmp_path / "out.gguf")["llama.rope.scaling.original_context_length"][1] == 256


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (replace(ROPE, sets=(ROPE.sets[0], replace(ROPE.sets[1], n_hat=16))), "n_hat = 0"),
        (replace(ROPE, sets=(replace(ROPE.sets[0], max_length=99), *ROPE.sets)), "two sets"),
        (replace(ROPE, sets=(replace(ROPE.sets[0], attention_factor=1), ROPE.sets[1])), "1.125]"),
        (replace(ROPE, interleaved=True), "interleaved"),
        (replace(ROPE, base=5e5), "freq_base"),
        (Rope((FactorSet(LONG[:8]),), BASE), "dimension_count"),
        (Rope((FactorSet((1e39,) * 16),), BASE), "float32"),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    tmp_path: Path, source: Path, rope: Rope, said: str
) -> None:
    with pytest.raises(ValueError, match=said.replace("]", r"\]")):
        export(rope, source, tmp_path / "out.gguf", length=LENGTH)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [None, CONTEXT - 1, float(LENGTH), np.int64(LENGTH), 2**32])
def test_a_length_that_no_loader_reads_is_refused(
    tmp_path: Path, source: Path, length: Any
) -> None:
    """A float would be written as one, which llama.cpp does not take for a length."""
    with pytest.raises(ValueError, match=r"length: expected at least the 256 .* whole number"):
        export(ROPE, source, tmp_path / "out.gguf", length=length)
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_reads_no_factors_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.config.model_type = "qwen2"
    source = write_gguf(model, tmp_path / "qwen2.gguf")
    with pytest.raises(ValueError, match="llama or phi3, got 'qwen2'"):
        export(ROPE, source, tmp_path / "out.gguf", length=LENGTH)


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="one of 3 parts"):
        export(ROPE, tmp_path / "part.gguf", tmp_path / "out.gguf", length=LENGTH)


def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path: Path, source: Path) -> None:
    whole, cut = source.read_bytes(), tmp_path / "cut.gguf"
    weights = gguf.GGUFReader(source).data_offset
    ends = [4, 8, 20, 24, 30, 100, *range(200, weights, 997), weights - 1, weights, len(whole) - 64]
    for end in ends:
        cut.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.gguf: expected a whole GGUF file"):
            export(ROPE, cut, tmp_path / "out.gguf", length=LENGTH)
    for content in (b"", b"GGU", b"PK\x03\x04" + whole[4:]):
        cut.write_bytes(content)
        with pytest.raises(ValueError, match="expected a GGUF file, which begins with GGUF"):
            export(ROPE, cut, tmp_path / "out.gguf", length=LENGTH)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_factors_that_are_there_are_replaced_by_name(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.gguf"
    export(ROPE, source, out, length=LENGTH)
    first = out.read_bytes()
    other = Rope.longrope(LONG, SHORT, 128, attention_factor=1.0, base=BASE)
    with pytest.raises(ValueError, match=r"rope_factors_long\.weight.*longrope; --replace"):
        export(other, out, tmp_path / "again.gguf", length=LENGTH)
    with pytest.raises(FileExistsError, match="--replace"):
        export(other, source, out, length=LENGTH)
    assert out.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]

    # In place: the same as from the source.
    export(other, out, out, length=LENGTH, replace_factors=True)
    export(other, source, tmp_path / "fresh.gguf", length=LENGTH)
    assert tensors(out) == tensors(tmp_path / "fresh.gguf")
    assert metadata(out) == metadata(tmp_path / "fresh.gguf")


def test_another_scaling_is_replaced_whole(tmp_path: Path, source: Path) -> None:
    """YaRN's metadata, and the factors of Llama 3, which would win over the two lists."""
    reader, scaled = gguf.GGUFReader(source), tmp_path / "scaled.gguf"
    writer = gguf.GGUFWriter(scaled, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_yarn_log_mul(0.1)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"rope_freqs\.weight, .*type = yarn, .*factor = 4"):
        export(ROPE, scaled, tmp_path / "out.gguf", length=LENGTH)
    export(ROPE, scaled, tmp_path / "out.gguf", length=LENGTH, replace_factors=True)
    export(ROPE, source, tmp_path / "plain.gguf", length=LENGTH)
    assert tensors(tmp_path / "out.gguf") == tensors(tmp_path / "plain.gguf")
    assert metadata(tmp_path / "out.gguf") == metadata(tmp_path / "plain.gguf")


@pytest.mark.parametrize("at", [1, 4, 12])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"before")
    real: Callable[..., None] = gguf_file_module._write
    calls = 0

    def write(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(gguf_file_module, "_write", write)
    with pytest.raises(OSError, match="No space"):
        export(ROPE, source, out, length=LENGTH, replace_factors=True)
    assert out.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("over", [False, True])
def test_two_exports_to_one_file_at_once(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    """The second one begins and ends within the first; a file that is called as a draft stays."""
    out, own = tmp_path / "out.gguf", tmp_path / "out.gguf.new"
    own.write_bytes(b"the user's")
    real: Callable[..., None] = gguf_file_module._write
    other = Rope.longrope(LONG, SHORT, 128, attention_factor=1.0, base=BASE)

    def write(*arguments: Any) -> None:
        monkeypatch.setattr(gguf_file_module, "_write", real)
        export(other, source, out, length=LENGTH, replace_factors=over)
        real(*arguments)

    monkeypatch.setattr(gguf_file_module, "_write", write)
    if over:
        export(ROPE, source, out, length=LENGTH, replace_factors=True)
    else:
        with pytest.raises(FileExistsError, match="--replace"):
            export(ROPE, source, out, length=LENGTH)
    export(ROPE if over else other, source, tmp_path / "alone.gguf", length=LENGTH)
    assert out.read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    assert own.read_bytes() == b"the user's"
    assert len(list(tmp_path.iterdir())) == 3


# -------------------------------------------------------------------------------------- the command


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


def searched(folder: Path, rope: Rope = ROPE) -> Path:
    """A folder as a search leaves it."""
    folder.mkdir()
    rope.save(folder)
    config = make_model().config.to_dict() | rope.to_config(max_position_embeddings=LENGTH)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_the_command_says_which_context_takes_which_set(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.gguf"
    done = run(searched(tmp_path / "found"), "--gguf", source, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert f"for {LENGTH} tokens" in done.stdout
    assert "one set for all sequences, by the context it was started with" in done.stdout
    assert f"  short llama-server -m {out} -c {CONTEXT} -np 1\n" in done.stdout
    assert f"  long  llama-server -m {out} -c {LENGTH} -np 1\n" in done.stdout
    assert set(tensors(out)) - set(tensors(source)) == NEW


@pytest.mark.parametrize(
    ("bound", "said"),
    [(300, "llama-server -m {out} -c 256 -np 1"), (200, "in no context, since they are multiples")],
)
def test_the_short_context_is_one_that_llama_cpp_makes(
    bound: int, said: str, tmp_path: Path, source: Path
) -> None:
    rope = Rope.longrope(SHORT, LONG, bound, attention_factor=1.125, base=BASE)
    out = tmp_path / "out.gguf"
    done = run(searched(tmp_path / "found", rope), "--gguf", source, "--out", out)
    assert f"  short {said.format(out=out)}" in done.stdout, done.stderr


def test_a_length_that_no_long_set_serves(tmp_path: Path, source: Path) -> None:
    folder, out = searched(tmp_path / "found"), tmp_path / "out.gguf"
    done = run(folder, "--gguf", source, "--out", out, "--length", 0)
    assert done.exit_code == 1
    assert "length: expected at least the 256 tokens of the short set" in done.stderr
    done = run(folder, "--gguf", source, "--out", out, "--length", 256)
    assert "  short llama-server" in done.stdout
    assert "  long  in no context of up to 256 tokens: they take the short set" in done.stdout


def test_a_folder_without_config_needs_a_length(tmp_path: Path, source: Path) -> None:
    folder, out = searched(tmp_path / "found"), tmp_path / "out.gguf"
    (folder / "config.json").unlink()
    done = run(folder, "--gguf", source, "--out", out)
    assert done.exit_code == 1
    assert done.stderr.startswith("longrope export: length: expected at least the 256 tokens")
    assert run(folder, "--gguf", source, "--out", out, "--length", LENGTH).exit_code == 0


def test_errors_of_the_command_are_one_line(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = searched(tmp_path / "found")
    for given, said in (
        ([folder, "--gguf", tmp_path / "none.gguf"], "none.gguf"),
        ([tmp_path / "nowhere", "--gguf", source], "nowhere"),
    ):
        done = run(*given, "--out", tmp_path / "out.gguf")
        assert done.exit_code == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name)
    )
    done = run(folder, "--gguf", source, "--out", tmp_path / "out.gguf")
    assert "longrope export needs gguf: pip install 'longrope-kernels[gguf]'" in done.stderr


# -------------------------------------------------------------------------------- llama.cpp itself


def expected(family: str, rope: Rope, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities by an untouched model of transformers that has the rope in its config."""
    (one,) = rope.sets
    config = {
        "rope_type": "longrope",
        "rope_theta": BASE,
        "short_factor": list(one.factors),
        "long_factor": list(one.factors),
        "attention_factor": one.attention_factor,
        "original_max_position_embeddings": CONTEXT,
    }
    model = make_model(family, rope_parameters=config, original_max_position_embeddings=CONTEXT)
    with torch.no_grad():
        return model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_llama_cpp_takes_each_set_by_its_context(tmp_path: Path, family: str) -> None:
    from longrope_kernels.integrations.llamacpp.engine import log_probabilities

    source = write_gguf(make_model(family), tmp_path / "model.gguf")
    out = export(ROPE, source, tmp_path / "out.gguf", length=LENGTH).path
    prompt = torch.randint(3, VOCABULARY, (240,)).tolist()
    short, long = (expected(family, ROPE.for_length(n), prompt) for n in (CONTEXT, LENGTH))
    for context, own, other in ((CONTEXT, short, long), (CONTEXT + 1, long, short)):
        told = log_probabilities(out, context, prompt, 20)
        assert len(told) == 20
        differences = [[abs(float(x[i]) - p) for i, p in told.items()] for x in (own, other)]
        assert max(differences[0]) < 1e-2
        assert max(differences[1]) > 0.1


@pytest.mark.full
def test_the_check_asks_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(make_model(), tmp_path / "model.gguf", quantised=True)
    folder = searched(tmp_path / "found")
    done = run(folder, "--gguf", source, "--out", tmp_path / "out.gguf", "--check")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  -c")]
    assert [(row[1], row[2]) for row in rows] == [("256", "short"), ("512", "long")]
    assert all(float(own) < float(other) / 2 for *_, own, other in rows)

    # A file whose lists were exchanged: the engine takes another set than it should.
    swapped = Rope.longrope(LONG, SHORT, CONTEXT, attention_factor=1.125, base=BASE)
    real = cli.importlib.import_module("longrope_kernels.integrations.llamacpp")
    write = real.export

    def wrong(rope: Rope, *arguments: Any, **named: Any) -> Any:
        return replace(write(swapped, *arguments, **named), rope=rope)

    monkeypatch.setattr(real, "export", wrong)
    done = run(folder, "--gguf", source, "--out", tmp_path / "wrong.gguf", "--check")
    assert done.exit_code == 1
    assert "takes another set than it should" in done.stderr
