"""Batches of training: contexts with questions, where the answers stand, and the text that follows.

A batch is a pure function of seed, step and part, so that a resumed run sees what an uninterrupted one would have.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..counted import counted
from .prompt import PromptTokens
from .sources import Record, Sources, Tokens
from .wordings import CONTINUE, facts

#: Positions of chunks that are drawn: those of documents of a million tokens are not new later.
LARGEST_OFFSET, MOST_CHUNKS = 900, 1100
#: Segments that the questions of one window may need.
NEEDED = 6
_TRIES = 50


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a batch holds; lengths in tokens.

    Attributes:
        contexts: in a batch.
        chunks: of a context.
        questions: about a context.
        question_tokens, answer_tokens: of one question and one answer, at most.
        running: of the text after the context.
        turns: questions that share a window.
        tail: questions and answers of a window, at most.
        memory_share: of the contexts whose memory is read; the others teach to read passages without one.
        spread: draw the positions of the chunks at random.
    """

    contexts: int = 8
    chunks: int = 7
    questions: int = 6
    question_tokens: int = 96
    answer_tokens: int = 96
    running: int = 1024
    turns: int = 3
    tail: int = 384
    memory_share: float = 0.85
    spread: bool = True


class Question(NamedTuple):
    """A question in tokens.

    Attributes:
        question, answer: token ids; the answer without an end token.
        places: (first token, tokens) of the evidence in the context; empty where that is not known.
        everywhere: whether no other context of a batch can answer it.
    """

    question: list[int]
    answer: list[int]
    places: list[tuple[int, int]]
    everywhere: bool


class Example(NamedTuple):
    """A context ``[C]``, questions about it, those of them that share a window, and the text that follows ``[W]``."""

    context: Tokens
    questions: list[Question]
    turns: list[int]
    running: Tokens


class Batch(NamedTuple):
    """Examples; ``gates``: whether their memory is read; ``chunk_index [chunks]`` of each, ``end`` of the document."""

    examples: list[Example]
    gates: list[bool]
    chunk_index: list[Tokens]
    end: int


