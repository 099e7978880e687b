"""Questions about contexts of a given length: RULER's tasks and three of InfiniteBench's, written anew.

Sources of the tasks: RULER (arXiv 2404.06654) and InfiniteBench (arXiv 2402.13718). ``docs/evaluation.md`` says what is
equal and what differs.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from sharedllm_ext.evaluation.haystacks import NOISE_HAYSTACK, Haystack
from sharedllm_ext.evaluation.json_rows import as_list, as_object, read_json, text_of
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.texts import TextError, shown
from sharedllm_ext.evaluation.words import ADJECTIVES, NOUNS, pairs

#: Default depths at which answers are hidden, in per cent of the context.
DEFAULT_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
#: From this length on the words of ``cwe`` come as often as in RULER from 4096 on: pairs are longer than its words.
LONG_LIST = 8192
#: Share of a length that a context may leave free: each try tokenises the whole of it.
SLACK = 1 / 512
#: Words that a code has for each token of length in ``fwe``.
CODE_SHARE = 50


class Made(NamedTuple):
    """A record's texts, before they are known to fit."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]


class Question(NamedTuple):
    """A question of a data set of documents: its answers and the numbers of the documents that hold them."""

    text: str
    answers: list[str]
    documents: list[int]


@dataclass(frozen=True)
class Documents:
    """A data set of questions about documents, in the form of SQuAD or HotpotQA."""

    questions: list[Question]
    documents: list[str]


@dataclass(frozen=True)
class Sources:
    """Sources of contexts: text for haystacks, data sets by the names of their tasks."""

    haystack: Haystack = NOISE_HAYSTACK
    documents: Mapping[str, Documents] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """Parameters of one record."""

    length: int
    index: int
    depth: float
    seed: int
    sources: Sources


@dataclass(frozen=True)
class Task:
    """A kind of question.

    ``make(generator, units, ask)`` gives the texts with ``units`` pieces of context around the answer; ``least`` and
    ``most`` bound them. ``has_depth`` says that the answer is in one place, chosen by the depth.
    """

    make: Callable[[random.Random, int, Ask], Made]
    metric: str
    max_new_tokens: int
    has_depth: bool = True
    least: int = 1
    most: Callable[[Ask], int] | None = None
    needs: str = ""


# -- needles ----------------------------------------------------------------------------------------------------------


def place_of(depth: float, pieces: Sequence[str]) -> int:
    """Number of pieces before the place at ``depth`` per cent of their characters."""
    sizes = [len(piece) + 1 for piece in pieces]
    wanted, before = sum(sizes) * depth / 100, 0.0
    for number, size in enumerate(sizes):
        if wanted < before + size / 2:
            return number
        before += size
    return len(sizes)


def hide(pieces: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """The pieces with each needle at its depth; those at one place stand in the order given."""
    result = list(pieces)
    placed = sorted(((place_of(depth, pieces), number) for number, (depth, _) in enumerate(needles)), reverse=True)
    for place, number in placed:
        result.insert(place, needles[number][1])
    return result


def _digits(generator: random.Random, count: int) -> str:
    return str(generator.randrange(10 ** (count - 1), 10**count))


def _uuid(generator: random.Random) -> str:
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))


def _different(generator: random.Random, kind: str, count: int) -> list[str]:
    """``count`` different words, numbers of seven digits or UUIDs."""
    if kind == "words":
        return pairs(generator, count)
    draw = partial(_digits, generator, 7) if kind == "numbers" else partial(_uuid, generator)
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


