"""Ways to answer a question about a long context, all asked in the same words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sharedllm_ext.counted import counted
from sharedllm_ext.evaluation import bm25
from sharedllm_ext.evaluation.decoding_rows import Row, RowRotary, decode_rows, read_prompt
from sharedllm_ext.evaluation.passage_search import PassageSearch, WordSearch
from sharedllm_ext.evaluation.prompts import PromptIds, Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.model.passages import Passage, passage_span


class System(Protocol):
    """Something that answers records.

    Attributes:
        name: its name in tables.
        settings: plain values that decide its answers; predictions are used again only where they are the same.
    """

    name: str
    settings: dict[str, Any]

    def answer(self, records: Sequence[Record]) -> list[str]:
        """One prediction for each record, in their order: the text after the answer prefix."""
        ...


def plain_decoder(model: Any, *, rope: dict[str, Any] | None = None) -> Any:
    """The decoder of a SharedLLM model as the Transformers model of its family, with the same weights in memory.

    It has no injected blocks and no compressor, so it is what the base checkpoint would be with these weights.

    Args:
        model: a SharedLLM model whose weights are plain and in memory.
        rope: fields to put into ``config.rope_parameters``; the model's own type must be ``default``.

    Raises:
        ValueError: weights that are quantised or offloaded; with ``rope`` frequencies that are scaled already, or
            several kinds of them.
    """
    config = copy.deepcopy(model.config.text_config)
    if rope is not None:
        kinds = [name for name, value in config.rope_parameters.items() if isinstance(value, dict)]
        if kinds:
            raise ValueError(
                f"rope: expected one rotation for all layers to stretch, got one each of {', '.join(kinds)}"
            )
        came = config.rope_parameters.get("rope_type", "default")
        if came != "default":
            raise ValueError(f"rope: expected a model with rope_type 'default' to stretch, got {came!r}")
        config.rope_parameters = {**config.rope_parameters, **rope}
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    state = model.state_dict()
    names = list(plain.state_dict())
    lacking = [name for name in names if name not in state or state[name].is_meta]
    if lacking or any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        raise ValueError(
            "model: expected plain weights to build the decoder alone from, got quantised or offloaded ones"
            + (f" ({lacking[0]})" if lacking else "")
        )
    plain.load_state_dict({name: state[name] for name in names}, assign=True)
    plain.tie_weights()
    _set_rotary(plain, config)
    own = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        # what is no part of a state: a factor of the embeddings
        if buffer.is_meta:
            place, _, attribute = name.rpartition(".")
            plain.get_submodule(place).register_buffer(attribute, own[name], persistent=False)
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.requires_grad_(False).eval()


def _set_rotary(plain: Any, config: Any) -> None:
    """Rotary frequencies from the configuration; they are not part of a state dict."""
    rotary: Any = type(plain.model.rotary_emb)
    plain.model.rotary_emb = rotary(config).to(plain.device)


def _follows_length(config: Any) -> bool:
    """Whether rotary frequencies change with the length of a text, which would be that of the longest row."""
    parameters = config.rope_parameters
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


class _Generating:
    """Greedy answers of a model after token ids."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts

    def _tensor(self, ids: Any) -> Tensor:
        return torch.as_tensor([int(token) for token in ids], dtype=torch.long, device=self.model.device).unsqueeze(0)

    def _stops(self, record: Record) -> list[int]:
        """Tokens that end an answer."""
        tokenizer = self.prompts.tokenizer
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = tokenizer.eos_token_id
        stops = list(end) if isinstance(end, (list, tuple)) else [] if end is None else [end]
        if record.stop_at_newline:
            newline = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
            stops += newline[-1:]
        return stops

    def _generate(self, record: Record, ids: Sequence[int], **more: Any) -> str:
        tokenizer = self.prompts.tokenizer
        stops = self._stops(record)
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = stops[0] if stops else 0
        prompt = self._tensor(ids)
        output = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=record.max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=pad,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            **more,
        )
        return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))


def _fits(record: Record, needed: int, window: int, what: str) -> None:
    if needed > window:
        raise ValueError(
            f"{record.id}: expected at most {counted(window, 'token')} in the window for {what}, got {needed}"
        )


