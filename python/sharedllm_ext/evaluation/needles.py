"""Answers hidden in a text: RULER's needles, and the pass key, number and key-value pairs of InfiniteBench."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from sharedllm_ext.evaluation.haystacks import NOISE_HAYSTACK
from sharedllm_ext.evaluation.tasks import Ask, Made, Task
from sharedllm_ext.evaluation.words import ADJECTIVES, NOUNS, pairs


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


def digits(generator: random.Random, count: int) -> str:
    return str(generator.randrange(10 ** (count - 1), 10**count))


def _uuid(generator: random.Random) -> str:
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))


def _different(generator: random.Random, kind: str, count: int) -> list[str]:
    """``count`` different words, numbers of seven digits or UUIDs."""
    if kind == "words":
        return pairs(generator, count)
    draw = partial(digits, generator, 7) if kind == "numbers" else partial(_uuid, generator)
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


@dataclass(frozen=True)
class Needles:
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


def pass_key(generator: random.Random, units: int, ask: Ask) -> Made:
    key = digits(generator, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    text = "\n".join(hide(NOISE_HAYSTACK.take(generator, units), [(ask.depth, needle)]))
    return Made(
        f"A pass key is hidden in this text. Find it and remember it.\n\n{text}",
        "\n\nWhat is the pass key?",
        " The pass key is",
        [key],
    )


def repeated_digits(generator: random.Random, units: int, ask: Ask) -> Made:
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


def key_value(generator: random.Random, units: int, ask: Ask) -> Made:
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
