"""The texts around passages, questions and answers, in tokens, and what a new pick needs of a tokenizer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.prompts import chat_halves


class PromptTokens(NamedTuple):
    """``config.passage_prompt`` in tokens.

    Attributes:
        begin, question, answer: as there.
        passages: before the passage of each rank.
        after: between an answer and the next question of the same window.
        comma: between several values of an answer.
        end: what ends an answer; empty if the tokenizer has no end token.
    """

    begin: list[int]
    passages: list[list[int]]
    question: list[int]
    answer: list[int]
    after: list[int]
    comma: list[int]
    end: list[int]

    @classmethod
    def of(cls, config: Any, tokenizer: Any, passages: int) -> "PromptTokens":
        """The tokens of a model's prompt; without a tokenizer there is nothing around the texts."""
        if tokenizer is None:
            return cls([], [[]] * passages, [], [], [], [], [])
        parts = config.passage_prompt or default_prompt(tokenizer)

        def tokens(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []

        end = tokenizer.eos_token_id
        return cls(
            begin=tokens(parts["begin"]),
            passages=[tokens(parts["passage"].format(rank=rank + 1)) for rank in range(passages)],
            question=tokens(parts["question"]),
            answer=tokens(parts["answer"]),
            after=tokens("\n" + parts["begin"]),
            comma=tokens(", "),
            end=[] if end is None else [end],
        )

    def turn(self, question: list[int], answer: list[int], *, first: bool) -> tuple[list[int], list[int]]:
        """Tokens of a question with its answer, and labels, -100 where no loss is taken."""
        asked = [*([] if first else self.after), *self.question, *question, *self.answer]
        answered = [*answer, *self.end]
        return asked + answered, [-100] * len(asked) + answered


def default_prompt(tokenizer: Any) -> dict[str, str]:
    """A ``passage_prompt``: the tokenizer's chat template where it has one, otherwise lines alone.

    Raises:
        ValueError: a chat template that does not say a message once, as it is.
    """
    begin, answer = "", "\n"
    if getattr(tokenizer, "chat_template", None):
        begin, answer = chat_halves(tokenizer, "chat template: expected one")
    elif getattr(tokenizer, "bos_token", None):
        begin = tokenizer.bos_token
    return {"begin": begin, "passage": "\n[{rank}]\n", "question": "\n\n", "answer": answer}


def token_classes(tokenizer: Any, vocabulary: int) -> Tensor:
    """Classes ``[vocabulary]`` int32 for the search by words: tokens that differ in case and spaces alone are one.

    0, which is not searched for, are special tokens, white space and single marks of punctuation.
    """
    classes, known = torch.zeros(vocabulary, dtype=torch.int32), dict[str, int]()
    special = set(tokenizer.all_special_ids)
    for token in range(min(vocabulary, len(tokenizer))):
        # of bytes that are no character each is its own kind
        word = tokenizer.decode([token]).strip().lower()
        if token in special or not word or (len(word) == 1 and word.isascii() and not word.isalnum()):
            continue
        word = tokenizer.convert_ids_to_tokens(token) if "\ufffd" in word else word
        classes[token] = known.setdefault(word, len(known) + 1)
    return classes
