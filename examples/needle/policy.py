"""How many passages to read: answers from the first 1, 2, 4 and 8 of the pick, and what rules on its scores would give.

    python policy.py --data data --adapter adapter.safetensors --out policy.jsonl
    python policy.py --report policy.jsonl

The adapter is train.py's or the package's. Of several values the share that is predicted right counts, each token after
the right ones before it; so figures of multi-value and multi-query are not those of evaluate.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapter import load_base
from evaluate import SEVERAL, SHARED, SQUAD_ANSWER_TOKENS, TASKS, Paragraphs, answered, covered, hidden_items
from hiding import Tokens
from models import PICKED, Context, Models, models_of
from package_form import any_adapter
from questions import QuestionSource, Row

COUNTS = (1, 2, 4, 8)
# passages end at the first drop of the score that is at least this share of the best score
DROPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
SQUAD = "SQuAD"
DEFAULT_TASKS = (
    "multi-key, 16 of one form",
    "multi-value",
    "multi-query",
    SQUAD,
    "other words",
    "single, RULER's wording",
    "29 other wordings",
)


def predicted(models: Models, context: Context, prompt: Tokens, answer: Tokens) -> list[bool]:
    """Which of the answer's tokens are predicted after the right ones before them."""
    ids = torch.tensor([[*prompt, *answer]], device=models.device)
    hidden = models.retriever.decode(models.decoder, ids, context.memory, context.query_position)[0]
    written = models.retriever.logits(hidden[len(prompt) - 1 : -1]).argmax(-1).tolist()
    return [token == right for token, right in zip(written, answer, strict=True)]


def share_right(models: Models, row: Row, right: Sequence[bool], several: bool) -> float:
    """1 or 0 for one value; of several values the share of those whose tokens are all right."""
    scored = len(row.answer) - (2 if row.lead else 1)
    if not several:
        return float(all(right[:scored]))
    ends = [i for i, token in enumerate(row.answer[:scored]) if "," in models.tokenizer.decode([token])]
    starts = [0, *(end + 1 for end in ends)]
    values = [right[a:b] for a, b in zip(starts, [*ends, scored], strict=True)]
    return sum(map(all, values)) / len(values)


def scored_segments(models: Models, context: Context, question: Tokens) -> tuple[list[int], list[float]]:
    """The best segments with their scores, best first."""
    ids = torch.tensor([question], device=models.device)
    used = torch.ones_like(ids, dtype=torch.bool)
    scores = models.retriever.scores(models.compressor, ids, used, context.raw_keys, context.words)[0]
    best = scores.topk(min(PICKED, len(scores)))
    return best.indices.tolist(), [round(value, 3) for value in best.values.tolist()]


