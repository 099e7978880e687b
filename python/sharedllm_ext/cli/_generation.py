"""Streamed generation with its times, used by ``ask``, ``chat`` and ``demo``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from sharedllm_ext.cli._output import emit


class TimedStreamer(TextStreamer):
    """Prints text as it is generated, or keeps quiet, and notes when each token came."""

    def __init__(self, tokenizer: Any, *, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.begin = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token at a time."""
        # the prompt is put before the model runs
        if self.next_tokens_are_prompt:
            self.begin = time.perf_counter()
        else:
            self.times.append(time.perf_counter() - self.begin)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the text that can no longer change."""
        if self.show:
            emit(text, end="\n" if stream_end else "")


def question_ids(tokenizer: Any, question: str) -> list[int]:
    """The question's own tokens; what looks like a special token is text."""
    return list(tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def settings(model: Any, tokenizer: Any, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Keywords of ``generate``: how to choose tokens, and the tokens that end an answer and fill rows.

    Greedy without ``temperature`` and ``top_p``, and at temperature 0.
    """
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature != 0 and (temperature is not None or top_p is not None):
        sampling = {
            "do_sample": True,
            "temperature": 1.0 if temperature is None else temperature,
            "top_p": 1.0 if top_p is None else top_p,
            "top_k": 0,
        }
    end = model.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    return {**sampling, "eos_token_id": end, "pad_token_id": pad}


@dataclass
class Answer:
    """Generated text and its times in seconds."""

    text: str
    tokens: int
    first_token: float
    per_token: float | None
    times: list[float] = field(repr=False)


def generate(
    model: Any,
    tokenizer: Any,
    input_ids: Any,
    memory: Any,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    show: bool = True,
    passages: Any = None,
    context: Any = None,
) -> Answer:
    """Generate after ``input_ids`` ``[1, L]`` with a memory (or none), by :func:`settings`.

    ``passages`` that were found in ``context`` ``[1, C]`` are read in front of it.
    """
    reading = {} if passages is None else {"passages": [passages], "context_ids": context, "tokenizer": tokenizer}
    streamer = TimedStreamer(tokenizer, show=show)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **({} if memory is None else {"memory": memory}),
        **reading,
        **settings(model, tokenizer, temperature, top_p),
    )
    new = output[0, input_ids.shape[1] :]
    times = streamer.times
    per_token = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    return Answer(tokenizer.decode(new, skip_special_tokens=True), len(new), times[0], per_token, times)
