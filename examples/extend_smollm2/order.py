"""How the coarse fitnesses order the candidates of a search that got the full one.

    python examples/extend_smollm2/order.py --model extend-smollm2-output/model --search FOLDER \\
        --documents genesis.txt

FOLDER is one of `longrope search` on that model, with one document. Its best candidates are judged
by the last tokens behind a prefix, read under the best of them, and by a window. Each is a line of
order.jsonl in FOLDER; stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from longrope_kernels.search import Candidate, Evaluation
from longrope_kernels.search.behind import BehindPrefix
from longrope_kernels.search.coarse import Coarse, correlation
from longrope_kernels.search.documents import encoder, read_documents
from longrope_kernels.search.fitness import Documents, Perplexity
from longrope_kernels.search.model import TransformersLosses
from longrope_kernels.search.settings import Options
from longrope_kernels.search.skipped import SkippedPerplexity
from longrope_kernels.search.source import load_model, open_source, read_json

Rows = list[dict[str, Any]]


def judged(model: Path, search: Path, texts: Path, most: int, original: int | None) -> Rows:
    """The best candidates, each with its three losses in nats per token."""
    path = search / "order.jsonl"
    rows: Rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    result, source = read_json(search / "result.json"), open_source(model, original)
    length, given = result["length"], result["options"]
    options = Options(**{**given, "coarse": Coarse(**given["coarse"])})
    space = options.space(source.rope, source.original, length)
    documents = read_documents([texts], encoder(str(model)), length)
    losses = TransformersLosses(load_model(model, dtype="bfloat16"))
    last, tokens = given["last"], length // 4
    behind = BehindPrefix(losses, Perplexity(losses, documents, length, last=last).windows)
    window = SkippedPerplexity(losses, documents, length, tokens, Coarse(), last=last)
    journal = (json.loads(x) for x in (search / "evaluations.jsonl").read_text().splitlines())
    full = [row for row in journal if row["stage"] == "full"]
    best = sorted((Evaluation.from_json(row) for row in full), key=lambda one: one.fitness)[:most]
    behind.under(space.rope(best[0].candidate))

    def loss(fitness: Documents, candidate: Candidate) -> float:
        return fitness.measure([space.rope(candidate)])[0].loss

    for one in best[len(rows) :]:
        told = {"full": one.details["losses"][0], "behind": loss(behind, one.candidate)}
        rows.append(one.candidate.to_json() | told | {"window": loss(window, one.candidate)})
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def told(rows: Rows) -> str:
    """Rank correlations with the full fitness."""
    lines = [f"{len(rows)} candidates within {rows[-1]['full'] - rows[0]['full']:.4f} nats"]
    for kind in ("behind", "window"):
        both = [(_told(row, kind), _told(row, "full")) for row in rows]
        rho = correlation(both, [1.0] * len(rows))
        lines.append(f"{kind}: " + ("too few" if rho is None else f"{rho:.2f}"))
    return "\n".join(lines)


def _told(row: dict[str, Any], kind: str) -> Evaluation:
    return Evaluation(Candidate(()), row[kind])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder that run.py has made")
    parser.add_argument("--search", type=Path, required=True)
    parser.add_argument("--documents", type=Path, required=True, help="of that search")
    parser.add_argument("--original", type=int, help="as in `longrope search`")
    parser.add_argument("--most", type=int, default=24, help="candidates")
    chosen = parser.parse_args()
    given = chosen.model, chosen.search, chosen.documents, chosen.most, chosen.original
    print(told(judged(*given)))


if __name__ == "__main__":
    main()