class Mix:
    """Draws batches from sources.

    A context is plain text with facts, records and nothing else put into it; questions ask for the facts, for what the
    records ask, and how a passage goes on. Without a tokenizer there are no facts.

    Args:
        sources: what was read.
        tokenizer: the base's, or ``None``.
        prompt: tokens around question and answer.
        config: the model's.
        sizes: of a batch.
        seed: of all that is drawn.

    Raises:
        ValueError: too little text, or a size out of range.
    """

    def __init__(
        self, sources: Sources, tokenizer: Any, prompt: PromptTokens, config: Any, sizes: Sizes, seed: int
    ) -> None:
        self.tokenizer, self.prompt, self.sizes, self.seed = tokenizer, prompt, sizes, seed
        self.records = sources.records
        self.segment, self.margin, self.chunk = config.segment_size, config.segment_margin, config.chunk_size
        self.length = sizes.chunks * config.chunk_size
        needed = self.length + sizes.running
        long = [document for document in sources.documents if len(document) >= needed]
        short = [document for document in sources.documents if len(document) < needed]
        if short:
            # short documents follow each other
            joined = np.concatenate(short)
            long += [joined] if len(joined) >= needed else []
        if not long:
            total = sum(map(len, sources.documents))
            raise ValueError(
                f"data: expected plain text of at least {counted(needed, 'token')} ({counted(sizes.chunks, 'chunk')} "
                f"of {config.chunk_size} and {sizes.running} that follow), got {total}"
            )
        self.documents = long
        room = np.array([len(document) - needed + 1 for document in long], dtype=np.float64)
        self.shares = room / room.sum()

    def batch(self, step: int, part: int) -> Batch:
        """The batch of a step and a part, which counts processes and accumulated batches."""
        rng = np.random.default_rng([self.seed, step, part])
        sizes = self.sizes
        examples = [self._example(rng) for _ in range(sizes.contexts)]
        gates = (rng.random(sizes.contexts) < sizes.memory_share).tolist()
        index, end = self._positions(rng)
        return Batch(examples, gates, index, end)

    def _positions(self, rng: np.random.Generator) -> tuple[list[Tokens], int]:
        """Indices of the chunks, rising in each context, and how many chunks the document then has."""
        contexts, chunks = self.sizes.contexts, self.sizes.chunks
        plain = np.arange(chunks)
        if not self.sizes.spread or rng.random() < 0.2:
            return [plain] * contexts, chunks
        if rng.random() < 0.25:
            offset = int(rng.integers(0, LARGEST_OFFSET))
            return [plain + offset] * contexts, offset + chunks
        total = int(rng.integers(chunks, max(MOST_CHUNKS, chunks + 1)))
        return [np.sort(rng.permutation(total)[:chunks]) for _ in range(contexts)], total

    def _example(self, rng: np.random.Generator) -> Example:
        for _ in range(_TRIES):
            example = self._draw(rng)
            if example is not None:
                return example
        raise ValueError(
            f"data: expected questions that fit {counted(self.sizes.question_tokens, 'token')}, with answers of "
            f"{self.sizes.answer_tokens}, in a context of {self.length}, got none in {counted(_TRIES, 'try')}"
        )

    def _draw(self, rng: np.random.Generator) -> Example | None:
        sizes = self.sizes
        pieces: list[list[int]] = []
        asked: list[tuple[list[int], list[list[int]], list[int]]] = []
        if self.tokenizer is not None:
            self._add_facts(rng, pieces, asked)
        records: list[tuple[int, Record, int]] = []
        if self.records:
            self._add_records(rng, pieces, records)
        room = self.length - sum(map(len, pieces))
        if room < self.length // 4:
            return None
        hay = self._hay(rng, room + sizes.running)
        context, first = insert(hay[:room], pieces, rng.integers(0, room + 1, len(pieces)))
        questions = []
        for question, answers, numbers in asked:
            places = [(first[i], len(pieces[i])) for i in numbers]
            questions.append(Question(question, self._joined(answers, places), places, True))
        for number, record, cut in records:
            places = [(first[number] + start - cut, count) for start, count in record.places]
            inside = [(a, n) for a, n in places if first[number] <= a and a + n <= first[number] + len(pieces[number])]
            questions.append(Question(record.question, record.answer, inside, False))
        while len(questions) < sizes.questions or rng.random() < 0.08:
            questions.append(self._continuation(rng, context))
        questions = [q for q in questions if self._fits(q)]
        chosen = [questions[int(i)] for i in rng.permutation(len(questions))[: sizes.questions]]
        turns = self._turns(chosen)
        return Example(context, chosen, turns, hay[room:]) if turns else None

    def _add_facts(self, rng: np.random.Generator, pieces: list[list[int]], asked: list[Any]) -> None:
        statements: list[str] = []
        found: list[tuple[str, list[str], list[int]]] = []
        # a third of the contexts hold few of them
        wanted = self.sizes.questions if rng.random() < 0.7 else int(rng.integers(0, 3))
        while len(found) < wanted and 12 * len(statements) < self.length // 4:
            own, about = facts(rng)
            found += [(f.question, f.values, [i + len(statements) for i in f.statements]) for f in about]
            statements += own
        values = [value for _, several, _ in found for value in several]
        texts = [f" {s}" for s in statements] + [question for question, _, _ in found] + values
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        pieces += encoded[: len(statements)]
        rest = iter(encoded[len(statements) + len(found) :])
        for (_, several, numbers), question in zip(found, encoded[len(statements) :], strict=False):
            asked.append((question, [next(rest) for _ in several], numbers))

    def _add_records(self, rng: np.random.Generator, pieces: list[list[int]], records: list[Any]) -> None:
        """Contexts of the records, cut around their evidence where they are too long."""
        for _ in range(int(rng.integers(1, 3))):
            record = self.records[int(rng.integers(len(self.records)))]
            most = self.length // 3
            cut = 0
            if len(record.context) > most:
                if record.places:
                    start, count = record.places[int(rng.integers(len(record.places)))]
                    cut = start - int(rng.integers(0, max(1, most - count)))
                else:
                    # what answers it is not known: the question would have no answer
                    continue
                cut = max(0, min(cut, len(record.context) - most))
            records.append((len(pieces), record, cut))
            pieces.append(record.context[cut : cut + most].tolist())

    def _joined(self, answers: list[list[int]], places: list[tuple[int, int]]) -> list[int]:
        """Several values in the order in which the text has them."""
        order = sorted(range(len(answers)), key=lambda i: places[i]) if len(answers) > 1 else [0]
        joined: list[int] = []
        for i in order:
            joined += (self.prompt.comma if joined else []) + answers[i]
        return joined

    def _continuation(self, rng: np.random.Generator, context: Tokens) -> Question:
        """A passage of the text whose first words are given."""
        given, wanted = (min(int(rng.integers(*span)), len(context) // 4) for span in ((10, 17), (16, 33)))
        start = int(rng.integers(0, len(context) - given - wanted + 1))
        order = CONTINUE[int(rng.integers(len(CONTINUE)))] if self.tokenizer is not None else ""
        ask = list(self.tokenizer(order, add_special_tokens=False).input_ids) if order else []
        middle = start + given
        return Question(
            ask + context[start:middle].tolist(),
            context[middle : middle + wanted].tolist(),
            [(start, given + wanted)],
            True,
        )

    def _fits(self, question: Question) -> bool:
        return len(question.question) <= self.sizes.question_tokens and len(question.answer) <= self.sizes.answer_tokens

    def _turns(self, questions: Sequence[Question]) -> list[int]:
        """As many questions as there is room for in one window."""
        turns: list[int] = []
        used, needed = 0, set[int]()
        for i, question in enumerate(questions):
            size = len(self.prompt.turn(question.question, question.answer, first=not turns)[0])
            segments = needed | needed_segments(question.places, self.segment, self.margin)
            if len(turns) < self.sizes.turns and used + size <= self.sizes.tail and len(segments) <= NEEDED:
                turns.append(i)
                used, needed = used + size, segments
        return turns

    def _hay(self, rng: np.random.Generator, length: int) -> Tokens:
        document = self.documents[int(rng.choice(len(self.documents), p=self.shares))]
        start = int(rng.integers(0, len(document) - length + 1))
        return np.asarray(document[start : start + length], dtype=np.int64)


def insert(hay: Tokens, pieces: Sequence[list[int]], cuts: Tokens) -> tuple[Tokens, list[int]]:
    """``hay`` with piece ``i`` before its token ``cuts[i]``, and the first token of each piece in the result."""
    parts, first, last, length = [], [0] * len(pieces), 0, 0
    for i in np.argsort(cuts, kind="stable"):
        cut = int(cuts[i])
        length += cut - last
        first[i] = length
        parts += [hay[last:cut], np.asarray(pieces[i], dtype=np.int64)]
        length += len(pieces[i])
        last = cut
    return np.concatenate([*parts, hay[last:]]).astype(np.int64), first


def segments_of(places: Sequence[tuple[int, int]], size: int) -> list[int]:
    """All segments that hold a token of the places."""
    return sorted({s for start, count in places for s in range(start // size, (start + count - 1) // size + 1)})


def needed_segments(places: Sequence[tuple[int, int]], size: int, margin: int) -> set[int]:
    """Segments that show all of the places when they are read with their margins."""
    found = set()
    for start, count in places:
        segment = start // size
        found.add(segment)
        while start + count > (segment + 1) * size + margin:
            segment += 1
            found.add(segment)
    return found