class MemorySystem(_Generating):
    """A SharedLLM model: the context is compressed, the question is running text.

    The question, with what the chat template puts around it and the answer prefix, is also the query that picks nodes.
    """

    name = "memory"

    def __init__(self, model: Any, prompts: Prompts) -> None:
        super().__init__(model, prompts)
        self.settings: dict[str, Any] = {"system": self.name, "chat": prompts.chat}

    def answer(self, records: Sequence[Record]) -> list[str]:
        """Answers of the model with a memory of each context; raises ``ValueError`` for too long a question."""
        return [self._one(record) for record in records]

    def _one(self, record: Record) -> str:
        ids = self.prompts.ids(record)
        running = [*ids.begin, *ids.question]
        _fits(record, len(running), self.model.config.window, "the question")
        memory = {}
        if len(ids.context):
            with torch.inference_mode():
                memory["memory"] = self.model.compress(self._tensor(ids.context), query_ids=self._tensor(running))
        return self._generate(record, running, **memory)


class PickSystem(_Generating):
    """A SharedLLM model with a trained pick: it finds passages by its memory and reads them beside it.

    The model's own prompt (``config.passage_prompt``) stands around passages, question and answer prefix, in the place
    of a chat template. Of the ``count`` best passages the worst are left out while the window has no room for them.

    With a ``search`` it is called ``pick-`` and the search's name, and reads as before, but the segments that the
    search finds, with the same margins.
    """

    name = "pick"

    def __init__(self, model: Any, prompts: Prompts, *, count: int = 8, search: PassageSearch | None = None) -> None:
        super().__init__(model, prompts)
        if model.pick is None or model.config.passage_prompt is None:
            raise ValueError("model: expected one with a pick and a passage_prompt, got one without")
        self.count, self.search = count, search
        if search is not None:
            self.name = f"pick-{search.name}"
        self.settings: dict[str, Any] = {"system": self.name, "passages": count}
        if search is not None:
            self.settings |= search.settings

    def answer(self, records: Sequence[Record]) -> list[str]:
        """Answers of the model after the passages found; raises ``ValueError`` where not one of them has room."""
        return [self._one(record) for record in records]

    def _one(self, record: Record) -> str:
        question, begin = record.question.strip(), record.answer_prefix.strip()
        context = self._tensor(self.prompts.encode(record.context, record.id))
        memory: dict[str, Any] = {}
        passages: list[Any] = []
        if context.shape[1]:
            asked = self._tensor(self.prompts.encode(question, record.id))
            with torch.inference_mode():
                memory["memory"] = self.model.compress(context)
                if self.search is None:
                    (passages,) = self.model.find_passages(asked, context, count=self.count, **memory)
                else:
                    passages = self._searched(self.search, record)
        while True:
            running = self.model.passage_prompt(self.prompts.tokenizer, context[0], passages, question, begin)
            needed = running.shape[1] + record.max_new_tokens
            if needed <= self.model.config.window or len(passages) <= 1:
                break
            passages = passages[:-1]
        _fits(record, needed, self.model.config.window, "a passage, question and answer")
        return self._generate(record, running[0].tolist(), **memory)

    def _searched(self, search: PassageSearch, record: Record) -> list[Passage]:
        config = self.model.config
        context = self.prompts.encode(record.context, record.id)
        scores = search.scores(record, context, config.segment_size)
        return [
            Passage(
                *passage_span(segment, len(context), config.segment_size, config.segment_margin),
                segment,
                rank,
                float(scores[segment]),
            )
            for rank, segment in enumerate(bm25.best(scores, self.count))
        ]