def needle_records(
    models: Models, task: str, chunks: int, source: QuestionSource, counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One record for each of the questions of one context."""
    layout = models.retriever.layout
    tokens, rows = hidden_items(source, [TASKS[task](source) for _ in range(SHARED)], chunks * layout.chunk_size)
    context = models.context(tokens)
    for row in rows:
        segments, scores = scored_segments(models, context, row.question)
        turn = source.turn(row.question, row.lead)
        right, found = {}, {}
        for count in counts:
            prompt = models.window(tokens, segments[:count], turn)
            predictions = predicted(models, context, prompt, row.answer)
            right[str(count)] = share_right(models, row, predictions, task in SEVERAL)
            found[str(count)] = covered(segments[:count], row.places, layout)
        yield {"task": task, "chunks": chunks, "scores": scores, "right": right, "found": found}


def squad_records(
    models: Models, chunks: int, source: QuestionSource, paragraphs: Paragraphs, counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The same for SQuAD's questions: whether a right answer is in what is written."""
    layout = models.retriever.layout
    asked = [source.choose(source.passages) for _ in range(SHARED)]
    gold = [paragraphs.number[passage["gold"][0]] for passage in asked]
    tokens, starts = paragraphs.context(source.rng, gold, chunks * layout.chunk_size)
    context = models.context(tokens)
    for passage, paragraph in zip(asked, gold, strict=True):
        question = source.encode([passage["question"]])[0]
        segments, scores = scored_segments(models, context, question)
        start, size = starts[paragraph], len(paragraphs.tokens[paragraph])
        middles = [s * layout.segment + layout.segment // 2 for s in segments]
        right, found = {}, {}
        for count in counts:
            prompt = models.window(tokens, segments[:count], source.turn(question, []))
            texts = models.written(
                models.decoder, [prompt], context.memory, context.query_position, SQUAD_ANSWER_TOKENS
            )
            right[str(count)] = float(answered(texts, [passage]))
            found[str(count)] = any(start <= middle < start + size for middle in middles[:count])
        yield {"task": SQUAD, "chunks": chunks, "scores": scores, "right": right, "found": found}


def kept_by_drop(scores: Sequence[float], drop: float) -> int:
    """How many passages stand before the first drop of at least ``drop`` of the best score."""
    for i, (score, following) in enumerate(itertools.pairwise(scores), 1):
        if score - following >= drop * abs(scores[0]):
            return i
    return len(scores)


def report(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell the percentage right by every fixed count and every rule; a rule's count is rounded up."""
    cells: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        cells[record["task"], record["chunks"]].append(record)
    rows = []
    for (task, chunks), of_cell in cells.items():
        counts = sorted(map(int, of_cell[0]["right"]))

        def percent(count_of: Callable[[dict[str, Any]], int], of: Sequence[dict[str, Any]] = of_cell) -> float:
            return round(100 * float(np.mean([record["right"][str(count_of(record))] for record in of])), 1)

        row: dict[str, Any] = {"task": task, "chunks": chunks, "questions": len(of_cell)}
        for count in counts:
            row[f"first {count}"] = percent(lambda _, count=count: count)
        for drop in DROPS:

            def by_rule(record: dict[str, Any], drop: float = drop, counts: Sequence[int] = counts) -> int:
                kept = kept_by_drop(record["scores"], drop)
                return next((count for count in counts if count >= kept), counts[-1])

            row[f"drop {drop}"] = percent(by_rule)
            row[f"passages, drop {drop}"] = round(float(np.mean([by_rule(record) for record in of_cell])), 1)
        rows.append(row)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", type=Path, help="only report the records of this file")
    parser.add_argument("--data", type=Path, help="folder written by prepare.py")
    parser.add_argument("--adapter", type=Path, help="train.py's file or the package's")
    parser.add_argument("--out", type=Path, help="records, one JSON a line; new ones are added")
    parser.add_argument("--lengths", type=int, nargs="*", default=[7, 32, 128], help="chunks of 1024 tokens")
    parser.add_argument("--tasks", nargs="*", default=list(DEFAULT_TASKS), choices=[*TASKS, SQUAD])
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    parser.add_argument("--rounds", type=int, default=5, help="contexts of each task and length")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no context after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.report:
        for row in report([json.loads(line) for line in arguments.report.read_text().splitlines()]):
            print(json.dumps(row))
        return
    missing = [name for name in ("data", "adapter", "out") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"expected --report, or --data, --adapter and --out; got no --{missing[0]}")
    base = load_base(arguments.data / "base", torch.device(arguments.device))
    models = models_of(arguments.data, any_adapter(arguments.adapter, base), base.folder)
    source = models.source(500 + arguments.seed)
    paragraphs = Paragraphs(arguments.data, source)
    start = time.monotonic()
    for _ in range(arguments.rounds):
        for chunks in arguments.lengths:
            for task in arguments.tasks:
                if time.monotonic() - start > arguments.seconds:
                    return
                made = (
                    squad_records(models, chunks, source, paragraphs, arguments.counts)
                    if task == SQUAD
                    else needle_records(models, task, chunks, source, arguments.counts)
                )
                with arguments.out.open("a") as file:
                    for record in made:
                        file.write(json.dumps(record) + "\n")
                        file.flush()


if __name__ == "__main__":
    main()
