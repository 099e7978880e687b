"""One conversation with a model: questions, streamed answers, and the passages that are read for them."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from sharedllm_ext.cli._common import mebibytes
from sharedllm_ext.cli._generation import TimedStreamer, question_ids
from sharedllm_ext.cli._output import say
from sharedllm_ext.cli._places import Places
from sharedllm_ext.cli._turns import Turns
from sharedllm_ext.counted import counted
from sharedllm_ext.model import Conversation
from sharedllm_ext.model.inputs import end_ids
from sharedllm_ext.model.memory_rows import documents_of
from sharedllm_ext.model.passages import Passage, PassagePrompt
from sharedllm_ext.model.sources import Source

#: Passages of a question that are named.
SHOWN = 3


class CtrlC(StoppingCriteria):
    """A context manager in which the first Ctrl-C ends an answer after its next token, and the third one the program.

    So the text is never left in the middle of a change.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        # only there a handler can be set, and only there Ctrl-C arrives
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._came)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> Any:
        """Whether to stop, for each row."""
        return torch.full((input_ids.shape[0],), self.count > 0, dtype=torch.bool, device=input_ids.device)

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 2:
            say("\nstopping after the next token; Ctrl-C once more ends the program, and the conversation is lost")
        elif self.count > 2:
            raise KeyboardInterrupt


