"""RULER's variable tracking and most common words, whose answers stand all over the text: how far passages go.

    python counting.py --data data

writes the questions to ``data/counting.json.gz``, by the package's generators; evaluate.py asks them, without the
package.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hiding import Tokens
from models import PICKED, Models
from questions import read_json_gz
from transformers import AutoTokenizer
from word_search import best, bm25

RECORDS = "counting.json.gz"
TASKS = ("vt", "cwe")
LENGTHS = (32, 128)
LINE_END = "\n"


def whole_chunks(tokens: Tokens, line_end: int, chunk_size: int) -> np.ndarray:
    """The tokens, filled up with ends of lines to a multiple of ``chunk_size``."""
    missing = -len(tokens) % chunk_size
    return np.array([*tokens, *[line_end] * missing], dtype=np.int64)


def share_written(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that a text contains (RULER's metric)."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def counting(models: Models, path: Path, count: int) -> list[dict[str, Any]]:
    """Of the first ``count`` questions of each task and length the percentage of the answers that is written.

    From the pick's passages, from BM25's, and by the base from the pick's.
    """
    cells: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in read_json_gz(path):
        cells[record["task"], record["chunks"]].append(record)
    source, layout = models.source(0), models.retriever.layout
    rows = []
    for (task, chunks), records in cells.items():
        hits: defaultdict[str, float] = defaultdict(float)
        for record in records[:count]:
            text, question, lead, line_end = source.encode(
                [record["context"], record["question"].strip(), record["lead"].strip(), LINE_END]
            )
            tokens = whole_chunks(text, line_end[0], layout.chunk_size)
            context, turn = models.context(tokens), source.turn(question, lead)
            picked = models.picked(context, question)
            by_words = best(bm25(tokens, question, layout), PICKED)
            for name, weights, segments, memory in (
                ("answered", models.decoder, picked, context.memory),
                ("BM25's passages", models.decoder, by_words, context.memory),
                ("base", models.retriever.base, picked, None),
            ):
                prompt = models.window(tokens, segments, turn)
                written = models.written(weights, [prompt], memory, context.query_position, record["most_tokens"])
                hits[name] += share_written(written[0], record["answers"])
        asked = len(records[:count])
        shares = {name: round(100 * hit / asked, 1) for name, hit in hits.items()}
        rows.append({"task": task, "chunks": chunks, "questions": asked, **shares})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), help="chunks of 1024 tokens")
    parser.add_argument("--questions", type=int, default=20, help="of each task and length")
    arguments = parser.parse_args()
    # what evaluates needs no package
    from sharedllm_ext.evaluation.generators import make_record
    from sharedllm_ext.evaluation.prompts import Prompts

    prompts = Prompts(AutoTokenizer.from_pretrained(arguments.data / "base"), chat=False)
    records = []
    for task in TASKS:
        for chunks in arguments.lengths:
            guess = None
            for index in range(arguments.questions):
                record, guess = make_record(task, 1024 * chunks, index, prompts, guess=guess)
                records.append(
                    {
                        "task": task,
                        "chunks": chunks,
                        "context": record.context,
                        "question": record.question,
                        "lead": record.answer_prefix,
                        "answers": record.answers,
                        "most_tokens": record.max_new_tokens,
                    }
                )
    with gzip.open(arguments.data / RECORDS, "wt", encoding="utf-8") as file:
        json.dump(records, file)


if __name__ == "__main__":
    main()
