"""Text without an answer in it: sentences of a text, or the five sentences that say nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sharedllm_ext.evaluation.texts import TextError, Texts

#: The noise of pass-key retrieval (arXiv 2305.16300) and RULER.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
#: Characters of a sentence; what is longer is cut at white space, as code and tables are.
SENTENCE_CHARACTERS = 400
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*\n\s*")


@dataclass(frozen=True)
class Haystack:
    """Sentences, and the text between them."""

    sentences: Sequence[str]
    between: str

    def take(self, generator: random.Random, count: int) -> list[str]:
        """``count`` sentences in their order from a random one on; after the last one comes the first."""
        first = generator.randrange(len(self.sentences))
        return [self.sentences[(first + i) % len(self.sentences)] for i in range(count)]


#: The noise, one line after the other.
NOISE_HAYSTACK = Haystack((NOISE,), "\n")


def sentences_of(text: str) -> list[str]:
    """Sentences with single spaces: they end after ``.``, ``!`` or ``?`` before white space, and at empty lines."""
    found = []
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        while words:
            size = 0
            count = 0
            while count < len(words) and (not count or size + 1 + len(words[count]) <= SENTENCE_CHARACTERS):
                size += len(words[count]) + (1 if count else 0)
                count += 1
            found.append(" ".join(words[:count]))
            words = words[count:]
    return found


def haystack_of(texts: Texts) -> Haystack:
    """The sentences of texts that were read; raises :class:`TextError` for token ids, which have none."""
    if texts.kind == "ids":
        raise TextError(f"{texts.source}: expected text as a haystack, got token ids")
    return Haystack([sentence for text in texts.documents for sentence in sentences_of(str(text))], " ")
