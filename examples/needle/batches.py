"""Training batches: contexts, questions with the segments that answer them, windows to answer in, running text."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hiding import IntArray, Tokens
from layout import Layout
from mix import Mix
from questions import QuestionSource, Row
from word_search import bm25

IGNORED = -100
# passages in a window, at most
PICKED = 8
# a reader's answer where no passage holds it, with and without the begin of an answer before it
ABSENT_AFTER_LEAD, ABSENT = " not in the passages.", "That is not in the passages."
# chunk indices seen in training, so that positions of a million tokens are not new
LARGEST_OFFSET, MOST_CHUNKS = 900, 1100
# segments that the answers of one window may need
NEEDED = 6
# of the contexts whose memory is read; the other rows learn to read passages without it
MEMORY_SHARE = 0.85


@dataclass(frozen=True)
class BatchSizes:
    """Contexts in a batch, chunks and questions of each, and lengths in tokens; ``turns`` questions share a window."""

    contexts: int = 8
    chunks: int = 7
    questions: int = 6
    question_tokens: int = 96
    running_tokens: int = 1024
    tail_tokens: int = 384
    answer_tokens: int = 144
    turns: int = 3


class Batch(NamedTuple):
    """``B`` contexts of ``n`` chunks, ``Q`` questions each; ``S`` segments in all of them, ``s`` in one.

    Attributes:
        chunks: ``[B n, chunk_size]`` token ids.
        questions: ``[B Q, L]`` token ids, zeros after the end.
        question_used: ``[B Q, L]`` bool, false after the end.
        targets: ``[B Q, S]`` float32, the answer's segments share 1.
        compared: ``[B Q, S]`` bool, the segments that the question is compared with.
        reader: ``[B]`` the question whose pick is read.
        needed: ``[B, s]`` bool, segments that must be among what is read.
        left_out: ``[B, s]`` bool, segments that must not.
        by_words: ``[B]`` bool, whether what is read goes by ``word_scores`` instead of the reader's pick.
        word_scores: ``[B, s]`` float32, BM25's scores of the reader's question.
        passages: ``[B]`` how many are read, 1 to PICKED.
        order: ``[B, PICKED]`` float32, numbers by which the passages are sorted; below 0 for the text's order.
        tail: ``[B, T]`` what follows the passages: questions and answers in turn.
        answer_places: ``[B, A]`` places of ``tail`` that predict an answer.
        answers: ``[B, A]`` the answers, ``IGNORED`` where there is none.
        running: ``[B, W]`` the text that follows the context.
        gate: ``[B]`` float32, 0 where the memory is not read.
        chunk_index: ``[B n]`` position of each chunk in its document.
        query_position: ``[1]`` position of the running text after it.
    """

    chunks: Any
    questions: Any
    question_used: Any
    targets: Any
    compared: Any
    reader: Any
    needed: Any
    left_out: Any
    by_words: Any
    word_scores: Any
    passages: Any
    order: Any
    tail: Any
    answer_places: Any
    answers: Any
    running: Any
    gate: Any
    chunk_index: Any
    query_position: Any


def empty_batch(sizes: BatchSizes, layout: Layout) -> Batch:
    rows, chunks = sizes.contexts * sizes.questions, sizes.contexts * sizes.chunks
    own = sizes.chunks * layout.segments_per_chunk
    return Batch(
        chunks=np.zeros((chunks, layout.chunk_size), np.int64),
        questions=np.zeros((rows, sizes.question_tokens), np.int64),
        question_used=np.zeros((rows, sizes.question_tokens), bool),
        targets=np.zeros((rows, chunks * layout.segments_per_chunk), np.float32),
        compared=np.ones((rows, chunks * layout.segments_per_chunk), bool),
        reader=np.zeros(sizes.contexts, np.int64),
        needed=np.zeros((sizes.contexts, own), bool),
        left_out=np.zeros((sizes.contexts, own), bool),
        by_words=np.zeros(sizes.contexts, bool),
        word_scores=np.zeros((sizes.contexts, own), np.float32),
        passages=np.full(sizes.contexts, PICKED, np.int64),
        order=np.full((sizes.contexts, PICKED), -1, np.float32),
        tail=np.zeros((sizes.contexts, sizes.tail_tokens), np.int64),
        answer_places=np.zeros((sizes.contexts, sizes.answer_tokens), np.int64),
        answers=np.full((sizes.contexts, sizes.answer_tokens), IGNORED, np.int64),
        running=np.zeros((sizes.contexts, sizes.running_tokens), np.int64),
        gate=np.ones(sizes.contexts, np.float32),
        chunk_index=np.zeros(chunks, np.int64),
        query_position=np.zeros(1, np.int64),
    )


def make_batch(source: QuestionSource, sizes: BatchSizes) -> Batch:
    """One batch, drawn from ``source``."""
    batch = empty_batch(sizes, source.layout)
    for b in range(sizes.contexts):
        while not _fill_context(batch, b, source, sizes):
            pass
    batch.gate[:] = source.rng.random(sizes.contexts) < MEMORY_SHARE
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


def _fill_context(batch: Batch, b: int, source: QuestionSource, sizes: BatchSizes) -> bool:
    """Draw a text; whether one of its questions could be asked in the room there is."""
    layout = source.layout
    text = source.training_text(sizes.chunks, sizes.questions, sizes.running_tokens, sizes.question_tokens)
    chunks = slice(b * sizes.chunks, (b + 1) * sizes.chunks)
    own = slice(chunks.start * layout.segments_per_chunk, chunks.stop * layout.segments_per_chunk)
    batch.chunks[chunks] = text.context.reshape(sizes.chunks, layout.chunk_size)
    batch.running[b] = text.running
    for j, row in enumerate(text.rows):
        r, n = b * sizes.questions + j, len(row.question)
        batch.questions[r], batch.question_used[r], batch.targets[r] = 0, False, 0
        batch.questions[r, :n], batch.question_used[r, :n] = row.question, True
        segments = answer_segments(row.places, layout.segment)
        for s in segments:
            batch.targets[r, own.start + s] = 1 / len(segments)
        batch.compared[r] = row.everywhere
        batch.compared[r, own] = True
    mix, rng = source.mix, source.rng
    absent = bool(mix.absent) and rng.random() < mix.absent and _fill_absent(batch, b, source, sizes, text.rows)
    if not absent and not _fill_tail(batch, b, source, sizes, text.rows):
        return False
    _fill_passages(batch, b, source, text.context)
    return True


def _fill_passages(batch: Batch, b: int, source: QuestionSource, context: IntArray) -> None:
    """Which passages are read, how many, and in which order."""
    mix, rng = source.mix, source.rng
    batch.by_words[b] = bool(mix.by_words) and rng.random() < mix.by_words
    batch.word_scores[b] = 0
    if batch.by_words[b]:
        reader = batch.reader[b]
        scores = bm25(context, batch.questions[reader][batch.question_used[reader]].tolist(), source.layout)
        # of two that are equal the earlier one
        batch.word_scores[b] = scores - 1e-4 * np.arange(len(scores))
    fewer = bool(mix.fewer) and rng.random() < mix.fewer
    least = max(1, int(batch.needed[b].sum()))
    batch.passages[b] = rng.integers(least, PICKED + 1) if fewer else PICKED
    shuffled = bool(mix.shuffled) and rng.random() < mix.shuffled
    batch.order[b] = rng.random(PICKED) if shuffled else -1


def _fill_absent(batch: Batch, b: int, source: QuestionSource, sizes: BatchSizes, rows: list[Row]) -> bool:
    """Ask the first question that only its places can answer, without the passages that hold them."""
    for j, row in enumerate(rows):
        if not (row.everywhere and row.answer and row.hidden):
            continue
        said = ABSENT_AFTER_LEAD if row.lead else ABSENT
        answer = [*source.encode([said])[0], source.tokenizer.eos_token_id]
        asked = source.turn(row.question, row.lead)
        if len(asked) + len(answer) > sizes.tail_tokens or len(answer) > sizes.answer_tokens:
            continue
        batch.reader[b] = b * sizes.questions + j
        places = range(len(asked) - 1, len(asked) - 1 + len(answer))
        _write_tail(batch, b, [*asked, *answer], list(places), answer)
        batch.left_out[b] = reading(row, source.layout, batch.needed.shape[1])
        return True
    return False


def reading(row: Row, layout: Layout, segments: int) -> np.ndarray:
    """``[segments]`` bool: those that are read together with a token of the row's places."""
    length = layout.segment + 2 * layout.margin
    first = np.clip(np.arange(segments) * layout.segment - layout.margin, 0, segments * layout.segment - length)
    read = np.zeros(segments, bool)
    for start, n in row.places:
        read |= (first < start + n) & (first + length > start)
    return read


