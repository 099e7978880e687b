"""The tokens of a conversation's turns, by a tokenizer's chat template or as plain lines."""

from __future__ import annotations

from typing import Any

from sharedllm_ext.cli._common import one_line
from sharedllm_ext.cli._output import CommandError

# stand for the messages while the template's own words are found
_MARKS = ("firstquestionmark", "firstanswermark", "nextquestionmark")
_HINT = "(--no-chat-template does without)"


class Turns:
    """What each turn adds to the text, up to where the answer begins.

    A template is asked for one exchange and the question after it, never for the whole conversation: what stands
    between an answer and the next question is the same in every turn.

    Args:
        tokenizer: the model's.
        chat: whether to use its chat template; ``None``: where there is one.
        system: the system message, or without a template the begin of the text.

    Raises:
        CommandError: there is no template, or none that can be used so.
    """

    def __init__(self, tokenizer: Any, chat: bool | None, system: str | None = None) -> None:
        if chat and not tokenizer.chat_template:
            raise CommandError("--chat-template: expected a tokenizer with a chat template, got one without")
        self.tokenizer = tokenizer
        self.uses_template = bool(tokenizer.chat_template) if chat is None else chat
        # what is never absorbed, if that can be told apart
        self.begin_ids: list[int] = []
        if not self.uses_template:
            if system is not None:
                self.begin_ids = list(tokenizer(f"{system}\n")["input_ids"])
            return
        first, answered, then = _MARKS
        before = [{"role": "system", "content": system}] if system is not None else []
        question = {"role": "user", "content": first}
        begin, self._end = self._around(self._render([*before, question]), first)
        if system is not None and system.strip() not in begin:
            raise CommandError(f"--system: expected a chat template with a system message, got one without {_HINT}")
        exchange = [question, {"role": "assistant", "content": answered}, {"role": "user", "content": then}]
        self._between, self._next_end = self._around(self._around(self._render(exchange), answered)[1], then)
        self._own = set(tokenizer.get_added_vocab().values())
        if system is not None:
            own = self._system_text(before)
            if own and begin.startswith(own):
                self.begin_ids, begin = self._special(own), begin[len(own) :]
        self._begin = begin

    @property
    def stop_ids(self) -> set[int]:
        """The token that ends an answer in the template, if that is one of the tokenizer's own."""
        if not self.uses_template:
            return set()
        return set(self._special(self._between)[:1]) & self._own

    def question(self, text: str, last: int | None, *, first: bool) -> list[int]:
        """The tokens of a question.

        Args:
            text: the question; what looks like a special token in it is text.
            last: the latest token of the text, ``None`` before the first one.
            first: whether it is the first turn.
        """
        if not self.uses_template:
            text = text if last is None else f"\n{text}"
            return list(self.tokenizer(text, add_special_tokens=last is None, split_special_tokens=True)["input_ids"])
        if first:
            return self._turn(self._begin, text, self._end)
        return self._after(self._turn(self._between, text, self._next_end), last)

    def closing(self, last: int | None, *, first: bool) -> list[int]:
        """The tokens that end the latest answer, before a turn that brings the marks of its begin along."""
        if first or not self.stop_ids:
            return []
        ids = self._special(self._between)
        # up to the next one of the tokenizer's own tokens
        return self._after(ids[: next((i for i, token in enumerate(ids) if i and token in self._own), 1)], last)

    def _turn(self, before: str, text: str, end: str) -> list[int]:
        if not any(token in text for token in self.tokenizer.get_added_vocab()):
            return self._special(f"{before}{text}{end}")
        plain = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*self._special(before), *plain, *self._special(end)]

    def _after(self, ids: list[int], last: int | None) -> list[int]:
        """Without the token that ends the answer, where the model has written it."""
        return ids[1:] if ids and ids[0] == last and last in self.stop_ids else ids

    def _special(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:
            # a template may raise anything
            raise CommandError(
                f"--chat-template: expected a template for questions and answers, got {one_line(error)} {_HINT}"
            ) from error

    def _system_text(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False))
        except Exception:
            # some templates want a question: then the system message is text as any other
            return ""

    def _around(self, text: str, mark: str) -> tuple[str, str]:
        if text.count(mark) != 1:
            raise CommandError(
                f"--chat-template: expected a template that has each message once, got one that has it "
                f"{text.count(mark)} times {_HINT}"
            )
        before, after = text.split(mark)
        return before, after
