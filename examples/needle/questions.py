"""Questions over long texts: hidden facts, real passages with questions, and the place of every answer."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import more_wordings
import numpy as np
import test_wordings
import train_wordings
from hiding import IntArray, Tokens, in_order, insert
from layout import Layout
from mix import Mix

T = TypeVar("T")
Wording = tuple[str, str, str]
# kinds of keys and values that can be asked for by name; a kind that is not named is drawn from the first ones
ADJECTIVE_NOUN, SEVEN_DIGITS, UUID, GLOSS = 0, 0, 9, 10
KEY_KINDS, VALUE_KINDS = 6, 8
LETTERS = "ABCDEFGHKLMNPRSTUVWX"
# tokens of an answer with its lead, at most
# draws of a long text before it is said that there is none
TRIES = 50
ANSWER_LIMIT = 90
# a name of several words or a number, which a cloze question blanks out
BLANKED = re.compile(r"(?<=[a-z,] )(?:[A-Z][\w'-]+(?: (?:of |the )?[A-Z][\w'-]+)*|\d[\d,.]*\d|\d)")


class Asked(NamedTuple):
    """A question before tokenisation.

    ``statements`` are the numbers of the statements that hold the answer; several values are listed in their order.
    ``everywhere`` says that no other text of a batch can answer it.
    """

    question: str
    lead: str
    value: str | list[str]
    statements: list[int]
    everywhere: bool = True


class Item(NamedTuple):
    """Statements to hide in a text, and questions about them."""

    statements: list[str]
    asked: list[Asked]


class Needles(NamedTuple):
    """An item whose statements have one form, with their keys and values."""

    item: Item
    keys: list[str]
    values: list[str]
    wording: Wording


@dataclass
class Row:
    """A question in tokens; ``places`` are (first token, tokens) of what answers it.

    Without an answer only the places count. ``everywhere`` is that of :class:`Asked`; ``hidden`` says that the places
    are statements that were hidden in the text.
    """

    question: Tokens
    lead: Tokens
    answer: Tokens
    places: list[tuple[int, int]]
    everywhere: bool = True
    hidden: bool = False


class TrainingText(NamedTuple):
    """A context, questions about it, and the text that follows it."""

    context: IntArray
    rows: list[Row]
    running: IntArray


def fitting(rows: Sequence[Row], limit: int) -> list[Row]:
    """The rows whose question has at most ``limit`` tokens and whose answer fits a window."""
    return [r for r in rows if len(r.question) <= limit and len(r.lead) + len(r.answer) <= ANSWER_LIMIT]


class QuestionSource:
    """Texts, words and passages of one part (``train`` or ``test``), and a random generator that draws from them."""

    def __init__(
        self, data: Path, tokenizer: Any, part: str, seed: int, layout: Layout | None = None, mix: Mix | None = None
    ) -> None:
        self.tokenizer, self.rng, self.layout = tokenizer, np.random.default_rng(seed), layout or Layout()
        self.mix = mix or Mix()
        self.text: IntArray = np.load(data / f"{part}.npy", mmap_mode="r")
        words = (data / "words.txt").read_text().split()
        self.train = part == "train"
        self.words = words[0::2] if self.train else words[1::2]
        glosses = read_json_gz(data / "glosses.json.gz")
        self.glosses = glosses[0::2] if self.train else glosses[1::2]
        if self.train:
            lists = train_wordings.LISTS
            self.first_names, self.last_names = lists["first"], lists["last"]
            self.adjectives, self.nouns = train_wordings.ADJECTIVES, train_wordings.NOUNS
            self.paragraphs: IntArray = np.load(data / "paragraphs_train.npy", mmap_mode="r")
            self.starts: IntArray = np.load(data / "paragraph_starts_train.npy")
        else:
            lists = test_wordings.LISTS
            self.first_names, self.last_names = lists["first_names"], lists["last_names"]
            self.adjectives, self.nouns = lists["adjectives"], lists["nouns"]
        self.passages = read_json_gz(data / f"passages_{part}.json.gz")
        more = more_wordings if self.mix.more else None
        self.wordings: list[Wording] = train_wordings.NEEDLES + (more.NEEDLES if more else [])
        self.several_wordings = train_wordings.SEVERAL + (more.SEVERAL if more else [])
        self.list_wordings = train_wordings.LIST_ALL + (more.LIST_ALL if more else [])
        self.facts = train_wordings.FACTS + (more.FACTS if more else [])
        self.events = train_wordings.SYNONYM_QA + (more.SYNONYM_QA if more else [])
        self.people: list[str] = []
        self.told: set[int] = set()
        self.user, self.between, self.assistant, self.next_turn = self.encode(
            ["<|im_start|>user\n", "\n\n", "<|im_end|>\n<|im_start|>assistant\n", "\n<|im_start|>user\n"]
        )

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

    def person(self, among: Mapping[str, Sequence[str]] | None = None) -> str:
        lists = among or {"first": self.first_names, "last": self.last_names}
        return f"{self.choose(lists['first'])} {self.choose(lists['last'])}"

    def few_words(self, count: int) -> dict[str, list[str]]:
        """Parts of keys, so few that many of ``count`` keys share one: ``first``, ``last``, ``adjective``, ``noun``."""
        size = 2 + int(np.ceil(1.5 * np.sqrt(count)))
        lists = {
            "first": self.first_names,
            "last": self.last_names,
            "adjective": self.adjectives,
            "noun": self.nouns,
            "word": self.words,
        }
        return {name: [words[int(i)] for i in self.rng.permutation(len(words))[:size]] for name, words in lists.items()}

    def key(self, kind: int, among: Mapping[str, Sequence[str]] | None = None) -> tuple[str, str]:
        """A name in a statement and in the question; ``kind`` is ADJECTIVE_NOUN, UUID, GLOSS or below KEY_KINDS.

        The two differ for GLOSS only: there the question gives the meaning. ``among`` is from :meth:`few_words`.
        """
        words = among["word"] if among else self.words
        if kind == GLOSS:
            gloss = self.choose(self.glosses)
            u = self.rng.random()
            if gloss["synonym"] and u < 0.35:
                return gloss["noun"], gloss["synonym"]
            form = self.choose(
                [
                    "the term that means '{}'",
                    "'{}'",
                    "what one calls {}",
                    'the word for "{}"',
                    "the thing described as {}",
                ]
            )
            return gloss["noun"], form.format(gloss["definition"])
        if kind == UUID:
            key = self.uuid()
        elif kind == ADJECTIVE_NOUN:
            adjectives, nouns = (among["adjective"], among["noun"]) if among else (self.adjectives, self.nouns)
            key = f"{self.choose(adjectives)} {self.choose(nouns)}"
        elif kind == 1:
            key = self.person(among)
        elif kind == 2:
            key = f"{self.choose(words)} {self.choose(words)}"
        elif kind == 3:
            key = f"{self.choose(words)}-{self.choose(words)}"
        elif kind == 4:
            key = f"{self.choose(words)}{self.digits(2)}"
        else:
            key = self.choose(self.words)
        return key, key

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
        self,
        wordings: Sequence[Wording],
        count: int,
        key: int | None = None,
        value: int | None = None,
        alike: float = 0.0,
    ) -> Needles:
        """``count`` statements in one of the wordings, with different keys of one kind, and a question about each.

        ``alike`` is the chance that the keys are put together from few words.
        """
        wording = wordings[0] if len(wordings) == 1 else self.choose(wordings)
        statement, question, lead = wording
        key = int(self.rng.integers(KEY_KINDS)) if key is None else key
        if value is None:  # one kind for all, or a kind for each
            value = None if self.rng.random() < 0.3 else int(self.rng.integers(VALUE_KINDS))
        among = self.few_words(count) if alike and self.rng.random() < alike else None
        keys: dict[str, str] = {}
        while len(keys) < count:
            keys.update([self.key(key, among)])
        values = [self.value(value) for _ in keys]
        statements = [statement.format(k=k, v=v) for k, v in zip(keys, values, strict=True)]
        if key == GLOSS:
            lead = ""
        asked = [
            Asked(question.format(k=name), lead.format(k=name), v, [i])
            for i, (name, v) in enumerate(zip(keys.values(), values, strict=True))
        ]
        return Needles(Item(statements, asked), list(keys), values, wording)

    def several(self) -> Item:
        """One question about several statements: of no key, of one key, or of several; those of other keys distract."""
        n = int(self.rng.integers(2, 5))
        key = int(self.rng.integers(KEY_KINDS))
        others = (
            self.mix.distractors if self.mix.distractors == 2 else int(self.rng.integers(2, self.mix.distractors + 1))
        )
        alike = self.mix.alike and self.rng.random() < self.mix.alike
        among = self.few_words(n + others) if alike else None
        names: list[str] = []
        while len(names) < 1 + n + others:
            name = self.key(key, among)[0]
            if name not in names:
                names.append(name)
        kind = int(self.rng.integers(VALUE_KINDS))
        values = [self.value(kind) for _ in range(n + others)]
        u = self.rng.random()
        if u < 0.15:
            statement, question, lead = self.choose(self.list_wordings)
            return Item(
                [statement.format(v=v) for v in values[:n]],
                [Asked(question, lead, values[:n], list(range(n)), everywhere=False)],
            )
        statement, one, one_lead, many, many_lead = self.choose(self.several_wordings)
        if u < 0.6:
            named = [names[0]] * n + names[1 : 1 + others]
            statements = [statement.format(k=k, v=v) for k, v in zip(named, values, strict=True)]
            asked = Asked(one.format(k=names[0]), one_lead.format(k=names[0]), values[:n], list(range(n)))
            return Item(statements, [asked])
        statements = [statement.format(k=k, v=v) for k, v in zip(names, values, strict=False)]
        joined = ", ".join(names[: n - 1]) + f" and {names[n - 1]}"
        question, lead = many.format(ks=joined), many_lead.format(ks=joined)
        return Item(statements, [Asked(question, lead, ", ".join(values[:n]), list(range(n)))])

    def fact(self) -> Item:
        """A fact about people, and questions that share few words with it, some not even a name."""
        number = int(self.rng.integers(len(self.facts)))
        while number in self.told:  # a question without a name must have one answer
            number = int(self.rng.integers(len(self.facts)))
        self.told.add(number)
        chosen, lists = self.facts[number], train_wordings.LISTS
        fill = {name: self.choose(lists[name]) for name in lists if name not in ("first", "last")}
        if len(self.people) < 3 or self.rng.random() < 0.4:
            self.people = [*self.people[-3:], self.person()]
        people = [self.people[int(i)] for i in self.rng.permutation(len(self.people))[:2]]
        fill |= {
            "p": people[0],
            "q": people[1] if len(people) > 1 and people[1] != people[0] else self.person(),
            "y": str(self.rng.integers(1900, 2025)),
            "m": f"${self.rng.integers(20, 9999):,}",
            "n": str(self.rng.integers(2, 60)),
            "h": f"{self.rng.integers(1, 13)}:{self.rng.integers(10, 60)} {self.choose(('am', 'pm'))}",
        }
        statement = self.choose(chosen["statements"])
        questions = [(q, f) for q, f in chosen["questions"] if "{" + f + "}" in statement]
        asked = []
        for i in self.rng.permutation(len(questions))[:2]:
            question, field = questions[int(i)]
            asked.append(Asked(question.format(**fill), "", fill[field], [0], everywhere="{" in question))
        return Item([statement.format(**fill)], asked)

    def sentence(self) -> Item:
        """An event in everyday words, and a question in other words."""
        statement, question, answer = self.choose(self.events)
        return Item([statement], [Asked(question, "", answer, [0], everywhere=False)])

    def training_item(self) -> Item:
        mix = self.mix
        needles, meanings, several, facts = np.cumsum(mix.items).tolist()
        u = self.rng.random()
        if u < needles:
            key = UUID if self.rng.random() < 0.12 else None
            value = UUID if self.rng.random() < 0.12 else None
            return self._asked_less(self.needles(self.wordings, self._count(), key, value, mix.alike).item)
        if u < meanings:
            return self.needles(self.wordings, int(self.rng.integers(1, 4)), GLOSS).item
        if u < several:
            return self.several()
        if u < facts:
            return self.fact()
        return self.sentence()

    def _count(self) -> int:
        """How many statements of one form there are; keys that are single words have to be enough for them."""
        mix = self.mix
        u = self.rng.random() if mix.many or mix.crowd else 1.0
        if u < mix.crowd:
            count = int(self.rng.integers(17, 65))
        else:
            count = int(self.rng.integers(7, 17) if u < mix.crowd + mix.many else self.rng.integers(1, 7))
        return min(count, max(6, len(self.words) // 2))

    def _asked_less(self, item: Item) -> Item:
        """The item with at most ``mix.asked`` of its questions."""
        if len(item.asked) <= self.mix.asked:
            return item
        chosen = self.rng.permutation(len(item.asked))[: self.mix.asked]
        return Item(item.statements, [item.asked[int(i)] for i in chosen])

    def training_text(self, chunks: int, questions: int, running: int, question_limit: int) -> TrainingText:
        """A context of ``chunks`` chunks with exactly ``questions`` questions of at most ``question_limit`` tokens."""
        length = chunks * self.layout.chunk_size
        while True:
            draw = self._draw_paragraphs if self.rng.random() < 0.3 else self._draw_text
            drawn = draw(length, questions, running, question_limit)
            if drawn is not None:
                return drawn

    def long_text(self, length: int, questions: int, limit: int, paragraphs: bool) -> TrainingText:
        """A text of one kind: paragraphs, or statements hidden in running text; lengths in tokens.

        Raises:
            ValueError: so many questions do not fit.
        """
        draw = self._draw_paragraphs if paragraphs else self._draw_text
        for _ in range(TRIES):
            # of so many questions a few are always too long
            drawn = draw(length, questions, 64, limit, spare=questions // 4)
            if drawn is not None:
                return drawn
        kind = "about paragraphs" if paragraphs else "about hidden statements"
        raise ValueError(f"text: expected {questions} questions in {length} tokens {kind}, got none in {TRIES} draws")

    def _draw_text(self, length: int, questions: int, running: int, limit: int, spare: int = 0) -> TrainingText | None:
        """Statements hidden in running text; ``None`` if they are too long or too few questions fit.

        ``spare`` more questions are drawn, and take the place of those that do not fit.
        """
        statements: list[str] = []
        asked: list[Asked] = []
        self.told.clear()
        # characters against tokens: the statements take a quarter of the text at most
        while len(asked) < questions + spare + 3 and sum(map(len, statements)) < length:
            item = self.training_item()
            asked += [a._replace(statements=[i + len(statements) for i in a.statements]) for a in item.asked]
            statements += item.statements
        pieces = self.encode([f" {s}" for s in statements])
        room = length - sum(map(len, pieces))
        # a quarter of a chunk, and enough for a span that is cut out
        if room < max(256, self.layout.chunk_size // 4):
            return None
        # a span that is asked for is cut out of the text
        span, cut = int(self.rng.integers(16, 48)), int(self.rng.integers(64, room - 64))
        hay = self.hay(room + span + running)
        removed = hay[cut : cut + span].tolist()
        hay = np.concatenate([hay[:cut], hay[cut + span :]])
        cuts = np.append(self.rng.integers(0, room + 1, len(pieces)), cut)
        context, places = insert(hay[:room], [*pieces, []], cuts)
        rows: list[Row] = []
        for i in self.rng.permutation(len(asked)):
            if len(rows) == questions + spare:
                break
            if self.rng.random() < 0.08:
                rows.append(self._copy_row(context))
            else:
                rows.append(self.row(asked[int(i)], places, pieces))
        if self.rng.random() < 0.3 and rows:
            rows[-1] = Row(removed, [], [], [(max(0, places[-1] - 24), 48)])
        rows = fitting(rows, limit)[:questions]
        return TrainingText(context, rows, hay[room:]) if len(rows) == questions else None

    def _draw_paragraphs(
        self, length: int, questions: int, running: int, limit: int, spare: int = 0
    ) -> TrainingText | None:
        """Real paragraphs with questions about some of them, and sentences with a blank; no statement is hidden."""
        passages = [self.choose(self.passages) for _ in range(questions + spare)]
        gold = {int(g) for p in passages for g in p["gold"]}
        others = [int(i) for i in self.rng.integers(0, len(self.starts) - 1, length // 60)]
        size, chosen = 0, []
        for i in [*gold, *(o for o in others if o not in gold)]:
            chosen.append(i)
            size += int(self.starts[i + 1] - self.starts[i])
            if size > length + running:
                break
        if size <= length + running:
            return None
        order = [chosen[int(i)] for i in self.rng.permutation(len(chosen))]
        tokens = np.concatenate([self.paragraphs[self.starts[i] : self.starts[i + 1]] for i in order]).astype(np.int64)
        sizes = [int(self.starts[i + 1] - self.starts[i]) for i in order]
        first = dict(zip(order, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        context, rows = tokens[:length], []
        for passage in passages:
            places = [(first[g], int(self.starts[g + 1] - self.starts[g])) for g in passage["gold"]]
            least = [n if self.mix.whole else 24 for _, n in places]
            places = [(start, min(n, length - start)) for start, n in places]
            cut = any(n < enough for (_, n), enough in zip(places, least, strict=True))
            if self.rng.random() < 0.35 or cut:
                row = self._cloze(order, first, length)
                if row is None:
                    if spare:
                        continue
                    return None
                rows.append(row)
            else:
                rows.append(
                    Row(self.encode([passage["question"]])[0], [], self.answer(passage["answer"], False), places)
                )
        rows = fitting(rows, limit)[:questions]
        if len(rows) < questions:
            return None
        return TrainingText(context, rows, tokens[length : length + running])

    def _cloze(self, order: Sequence[int], first: dict[int, int], length: int) -> Row | None:
        """A sentence of one of the paragraphs with a name or number left out."""
        for _ in range(20):
            i = self.choose(order)
            start, end = int(self.starts[i]), int(self.starts[i + 1])
            if first[i] + end - start > length:
                continue
            text = self.tokenizer.decode(self.paragraphs[start:end].tolist())
            sentences = [s for s in re.split(r"(?<=[a-z0-9)][.!?]) +(?=[A-Z])", text) if 60 <= len(s) <= 260]
            if not sentences:
                continue
            sentence = self.choose(sentences)
            found = list(BLANKED.finditer(sentence))
            if not found:
                continue
            blank = self.choose(found)
            answer = blank.group()
            if len(answer) > 50:
                continue
            gap = sentence[: blank.start()] + "____" + sentence[blank.end() :]
            form = self.choose(["Fill in the gap: {}", "What belongs in the blank? {}", "Complete the sentence: {}"])
            question = self.encode([form.format(gap.strip())])[0]
            return Row(question, [], self.answer(answer, False), [(first[i], end - start)])
        return None

    def hay(self, length: int) -> IntArray:
        """Running text from a random place."""
        if self.train and self.rng.random() < 0.15:
            text: IntArray = self.paragraphs
        else:
            text = self.text
        start = int(self.rng.integers(0, len(text) - length))
        return text[start : start + length].astype(np.int64)

    def row(self, asked: Asked, places: Sequence[int], pieces: Sequence[Tokens]) -> Row:
        """A question in tokens; ``places`` and ``pieces`` are those of all statements of the text."""
        value = in_order(asked.value, [places[i] for i in asked.statements])
        lead = asked.lead if asked.lead and (not self.train or self.rng.random() < 0.8) else ""
        lead_ids = self.encode([lead])[0] if lead else []
        answer = self.answer(value, after_lead=bool(lead))
        where = [(places[i], len(pieces[i])) for i in asked.statements]
        return Row(self.encode([asked.question])[0], lead_ids, answer, where, asked.everywhere, hidden=True)

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

    def separators(self, count: int) -> IntArray:
        """``[count, n]`` tokens that stand before a passage: its rank by the pick, best first."""
        return np.array(self.encode([f"\n[{rank + 1}]\n" for rank in range(count)]))

    def turn(self, question: Tokens, lead: Tokens) -> Tokens:
        """What follows the passages: a question, and the begin of the answer."""
        return [*self.between, *question, *self.assistant, *lead]


def read_json_gz(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)