def _write_tail(batch: Batch, b: int, tail: Tokens, places: list[int], answers: Tokens) -> None:
    batch.tail[b], batch.answer_places[b], batch.answers[b] = 0, 0, IGNORED
    batch.needed[b], batch.left_out[b] = False, False
    batch.tail[b, : len(tail)] = tail
    batch.answer_places[b, : len(places)] = places
    batch.answers[b, : len(answers)] = answers


def _fill_tail(batch: Batch, b: int, source: QuestionSource, sizes: BatchSizes, rows: list[Row]) -> bool:
    """Ask as many of the questions as there is room for; the first one's pick is read."""
    tail: list[int] = []
    places: list[int] = []
    answers: list[int] = []
    needed: set[int] = set()
    turns = 0
    for j, row in enumerate(rows):
        if turns == sizes.turns:
            break
        segments = {*needed, *_needed(row, source.layout)}
        asked = [*(source.next_turn if turns else []), *source.turn(row.question, row.lead)]
        size, count = len(tail) + len(asked) + len(row.answer), len(answers) + len(row.answer)
        if not row.answer or len(segments) > NEEDED or size > sizes.tail_tokens or count > sizes.answer_tokens:
            continue
        if not turns:
            batch.reader[b] = b * sizes.questions + j
        tail += asked
        places += range(len(tail) - 1, len(tail) - 1 + len(row.answer))
        answers += row.answer
        tail += row.answer
        needed, turns = segments, turns + 1
    _write_tail(batch, b, tail, places, answers)
    batch.needed[b, list(needed)] = True
    return turns > 0


