"""One question about one context, and its right answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """A question about a context.

    The prompt is ``context``, ``question`` and ``answer_prefix``, one after the other and with nothing between them;
    a model that compresses its context gets the first as context and the others as running text.

    Attributes:
        task: the task's name in its suite.
        context: the long text, with the instructions before it.
        question: the question, with the white space that divides it from the context.
        answer_prefix: the beginning of the answer, may be empty; it is part of the prompt.
        answers: right answers; the metric decides how several count.
        max_new_tokens: most tokens of an answer.
        metric: a name in :data:`sharedllm_ext.evaluation.metrics.METRICS`.
        id: different for every record of a run.
        length: tokens for which it was made, or the suite's own name of its length.
        depth: place of the answer in the context, from 0 (begin) to 100 (end); ``None`` if that has no meaning.
        all_classes: the names of all classes, for classification.
        chat: whether the question may be wrapped in a chat template.
        first_line: whether only the first line of an answer counts.
        stop_at_newline: whether the answer ends with its first line.
        labels: other groups in which it is counted, such as ``{"difficulty": "hard"}``.
    """

    task: str
    context: str
    question: str
    answer_prefix: str
    answers: list[str]
    max_new_tokens: int
    metric: str
    id: str
    length: int | str = ""
    depth: float | None = None
    all_classes: list[str] | None = None
    chat: bool = True
    first_line: bool = False
    stop_at_newline: bool = False
    labels: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """SHA-256 of a model's input: records with the same digest ask the same."""
        given = [self.context, self.question, self.answer_prefix, self.max_new_tokens, self.chat, self.stop_at_newline]
        # half surrogates, which JSON files may hold, have no UTF-8
        return hashlib.sha256(json.dumps(given).encode()).hexdigest()
