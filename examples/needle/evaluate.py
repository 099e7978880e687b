"""Needles, SQuAD among distractors and perplexity, beside the base that reads the same passages and beside BM25.

    python evaluate.py --data data --adapter adapter.safetensors --out result.json

Lengths are in chunks of 1024 tokens. An answer is exact if greedy decoding would write all of its tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from adapter import load_adapter, load_base
from questions import (
    ADJECTIVE_NOUN,
    SEVEN_DIGITS,
    UUID,
    Asked,
    IntArray,
    Item,
    Needles,
    QuestionSource,
    Row,
    Tokens,
    insert,
    read_json_gz,
)
from retriever import Memory, RawKeys, Retriever, Weights
from torch import Tensor
from transformers import AutoTokenizer
from word_search import best, bm25
from wordings import TEST_FACTS, TEST_NEEDLES, TRAIN_NEEDLES

PICKED = 8
# chunks compressed at a time
MICRO_BATCH = 128
# questions that share one context
SHARED = 8
LONG = 128
LONG_TASKS = ("single, RULER's wording", "other wordings", "multi-key, 16 of one form", "facts in other words")
SQUAD_LENGTHS = (32, 128)
SQUAD_ANSWER_TOKENS = 20


class Context(NamedTuple):
    """A context with its memory, as the decoder and as the pick read it."""

    tokens: IntArray
    memory: Memory
    raw_keys: RawKeys
    query_position: Tensor


class Prompt(NamedTuple):
    """A prompt with its answer, whose first ``scored`` tokens count: neither full stop nor end of turn."""

    prompt: Tokens
    answer: Tokens
    scored: int


@dataclass(frozen=True)
class Models:
    """The trained retriever with its weights, and what makes prompts for it."""

    retriever: Retriever
    compressor: Weights
    decoder: Weights
    tokenizer: Any
    data: Path

    @property
    def device(self) -> torch.device:
        return self.retriever.device

    def source(self, seed: int) -> QuestionSource:
        return QuestionSource(self.data, self.tokenizer, "test", seed, self.retriever.layout)

    def context(self, tokens: IntArray) -> Context:
        """Compress whole chunks."""
        ids = torch.from_numpy(tokens).to(self.device).view(-1, self.retriever.layout.chunk_size)
        parts = [self.retriever.compress(self.compressor, part) for part in ids.split(MICRO_BATCH)]
        memory = [
            (torch.cat([keys for keys, _ in layers]), torch.cat([values for _, values in layers]))
            for layers in zip(*(memory for memory, _ in parts), strict=True)
        ]
        raw_keys = {layer: torch.cat([raw[layer] for _, raw in parts]) for layer in parts[0][1]}
        placed = self.retriever.place(memory, torch.arange(len(ids), device=self.device), 1)
        return Context(tokens, placed, raw_keys, torch.tensor([len(ids) + 1], device=self.device))

    def picked(self, context: Context, question: Tokens) -> list[int]:
        """The best segments, best first."""
        ids = torch.tensor([question], device=self.device)
        used = torch.ones_like(ids, dtype=torch.bool)
        scores = self.retriever.scores(self.compressor, ids, used, context.raw_keys)[0]
        order: list[int] = scores.topk(min(PICKED, len(scores))).indices.tolist()
        return order

    def padded(self, rows: Sequence[Tokens]) -> Tensor:
        """``[rows, longest]`` token ids, zeros after the end."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids.to(self.device)

    def exact(
        self, weights: Weights, prompts: Sequence[Prompt], memory: Memory | None, query_position: Tensor
    ) -> list[bool]:
        """Which answers greedy decoding writes in full."""
        ids = self.padded([p.prompt + p.answer for p in prompts])
        hidden = self.retriever.decode(weights, ids, memory, query_position)
        right = []
        for row, tokens, p in zip(hidden, ids, prompts, strict=True):
            start, end = len(p.prompt), len(p.prompt) + p.scored
            written = self.retriever.logits(row[start - 1 : end - 1]).argmax(-1)
            right.append(bool((written == tokens[start:end]).all()))
        return right

    def written(
        self, weights: Weights, prompts: Sequence[Tokens], memory: Memory | None, query_position: Tensor, count: int
    ) -> list[str]:
        """Greedy continuations of ``count`` tokens, cut at the end of the turn."""
        rows = [list(prompt) for prompt in prompts]
        for _ in range(count):
            hidden = self.retriever.decode(weights, self.padded(rows), memory, query_position)
            last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
            chosen = self.retriever.logits(hidden[torch.arange(len(rows), device=self.device), last]).argmax(-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                row.append(token)
        texts = []
        for row, prompt in zip(rows, prompts, strict=True):
            new = row[len(prompt) :]
            end = new.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in new else len(new)
            texts.append(self.tokenizer.decode(new[:end]))
        return texts


def several_values(source: QuestionSource) -> Item:
    """One key with four values, two more keys of the same form."""
    _, keys, values, wording = ruler(source, 6)
    named = [keys[0]] * 4 + keys[4:]
    statements = [wording.statement.format(k=k, v=v) for k, v in zip(named, values, strict=True)]
    question = f"What are all the special magic numbers for {keys[0]} mentioned in the provided text?"
    lead = f"The special magic numbers for {keys[0]} mentioned in the provided text are"
    return Item(statements, [Asked(question, lead, values[:4], [0, 1, 2, 3])])


def several_keys(source: QuestionSource) -> Item:
    """Three keys in one question, three more of the same form."""
    item, keys, values, _ = ruler(source, 6)
    names = f"{keys[0]}, {keys[1]} and {keys[2]}"
    question = f"What are all the special magic numbers for {names} mentioned in the provided text?"
    lead = f"The special magic numbers for {names} mentioned in the provided text are"
    return Item(item.statements, [Asked(question, lead, ", ".join(values[:3]), [0, 1, 2])])


def ruler(source: QuestionSource, count: int) -> Needles:
    """Needles in RULER's wording."""
    return source.needles(TEST_NEEDLES[:1], count, ADJECTIVE_NOUN, SEVEN_DIGITS)


def other_wordings(source: QuestionSource) -> Item:
    wording = TEST_NEEDLES[1 + int(source.rng.integers(2))]
    return source.needles([wording], 4, None, SEVEN_DIGITS).item


TASKS: dict[str, Callable[[QuestionSource], Item]] = {
    "single, RULER's wording": lambda source: ruler(source, 1).item,
    "other wordings": other_wordings,
    "multi-key, 16 of one form": lambda source: ruler(source, 16).item,
    "key-value, UUID": lambda source: source.needles(TEST_NEEDLES[:1], 4, UUID, UUID).item,
    "multi-value": several_values,
    "multi-query": several_keys,
    "facts in other words": lambda source: source.fact(TEST_FACTS),
    "wordings of training": lambda source: source.needles(TRAIN_NEEDLES, 4, ADJECTIVE_NOUN, SEVEN_DIGITS).item,
}


def hidden_items(source: QuestionSource, items: Sequence[Item], length: int) -> tuple[IntArray, list[Row]]:
    """A text of ``length`` tokens with the items' statements at random places, and each item's first question."""
    pieces = source.encode([f" {s}" for item in items for s in item.statements])
    room = length - sum(map(len, pieces))
    hay = source.hay(room)
    context, places = insert(hay, pieces, source.rng.integers(0, room + 1, len(pieces)))
    rows, first = [], 0
    for item in items:
        end = first + len(item.statements)
        rows.append(source.row(item.asked[0], places[first:end], pieces[first:end]))
        first = end
    return context, rows


def covered(segments: Sequence[int], places: Sequence[tuple[int, int]], segment: int, margin: int) -> bool:
    """Whether each place lies whole in one of the segments with its margins."""
    spans = [(s * segment - margin, (s + 1) * segment + margin) for s in segments]
    return all(any(start <= place and place + n <= end for start, end in spans) for place, n in places)


def needle_task(models: Models, task: str, chunks: int, count: int, source: QuestionSource) -> dict[str, Any]:
    """Percentages of one task: found by the pick and by BM25, answered from what they found."""
    layout, start = models.retriever.layout, time.monotonic()
    hits: Counter[str] = Counter()
    total = 0
    while total < count:
        items = [TASKS[task](source) for _ in range(min(SHARED, chunks))]
        tokens, rows = hidden_items(source, items, chunks * layout.chunk_size)
        context = models.context(tokens)
        prompts: dict[str, list[Prompt]] = {"pick": [], "bm25": [], "oracle": []}
        for row in rows:
            chosen = {
                "pick": models.picked(context, row.question),
                "bm25": best(bm25(tokens, row.question, layout), PICKED),
                "oracle": [(place + n // 2) // layout.segment for place, n in row.places],
            }
            hits["found by the pick"] += covered(chosen["pick"], row.places, layout.segment, layout.margin)
            hits["found by its first"] += covered(chosen["pick"][:1], row.places, layout.segment, layout.margin)
            hits["found by BM25"] += covered(chosen["bm25"], row.places, layout.segment, layout.margin)
            for name, segments in chosen.items():
                reading = source.reading(source.passages_at(tokens, segments), row.question, row.lead)
                scored = len(row.answer) - (2 if row.lead else 1)
                prompts[name].append(Prompt(reading, row.answer, scored))
        memory, position = context.memory, context.query_position
        hits["exact"] += sum(models.exact(models.decoder, prompts["pick"], memory, position))
        hits["exact, BM25's passages"] += sum(models.exact(models.decoder, prompts["bm25"], memory, position))
        hits["exact, right passages"] += sum(models.exact(models.decoder, prompts["oracle"], memory, position))
        hits["exact, without memory"] += sum(models.exact(models.decoder, prompts["pick"], None, position))
        hits["exact, base"] += sum(models.exact(models.retriever.base, prompts["pick"], None, position))
        total += len(rows)
    shares = {name: round(100 * hit / total, 1) for name, hit in hits.items()}
    seconds = round(time.monotonic() - start, 1)
    return {"task": task, "chunks": chunks, "questions": total, **shares, "seconds": seconds}


def needles(models: Models, lengths: Sequence[int], count: int) -> list[dict[str, Any]]:
    """All tasks at every length; above 128 chunks half the questions and four tasks."""
    rows = []
    for chunks in lengths:
        source = models.source(99 + chunks)
        tasks = list(TASKS) if chunks <= LONG else LONG_TASKS
        for task in tasks:
            rows.append(needle_task(models, task, chunks, count if chunks <= LONG else max(SHARED, count // 2), source))
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


def squad(models: Models, chunks: int, count: int) -> dict[str, Any]:
    """SQuAD's questions among its paragraphs: found, answered, and answered with the gold paragraph alone."""
    source, layout = models.source(7), models.retriever.layout
    paragraphs = Paragraphs(models.data, source)
    hits: Counter[str] = Counter()
    total = 0
    while total < count:
        asked = [source.choose(source.passages) for _ in range(SHARED)]
        gold = [paragraphs.number[passage["gold"][0]] for passage in asked]
        tokens, starts = paragraphs.context(source.rng, gold, chunks * layout.chunk_size)
        context = models.context(tokens)
        prompts: dict[str, list[Tokens]] = {"pick": [], "bm25": [], "gold": []}
        for passage, paragraph in zip(asked, gold, strict=True):
            question, start = source.encode([passage["question"]])[0], starts[paragraph]
            end = start + len(paragraphs.tokens[paragraph])
            for name, segments in (
                ("pick", models.picked(context, question)),
                ("bm25", best(bm25(tokens, question, layout), PICKED)),
            ):
                middles = [s * layout.segment + layout.segment // 2 for s in segments]
                hits[f"found by {name}"] += any(start <= middle < end for middle in middles)
                prompts[name].append(source.reading(source.passages_at(tokens, segments), question, []))
            prompts["gold"].append(source.reading(paragraphs.tokens[paragraph].tolist(), question, []))
        for name, weights, passages, memory in (
            ("answered", models.decoder, "pick", context.memory),
            ("answered, BM25's passages", models.decoder, "bm25", context.memory),
            ("answered, gold alone", models.decoder, "gold", None),
            ("answered, gold alone, base", models.retriever.base, "gold", None),
        ):
            texts = models.written(weights, prompts[passages], memory, context.query_position, SQUAD_ANSWER_TOKENS)
            hits[name] += answered(texts, asked)
        total += SHARED
    shares = {name: round(100 * hit / total, 1) for name, hit in hits.items()}
    return {"chunks": chunks, "questions": total, **shares}


def perplexity(models: Models, points: int = 24, window: int = 2048) -> dict[str, float]:
    """Of the same windows with 0, 6, 32 and 128 chunks before them; full attention with 0 and 6, trained and base."""
    text, size = models.source(1).text, models.retriever.layout.chunk_size
    first = min(1 << 20, len(text) // 2) + window
    ends = [int(end) for end in np.linspace(first, len(text) - 1, points)]

    def loss(weights: Weights, ids: Tensor, memory: Memory | None, position: Tensor) -> float:
        hidden = models.retriever.decode(weights, ids[None], memory, position)[0, -window:]
        return float(F.cross_entropy(models.retriever.logits(hidden[:-1]), ids[-window:][1:]))

    def before(chunks: int, end: int) -> IntArray:
        return text[end - window - chunks * size : end].astype(np.int64)

    def with_memory(chunks: int, end: int) -> float:
        tokens = before(chunks, end)
        running = torch.from_numpy(tokens[-window:]).to(models.device)
        if not chunks:
            return loss(models.decoder, running, None, torch.tensor([1], device=models.device))
        context = models.context(tokens[:-window])
        return loss(models.decoder, running, context.memory, context.query_position)

    def full_attention(weights: Weights, chunks: int, end: int) -> float:
        ids = torch.from_numpy(before(chunks, end)).to(models.device)
        return loss(weights, ids, None, torch.tensor([1], device=models.device))

    def over_points(point: Callable[[int], float]) -> float:
        return round(math.exp(sum(point(end) for end in ends) / len(ends)), 3)

    results = {}
    for chunks in (0, 6, 32, 128):
        results[f"memory of {chunks} chunks"] = over_points(partial(with_memory, chunks))
    for name, weights in (("base", models.retriever.base), ("trained", models.decoder)):
        for chunks in (0, 6):
            mean = over_points(partial(full_attention, weights, chunks))
            results[f"full attention over {chunks} chunks, {name}"] = mean
    return results


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--adapter", type=Path, required=True, help="file written by train.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--lengths", type=int, nargs="*", default=[8, 128, 1024], help="chunks of 1024 tokens")
    parser.add_argument("--questions", type=int, default=64, help="questions of each needle task")
    parser.add_argument("--squad", type=int, default=64, help="questions of SQuAD at each length, 0 for none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    base = load_base(arguments.data / "base", device)
    retriever = load_adapter(arguments.adapter, base)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    models = Models(retriever, retriever.compressor_weights(), retriever.decoder_weights(), tokenizer, arguments.data)
    results: dict[str, Any] = {"base": base.source, "torch": str(torch.__version__), "device": str(device)}
    results["needles"] = needles(models, arguments.lengths, arguments.questions)
    if arguments.squad:
        results["squad"] = [squad(models, chunks, arguments.squad) for chunks in SQUAD_LENGTHS]
        print(json.dumps(results["squad"]), flush=True)
    results["perplexity"] = perplexity(models)
    print(json.dumps(results["perplexity"]), flush=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
