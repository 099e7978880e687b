"""Questions over long texts: facts hidden in plain text, real passages with questions, and the place of every answer.

Wordings, running text, long word lists and passages for training and testing are kept apart. The short lists
(adjectives, nouns, cities, trades, ...) serve both, and so do some of the people's names.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from layout import Layout
from wordings import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    FIRST_NAMES,
    FOODS,
    LAST_NAMES,
    NOUNS,
    THINGS,
    TRADES,
    TRAIN_FACTS,
    TRAIN_NEEDLES,
    Fact,
    Needle,
)

T = TypeVar("T")
Tokens = list[int]
IntArray = np.ndarray
# kinds of keys and values that a question can ask for; other numbers are drawn at random
ADJECTIVE_NOUN, SEVEN_DIGITS, UUID = 0, 0, 9
KEY_KINDS, VALUE_KINDS = 6, 8
LETTERS = "ABCDEFGHKLMNPRSTUVWX"
# tokens of an answer with its lead, at most
ANSWER_LIMIT = 90


class Asked(NamedTuple):
    """A question before tokenisation.

    ``statements`` are the numbers of the statements that hold the answer; several values are listed in their order.
    """

    question: str
    lead: str
    value: str | list[str]
    statements: list[int]


class Item(NamedTuple):
    """Statements to hide in a text, and questions about them."""

    statements: list[str]
    asked: list[Asked]


class Needles(NamedTuple):
    """An item whose statements have one form, with their keys and values."""

    item: Item
    keys: list[str]
    values: list[str]
    wording: Needle


@dataclass
class Row:
    """A question in tokens; ``places`` are (first token, tokens) of what answers it."""

    question: Tokens
    lead: Tokens
    answer: Tokens
    places: list[tuple[int, int]]


class TrainingText(NamedTuple):
    """A context, questions about it, and the text that follows it."""

    context: IntArray
    rows: list[Row]
    running: IntArray


def in_order(value: str | list[str], places: Sequence[int]) -> str:
    """Several values in the order in which the text has them."""
    if isinstance(value, str):
        return value
    return ", ".join(v for _, v in sorted(zip(places, value, strict=True)))


def insert(hay: IntArray, pieces: Sequence[Tokens], cuts: IntArray) -> tuple[IntArray, list[int]]:
    """``hay`` with piece ``i`` put in before its token ``cuts[i]``, and the first token of each piece in the result."""
    parts, places, last, length = [], [0] * len(pieces), 0, 0
    for i in np.argsort(cuts, kind="stable"):
        length += int(cuts[i]) - last
        places[i] = length
        parts += [hay[last : cuts[i]], np.array(pieces[i], dtype=np.int64)]
        length += len(pieces[i])
        last = int(cuts[i])
    return np.concatenate([*parts, hay[last:]]), places


class QuestionSource:
    """Texts, words and passages of one part (``train`` or ``test``), and a random generator that draws from them."""

    def __init__(self, data: Path, tokenizer: Any, part: str, seed: int, layout: Layout | None = None) -> None:
        self.tokenizer, self.rng, self.layout = tokenizer, np.random.default_rng(seed), layout or Layout()
        self.text: IntArray = np.load(data / f"{part}.npy", mmap_mode="r")
        words = (data / "words.txt").read_text().split()
        train = part == "train"
        self.words = words[0::2] if train else words[1::2]
        self.first_names = FIRST_NAMES[0::2] + FIRST_NAMES[1::4] if train else FIRST_NAMES[1::2]
        self.last_names = LAST_NAMES[:30] if train else LAST_NAMES[30:] + LAST_NAMES[0::5]
        self.passages = read_json_gz(data / f"passages_{part}.json.gz")
        self.frame = self.encode(["<|im_start|>user\n", "\n\n", "<|im_end|>\n<|im_start|>assistant\n", "\n...\n"])

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Tokens of each text, without special tokens around it."""
        encoded: list[Tokens] = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return encoded

    def choose(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def digits(self, count: int) -> str:
        return str(self.rng.integers(10 ** (count - 1), 10**count))

    def hexadecimal(self, count: int) -> str:
        return "".join(self.choose("0123456789abcdef") for _ in range(count))

    def uuid(self) -> str:
        h = self.hexadecimal(32)
        return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"

    def person(self) -> str:
        return f"{self.choose(self.first_names)} {self.choose(self.last_names)}"

    def key(self, kind: int) -> str:
        """A name to ask for; ``kind`` is ADJECTIVE_NOUN, UUID or another number below KEY_KINDS."""
        if kind == UUID:
            return self.uuid()
        if kind == ADJECTIVE_NOUN:
            return f"{self.choose(ADJECTIVES)} {self.choose(NOUNS)}"
        if kind == 1:
            return self.person()
        if kind == 2:
            return f"{self.choose(self.words)} {self.choose(self.words)}"
        if kind == 3:
            return f"{self.choose(self.words)}-{self.choose(self.words)}"
        if kind == 4:
            return f"{self.choose(self.words)}{self.digits(2)}"
        return self.choose(self.words)

    def value(self, kind: int | None) -> str:
        """What stands behind a key; ``None`` draws a kind below VALUE_KINDS."""
        if kind == UUID:
            return self.uuid()
        kind = int(self.rng.integers(VALUE_KINDS)) if kind is None else kind
        if kind <= 2:
            return self.digits(7)
        if kind == 3:
            return self.digits(int(self.rng.integers(4, 11)))
        if kind == 4:
            return f"{self.choose(self.words)} {self.choose(self.words)}"
        if kind == 5:
            return self.choose(LETTERS) + self.choose(LETTERS) + "-" + self.digits(4)
        if kind == 6:
            return self.person()
        return self.hexadecimal(10)

    def needles(
        self, wordings: Sequence[Needle], count: int, key: int | None = None, value: int | None = None
    ) -> Needles:
        """``count`` statements in one of the wordings, with different keys of one kind, and a question about each."""
        wording = wordings[0] if len(wordings) == 1 else self.choose(wordings)
        key = int(self.rng.integers(KEY_KINDS)) if key is None else key
        if value is None:  # one kind for all, or a kind for each
            value = None if self.rng.random() < 0.3 else int(self.rng.integers(VALUE_KINDS))
        keys: list[str] = []
        while len(keys) < count:
            name = self.key(key)
            if name not in keys:
                keys.append(name)
        values = [self.value(value) for _ in keys]
        pairs = list(zip(keys, values, strict=True))
        statements = [wording.statement.format(k=k, v=v) for k, v in pairs]
        asked = [
            Asked(wording.question.format(k=k), wording.lead.format(k=k), v, [i]) for i, (k, v) in enumerate(pairs)
        ]
        return Needles(Item(statements, asked), keys, values, wording)

    def several(self, wordings: Sequence[Needle]) -> Item:
        """One question about several statements: one key with several values, or several keys; two more distract."""
        wording = self.choose(wordings)
        n = int(self.rng.integers(2, 5))
        item, keys, values, _ = self.needles([wording], n + 2)
        numbers = list(range(n))
        if self.rng.random() < 0.5:
            named = [keys[0]] * n + keys[n:]
            statements = [wording.statement.format(k=k, v=v) for k, v in zip(named, values, strict=True)]
            question = f"{wording.question.format(k=keys[0])} List all {n} that the text mentions."
            return Item(statements, [Asked(question, wording.lead.format(k=keys[0]), values[:n], numbers)])
        names = ", ".join(keys[: n - 1]) + f" and {keys[n - 1]}"
        question = f"{wording.question.format(k=names)} Answer for each of them in turn."
        return Item(item.statements, [Asked(question, wording.lead.format(k=names), ", ".join(values[:n]), numbers)])

    def fact(self, facts: Sequence[Fact]) -> Item:
        """A fact about a person, and a question that shares few words with it."""
        chosen = self.choose(facts)
        fill = {
            "p": self.person(),
            "q": self.person(),
            "c": self.choose(CITIES),
            "y": str(self.rng.integers(1900, 2025)),
            "j": self.choose(TRADES),
            "t": self.choose(THINGS),
            "a": self.choose(ANIMALS),
            "f": self.choose(FOODS),
            "m": str(self.rng.integers(20, 9999)),
            "h": f"{self.rng.integers(1, 13)}:{self.rng.integers(10, 60)}",
            "s": str(self.rng.integers(2, 30)),
        }
        question, field = self.choose(chosen.questions)
        return Item(
            [self.choose(chosen.statements).format(**fill)], [Asked(question.format(**fill), "", fill[field], [0])]
        )

    def passage(self) -> Item:
        """Real passages with a question about them."""
        passage = self.choose(self.passages)
        gold = list(passage["gold"])
        return Item(gold, [Asked(passage["question"], "", passage["answer"], list(range(len(gold))))])

    def training_item(self) -> Item:
        u = self.rng.random()
        if u < 0.42:
            key = UUID if self.rng.random() < 0.1 else None
            count = int(self.rng.integers(1, 7))
            return self.needles(TRAIN_NEEDLES, count, key, UUID if self.rng.random() < 0.08 else None).item
        if u < 0.58:
            return self.several(TRAIN_NEEDLES)
        if u < 0.80:
            return self.fact(TRAIN_FACTS)
        return self.passage()

    def training_text(self, chunks: int, questions: int, running: int, question_limit: int) -> TrainingText:
        """A context of ``chunks`` chunks with exactly ``questions`` questions of at most ``question_limit`` tokens."""
        while True:
            drawn = self._draw_training_text(chunks * self.layout.chunk_size, questions, running, question_limit)
            if drawn is not None:
                return drawn

    def _draw_training_text(self, length: int, questions: int, running: int, limit: int) -> TrainingText | None:
        """One attempt, ``None`` if the statements are too long or too few questions fit."""
        statements: list[str] = []
        asked: list[Asked] = []
        # characters against tokens: the statements take a quarter of the text at most
        while len(asked) < questions + 3 and sum(map(len, statements)) < length:
            item = self.training_item()
            asked += [a._replace(statements=[i + len(statements) for i in a.statements]) for a in item.asked]
            statements += item.statements
        pieces = self.encode([f" {s}" for s in statements])
        room = length - sum(map(len, pieces))
        if room < self.layout.chunk_size // 4:
            return None
        hay = self.hay(room + running)
        context, places = insert(hay[:room], pieces, self.rng.integers(0, room + 1, len(pieces)))
        rows: list[Row] = []
        for i in self.rng.permutation(len(asked)):
            if len(rows) == questions:
                break
            rows.append(
                self._copy_row(context) if self.rng.random() < 0.12 else self.row(asked[int(i)], places, pieces)
            )
        rows = [r for r in rows if len(r.question) <= limit and 0 < len(r.lead) + len(r.answer) <= ANSWER_LIMIT]
        return TrainingText(context, rows, hay[room:]) if len(rows) == questions else None

    def hay(self, length: int) -> IntArray:
        """Running text from a random place."""
        start = int(self.rng.integers(0, len(self.text) - length))
        return self.text[start : start + length].astype(np.int64)

    def row(self, asked: Asked, places: Sequence[int], pieces: Sequence[Tokens]) -> Row:
        """A question in tokens; ``places`` and ``pieces`` are those of all statements of the text."""
        value = in_order(asked.value, [places[i] for i in asked.statements])
        lead = self.encode([asked.lead])[0] if asked.lead else []
        answer = self.answer(value, after_lead=bool(lead))
        where = [(places[i], len(pieces[i])) for i in asked.statements]
        return Row(self.encode([asked.question])[0], lead, answer, where)

    def _copy_row(self, context: IntArray) -> Row:
        """Go on with a passage of the text whose first words are given."""
        start = int(self.rng.integers(0, len(context) - 64))
        given, wanted = int(self.rng.integers(10, 17)), int(self.rng.integers(24, 40))
        order = "Copy the passage of the text that begins with the following words: "
        question = self.encode([order])[0] if self.rng.random() < 0.5 else []
        question = question + context[start : start + given].tolist()
        end = start + given + wanted
        return Row(question, [], context[start + given : end].tolist(), [(start, given + wanted)])

    def answer(self, value: str, after_lead: bool) -> Tokens:
        """A value as the model has to write it, with the end of its turn."""
        return [*self.encode([f" {value}." if after_lead else value])[0], self.tokenizer.eos_token_id]

    def passages_at(self, context: IntArray, segments: Iterable[int]) -> Tokens:
        """The text of the segments with the margin around each, in the text's order, gaps marked."""
        size, margin = self.layout.segment, self.layout.margin
        spans: list[list[int]] = []
        for segment in sorted(set(segments)):
            start, end = max(0, segment * size - margin), min(len(context), (segment + 1) * size + margin)
            if spans and start <= spans[-1][1]:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        out: Tokens = []
        for start, end in spans:
            out += (self.frame[3] if out else []) + context[start:end].tolist()
        return out

    def reading(self, text: Tokens, question: Tokens, lead: Tokens) -> Tokens:
        """The prompt: passages, question, and the begin of the answer."""
        user, between, assistant, _ = self.frame
        return user + text + between + question + assistant + lead


def read_json_gz(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)
