"""A text without an end in bounded state: what passes the window moves into the memory by itself."""

import os
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from .appending import tail_of
from .file_description import running_shape
from .inputs import check_ids, end_ids
from .memory import ContextMemory
from .memory_fields import describe_origin, file_version
from .memory_file import CONVERSATION, MemoryFile
from .memory_rows import documents_of
from .memory_writer import write_tensors
from .modeling import SharedLLMForCausalLM
from .sources import check_tokenizer, tokenizer_digest
from .split_prompt import SplitPrompt

#: Arguments of the model's generate that the conversation gives itself.
_OWN = frozenset(
    """
    attention_mask cache context_attention_mask context_ids input_ids inputs inputs_embeds max_length memory passages
    past_key_values position_ids query_attention_mask query_ids split_prompt split_window
    """.split()  # noqa: SIM905
)
#: Settings that would need more than one row, or that count from the end of one call, with the values that ask nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "return_dict_in_generate": (None, False),
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
    "min_length": (None, 0),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "custom_generate": (None,),
}


class Conversation:
    """One text that goes on and on: its end is running text, everything before is in the memory.

    After every token that joins the text, the state is that of compressing anew::

        memory = model.compress(absorbed)  # all tokens that have left the running text
        logits = model(running_ids, memory=memory).logits

    When the running text has more than ``window`` tokens, its oldest whole chunks, as few as suffice, are appended to
    the memory. So ``window - chunk_size + 1`` to ``window`` tokens stay, and positions count from the first of them.

    Args:
        model: reads and generates; its mode does not matter.
        memory: of what came before the text, of one batch row. It stays readable. Of several documents the text goes
            on in the last one, which may be empty: ``memory.with_rows([[0, 3, own]])``.
        window: the most tokens of running text; default: ``model.config.window``.
        keep_first: tokens at the begin of the text that stay running text, in front of the latest ones (a system
            prompt, an attention sink). They are part of the window.
        query_ids: ``[1, Q]`` the text whose last token picks the nodes of all chunks, as for :meth:`compress`; without
            it the right children are taken. A memory that is given goes on exactly with the query it was made with.

    Raises:
        ValueError: a window without room for ``keep_first`` and a chunk, or beyond ``model.config.window``; a memory of
            several rows, of another model, or without the token ids of its last chunk.
    """

    def __init__(
        self,
        model: SharedLLMForCausalLM,
        memory: ContextMemory | None = None,
        *,
        window: int | None = None,
        keep_first: int = 0,
        query_ids: Tensor | None = None,
    ) -> None:
        _check_integer("keep_first", keep_first, 0)
        size, most = model.config.chunk_size, model.config.window
        window = most if window is None else window
        _check_integer("window", window, 1)
        if not keep_first + size <= window <= most:
            raise ValueError(
                f"window: expected {keep_first + size} (keep_first and a chunk of {size}) to {most} (config.window) "
                f"tokens, got {window}"
            )
        if query_ids is not None:
            check_ids(model, "query_ids", query_ids, range_too=True)
            if query_ids.shape[0] != 1:
                raise ValueError(f"query_ids: expected one row, got {query_ids.shape[0]}")
        self.model, self.window, self.keep_first = model, window, keep_first
        self._query_ids = query_ids
        self._running = torch.empty((1, 0), dtype=torch.int64, device=model.device)
        if memory is not None:
            _check_can_go_on(memory, size)
            # nothing is appended; what cannot be appended to is refused
            model.append(memory, self._running, documents=[_goes_on(memory)])
        self._memory, self._is_given = memory, memory is not None

    @property
    def memory(self) -> ContextMemory | None:
        """The memory of everything before the running text; ``None`` before anything was absorbed.

        It is valid until the text goes on: as for :meth:`append`, the next absorption may use it up.
        """
        return self._memory

    @property
    def running_ids(self) -> Tensor:
        """The running text ``[1, L]``, int64: the first ``keep_first`` tokens, and the latest ones."""
        return self._running

    @property
    def num_tokens(self) -> int:
        """Tokens of memory and running text together."""
        absorbed = 0
        if self._memory is not None:
            absorbed = sum(self._memory.num_tokens[document] for document in documents_of(self._memory.memory_index[0]))
        return absorbed + self._running.shape[1]

    @torch.no_grad()
    def add(self, ids: Tensor) -> None:
        """More text: a message, a document, the begin of an answer.

        Args:
            ids: ``[1, n]`` token ids.

        Raises:
            ValueError: other shapes, dtypes, devices or ids out of the vocabulary; the conversation is as before.
        """
        check_ids(self.model, "ids", ids, range_too=True)
        if ids.shape[0] != 1:
            raise ValueError(f"ids: expected one row (a conversation is one text), got {ids.shape[0]}")
        running = torch.cat((self._running, ids.long()), 1)
        size, excess = self.model.config.chunk_size, running.shape[1] - self.window
        if excess > 0:
            first, end = self.keep_first, self.keep_first + -(-excess // size) * size
            self._absorb(running[:, first:end])
            running = torch.cat((running[:, :first], running[:, end:]), 1)
        self._running = running

    def save(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Write memory, running text, ``window`` and ``keep_first`` to one safetensors file.

        The file appears, or replaces an older one, when it is complete.

        Args:
            path: the file.
            tokenizer: the one that has made the tokens; its digest is written too, and compared by :meth:`load`.

        Raises:
            ValueError: ``path`` is a folder or a device.
            OSError: the file cannot be written.
        """
        # a memory of no tokens stands for none
        memory = self.model.compress(self._running[:, :0], training=False) if self._memory is None else self._memory
        fields, tensors = memory.contents()
        told, integers = describe_origin("memory", memory.tails, memory.sources, fields)
        own = {"window": self.window, "keep_first": self.keep_first, "tokenizer": None}
        if tokenizer is not None:
            own["tokenizer"] = tokenizer_digest(tokenizer)
        running = {"running_ids": self._running[0].to("cpu", torch.int32)}
        version = file_version(CONVERSATION, memory.memory_index, memory.sources)
        write_tensors(path, {**fields, **told, **own}, {**tensors, **integers, **running}, CONVERSATION, version)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: SharedLLMForCausalLM,
        tokenizer: Any = None,
        *,
        query_ids: Tensor | None = None,
        verify: bool = True,
    ) -> "Conversation":
        """Go on with a conversation that :meth:`save` has written.

        Args:
            path: the file.
            model: the one that it was held with; the memory is converted to its dtype and device.
            tokenizer: compared with the digests in the file, where there are any.
            query_ids: as before, the file has none.
            verify: whether to compare checksums.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, damaged or no conversation, or it was held with another model or
                another tokenizer.
        """
        with MemoryFile(path, CONVERSATION) as file:
            shape = running_shape(file)
            if tokenizer is not None:
                check_tokenizer(file.name, [file.header["tokenizer"]], tokenizer)
            memory = ContextMemory.read(file, model, model.device, verify=verify, others=shape).to(model.dtype)
            running = file.read(list(shape), lambda tensor: tensor.to(model.device).unsqueeze(0), verify=verify)[0]
            own = {name: file.header[name] for name in ("window", "keep_first")}
            try:
                absorbed = memory if any(memory.num_tokens) else None
                conversation = cls(model, absorbed, **own, query_ids=query_ids)
                conversation.add(running)
            except ValueError as error:
                raise ValueError(f"{file.name}: {error}") from None
        if tokenizer is not None:
            sources = [source for source in memory.sources or () if source is not None]
            check_tokenizer(file.name, [source.tokenizer for source in sources], tokenizer)
        # nobody else has it
        conversation._is_given = False
        return conversation

    def _absorb(self, ids: Tensor) -> None:
        if self._memory is None:
            self._memory = self.model.compress(ids, query_ids=self._query_ids, training=False)
        else:
            own = [_goes_on(self._memory)]
            self._memory = self.model.append(
                self._memory, ids, query_ids=self._query_ids, documents=own, keep=self._is_given
            )
        self._is_given = False

    def generate(self, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Tensor:
        """Generate what follows, which becomes part of the text.

        When the running text passes the window, a chunk of it is absorbed, the rest is read again with the longer
        memory, and generation goes on. Logits processors, stopping criteria, streamers and assistant models see the
        running text as it was when generate was called, and everything generated since.

        Args:
            generation_config: as for Transformers.
            kwargs: as for the model's ``generate``, without inputs: sampling, ``streamer``, ``stopping_criteria``,
                ``logits_processor``, ``eos_token_id``, ``stop_strings`` and others. ``max_new_tokens`` must be there,
                or in a generation config.

        Returns:
            ``[1, n]`` the new token ids alone, with the one that ended the answer.

        Raises:
            TypeError: an argument that the conversation gives itself, such as ``memory`` or ``attention_mask``.
            ValueError: there is no text to follow, or settings that would need several rows or one unbroken call
                (beams, ``num_return_sequences``, ``return_dict_in_generate``, …). If an error comes after the first
                break, the text has what was generated before the last one.
        """
        settings = _Settings(self.model, generation_config, kwargs)
        settings.check()
        if self._running.shape[1] == 0:
            raise ValueError("Conversation: expected some text (add) before generate, got none")
        watched, relay = _Watched(kwargs.pop("stopping_criteria", None)), None
        if kwargs.get("streamer") is not None:
            relay = kwargs["streamer"] = _Relay(kwargs["streamer"])
        whole = self._running
        begin, last = whole.shape[1], whole.shape[1] + settings.max_new_tokens
        while True:
            done, room = whole.shape[1] - begin, self.window + 1 - self._running.shape[1]
            budget = min(room, last - whole.shape[1])
            result = self.model.generate(
                whole,
                generation_config,
                memory=self._memory,
                split_prompt=SplitPrompt(whole, self._running, None),
                split_window=False,
                stopping_criteria=StoppingCriteriaList([watched]),
                **{**kwargs, **settings.of_part(done, budget)},
            )
            new, whole = result[:, whole.shape[1] :], result
            self.add(new)
            if new.shape[1] < budget or whole.shape[1] == last or watched.fired or settings.has_ended(whole):
                break
        if relay is not None:
            relay.inner.end()
        return whole[:, begin:]


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _check_can_go_on(memory: ContextMemory, chunk_size: int) -> None:
    """Refuse now what append would refuse in the middle of an answer."""
    if memory.batch_size != 1:
        raise ValueError(f"memory: expected one batch row (a conversation is one text), got {memory.batch_size}")
    tail_of(memory, _goes_on(memory), chunk_size)


def _goes_on(memory: ContextMemory) -> int:
    """The document that the conversation's text goes on in: the last one that it reads."""
    return documents_of(memory.memory_index[0])[-1]


class _Settings:
    """What a call of ``generate`` asks, whose parts are calls of their own."""

    def __init__(self, model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        self._kwargs, self._configs = kwargs, (generation_config, model.generation_config)
        self.max_new_tokens: int = self._of("max_new_tokens")
        self._least = self._of("min_new_tokens")
        seconds = self._of("max_time")
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._eos = set(end_ids(self._of("eos_token_id")))
        strings = self._of("stop_strings")
        self._strings = None
        if strings is not None and kwargs.get("tokenizer") is not None:
            self._strings = StopStringCriteria(kwargs["tokenizer"], strings)

    def _of(self, name: str) -> Any:
        """A setting as Transformers finds it: a keyword, the caller's config, the model's."""
        if name in self._kwargs:
            return self._kwargs[name]
        return next((x for x in (getattr(config, name, None) for config in self._configs) if x is not None), None)

    def check(self) -> None:
        """Refuse what cannot go on across a break, before anything is generated."""
        given = sorted(_OWN & self._kwargs.keys())
        if given:
            raise TypeError(f"Conversation.generate: expected no {given[0]}, which the conversation gives itself")
        for name, silent in _REFUSED.items():
            if self._of(name) not in silent:
                raise ValueError(f"{name}: expected {silent[-1]} in a conversation, got {self._of(name)!r}")
        if self.max_new_tokens is None:
            raise ValueError("max_new_tokens: expected the most tokens of an answer, got none")
        _check_integer("max_new_tokens", self.max_new_tokens, 1)

    def of_part(self, done: int, budget: int) -> dict[str, Any]:
        """Keywords of a part of at most ``budget`` tokens, after ``done`` tokens of the answer."""
        part: dict[str, Any] = {"max_new_tokens": budget}
        if self._least is not None:
            part["min_new_tokens"] = min(max(self._least - done, 0), budget)
        if self._deadline is not None:
            part["max_time"] = max(self._deadline - time.monotonic(), 0.0)
        return part

    def has_ended(self, text: Tensor) -> bool:
        """Whether a part that used all of its tokens ended with the answer's last one."""
        if int(text[0, -1]) in self._eos:
            return True
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return True
        no_scores: Any = None
        return self._strings is not None and bool(self._strings(text, no_scores).all())


class _Watched(StoppingCriteria):
    """The caller's stopping criteria, and whether the latest token fulfilled one."""

    def __init__(self, criteria: Any) -> None:
        self.criteria = StoppingCriteriaList([] if criteria is None else criteria)
        self.fired = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        done: Any = self.criteria(input_ids, scores, **kwargs)
        self.fired = bool(done.all()) if self.criteria else False
        return done


class _Relay(BaseStreamer):
    """The caller's streamer, which is told the text in front once, and the end by the conversation."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.parts, self.fresh = 0, True

    def put(self, value: Tensor) -> None:
        """Pass on tokens, and the text in front of the first part."""
        if not self.fresh or self.parts == 0:
            self.inner.put(value)
        self.fresh = False

    def end(self) -> None:
        """A part has ended; the next one begins with the text in front."""
        self.parts, self.fresh = self.parts + 1, True