@dataclass(frozen=True)
class _Needles:
    """A task of needles: kinds of keys and values, number of keys, values per key, and keys in the question."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    count: int = 1
    values_each: int = 1
    asked: int = 1

    def make(self, generator: random.Random, units: int, ask: Ask) -> Made:
        straw = units if self.haystack == "needles" else 0
        keys = _different(generator, self.keys, self.count + straw)
        values = _different(generator, self.values, self.count * self.values_each + straw)
        kind = self.values

        def needle(key: str, value: str) -> str:
            return f"One of the special magic {kind} for {key} is: {value}."

        own = [values[i * self.values_each : (i + 1) * self.values_each] for i in range(self.count)]
        asked = sorted(generator.sample(range(self.count), self.asked))
        single = self.asked * self.values_each == 1
        needles = []
        for number, (key, its) in enumerate(zip(keys, own, strict=False)):
            for value in its:
                depth = ask.depth if single and number in asked else generator.uniform(0, 100)
                needles.append((depth, needle(key, value)))
        if self.haystack == "needles":
            pieces = [needle(key, value) for key, value in zip(keys[self.count :], values[self.count :], strict=False)]
            between = "\n"
        else:
            haystack = NOISE_HAYSTACK if self.haystack == "noise" else ask.sources.haystack
            pieces, between = haystack.take(generator, units), haystack.between
        context = between.join(hide(pieces, needles))
        names = [keys[number] for number in asked]
        query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}"
        answers = [value for number in asked for value in own[number]]
        one, many = kind.removesuffix("s"), kind
        if single:
            return Made(
                f"Somewhere in this text is a special magic {one}. Remember it: you will be asked for it.\n{context}",
                f"\nWhat is the special magic {one} for {query} mentioned in the provided text?",
                f" The special magic {one} for {query} mentioned in the provided text is",
                answers,
            )
        return Made(
            f"Somewhere in this text are special magic {many}. Remember them: you will be asked for them.\n{context}",
            f"\nWhat are all the special magic {many} for {query} mentioned in the provided text?",
            f" The special magic {many} for {query} mentioned in the provided text are",
            answers,
        )

    def task(self) -> Task:
        return Task(
            self.make,
            "part",
            128,
            has_depth=self.asked * self.values_each == 1,
            most=self.most if self.haystack == "needles" and self.keys == "words" else None,
        )

    def most(self, ask: Ask) -> int:
        return len(ADJECTIVES) * len(NOUNS) - self.count


def _pass_key(generator: random.Random, units: int, ask: Ask) -> Made:
    key = _digits(generator, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    text = "\n".join(hide(NOISE_HAYSTACK.take(generator, units), [(ask.depth, needle)]))
    return Made(
        f"A pass key is hidden in this text. Find it and remember it.\n\n{text}",
        "\n\nWhat is the pass key?",
        " The pass key is",
        [key],
    )


def _number(generator: random.Random, units: int, ask: Ask) -> Made:
    number = ""
    while len(number) < 10:
        # runs of one digit, which make it hard; no two of them with the same digit
        digit = generator.choice([d for d in "0123456789" if d != number[-1:]])
        number += digit * generator.randint(1, 4)
    number = number[:10]
    needle = f"The sequence of digits is {number}. Remember it. {number} is the sequence of digits."
    text = "\n".join(hide(NOISE_HAYSTACK.take(generator, units), [(ask.depth, needle)]))
    return Made(
        f"A sequence of digits is hidden in this text. Find it and remember it.\n\n{text}",
        "\n\nWhat is the sequence of digits?",
        " The sequence of digits is",
        [number],
    )


def _key_value(generator: random.Random, units: int, ask: Ask) -> Made:
    texts = _different(generator, "uuids", 2 * units)
    rows = [f'"{key}": "{value}"' for key, value in zip(texts[::2], texts[1::2], strict=True)]
    # all rows are of one size
    place = round((units - 1) * ask.depth / 100)
    return Made(
        "Remember the values of the keys in this JSON object.\n\n{" + ", ".join(rows) + "}",
        f'\n\nWhat is the value of the key "{texts[2 * place]}"?',
        " The value is",
        [texts[2 * place + 1]],
    )


# -- counting and tracking --------------------------------------------------------------------------------------------


def _chain(generator: random.Random, lines: int, letters: int, hops: int) -> tuple[str, str, list[str]]:
    """Text with a chain of assignments, the value, and the variables that have it."""
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names["".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters))] = None
    variables = list(names)
    value = _digits(generator, 5)
    needles = [f"VAR {variables[0]} = {value}"]
    needles += [f"VAR {new} = VAR {old}" for old, new in pairwise(variables)]
    depths = sorted(generator.uniform(0, 100) for _ in needles)
    pieces = NOISE_HAYSTACK.take(generator, lines)
    return "\n".join(hide(pieces, list(zip(depths, needles, strict=True)))), value, variables


def _tracking(generator: random.Random, units: int, ask: Ask) -> Made:
    head = "Keep track of the variables in this text and of the values that they are given.\n\n"

    def asked(value: str) -> tuple[str, str]:
        return (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            f" Answer: By the assignments in the text above, 5 variables are assigned the value {value}, they are:",
        )

    text, value, variables = _chain(generator, 5, 3, 4)
    example = head + text + "".join(asked(value)) + " " + " ".join(variables) + "\n\n"
    text, value, variables = _chain(generator, units, 5, 4)
    return Made(example + head + text, *asked(value), variables)


def _counted(generator: random.Random, rare: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """A numbered list in which 10 words come ``often`` times and ``rare`` words ``seldom`` times."""
    words = pairs(generator, 10 + rare)
    listed = words[:10] * often + words[10:] * seldom
    generator.shuffle(listed)
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)), words[:10]


def _common_words(generator: random.Random, units: int, ask: Ask) -> Made:
    head = "This is a numbered list of words. Some come more often than others. Remember those that come most often.\n"
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The 10 words that come most often in the list are:"
    is_long = ask.length >= LONG_LIST
    text, words = _counted(generator, 30, 10, 3) if is_long else _counted(generator, 10, 3, 1)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    example = f"{head}{text}{question}{prefix} {numbered}\n\n"
    text, words = _counted(generator, units, 30, 3) if is_long else _counted(generator, units, 6, 1)
    return Made(example + head + text, question, prefix, words)


def _frequent_words(generator: random.Random, units: int, ask: Ask) -> Made:
    vocabulary = max(ask.length // CODE_SHARE, 5)
    codes: dict[str, None] = {}
    while len(codes) < vocabulary:
        codes["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    # the most frequent one is noise
    names = ["...", *list(codes)[1:]]
    # Zipf's law with exponent 2: the sum over all ranks is pi^2 / 6
    text = [name for rank, name in enumerate(names, 1) for _ in range(int(units / rank**2 / (math.pi**2 / 6)))]
    generator.shuffle(text)
    return Made(
        "This text is in code. Count how often each coded word comes.\n\n" + " ".join(text),
        "\nQuestion: What are the three coded words that come most often in the above text? Leave out the dots '...'.",
        " Answer: The three coded words that come most often are:",
        names[1:4],
    )


# -- questions about documents ----------------------------------------------------------------------------------------


def read_squad(path: Path) -> Documents:
    """Questions that have an answer, and all paragraphs, of a file in SQuAD's form.

    ``{"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, "answers": [{"text": …}]}]}]}]}``, with
    ``is_impossible`` as in version 2.0.

    Raises:
        TextError: another form; the message names the place.
    """
    source = shown(path)
    table = as_object(read_json(path, "a JSON object with SQuAD's data"), source)
    places: dict[str, int] = {}
    questions = []
    for i, article in enumerate(as_list(table.get("data"), f'{source} "data"')):
        name = f"{source} article {i}"
        paragraphs = as_list(as_object(article, name).get("paragraphs"), f'{name} "paragraphs"')
        for j, paragraph in enumerate(paragraphs):
            name = f"{source} article {i} paragraph {j}"
            row = as_object(paragraph, name)
            place = places.setdefault(text_of(row, "context", name), len(places))
            for entry in as_list(row.get("qas"), f'{name} "qas"'):
                asked = as_object(entry, f"{name} question")
                answers = [
                    text_of(as_object(answer, f"{name} answer"), "text", f"{name} answer")
                    for answer in as_list(asked.get("answers"), f'{name} "answers"')
                ]
                if answers and not asked.get("is_impossible"):
                    text = text_of(asked, "question", f"{name} question")
                    questions.append(Question(text, list(dict.fromkeys(answers)), [place]))
    return _documents(source, questions, list(places))


def read_hotpotqa(path: Path) -> Documents:
    """Questions and paragraphs of a file in HotpotQA's form: a list of ``question``, ``answer`` and ``context``.

    ``context`` is a list of ``[title, [sentence, …]]``. The paragraphs of a question are those with its answer.

    Raises:
        TextError: another form; the message names the place.
    """
    source = shown(path)
    places: dict[str, int] = {}
    questions = []
    for number, entry in enumerate(as_list(read_json(path, "a JSON array of HotpotQA's questions"), source)):
        name = f"{source} item {number}"
        row = as_object(entry, name)
        own = []
        for paragraph in as_list(row.get("context"), f'{name} "context"'):
            match paragraph:
                case [str() as title, [*sentences]] if all(isinstance(text, str) for text in sentences):
                    own.append(places.setdefault(f"{title}\n{''.join(sentences)}", len(places)))
                case _:
                    raise TextError(f'{name}: expected "context", a list of [title, [sentence, …]], got another list')
        answer = text_of(row, "answer", name)
        if answer and own:
            questions.append(Question(text_of(row, "question", name), [answer], list(dict.fromkeys(own))))
    return _documents(source, questions, list(places))


def _documents(source: str, questions: list[Question], documents: list[str]) -> Documents:
    if not questions:
        raise TextError(f"{source}: expected at least one question with an answer, got none")
    return Documents(questions, documents)


def _about_documents(task: str, generator: random.Random, units: int, ask: Ask) -> Made:
    data = ask.sources.documents[task]
    # another question for each record, until all were asked
    order = list(range(len(data.questions)))
    random.Random(f"{ask.seed} {task}").shuffle(order)
    question = data.questions[order[ask.index % len(order)]]
    own = set(question.documents)
    others = [number for number in range(len(data.documents)) if number not in own]
    chosen = generator.sample(others, len(others))[:units]
    texts = [data.documents[number] for number in chosen]
    if len(question.documents) == 1:
        texts.insert(place_of(ask.depth, texts), data.documents[question.documents[0]])
    else:
        texts = hide(texts, [(generator.uniform(0, 100), data.documents[number]) for number in question.documents])
    context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1))
    return Made(
        f"Answer the question from these documents. Give the answer alone.\n\n{context}",
        f"\n\nAnswer the question from the documents above. Give the answer alone.\n\nQuestion: {question.text}",
        " Answer:",
        question.answers,
    )


def _other_documents(task: str, ask: Ask) -> int:
    data = ask.sources.documents[task]
    return len(data.documents) - max(len(question.documents) for question in data.questions)


def _document_task(task: str, has_depth: bool) -> Task:
    return Task(
        partial(_about_documents, task),
        "any",
        32,
        has_depth=has_depth,
        least=0,
        most=partial(_other_documents, task),
        needs=task,
    )


# -- records ----------------------------------------------------------------------------------------------------------

#: The tasks by name, in RULER's order; then those in the manner of InfiniteBench.
TASKS: dict[str, Task] = {
    "niah_single_1": _Needles("noise").task(),
    "niah_single_2": _Needles("text").task(),
    "niah_single_3": _Needles("text", values="uuids").task(),
    "niah_multikey_1": _Needles("text", count=4).task(),
    "niah_multikey_2": _Needles("needles").task(),
    "niah_multikey_3": _Needles("needles", keys="uuids", values="uuids").task(),
    "niah_multivalue": _Needles("text", values_each=4).task(),
    "niah_multiquery": _Needles("text", count=4, asked=4).task(),
    "vt": Task(_tracking, "part", 30, has_depth=False, least=5),
    "cwe": Task(
        _common_words, "part", 120, has_depth=False, most=lambda ask: len(ADJECTIVES) * len(NOUNS) - 10, least=10
    ),
    "fwe": Task(_frequent_words, "part", 50, has_depth=False, least=60),
    "qa_squad": _document_task("qa_squad", True),
    "qa_hotpotqa": _document_task("qa_hotpotqa", False),
    "passkey": Task(_pass_key, "first_number", 6),
    "number": Task(_number, "first_number", 12),
    "kv": Task(_key_value, "among_words", 50),
}


def default_tasks(sources: Sources) -> list[str]:
    """All tasks for which these sources suffice."""
    return [name for name, task in TASKS.items() if not task.needs or task.needs in sources.documents]


def check_tasks(tasks: Iterable[str], sources: Sources) -> None:
    """Raise ``ValueError`` for a task that is unknown or whose source is not there."""
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {name!r}")
        if TASKS[name].needs and TASKS[name].needs not in sources.documents:
            raise ValueError(f"tasks: expected a file of {name.removeprefix('qa_')} questions for {name}, got none")


def _largest(
    tokens: Callable[[int], int], limit: int, least: int, most: int | None, guess: int | None
) -> tuple[int, int]:
    """The most units whose ``tokens`` are at most ``limit``, to a unit or to ``SLACK`` of it, and their tokens.

    ``tokens`` grows nearly evenly; only a number that was tried is returned.
    """
    slack = limit * SLACK
    low, used = least, tokens(least)
    high = None if most is None else most + 1
    if used > limit:
        return low, used
    probe = low + 8 if guess is None else guess
    while high is None or high - low > 1:
        probe = max(probe, low + 1)
        if high is not None:
            probe = min(probe, high - 1)
        came = tokens(probe)
        each = max((came - used) / (probe - low), 0.1)
        if came <= limit:
            low, used = probe, came
        else:
            high = probe
        if limit - used < max(each / 2, slack):
            break
        # in the middle of what is close enough, where that is more than a unit
        aim = limit - (slack / 2 if slack > each else 0)
        probe = low + int((aim - used) / each)
    return low, used


def make_record(
    task: str,
    length: int,
    index: int,
    prompts: Prompts,
    *,
    sources: Sources | None = None,
    seed: int = 0,
    depth: float = 50.0,
    guess: int | None = None,
) -> tuple[Record, int]:
    """One record whose prompt and longest answer are at most ``length`` tokens, and the units of its context.

    Args:
        task: a name in :data:`TASKS`.
        length: most tokens of ``prompts``' tokenizer, ``task``'s ``max_new_tokens`` among them, as in RULER.
        index: the record's number; another one gives another record of the same seed.
        prompts: turns records into tokens.
        sources: sources of the context (default: the noise sentences; tasks about documents need theirs).
        seed: another one gives other records.
        depth: place of the answer in the context, 0 to 100 per cent, for tasks that have one.
        guess: units to try first, such as those of another record; it may decide how full the length is.

    Raises:
        ValueError: an unknown task, or a length that has no room for the shortest context.
    """
    sources = Sources() if sources is None else sources
    check_tasks([task], sources)
    known = TASKS[task]
    ask = Ask(length, index, depth, seed, sources)
    key = f"{seed} {task} {length} {index}"
    records: dict[int, Record] = {}

    def record(units: int) -> Record:
        if units not in records:
            # the same random numbers for every size, so that sizes differ by their units alone
            made = known.make(random.Random(key), units, ask)
            records.clear()
            records[units] = Record(
                task,
                *made,
                max_new_tokens=known.max_new_tokens,
                metric=known.metric,
                id=f"{task}/{length}/{index}",
                length=length,
                depth=depth if known.has_depth else None,
            )
        return records[units]

    most = None if known.most is None else known.most(ask)
    units, used = _largest(lambda units: prompts.length(record(units)), length, known.least, most, guess)
    if used > length:
        raise ValueError(f"length: expected at least {used} tokens for {task} with this tokenizer, got {length}")
    return record(units), units


def generate_records(
    tasks: Sequence[str],
    lengths: Sequence[int],
    prompts: Prompts,
    *,
    questions: int = 20,
    depths: Sequence[float] = DEFAULT_DEPTHS,
    sources: Sources | None = None,
    seed: int = 0,
) -> Iterator[Record]:
    """``questions`` records of every task and length, one after the other as they are asked for.

    The depths alternate. Arguments and errors as for :func:`make_record`.
    """
    sources = Sources() if sources is None else sources
    check_tasks(tasks, sources)
    for task in tasks:
        for length in lengths:
            guess = None
            for index in range(questions):
                # one guess for all, so that a record does not depend on those before it
                record, units = make_record(
                    task,
                    length,
                    index,
                    prompts,
                    sources=sources,
                    seed=seed,
                    depth=depths[index % len(depths)],
                    guess=guess,
                )
                guess = units if guess is None else guess
                yield record
