"""Finding the passages of a context that answer a question, and the prompt in which they are read."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..counted import counted
from .inputs import check_ids, check_mask
from .memory import ContextMemory
from .memory_fields import has_rows_of_several
from .memory_rows import documents_of
from .pick import slot_places
from .pick_index import PickIndex, check_text, unrotated_keys
from .picked_memory import PickedMemory
from .sources import Place, Source
from .tiered_memory import TieredMemory
from .word_index import joint_evidence

#: Chunks of a tiered memory that a question reads by default: 128K tokens in chunks of 1024.
CHUNKS = 128
#: What a model without a pick is told.
NO_PICK = "a model with a pick (config.pick_layers; from_adapter loads one), got one without"


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage of a context.

    Attributes:
        start, end: its tokens in the document, margins included.
        segment: the number of the segment inside.
        rank: 0 for the best of its question.
        score: the pick's; comparable within one question.
        place: its characters in the text that has most of it, where the memory knows them: ``(name, first, end)``.
        document: which of the documents that its question reads, from 0, in their order.
    """

    start: int
    end: int
    segment: int
    rank: int
    score: float
    place: Place | None = None
    document: int = 0


class _Part(NamedTuple):
    """A document that a question reads.

    Attributes:
        asked: what a question is compared with.
        length: its tokens.
        origin: where it comes from, if that is known.
    """

    asked: PickIndex
    length: int
    origin: Source | None


class _Scored(NamedTuple):
    """One question's scores.

    Attributes:
        scores: ``[n]`` of all documents' segments, one document after the other.
        parts: the documents that it reads.
    """

    scores: Tensor
    parts: list[_Part]


class PassagePrompt:
    """``config.passage_prompt`` in the tokens of a tokenizer.

    Raises:
        ValueError: the configuration has none.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        if config.passage_prompt is None:
            raise ValueError("passage_prompt: expected config.passage_prompt, got None")
        self._parts: dict[str, str] = config.passage_prompt
        self._tokenizer = tokenizer

    def text(self, text: str) -> list[int]:
        """Tokens of a text, in which what looks like a special token is text: it must not end the turn."""
        return self._tokens(text, split_special_tokens=True)

    def ids(
        self, texts: Sequence[Tensor], passages: list[Passage], question: list[int], answer_begin: list[int]
    ) -> list[int]:
        """All tokens, passages in the order of the documents ``[C]`` that ``texts`` has, and of each one's text."""
        ids = self._tokens(self._parts["begin"])
        for passage in sorted(passages, key=lambda p: (p.document, p.start, p.segment)):
            ids += self._tokens(self._parts["passage"].format(rank=passage.rank + 1))
            ids += texts[passage.document][passage.start : passage.end].tolist()
        return (
            ids + self._tokens(self._parts["question"]) + question + self._tokens(self._parts["answer"]) + answer_begin
        )

    def _tokens(self, text: str, **how: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, **how).input_ids) if text else []


