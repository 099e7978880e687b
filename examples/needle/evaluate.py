"""Needles, SQuAD among distractors and perplexity, beside the base that reads the same passages and beside BM25.

    python evaluate.py --data data --adapter adapter.safetensors --out result.json

Lengths are in chunks of 1024 tokens. An answer is right if greedy decoding would write all of its tokens; of several
values the share that greedy decoding writes counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from adapter import file_digest, load_base
from counting import RECORDS, counting
from hiding import IntArray, Tokens, insert
from layout import Layout
from models import PICKED, Models, Prompt, models_of
from package_form import any_adapter
from questions import (
    ADJECTIVE_NOUN,
    GLOSS,
    SEVEN_DIGITS,
    UUID,
    Asked,
    Item,
    Needles,
    QuestionSource,
    Row,
    read_json_gz,
)
from retriever import Memory, Weights
from test_wordings import DIFFERENT_WORDS, NAME_ONLY, NEEDLES
from torch import Tensor
from word_search import best, bm25

# questions that share one context
SHARED = 10
LONG = 128
ANSWER_TOKENS, SQUAD_ANSWER_TOKENS = 72, 20
SQUAD_LENGTHS = (32, 128)
# exit status of a command that has more to do
GO_ON = 75
# what the base reads with full attention: its window less question and answer
WINDOW_CHUNKS = 7


def several_values(source: QuestionSource) -> Item:
    """One key with four values, two more keys of the same form."""
    _, keys, values, (statement, _, _) = ruler(source, 6)
    named = [keys[0]] * 4 + keys[4:]
    statements = [statement.format(k=k, v=v) for k, v in zip(named, values, strict=True)]
    question = f"What are all the special magic numbers for {keys[0]} mentioned in the provided text?"
    lead = f"The special magic numbers for {keys[0]} mentioned in the provided text are"
    return Item(statements, [Asked(question, lead, values[:4], [0, 1, 2, 3])])


def several_keys(source: QuestionSource) -> Item:
    """Four keys in one question, two more of the same form."""
    item, keys, values, _ = ruler(source, 6)
    names = f"{', '.join(keys[:3])}, and {keys[3]}"
    question = f"What are all the special magic numbers for {names} mentioned in the provided text?"
    lead = f"The special magic numbers for {names} mentioned in the provided text are"
    return Item(item.statements, [Asked(question, lead, ", ".join(values[:4]), [0, 1, 2, 3])])


def ruler(source: QuestionSource, count: int) -> Needles:
    """Needles in RULER's wording."""
    return source.needles(NEEDLES[:1], count, ADJECTIVE_NOUN, SEVEN_DIGITS)


def by_meaning(source: QuestionSource) -> Item:
    """The question names the key by a synonym or its definition, three more of the same form."""
    item = source.needles(NEEDLES[1:], 4, GLOSS, SEVEN_DIGITS).item
    return Item(item.statements, item.asked[:1])


def sentences(facts: Sequence[tuple[str, str, str]]) -> Callable[[QuestionSource], Item]:
    """The next one of the facts at each call."""
    numbers = itertools.cycle(range(len(facts)))

    def task(source: QuestionSource) -> Item:
        statement, question, answer = facts[next(numbers)]
        return Item([statement], [Asked(question, "", answer, [0])])

    return task


TASKS: dict[str, Callable[[QuestionSource], Item]] = {
    "single, RULER's wording": lambda source: ruler(source, 1).item,
    "29 other wordings": lambda source: source.needles(NEEDLES[1:], 4, None, SEVEN_DIGITS).item,
    "multi-key, 16 of one form": lambda source: ruler(source, 16).item,
    "key-value, UUID": lambda source: source.needles(NEEDLES[:1], 4, UUID, UUID).item,
    "key by its meaning": by_meaning,
    "other words": sentences(DIFFERENT_WORDS),
    "other words but a name": sentences(NAME_ONLY),
    "multi-value": several_values,
    "multi-query": several_keys,
}
# answered in full text, scored by the share of values in it; the other tasks have one value, written exactly or not
SEVERAL = ("multi-value", "multi-query")
LONG_TASKS = ("single, RULER's wording", "29 other wordings", "multi-key, 16 of one form", "other words")


