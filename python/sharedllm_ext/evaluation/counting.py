"""Answers that stand all over the text: RULER's variables that are tracked, and words that are counted."""

from __future__ import annotations

import math
import random
from itertools import pairwise

from sharedllm_ext.evaluation.haystacks import NOISE_HAYSTACK
from sharedllm_ext.evaluation.needles import digits, hide
from sharedllm_ext.evaluation.tasks import Ask, Made
from sharedllm_ext.evaluation.words import pairs

#: From this length on the words of ``cwe`` come as often as in RULER from 4096 on: pairs are longer than its words.
LONG_LIST = 8192
#: Words that a code has for each token of length in ``fwe``.
CODE_SHARE = 50


def _chain(generator: random.Random, lines: int, letters: int, hops: int) -> tuple[str, str, list[str]]:
    """Text with a chain of assignments, the value, and the variables that have it."""
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names["".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters))] = None
    variables = list(names)
    value = digits(generator, 5)
    needles = [f"VAR {variables[0]} = {value}"]
    needles += [f"VAR {new} = VAR {old}" for old, new in pairwise(variables)]
    depths = sorted(generator.uniform(0, 100) for _ in needles)
    pieces = NOISE_HAYSTACK.take(generator, lines)
    return "\n".join(hide(pieces, list(zip(depths, needles, strict=True)))), value, variables


def tracking(generator: random.Random, units: int, ask: Ask) -> Made:
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


def common_words(generator: random.Random, units: int, ask: Ask) -> Made:
    head = "This is a numbered list of words. Some come more often than others. Remember those that come most often.\n"
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The 10 words that come most often in the list are:"
    is_long = ask.length >= LONG_LIST
    text, words = _counted(generator, 30, 10, 3) if is_long else _counted(generator, 10, 3, 1)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    example = f"{head}{text}{question}{prefix} {numbered}\n\n"
    text, words = _counted(generator, units, 30, 3) if is_long else _counted(generator, units, 6, 1)
    return Made(example + head + text, question, prefix, words)


def frequent_words(generator: random.Random, units: int, ask: Ask) -> Made:
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
