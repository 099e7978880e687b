"""Training batches: contexts, questions with the segments that answer them, passages to read, and running text."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from layout import Layout
from questions import ANSWER_LIMIT, IntArray, QuestionSource, Row, Tokens

IGNORED = -100
# chunk indices seen in training, so that positions of a million tokens are not new
LARGEST_OFFSET, MOST_CHUNKS = 900, 1100


@dataclass(frozen=True)
class BatchSizes:
    """Contexts in a batch, chunks and questions of each, and lengths in tokens."""

    contexts: int = 8
    chunks: int = 7
    questions: int = 6
    question_tokens: int = 96
    running_tokens: int = 512
    reading_tokens: int = 1248
    passage_tokens: int = 1040


class Batch(NamedTuple):
    """``B`` contexts of ``n`` chunks, ``Q`` questions each; ``S`` segments in all of them.

    Attributes:
        chunks: ``[B n, chunk_size]`` token ids.
        questions: ``[B Q, L]`` token ids, zeros after the end.
        question_used: ``[B Q, L]`` bool, false after the end.
        targets: ``[B Q, S]`` float32, the answer's segments share 1.
        reading: ``[B, R]`` passages, one question and its answer.
        answer_places: ``[B, A]`` places of ``reading`` that predict the answer.
        answers: ``[B, A]`` the answer, ``IGNORED`` after its end.
        running: ``[B, W]`` the text that follows the context.
        chunk_index: ``[B n]`` position of each chunk in its document.
        query_position: ``[1]`` position of the running text after it.
    """

    chunks: Any
    questions: Any
    question_used: Any
    targets: Any
    reading: Any
    answer_places: Any
    answers: Any
    running: Any
    chunk_index: Any
    query_position: Any


def empty_batch(sizes: BatchSizes, layout: Layout) -> Batch:
    rows, chunks = sizes.contexts * sizes.questions, sizes.contexts * sizes.chunks
    return Batch(
        chunks=np.zeros((chunks, layout.chunk_size), np.int64),
        questions=np.zeros((rows, sizes.question_tokens), np.int64),
        question_used=np.zeros((rows, sizes.question_tokens), bool),
        targets=np.zeros((rows, chunks * layout.segments_per_chunk), np.float32),
        reading=np.zeros((sizes.contexts, sizes.reading_tokens), np.int64),
        answer_places=np.zeros((sizes.contexts, ANSWER_LIMIT), np.int64),
        answers=np.full((sizes.contexts, ANSWER_LIMIT), IGNORED, np.int64),
        running=np.zeros((sizes.contexts, sizes.running_tokens), np.int64),
        chunk_index=np.zeros(chunks, np.int64),
        query_position=np.zeros(1, np.int64),
    )


def make_batch(source: QuestionSource, sizes: BatchSizes) -> Batch:
    """One batch, drawn from ``source``."""
    batch = empty_batch(sizes, source.layout)
    for b in range(sizes.contexts):
        _fill_context(batch, b, source, sizes)
    batch.chunk_index[:], batch.query_position[:] = draw_chunk_index(source.rng, sizes.contexts, sizes.chunks)
    return batch


def answer_segments(places: list[tuple[int, int]], segment: int) -> list[int]:
    """All segments that hold a token of the places."""
    return sorted({s for start, n in places for s in range(start // segment, (start + n - 1) // segment + 1)})


def draw_chunk_index(rng: np.random.Generator, contexts: int, chunks: int) -> tuple[IntArray, int]:
    """Indices ``[contexts * chunks]`` of the chunks in a document, ascending in each context, and what follows them."""
    if rng.random() < 0.4:
        offset = int(rng.integers(0, LARGEST_OFFSET)) if rng.random() < 0.5 else 0
        return np.tile(np.arange(chunks) + offset, contexts), offset + chunks + 1
    total = int(rng.integers(contexts * chunks + 1, MOST_CHUNKS))
    index = np.sort(rng.permutation(total)[: contexts * chunks].reshape(contexts, chunks), 1)
    return index.reshape(-1), total + 1


def _fill_context(batch: Batch, b: int, source: QuestionSource, sizes: BatchSizes) -> None:
    """Draw texts until one of the questions can be read in the room there is."""
    layout = source.layout
    read = False
    while not read:
        text = source.training_text(sizes.chunks, sizes.questions, sizes.running_tokens, sizes.question_tokens)
        chunks = slice(b * sizes.chunks, (b + 1) * sizes.chunks)
        batch.chunks[chunks] = text.context.reshape(sizes.chunks, layout.chunk_size)
        batch.running[b] = text.running
        for j, row in enumerate(text.rows):
            _fill_question(batch, b * sizes.questions + j, row, chunks.start, layout)
            if not read:
                passages = draw_passages(source, text.context, row, sizes)
                read = _fill_reading(batch, b, source.reading(passages, row.question, row.lead), row.answer)


def _fill_question(batch: Batch, r: int, row: Row, first_chunk: int, layout: Layout) -> None:
    n = len(row.question)
    batch.questions[r], batch.question_used[r], batch.targets[r] = 0, False, 0
    batch.questions[r, :n], batch.question_used[r, :n] = row.question, True
    segments = answer_segments(row.places, layout.segment)
    for s in segments:
        batch.targets[r, first_chunk * layout.segments_per_chunk + s] = 1 / len(segments)


def draw_passages(source: QuestionSource, context: IntArray, row: Row, sizes: BatchSizes) -> Tokens:
    """The answer's segments and up to four others, in the order of the text."""
    size = source.layout.segment
    segments = sorted({start // size for start, _ in row.places})
    if len(row.places) == 1 or max(n for _, n in row.places) > source.layout.margin:
        segments = sorted({*segments, *((start + n - 1) // size for start, n in row.places)})
    others = source.rng.integers(0, len(context) // size, 4)
    text = source.passages_at(context, segments)
    for other in others:
        longer = source.passages_at(context, [*segments, int(other)])
        if len(longer) <= sizes.passage_tokens and source.rng.random() < 0.8:
            segments, text = [*segments, int(other)], longer
    return text


def _fill_reading(batch: Batch, b: int, prompt: Tokens, answer: Tokens) -> bool:
    """Whether the prompt with its answer has room; if so it is written."""
    p, n = len(prompt), len(answer)
    if p + n > batch.reading.shape[1] or n > batch.answers.shape[1]:
        return False
    batch.reading[b, : p + n] = prompt + answer
    batch.answer_places[b, :n] = np.arange(p - 1, p - 1 + n)
    batch.answers[b, :n] = answer
    return True


class BatchQueue:
    """Batches made by worker processes, each with a seed of its own."""

    def __init__(self, data: Path, base: Path, layout: Layout, sizes: BatchSizes, workers: int, seed: int) -> None:
        context = mp.get_context("spawn")
        self.queue: Any = context.Queue(64)
        self.processes = [
            context.Process(
                target=_work, args=(self.queue, data, base, layout, sizes, 1000 * seed + 17 + i), daemon=True
            )
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()

    def get(self) -> Batch:
        """The next batch.

        Raises:
            RuntimeError: a worker failed, or all of them have ended.
        """
        while True:
            try:
                item = self.queue.get(timeout=10)
            except queue.Empty:
                if not any(process.is_alive() for process in self.processes):
                    raise RuntimeError("batches: all workers have ended") from None
                continue
            if isinstance(item, str):
                raise RuntimeError(f"batches: a worker failed:\n{item}")
            return Batch(*item)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


def _work(out: Any, data: Path, base: Path, layout: Layout, sizes: BatchSizes, seed: int) -> None:
    # one core for each worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    try:
        source = QuestionSource(data, AutoTokenizer.from_pretrained(base), "train", seed, layout)
        while True:
            out.put(tuple(make_batch(source, sizes)))
    except Exception:
        # told to the process that trains, which stops
        out.put(traceback.format_exc())
