"""Texts in files as tokens, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longrope_kernels.search.documents import encoder, read_documents, texts
from longrope_kernels.search.source import repeats

BYTES = encoder("bytes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("grün\n", "utf-8")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one\\u2028"}\n\n{"text": "two", "n": 1}\n', "utf-8"
    )
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.py").write_text("x = 1", "utf-8")
    (tmp_path / ".hidden").write_text("no", "utf-8")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.txt").write_text("no", "utf-8")
    return tmp_path


def test_files_lines_and_folders_are_documents_in_order(folder):
    got = [(Path(name).relative_to(folder).as_posix(), text) for name, text in texts([folder])]
    expected = [("a.jsonl:1", "one\u2028"), ("a.jsonl:3", "two"), ("b.txt", "grün\n")]
    assert got == [*expected, ("inner/c.py", "x = 1")]
    assert [t for _, t in texts([folder / "b.txt", folder / "inner"])] == ["grün\n", "x = 1"]
    assert [t for _, t in texts([folder / ".cache"])] == ["no"]  # named by the user
    (folder / "a.jsonl").rename(folder / "a.JSONL")
    assert [t for _, t in texts([folder / "a.JSONL"])] == ["one\u2028", "two"]


def test_a_mark_of_utf8_is_no_text(tmp_path):
    for name, text in (("a.jsonl", '{"text": "one"}'), ("b.txt", "two")):
        (tmp_path / name).write_text(text, "utf-8-sig")
    assert [text for _, text in texts([tmp_path])] == ["one", "two"]


def test_links_to_folders_are_followed_and_to_each_once(folder, tmp_path_factory):
    more = tmp_path_factory.mktemp("more")
    (more / "e.txt").write_text("linked")
    (folder / "x").symlink_to(more)
    (folder / "y").symlink_to(more)
    (more / "back").symlink_to(folder)
    (folder / "inner/loop").symlink_to(folder)
    assert [text for _, text in texts([folder])] == [
        "one\u2028",
        "two",
        "grün\n",
        "x = 1",
        "linked",
    ]


def test_a_file_that_is_given_twice_is_refused(folder):
    for again in (folder / "b.txt", folder / "inner/../b.txt", folder):
        with pytest.raises(ValueError, match=r"b\.txt: expected each text once, got it twice"):
            list(texts([folder / "b.txt", again]))


def test_texts_that_are_there_twice_are_told(folder):
    (folder / "z.txt").write_text("grün\n", "utf-8")
    documents = read_documents([folder], BYTES)
    name = {Path(one.name).name: one.name for one in documents}
    twice = f"{name['z.txt']}: the same text as {name['b.txt']}, which counts twice"
    assert list(repeats(documents)) == [twice]
    (measured,) = read_documents([folder / "inner"], BYTES)
    assert list(repeats([measured], documents)) == [
        f"{measured.name}: a text to train on, which {measured.name} measures the model by"
    ]


def test_bytes_are_those_of_utf8(folder):
    (document,) = read_documents([folder / "b.txt"], BYTES)
    assert bytes(document.tokens.tolist()) == "grün\n".encode()
    assert document.tokens.dtype.is_signed
    assert str(document.tokens.dtype) == "torch.int64"


def test_ids_that_the_model_does_not_know_are_refused(folder):
    encode = encoder("bytes", 110)
    assert encode("mmm") == [109] * 3
    with pytest.raises(ValueError, match=r"--tokenizer: expected ids below 110, .* got 110"):
        encode("mmn")


def test_the_tokenizer_of_a_folder_adds_nothing(tmp_path):
    plain = Tokenizer(models.WordLevel({"[U]": 0, "[B]": 1, "ab": 2, "c": 3}, "[U]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="[B]", unk_token="[U]")
    fast.save_pretrained(tmp_path)
    assert encoder(str(tmp_path))("c ab c what") == [3, 2, 3, 0]


def test_documents_begin_as_the_tokenizer_begins_them(tmp_path):
    plain = Tokenizer(models.WordLevel({"[U]": 0, "[B]": 1, "[E]": 2, "ab": 3}, "[U]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[B] $A [E]", special_tokens=[("[B]", 1), ("[E]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[U]").save_pretrained(tmp_path)
    encode = encoder(str(tmp_path))
    assert encode("ab ab") == [3, 3]
    (tmp_path / "text").write_text("ab ab")
    (document,) = read_documents([tmp_path / "text"], encode)
    assert document.tokens.tolist() == [1, 3, 3]


def test_a_short_document_is_named_with_its_tokens(folder):
    with pytest.raises(ValueError, match=r"a\.jsonl:3: expected at least 5 tokens, .* got 3"):
        read_documents([folder], BYTES, 5)
    kept = read_documents([folder], BYTES, 5, short="skip")
    assert [len(d.tokens) for d in kept] == [6, 6, 5]
    assert len(read_documents([folder], BYTES, 5, most=2, short="skip")) == 2
    assert len(read_documents([folder], BYTES, 5, most=1)) == 1  # what is not taken may be short
    with pytest.raises(
        ValueError, match=r"expected a document of 7 tokens or more, the longest .* 6"
    ):
        read_documents([folder], BYTES, 7, short="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad\.jsonl:2: expected JSON"),
        ('{"content": "x"}', r'bad\.jsonl:2: expected an object with "text"'),
        ('["text"]', r'bad\.jsonl:2: expected an object with "text"'),
        ('{"text": 3}', r'bad\.jsonl:2: expected an object with "text"'),
        ('{"text": "\\ud800"}', r"bad\.jsonl:2: expected text that UTF-8 can say"),
        ("[" * 100_000, r"bad\.jsonl:2: expected JSON"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "good"}) + "\n" + line, "utf-8")
    with pytest.raises(ValueError, match=message):
        list(texts([tmp_path / "bad.jsonl"]))


def test_what_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such file or folder"):
        list(texts([tmp_path / "nowhere"]))
    with pytest.raises(ValueError, match="expected texts, got a folder without files"):
        list(texts([tmp_path]))
    (tmp_path / "latin").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match="latin: expected text in UTF-8"):
        list(texts([tmp_path]))
    with pytest.raises(
        ValueError, match=r"tokenizer: found none in .*; name the folder of one, or"
    ):
        encoder(str(tmp_path))