class FullSystem(_Generating):
    """A base model that reads the whole prompt with full attention, however many positions it was trained on."""

    name = "full"

    def __init__(self, model: Any, prompts: Prompts) -> None:
        super().__init__(model, prompts)
        self.settings: dict[str, Any] = {"system": self.name, "chat": prompts.chat}

    def answer(self, records: Sequence[Record]) -> list[str]:
        """Answers of the model to the part of the prompt that :meth:`read` keeps.

        The prompts of several records are read one after the other, and answered together.
        Each has an answer of its own where the model's rotation follows the length of what it reads.
        """
        prompts = [self.read(record, self.prompts.ids(record)) for record in records]
        if len(records) == 1 or _follows_length(self.model.config):
            return [self._generate(record, ids) for record, ids in zip(records, prompts, strict=True)]
        return self._decode(records, [read_prompt(self.model, self._tensor(ids)) for ids in prompts])

    def _decode(self, records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
        """Answers after prompts that were read."""
        stops = [self._stops(record) for record in records]
        answers = decode_rows(self.model, rows, [record.max_new_tokens for record in records], stops)
        return [str(self.prompts.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in answers]

    def read(self, record: Record, ids: PromptIds) -> list[int]:
        """The tokens that are read."""
        return [*ids.begin, *ids.context.tolist(), *ids.question]


class YarnSystem(FullSystem):
    """The same with rotary frequencies stretched by YaRN (arXiv 2309.00071), as Transformers' ``rope_type`` yarn does.

    ``model`` is a :func:`plain_decoder` of :func:`yarn_parameters`; one factor for prompts of all lengths.
    """

    name = "yarn"

    def __init__(self, model: Any, prompts: Prompts) -> None:
        super().__init__(model, prompts)
        self.settings["factor"] = model.config.rope_parameters["factor"]


def yarn_parameters(config: Any, factor: float) -> dict[str, Any]:
    """``rope_parameters`` that stretch a base's positions by ``factor``."""
    positions = config.text_config.max_position_embeddings
    return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": positions}


class NtkSystem(FullSystem):
    """The same with frequencies of dynamic NTK scaling: theta grows with the prompt beyond the trained positions.

    ``theta (n / positions) ** (d / (d - 2))`` for a prompt and longest answer of ``n`` tokens, ``d`` numbers of each
    head being rotated: Transformers' ``rope_type`` dynamic with factor 1 at that length. It stays while the answer
    grows, so that all keys are rotated alike.
    """

    name = "ntk"

    def answer(self, records: Sequence[Record]) -> list[str]:
        """Answers of the model, whose frequencies are set for each prompt."""
        prompts = [self.read(record, self.prompts.ids(record)) for record in records]
        own = self.model.model.rotary_emb
        rows, rotaries = [], []
        try:
            for record, ids in zip(records, prompts, strict=True):
                self._stretch(len(ids) + record.max_new_tokens)
                if len(records) == 1:
                    return [self._generate(record, ids)]
                rows.append(read_prompt(self.model, self._tensor(ids)))
                rotaries.append(self.model.model.rotary_emb)
            self.model.model.rotary_emb = RowRotary(rotaries)
            return self._decode(records, rows)
        finally:
            self.model.model.rotary_emb = own

    def _stretch(self, tokens: int) -> None:
        """Set the model's frequencies for so many tokens."""
        config = copy.deepcopy(self.model.config)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
        ratio = max(1.0, tokens / config.max_position_embeddings)
        theta = config.rope_parameters["rope_theta"] * ratio ** (size / (size - 2))
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
        _set_rotary(self.model, config)


class WindowSystem(FullSystem):
    """A sliding window with attention sinks (StreamingLLM, arXiv 2309.17453), as a cut of the prompt.

    Of a prompt longer than ``window - max_new_tokens`` the first ``sinks`` tokens and the last others are read, at the
    positions 0, 1, 2, … that they have among themselves; tokens between them are never seen. Streaming would keep
    keys and values that were computed while other tokens were visible; here all are computed from the tokens that are
    left.
    """

    name = "window"

    def __init__(self, model: Any, prompts: Prompts, *, window: int, sinks: int = 4) -> None:
        super().__init__(model, prompts)
        self.window, self.sinks = window, sinks
        self.settings |= {"window": window, "sinks": sinks}

    def read(self, record: Record, ids: PromptIds) -> list[int]:
        """First and last tokens; raises ``ValueError`` where the question alone has no room."""
        _fits(record, self.sinks + len(ids.question) + record.max_new_tokens, self.window, "sinks, question and answer")
        prompt = super().read(record, ids)
        room = self.window - record.max_new_tokens
        return prompt if len(prompt) <= room else prompt[: self.sinks] + prompt[len(prompt) - (room - self.sinks) :]


class PassagesSystem(FullSystem):
    """The passages of the context that a search finds for the question, read in the window in their order.

    As many of the ``count`` best passages of ``size`` tokens as have room beside the question and the longest answer.
    The search is BM25 over token ids, if no other is given, and names the system.
    """

    name = "bm25"

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        *,
        window: int,
        count: int = 8,
        size: int = 128,
        search: PassageSearch | None = None,
    ) -> None:
        super().__init__(model, prompts)
        self.window, self.count, self.size = window, count, size
        self.search = WordSearch(prompts) if search is None else search
        self.name = self.search.name
        self.settings |= {"system": self.name, "window": window, "passages": count, "passage_tokens": size}
        self.settings |= self.search.settings

    def read(self, record: Record, ids: PromptIds) -> list[int]:
        """Passages and question; raises ``ValueError`` where not one passage has room."""
        beside = len(ids.begin) + len(ids.question) + record.max_new_tokens
        size = min(self.size, len(ids.context))
        _fits(record, beside + size, self.window, "a passage, question and answer")
        room = (self.window - beside) // self.size if len(ids.context) > self.window - beside else self.count
        found = self.search.scores(record, ids.context, self.size)
        chosen = sorted(bm25.best(found, min(self.count, max(room, 1))))
        passages = [token for i in chosen for token in ids.context[i * self.size : (i + 1) * self.size].tolist()]
        return [*ids.begin, *passages, *ids.question]