class PassageRetrieval:
    """The part of a model that finds passages of a compressed context."""

    @torch.no_grad()
    @torch.compiler.disable
    def find_passages(
        self: Any,
        question_ids: Tensor,
        context_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        question_attention_mask: Tensor | None = None,
        memory: ContextMemory | TieredMemory | None = None,
        count: int = 8,
    ) -> list[list[Passage]]:
        """The passages of a context that answer a question best, by its memory and by its words.

        Nothing is compressed if the memory is given, and it is not changed: many questions may be asked of one. What
        does not depend on the question is kept as long as the memory lives, so the next one costs only itself.

        Args:
            question_ids: ``[B, L]`` the question's own tokens, without any prompt around them.
            context_ids: ``[B, C]`` the context that the memory was made of, or one row for all questions; not needed by
                a memory that knows its token ids (:meth:`ContextMemory.with_sources`).
            context_attention_mask: ``[B, C]``, 0 for padding (on either side).
            question_attention_mask: ``[B, L]``, 0 for padding.
            memory: what :meth:`compress` has made of the context; compressed here by default. One of a single row
                serves all questions. The passages of several documents that a row reads are ranked together.
            count: passages for a question, each another one; fewer if the context has fewer.

        Returns:
            For each question its passages, best first.

        Raises:
            ValueError: the model has no pick, inputs that contradict each other, or a memory of another context.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count: expected an integer of at least 1, got {count!r}")
        context = context_ids, context_attention_mask
        scored = self._scored("find_passages", question_ids, question_attention_mask, context, memory)
        return [self._best(one, count) for one in scored]

    @torch.no_grad()
    def _scored(
        self: Any,
        name: str,
        question_ids: Tensor,
        question_attention_mask: Tensor | None,
        context: tuple[Tensor | None, Tensor | None],
        memory: ContextMemory | TieredMemory | None,
    ) -> list["_Scored"]:
        """The segments' scores for each question; arguments as for :meth:`find_passages`, whose errors it raises."""
        if self.pick is None:
            raise ValueError(f"{name}: expected {NO_PICK}")
        context_ids, context_attention_mask = context
        check_ids(self, "question_ids", question_ids, range_too=True)
        asked = check_mask("question_attention_mask", question_attention_mask, "question_ids", question_ids)
        rows, device, texts = question_ids.shape[0], question_ids.device, None
        if context_ids is not None:
            texts = _rows_of(self, context_ids, context_attention_mask, rows)
        elif context_attention_mask is not None:
            raise ValueError("context_attention_mask: expected context_ids with it, got none")
        if memory is not None:
            self.check_memory(memory, tiered=True)
        elif context_ids is not None:
            memory = self.compress(context_ids, context_attention_mask, training=False)
        else:
            raise ValueError("context_ids, memory: expected at least one of them, got none")
        memory.expect_whole()
        if memory.device != device:
            raise ValueError(
                f"memory: expected device {device} as {'question_ids' if texts is None else 'context_ids'}, got "
                f"{memory.device}; use memory.to(…)"
            )
        if memory.batch_size not in (1, rows):
            raise ValueError(
                f"memory: expected {counted(rows, 'batch row')} as in question_ids, or 1, got {memory.batch_size}"
            )
        if texts is not None and has_rows_of_several(memory.memory_index):
            raise ValueError(
                "context_ids: expected none with batch rows that read several documents, whose memory has to know its "
                "token ids (with_sources), got some"
            )
        found = []
        known: dict[tuple[int, int], _Part] = {}
        for row in range(rows):
            before, known = known, {}
            for document in documents_of(memory.memory_index[row if memory.batch_size > 1 else 0]):
                source = document if texts is None else row if len(texts) > 1 else 0
                part = before.get((source, document))
                if part is None:
                    ids = kept_ids(self, memory, document, device) if texts is None else texts[source]
                    if ids.numel() != memory.num_tokens[document]:
                        expected = counted(memory.num_tokens[document], "token")
                        raise ValueError(
                            f"context_ids: expected the {expected} of the memory's document {document}, got "
                            f"{ids.numel()} in row {source}"
                        )
                    origin = None if memory.sources is None else memory.sources[document]
                    part = _Part(self._pick_index(ids, memory, document), ids.numel(), origin)
                known[source, document] = part
            question = question_ids[row] if asked is None else question_ids[row][asked[row]]
            parts = list(known.values())
            found.append(_Scored(self._scores([part.asked for part in parts], question), parts))
        return found

    @torch.no_grad()
    def _read_tiers(
        self: Any,
        memory: TieredMemory,
        question_ids: Tensor,
        question_attention_mask: Tensor | None,
        context: tuple[Tensor | None, Tensor | None],
        *,
        passages: int = 0,
        chunks: int = CHUNKS,
    ) -> tuple[PickedMemory, list[list[Passage]]]:
        """The best chunks for each question, brought to the device, and its best passages."""
        scored = self._scored("memory_for", question_ids, question_attention_mask, context, memory)
        found = [self._best(one, passages) for one in scored]
        rows = memory if memory.batch_size == len(scored) else memory.expand(len(scored))
        return rows.select_chunks([self._picked_chunks(one, chunks) for one in scored]), found

    def _picked_chunks(self: Any, scored: "_Scored", count: int) -> list[int]:
        """The chunks of the best segments, at most so many; counted over all documents."""
        size, span, device = self.config.chunk_size, self.config.segment_size, scored.scores.device
        if not scored.scores.numel():
            return []
        chunks = sum(-(-part.length // size) for part in scored.parts)
        best = torch.full((chunks,), -torch.inf, device=device)
        scores, begin = scored.scores, 0
        for part in scored.parts:
            own, scores = scores[: part.asked.count], scores[part.asked.count :]
            first = torch.arange(part.asked.count, device=device) * span
            last = (first + span).clamp(max=part.length) - 1
            # a segment may lie in two chunks
            for token in (first, last):
                best.scatter_reduce_(0, begin + token // size, own, "amax")
            begin += -(-part.length // size)
        chosen: list[int] = best.topk(min(count, best.numel())).indices.tolist()
        return chosen

    def passage_prompt(
        self: Any,
        tokenizer: Any,
        context_ids: Tensor | Sequence[Tensor],
        passages: list[Passage],
        question: str,
        answer_begin: str = "",
    ) -> Tensor:
        """The running text in which the model reads passages and answers: their text in the document's order.

        Each passage follows ``config.passage_prompt["passage"]`` with its rank, 1 for the best.

        Args:
            tokenizer: the base checkpoint's.
            context_ids: ``[C]`` the document's tokens, or a list of those of each document that the question reads.
            passages: of :meth:`find_passages`.
            question: asked after the passages.
            answer_begin: the begin of the answer, which the model goes on with.

        Returns:
            ``[1, L]`` int64 on the context's device, for ``generate(input_ids, memory=memory)``.

        Raises:
            ValueError: the configuration has no ``passage_prompt``, or a passage is of a document that is not there.
        """
        layout = PassagePrompt(self.config, tokenizer)
        texts = [context_ids] if isinstance(context_ids, Tensor) else list(context_ids)
        check_documents("passages", passages, len(texts))
        ids = layout.ids(texts, passages, layout.text(question), layout.text(answer_begin))
        return torch.tensor([ids], dtype=torch.int64, device=texts[0].device)

    def _layer_inputs(self: Any, ids: Tensor) -> list[Tensor]:
        """What comes into each of the compressor's layers, ``[B, L, d]`` each, at the tokens ``[B, L]`` of a text."""
        source = self.model if self.compressor is None else self.compressor
        states = source(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return list(states[: self.config.injection_layers])

    def _pick_index(self: Any, ids: Tensor, memory: ContextMemory | TieredMemory, document: int) -> PickIndex:
        """What is asked of a document, kept from an earlier question if there was one."""
        config, pick, lower = self.config, self.pick, self.lower_model
        if isinstance(memory, TieredMemory):
            return memory.pick_index(document, ids, self)
        slots = slice(memory.cu_slots[document], memory.cu_slots[document + 1])
        index = self._pick_indexes.get(memory, slots, ids, pick, self.dtype)
        if index is not None:
            return index
        places = slot_places(ids.numel(), config)
        values = memory.values[0][slots]
        check_text(lower, ids, places, lambda chosen: values[chosen.to(values.device)])
        keys = [unrotated_keys(self, layer, memory.keys[layer][slots], places.position) for layer in pick.layers]
        index = PickIndex.of(ids, keys, places, pick, config)
        self._pick_indexes.put(memory, slots, index, pick, self.dtype)
        return index

    def _scores(self: Any, documents: list[PickIndex], question: Tensor) -> Tensor:
        """The scores ``[n]`` of all documents' segments for the tokens ``[L]`` of a question."""
        begins = list(itertools.accumulate((index.count for index in documents), initial=0))
        if not question.numel() or not begins[-1]:
            return torch.zeros(begins[-1], device=question.device, dtype=torch.float32)
        inputs = [state[0] for state in self._layer_inputs(question.unsqueeze(0))]
        evidence = joint_evidence([index.words for index in documents], self.pick.token_class[question].long())
        segment = documents[0].segment
        if len(documents) > 1:
            segment = torch.cat([index.segment + begin for index, begin in zip(documents, begins, strict=False)])
        keys = [index.keys for index in documents]
        scores: Tensor = self.pick(inputs, self.lower_model.layers, keys, segment, begins[-1], evidence)
        return scores

    def _best(self: Any, scored: "_Scored", count: int) -> list[Passage]:
        size, margin = self.config.segment_size, self.config.segment_margin
        # at the end of a text several segments have one passage, at most so many
        alike = (size + 2 * margin) // size + 1
        values, order = scored.scores.topk(min(alike * count, scored.scores.numel()))
        ends = list(itertools.accumulate(part.asked.count for part in scored.parts))
        found: dict[tuple[int, int], Passage] = {}
        for place_of_all, score in zip(order.tolist(), values.tolist(), strict=True):
            document = bisect.bisect_right(ends, place_of_all)
            part = scored.parts[document]
            segment = place_of_all - ends[document] + part.asked.count
            start, end = passage_span(segment, part.length, size, margin)
            if (document, start) in found:
                continue
            place = None if part.origin is None else part.origin.place(start, end)
            found[document, start] = Passage(start, end, segment, len(found), score, place, document)
            if len(found) == count:
                break
        return list(found.values())


def check_documents(name: str, passages: Sequence[Passage], count: int) -> None:
    """Refuse passages of other documents than the ``count`` that a question reads."""
    for passage in passages:
        if not 0 <= passage.document < count:
            raise ValueError(f"{name}: expected passages of documents 0 to {count - 1}, got one of {passage.document}")


def _rows_of(model: Any, context_ids: Tensor, mask: Tensor | None, rows: int) -> list[Tensor]:
    """The texts of a context, one for each question or one for all."""
    check_ids(model, "context_ids", context_ids, range_too=True)
    used = check_mask("context_attention_mask", mask, "context_ids", context_ids)
    if context_ids.shape[0] not in (1, rows):
        raise ValueError(
            f"context_ids: expected {counted(rows, 'row')} as in question_ids, or 1, got {context_ids.shape[0]}"
        )
    return [ids if used is None else ids[used[row]] for row, ids in enumerate(context_ids)]


def kept_ids(model: Any, memory: ContextMemory | TieredMemory, document: int, device: torch.device) -> Tensor:
    """The token ids ``[T]`` that a memory has kept of a document.

    Raises:
        ValueError: it has not, or they are not the model's.
    """
    source = None if memory.sources is None else memory.sources[document]
    ids = None if source is None else source.token_ids
    if ids is None:
        raise ValueError(
            f"context_ids: expected the tokens of the memory's document {document}, or a memory that knows them "
            "(with_sources), got none"
        )
    ids = ids.to(device)
    check_ids(model, f"sources[{document}].token_ids", ids.unsqueeze(0), range_too=True)
    return ids


def passage_span(segment: int, length: int, size: int, margin: int) -> tuple[int, int]:
    """First token and end of a segment of ``size`` tokens with its margins, moved into a text of ``length`` tokens."""
    whole = min(length, size + 2 * margin)
    start = max(0, min(segment * size - margin, length - whole))
    return start, start + whole
