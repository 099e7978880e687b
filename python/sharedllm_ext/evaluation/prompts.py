"""The tokens of a record: those before the context, the context, and those after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.texts import TextError, Tokens
from sharedllm_ext.evaluation.tokenising import _Encoder

# a noncharacter of Unicode, which no interchanged text holds
_PLACE = "\ufdd2"


class PromptIds(NamedTuple):
    """Token ids of one record: ``begin`` (start token or head of the chat template), ``context``, ``question``."""

    begin: list[int]
    context: Tokens
    question: list[int]

    def __len__(self) -> int:
        """All tokens of the prompt."""
        return len(self.begin) + len(self.context) + len(self.question)


def chat_halves(tokenizer: Any, expected: str) -> tuple[str, str]:
    """What a chat template says before and after one user message, the begin of the answer included.

    Raises:
        ValueError: ``expected`` begins the error: the template does not take one user message and say it once.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        # a template may raise anything
        raise ValueError(f"{expected} that takes one user message, got {' '.join(str(error).split())}") from error
    head, *rest = text.split(_PLACE)
    if len(rest) != 1:
        raise ValueError(f"{expected} that says the message once, got it {len(rest)} times")
    return head, rest[0]


class Prompts:
    """Turns records into token ids, the same for every system.

    Context and question are tokenised separately and without special tokens: text that looks like one is text.
    In a chat, context and question are one user message and the answer prefix begins the answer.

    Args:
        tokenizer: a Transformers tokenizer.
        chat: wrap questions in its chat template, where the record allows it (default: where it has one).

    Raises:
        ValueError: ``chat`` without a template, or a template that does not take one user message as it is.
    """

    def __init__(self, tokenizer: Any, *, chat: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._encoder = _Encoder(tokenizer)
        template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not template:
            raise ValueError("chat: expected a tokenizer with a chat template, got one without")
        self.chat = template if chat is None else chat
        self._start = self._start_tokens()
        self._chat_head: list[int] = []
        self._chat_tail: list[int] = []
        if self.chat:
            self._read_template()

    def _start_tokens(self) -> list[int]:
        """What the tokenizer puts before a text."""
        bare = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self.tokenizer("a")["input_ids"])
        for place in range(len(whole) - len(bare) + 1):
            if whole[place : place + len(bare)] == bare:
                return whole[:place]
        return []

    def _read_template(self) -> None:
        self._chat_head, self._chat_tail = (
            list(self.tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in chat_halves(self.tokenizer, "chat: expected a template")
        )

    def encode(self, text: str, name: str = "text") -> Tokens:
        """Token ids of a text, without special tokens."""
        parts = [ids for _, ids in self._encoder.pieces(text, name)] if text else []
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def ids(self, record: Record) -> PromptIds:
        """Token ids of a record.

        Raises:
            TextError: nothing to ask, or a text that the tokenizer cannot read.
        """
        context = self.encode(record.context, f"{record.id}: context")
        name = f"{record.id}: question"
        if self.chat and record.chat:
            question = self.encode(record.question, name).tolist() + self._chat_tail
            # the answer is a message of its own, which begins without white space
            question += self.encode(record.answer_prefix.lstrip(), name).tolist()
            begin = self._chat_head
        else:
            question = self.encode(record.question + record.answer_prefix, name).tolist()
            begin = self._start
        if not question:
            raise TextError(f"{record.id}: expected a question of at least one token, got none")
        return PromptIds(begin, context, question)

    def length(self, record: Record) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.ids(record)) + record.max_new_tokens