def hidden_items(source: QuestionSource, items: Sequence[Item], length: int) -> tuple[IntArray, list[Row]]:
    """The items' statements at even random depths of running text, and the first question of each."""
    statements = [s for item in items for s in item.statements]
    pieces = source.encode([f" {s}" for s in statements])
    room = length - sum(map(len, pieces))
    tokens, places = insert(source.hay(room), pieces, source.rng.integers(0, room + 1, len(pieces)))
    rows, first = [], 0
    for item in items:
        asked = item.asked[0]
        rows.append(source.row(asked._replace(statements=[first + i for i in asked.statements]), places, pieces))
        first += len(item.statements)
    return tokens, rows


def covered(segments: Sequence[int], places: Sequence[tuple[int, int]], layout: Layout) -> bool:
    """Whether every place lies whole in what is read with one of the segments."""
    size, margin = layout.segment, layout.margin
    return all(
        any(s * size - margin <= start and start + n <= (s + 1) * size + margin for s in segments)
        for start, n in places
    )


def needle_task(models: Models, task: str, chunks: int, count: int, source: QuestionSource) -> dict[str, Any]:
    """Percentages over ``count`` questions."""
    layout, start = models.retriever.layout, time.monotonic()
    hits: defaultdict[str, float] = defaultdict(float)
    total = 0
    while total < count:
        items = [TASKS[task](source) for _ in range(SHARED)]
        tokens, rows = hidden_items(source, items, chunks * layout.chunk_size)
        context = models.context(tokens)
        prompts: dict[str, list[Prompt]] = {"pick": [], "BM25": [], "oracle": [], "full": []}
        for row in rows:
            oracle = sorted({(place + n // 2) // layout.segment for place, n in row.places})
            chosen = {
                "pick": models.picked(context, row.question),
                "BM25": best(bm25(tokens, row.question, layout), PICKED),
                "oracle": oracle,
            }
            hits["found by the pick"] += covered(chosen["pick"], row.places, layout)
            hits["found by its first"] += covered(chosen["pick"][:1], row.places, layout)
            hits["found without words"] += covered(
                models.picked(context, row.question, by_words=False), row.places, layout
            )
            hits["found by BM25"] += covered(chosen["BM25"], row.places, layout)
            turn, scored = source.turn(row.question, row.lead), len(row.answer) - (2 if row.lead else 1)
            for name, segments in chosen.items():
                prompts[name].append(Prompt(models.window(tokens, segments, turn), row.answer, scored))
            if chunks <= WINDOW_CHUNKS:
                prompts["full"].append(Prompt([*models.user, *tokens.tolist(), *turn], row.answer, scored))
        memory, position = context.memory, context.query_position
        values = [source.tokenizer.decode(row.answer[:-1]).strip(" .").split(", ") for row in rows]
        systems: list[tuple[str, Weights, str, Memory | None]] = [
            ("answered", models.decoder, "pick", memory),
            ("BM25's passages", models.decoder, "BM25", memory),
            ("right passages", models.decoder, "oracle", memory),
            ("without memory", models.decoder, "pick", None),
            ("base", models.retriever.base, "pick", None),
            ("base, BM25's passages", models.retriever.base, "BM25", None),
        ]
        if chunks <= WINDOW_CHUNKS:
            systems.append(("base, full attention", models.retriever.base, "full", None))
        if task in SEVERAL:
            systems = systems[:3]
        for name, weights, passages, read in systems:
            if task in SEVERAL:
                asked, right = ([p.prompt for p in prompts[passages]], [p.answer for p in prompts[passages]])
                texts = models.written(weights, asked, read, position, ANSWER_TOKENS, right)
                hits[name] += sum(
                    sum(v in text for v in wanted) / len(wanted) for text, wanted in zip(texts, values, strict=True)
                )
            else:
                hits[name] += sum(models.exact(weights, prompts[passages], read, position))
        total += len(rows)
    shares = {name: round(100 * hit / total, 1) for name, hit in hits.items()}
    seconds = round(time.monotonic() - start, 1)
    return {"task": task, "chunks": chunks, "questions": total, **shares, "seconds": seconds}


def needles(models: Models, chunks: int, count: int, seed: int = 0, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All tasks (or ``only`` some) at one length; above 128 chunks half the questions and four tasks."""
    rows = []
    source = models.source(99 + chunks + 10_000 * seed)
    for task in TASKS if chunks <= LONG else LONG_TASKS:
        if only and task not in only:
            continue
        asked = count if chunks <= LONG and task not in SEVERAL else max(SHARED, count // 2)
        rows.append({**needle_task(models, task, chunks, asked, source), "seed": seed})
        print(json.dumps(rows[-1]), flush=True)
    return rows


class Paragraphs:
    """The paragraphs of SQuAD's development set, in tokens."""

    def __init__(self, data: Path, source: QuestionSource) -> None:
        texts: list[str] = read_json_gz(data / "paragraphs_test.json.gz")
        self.number = {text: i for i, text in reversed(list(enumerate(texts)))}
        self.tokens = [np.array(ids) for ids in source.encode([f"\n\n{text}" for text in texts])]

    def context(self, rng: np.random.Generator, gold: Sequence[int], length: int) -> tuple[IntArray, dict[int, int]]:
        """Gold and other paragraphs in random order, cut at ``length`` tokens; the first token of each."""
        others = [int(i) for i in rng.permutation(len(self.tokens)) if i not in gold]
        chosen = list(gold)
        size = sum(len(self.tokens[i]) for i in gold)
        for i in others * 9:  # the set is smaller than the longest context
            if size > length:
                break
            chosen.append(i)
            size += len(self.tokens[i])
        # what is cut is the last one
        order = [chosen[i] for i in rng.permutation(len(chosen) - 1)] + [chosen[-1]]
        starts: dict[int, int] = {}
        at = 0
        for i in order:
            starts.setdefault(i, at)
            at += len(self.tokens[i])
        return np.concatenate([self.tokens[i] for i in order])[:length].astype(np.int64), starts


def answered(texts: Sequence[str], passages: Sequence[dict[str, Any]]) -> int:
    """How many texts contain one of the right answers (RULER's metric)."""
    return sum(
        any(answer.lower() in text.lower() for answer in passage["answers"])
        for text, passage in zip(texts, passages, strict=True)
    )


def squad(models: Models, chunks: int, count: int, seed: int = 0) -> dict[str, Any]:
    """SQuAD's questions among its paragraphs: found, answered, and answered with the gold paragraph alone."""
    source, layout = models.source(7 + 10_000 * seed), models.retriever.layout
    paragraphs = Paragraphs(models.data, source)
    hits: Counter[str] = Counter()
    total = 0
    while total < count:
        asked = [source.choose(source.passages) for _ in range(SHARED)]
        gold = [paragraphs.number[passage["gold"][0]] for passage in asked]
        tokens, starts = paragraphs.context(source.rng, gold, chunks * layout.chunk_size)
        context = models.context(tokens)
        prompts: dict[str, list[Tokens]] = {"pick": [], "BM25": [], "gold": []}
        for passage, paragraph in zip(asked, gold, strict=True):
            question, start = source.encode([passage["question"]])[0], starts[paragraph]
            end = start + len(paragraphs.tokens[paragraph])
            for name, segments in (
                ("pick", models.picked(context, question)),
                ("BM25", best(bm25(tokens, question, layout), PICKED)),
            ):
                middles = [s * layout.segment + layout.segment // 2 for s in segments]
                hits[f"found by {name}"] += any(start <= middle < end for middle in middles)
                prompts[name].append(models.window(tokens, segments, source.turn(question, [])))
            alone = [*source.separators(1)[0].tolist(), *paragraphs.tokens[paragraph].tolist()]
            prompts["gold"].append([*models.user, *alone, *source.turn(question, [])])
        guesses = [source.answer(passage["answers"][0], after_lead=False) for passage in asked]
        for name, weights, passages, memory in (
            ("answered", models.decoder, "pick", context.memory),
            ("answered, BM25's passages", models.decoder, "BM25", context.memory),
            ("answered, base", models.retriever.base, "pick", None),
            ("answered, gold alone", models.decoder, "gold", None),
            ("answered, gold alone, base", models.retriever.base, "gold", None),
        ):
            texts = models.written(
                weights, prompts[passages], memory, context.query_position, SQUAD_ANSWER_TOKENS, guesses
            )
            hits[name] += answered(texts, asked)
        total += SHARED
    shares = {name: round(100 * hit / total, 1) for name, hit in hits.items()}
    return {"chunks": chunks, "questions": total, **shares, "seed": seed}


def perplexity(
    models: Models, points: int = 24, window: int = 2048, lengths: Sequence[int] = (6, 32, 128, 1024)
) -> dict[str, float]:
    """Of the same windows with more and more before them, by what is read of it.

    ``memory`` is the coarse memory; ``recent`` the last 2048 tokens before the window, as text; ``picked`` 1024 of them
    and 1024 that the pick takes for the last 96.
    """
    text, size = models.source(1).text, models.retriever.layout.chunk_size
    layout = models.retriever.layout
    ends = [int(end) for end in np.linspace((1 << 20) + window + size, len(text) - 1, points)]

    def loss(weights: Weights, ids: IntArray, memory: Memory | None, position: Tensor) -> float:
        rows = torch.from_numpy(ids.astype(np.int64))[None].to(models.device)
        hidden = models.retriever.decode(weights, rows, memory, position)[0, -window:]
        return float(F.cross_entropy(models.retriever.logits(hidden[:-1]), rows[0, -window:][1:]))

    nowhere = torch.tensor([1], device=models.device)
    losses: dict[str, list[float]] = {}
    for end in ends:
        scored = text[end - window : end]

        def add(name: str, value: float) -> None:
            losses.setdefault(name, []).append(value)

        for name, weights in (("base", models.retriever.base), ("trained", models.decoder)):
            for before in (0, 2048, 6144):
                add(f"{name}, {before} tokens before", loss(weights, text[end - window - before : end], None, nowhere))
        for chunks in lengths:
            tokens = text[end - window - chunks * size : end - window].astype(np.int64)
            context = models.context(tokens)
            memory, position = context.memory, context.query_position
            add(f"memory of {chunks} chunks", loss(models.decoder, scored, memory, position))
            recent = np.concatenate((tokens[-2048:], scored))
            add(f"memory and recent, {chunks} chunks", loss(models.decoder, recent, memory, position))
            chosen = sorted(
                s for s in models.picked(context, tokens[-96:].tolist()) if s < (len(tokens) - 1024) // layout.segment
            )
            parts = [tokens[s * layout.segment : (s + 1) * layout.segment] for s in chosen]
            picked = np.concatenate((*parts, tokens[-1024:], scored))
            add(f"memory and picked, {chunks} chunks", loss(models.decoder, picked, memory, position))
    return {name: round(math.exp(sum(values) / len(values)), 3) for name, values in losses.items()}


def units(models: Models, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is evaluated one after the other, by its name in the results."""
    made: dict[str, Callable[[], Any]] = {}
    for seed in arguments.seeds:
        for chunks in arguments.lengths:
            made[f"needles, {chunks} chunks, seed {seed}"] = partial(
                needles, models, chunks, arguments.questions, seed, arguments.tasks
            )
        for chunks in arguments.squad_lengths if arguments.squad else ():
            made[f"SQuAD, {chunks} chunks, seed {seed}"] = partial(squad, models, chunks, arguments.squad, seed)
    if arguments.counting and (arguments.data / RECORDS).is_file():
        made["counting"] = partial(counting, models, arguments.data / RECORDS, arguments.counting)
    if arguments.points:
        made["perplexity"] = partial(perplexity, models, arguments.points)
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--adapter", type=Path, required=True, help="file written by train.py, or the package's")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results; what it has is not repeated")
    parser.add_argument("--lengths", type=int, nargs="*", default=[7, 32, 128, 512, 1024], help="chunks of 1024 tokens")
    parser.add_argument("--tasks", nargs="*", default=[], choices=list(TASKS), help="needle tasks, all by default")
    parser.add_argument("--questions", type=int, default=100, help="questions of each needle task")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="all questions are drawn anew for each")
    parser.add_argument("--squad", type=int, default=100, help="questions of SQuAD at each length, 0 for none")
    parser.add_argument("--squad-lengths", type=int, nargs="*", default=list(SQUAD_LENGTHS))
    parser.add_argument("--counting", type=int, default=20, help="questions of each task of counting.py, 0 for none")
    parser.add_argument("--points", type=int, default=24, help="windows of which perplexity is taken, 0 for none")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no part after so many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    start = time.monotonic()
    base = load_base(arguments.data / "base", torch.device(arguments.device))
    models = models_of(arguments.data, any_adapter(arguments.adapter, base), base.folder)
    header: dict[str, Any] = {
        "base": base.source,
        "adapter": file_digest(arguments.adapter),
        "device": arguments.device,
    }
    header |= {name: getattr(arguments, name) for name in ("tasks", "questions", "squad")}
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else dict(header)
    if any(results.get(name) != value for name, value in header.items()):
        got = {name: results.get(name) for name in header}
        raise SystemExit(f"{arguments.out}: expected results of {header}, got those of {got}; give another --out")
    results["torch"] = str(torch.__version__)
    for name, unit in units(models, arguments).items():
        if name in results:
            continue
        if time.monotonic() - start > arguments.limit:
            print(f"stopped before {name}: the same command goes on", flush=True)
            raise SystemExit(GO_ON)
        results[name] = unit()
        part = arguments.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=2) + "\n")
        part.replace(arguments.out)
        print(json.dumps({name: results[name]}), flush=True)


if __name__ == "__main__":
    main()