def _needed(row: Row, layout: Layout) -> set[int]:
    """Segments that hold the places, together with their margins."""
    segment, margin = layout.segment, layout.margin
    found = set()
    for start, n in row.places:
        first = start // segment
        found.add(first)
        if start + n > (first + 1) * segment + margin:
            found.add((start + n - 1) // segment)
    return found


class BatchQueue:
    """Batches made by worker processes, each with a seed of its own."""

    def __init__(
        self,
        data: Path,
        base: Path,
        layout: Layout,
        sizes: BatchSizes,
        workers: int,
        seed: int,
        mix: Mix | None = None,
    ) -> None:
        context = mp.get_context("spawn")
        self.queue: Any = context.Queue(64)
        self.processes = [
            context.Process(
                target=_work, args=(self.queue, data, base, layout, sizes, 1000 * seed + 17 + i, mix), daemon=True
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


def _work(out: Any, data: Path, base: Path, layout: Layout, sizes: BatchSizes, seed: int, mix: Mix | None) -> None:
    # one core for each worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    try:
        source = QuestionSource(data, AutoTokenizer.from_pretrained(base), "train", seed, layout, mix)
        while True:
            out.put(tuple(make_batch(source, sizes)))
    except Exception:
        # told to the process that trains, which stops
        out.put(traceback.format_exc())