class Dialogue:
    """Questions and answers in a conversation.

    Args:
        conversation: holds the text, from its begin or from a file.
        tokenizer: the model's.
        turns: gives each turn's tokens.
        passages: how many to find and read for a question, where the memory has kept its tokens; 0: none.
        settings: keywords of ``generate``.
        places: of the texts that the memory is of, as far as they are known.
        show: whether an answer is printed while it comes; otherwise it is in the report alone.
    """

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Any,
        turns: Turns,
        *,
        passages: int,
        settings: dict[str, Any],
        places: Places | None = None,
        show: bool = True,
    ) -> None:
        self.show = show
        self.conversation, self.model, self.tokenizer = conversation, conversation.model, tokenizer
        self.turns, self.passages, self.places = turns, passages, places
        ends = {*end_ids(settings["eos_token_id"]), *turns.stop_ids}
        self.settings = {**settings, "eos_token_id": sorted(ends) or None}

    @property
    def reads(self) -> bool:
        """Whether passages are found for the next question."""
        known = [source is not None and source.token_ids is not None for source in self._sources]
        return self.passages > 0 and bool(known) and all(known)

    @property
    def _sources(self) -> list[Source | None]:
        """The sources of the documents that are read; empty where none is known."""
        memory = self.conversation.memory
        if memory is None or memory.sources is None:
            return []
        return [memory.sources[document] for document in documents_of(memory.memory_index[0])]

    def answer(self, question: str) -> dict[str, Any]:
        """Answer a question; both become part of the conversation.

        Returns:
            What ``--json`` says of it, but the question: answer, tokens, passages, times.

        Raises:
            ValueError: passages and question do not fit the window; the conversation is as before.
        """
        running = self.conversation.running_ids
        last = int(running[0, -1]) if running.shape[1] else None
        first = running.shape[1] <= self.conversation.keep_first
        turn = self._tensor(self.turns.question(question, last, first=first))
        streamer, find, found = TimedStreamer(self.tokenizer, show=self.show), None, None
        with CtrlC() as stop:
            if self.reads:
                # read beside the conversation, so that passages do not become part of it
                begin = time.perf_counter()
                beside, found = self._with_passages(question, self.turns.closing(last, first=first))
                find = time.perf_counter() - begin
                answer = self._generate(beside, stop, streamer)
                self.conversation.add(torch.cat((turn, answer), 1))
            else:
                self.conversation.add(turn)
                answer = self._generate(self.conversation, stop, streamer)
        if stop.count:
            say("interrupted; the conversation goes on after what was written")
        times, held = streamer.times, self.conversation.running_ids.shape[1]
        return {
            "answer": self.tokenizer.decode(answer[0], skip_special_tokens=True),
            "answer_tokens": answer.shape[1],
            "interrupted": stop.count > 0,
            "passages": None if found is None else [self._described(passage) for passage in found],
            "running_tokens": held,
            "memory_tokens": self.conversation.num_tokens - held,
            "seconds": {
                "find": find,
                "first_token": times[0],
                "per_token": (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
            },
        }

    def _generate(self, conversation: Conversation, stop: CtrlC, streamer: TimedStreamer) -> torch.Tensor:
        criteria = StoppingCriteriaList([stop])
        return conversation.generate(streamer=streamer, stopping_criteria=criteria, **self.settings)

    def _with_passages(self, question: str, closing: list[int]) -> tuple[Conversation, list[Passage]]:
        """The conversation so far and, at its end, passages and the question; and the passages."""
        memory, window = self.conversation.memory, self.conversation.window
        assert memory is not None  # see reads
        asked = question_ids(self.tokenizer, question)
        found = self.model.find_passages(self._tensor(asked), memory=memory, count=self.passages)[0]
        texts: Any = [source.token_ids for source in self._sources if source is not None]
        prompt = PassagePrompt(self.model.config, self.tokenizer).ids(texts, found, asked, [])
        if len(prompt) > window:
            raise ValueError(
                f"--passages: expected passages and question of at most {counted(window, 'token')} (the model's "
                f"window), got {len(prompt)} by {counted(len(found), 'passage')}"
            )
        if self.show:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            say(f"passages: {'; '.join(map(self._place, found[:SHOWN]))}{more}")
        beside = Conversation(self.model, memory, window=window, keep_first=self.conversation.keep_first)
        beside.add(torch.cat((self.conversation.running_ids, self._tensor([*closing, *prompt])), 1))
        return beside, found

    def _source(self, passage: Passage) -> str | None:
        """The text that a passage is of; of several that it touches, the one that has most of it."""
        if len(self._sources) > 1:
            source = self._sources[passage.document]
            text = None if source is None else source.text_of(passage.start, passage.end)
            return (None if text is None else text[0]) or f"document {passage.document + 1}"
        documents = [] if self.places is None else self.places.documents
        shares = [(min(passage.end, one.end) - max(passage.start, one.start), one.source) for one in documents]
        return max(shares)[1] if shares and max(shares)[0] > 0 else None

    def _place(self, passage: Passage) -> str:
        name = self._source(passage)
        return f"{f'{name} ' if name else ''}tokens {passage.start:,} to {passage.end - 1:,}"

    def _described(self, passage: Passage) -> dict[str, Any]:
        tokens = [passage.start, passage.end]
        return {"rank": passage.rank + 1, "score": passage.score, "tokens": tokens, "source": self._source(passage)}

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.model.device)

    def state(self) -> list[str]:
        """What is held, in lines for people."""
        conversation, memory = self.conversation, self.conversation.memory
        running, tokens = conversation.running_ids.shape[1], conversation.num_tokens
        first = f", the first {conversation.keep_first} stay" if conversation.keep_first else ""
        lines = [f"running text: {running:,} of {counted(conversation.window, 'token', ',')}{first}"]
        if memory is None:
            return [*lines, "memory: none yet"]
        source = self._sources[-1] if self._sources else None
        names = [one.name for one in self._sources if one is not None and one.name]
        name = f" ({', '.join(names)})" if len(names) > 1 else ""
        if len(names) == 1 and source is not None and source.name:
            # what moved in from the running text is a stretch without digest and name behind those that were read
            last = source.texts[-1]
            followed = len(source.texts) > 1 and last.sha256 is None and last.name is None
            name = f" ({source.name}{', and what followed' if followed else ''})"
        lines.append(
            f"memory: {counted(tokens - running, 'token', ',')}{name} in "
            f"{counted(sum(memory.num_chunks), 'chunk', ',')}, {counted(memory.num_slots, 'slot', ',')} in "
            f"{counted(len(memory.keys), 'layer')}, {mebibytes(memory.nbytes)}"
        )
        if self.reads:
            lines.append(f"passages: up to {self.passages} for a question")
        return lines
