"""``generate(…, passages=…)``: passages are found for a question, and the model reads them in front of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from .inputs import check_ids, check_mask, check_not_empty
from .memory import ContextMemory
from .memory_rows import documents_of
from .passages import NO_PICK, Passage, PassagePrompt, check_documents, kept_ids
from .split_prompt import SplitPrompt
from .tiered_memory import TieredMemory


@dataclasses.dataclass(frozen=True)
class PassageRequest:
    """The keywords of a ``generate`` that ask for passages.

    Attributes:
        passages: how many to find for each question, or what :meth:`find_passages` has found.
        answer_begin: the begin of the answer, which the model goes on with.
        tokenizer: the base checkpoint's.
    """

    passages: int | Sequence[Sequence[Passage]]
    answer_begin: str
    tokenizer: Any

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> "PassageRequest | None":
        """From the keywords of ``generate``, without those that are its own; ``None`` where no passages are asked for.

        Raises:
            ValueError: some of them without the others.
        """
        passages, begin = kwargs.pop("passages", None), kwargs.pop("answer_begin", None)
        tokenizer = kwargs.get("tokenizer")
        if passages is None:
            if begin is not None:
                raise ValueError(f"answer_begin: expected passages with it, got {begin!r} alone")
            return None
        if tokenizer is None:
            raise ValueError("passages: expected tokenizer with it, for the texts of config.passage_prompt, got none")
        if begin is not None and not isinstance(begin, str):
            raise TypeError(f"answer_begin: expected a string, got {type(begin).__name__}")
        for name in ("position_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: expected none with passages, which stand in front of input_ids, got some")
        return cls(passages, begin or "", tokenizer)

    def read(
        self,
        model: Any,
        input_ids: Tensor | None,
        mask: Tensor | None,
        context: tuple[Tensor | None, Tensor | None],
        memory: ContextMemory | TieredMemory | None,
        query: tuple[Tensor | None, Tensor | None],
        cached: int,
    ) -> tuple[ContextMemory, SplitPrompt, list[list[Passage]]]:
        """The memory, the prompt whose whole text is the question and whose running text is what the model reads.

        Args:
            model: with a pick.
            input_ids: ``[B, L]`` the questions' own tokens.
            mask: ``[B, L]``, 0 for padding.
            context: ids ``[B or 1, C]`` and mask of the text; not needed by a memory that has kept them.
            memory: of the text; compressed here by default.
            query: ids ``[B, Q]`` and mask of what passages are found for, in place of ``input_ids``.
            cached: tokens of the caller's cache.

        Returns:
            Memory, prompt, and the passages of each row.

        Raises:
            ValueError: inputs that contradict each other, special tokens in a question, or a prompt that the window has
                no room for.
        """
        if model.pick is None:
            raise ValueError(f"passages: expected {NO_PICK}")
        if cached:
            raise ValueError(
                f"passages: expected an empty cache, got one of {counted(cached, 'token')}; what goes on from it reads "
                "the passages that it holds"
            )
        context_ids, context_mask = context
        # of the documents that are read: a memory may hold others
        read = []
        if memory is not None and memory.sources is not None:
            read = [memory.sources[i] for row in memory.memory_index for i in documents_of(row)]
        known = bool(read) and all(source is not None and source.token_ids is not None for source in read)
        if input_ids is None or (context_ids is None and not known):
            name = "input_ids" if input_ids is None else "context_ids"
            what = "the questions"
            if input_ids is not None:
                what = "the text of the passages, or a memory that has kept its token ids (with_sources)"
            raise ValueError(f"passages: expected {name} with it, {what}, got none")
        if context_ids is not None:
            check_ids(model, "context_ids", context_ids, range_too=True)
        asked = check_mask("attention_mask", mask, "input_ids", input_ids)
        questions = [row if asked is None else row[asked[i]] for i, row in enumerate(input_ids)]
        self._check_questions(questions)
        layout = PassagePrompt(model.config, self.tokenizer)
        if memory is None:
            memory = model.compress(context_ids, context_mask, training=False)
        memory, found = self._found(model, input_ids, mask, context, memory, query)
        texts = _texts(model, context, memory, len(questions))
        begin, rows = layout.text(self.answer_begin), []
        for i, (question, passages) in enumerate(zip(questions, found, strict=True)):
            _check_within(passages, texts[i], i)
            rows.append(layout.ids(texts[i], passages, question.tolist(), begin))
            if len(rows[-1]) > model.config.window:
                raise ValueError(
                    f"passages: expected passages and question of at most {counted(model.config.window, 'token')} "
                    f"(config.window), got {len(rows[-1])} by {counted(len(passages), 'passage')} in row {i}"
                )
        longest = max(map(len, rows))
        # padding is masked; any token will do
        running = torch.tensor([row[:1] * (longest - len(row)) + row for row in rows], device=input_ids.device)
        padding = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=input_ids.device)
        prompt = SplitPrompt(input_ids, running.to(input_ids.dtype), padding, mask, inserted=True)
        return memory, prompt, found

    def _found(
        self,
        model: Any,
        input_ids: Tensor,
        mask: Tensor | None,
        context: tuple[Tensor | None, Tensor | None],
        memory: ContextMemory | TieredMemory,
        query: tuple[Tensor | None, Tensor | None],
    ) -> tuple[ContextMemory, list[list[Passage]]]:
        """The memory that is read, of tiers what was picked, and the passages of each row."""
        count = self.passages
        if isinstance(count, int) and not isinstance(count, bool) and count >= 1:
            question, question_mask = (input_ids, mask) if query[0] is None else query
            if query[0] is not None:
                check_ids(model, "query_ids", query[0], range_too=True)
                check_not_empty(query[0])
                if query[0].shape[0] != input_ids.shape[0]:
                    raise ValueError(
                        f"query_ids: expected {counted(input_ids.shape[0], 'row')} as in input_ids, got "
                        f"{query[0].shape[0]}"
                    )
            if isinstance(memory, TieredMemory):
                picked: tuple[ContextMemory, list[list[Passage]]]
                picked = model._read_tiers(memory, question, question_mask, context, passages=count)
                return picked
            result: list[list[Passage]] = model.find_passages(
                question, context[0], context[1], question_mask, memory, count
            )
            return memory, result
        rows = input_ids.shape[0]
        given = isinstance(count, Sequence) and all(
            isinstance(row, Sequence) and all(isinstance(passage, Passage) for passage in row) for row in count
        )
        if not given or isinstance(count, int):
            raise ValueError(
                f"passages: expected an integer of at least 1, or what find_passages returns, got {count!r}"
            )
        if len(count) != rows:
            raise ValueError(
                f"passages: expected those of {counted(rows, 'row')} as in input_ids, got those of {len(count)}"
            )
        if query[0] is not None:
            raise ValueError("query_ids: expected none with passages that have been found, got some")
        if isinstance(memory, TieredMemory):
            read: ContextMemory = model.memory_for(memory, input_ids, mask)
            return read, [list(row) for row in count]
        return memory, [list(row) for row in count]

    def _check_questions(self, questions: Sequence[Tensor]) -> None:
        """Refuse special tokens: padding without a mask, a start token, a chat template, or text that ends the turn."""
        special = set(getattr(self.tokenizer, "all_special_ids", ())) - {getattr(self.tokenizer, "unk_token_id", None)}
        for row, question in enumerate(questions):
            wrong = next((token for token in question.tolist() if token in special), None)
            if wrong is not None:
                raise ValueError(
                    "input_ids: expected a question's own tokens with passages (add_special_tokens=False, "
                    f"split_special_tokens=True, a mask where rows are padded), got the special token "
                    f"{self.tokenizer.decode([wrong])!r} in row {row}"
                )


def _texts(
    model: Any, context: tuple[Tensor | None, Tensor | None], memory: ContextMemory, rows: int
) -> list[list[Tensor]]:
    """The tokens ``[T]`` of each document that a row reads: the context's, or those that the memory has kept."""
    ids, mask = context
    if ids is None:
        own = [documents_of(row) for row in memory.memory_index] * (rows if memory.batch_size == 1 else 1)
        kept = {i: kept_ids(model, memory, i, model.device) for documents in set(own) for i in documents}
        return [[kept[document] for document in documents] for documents in own]
    used = check_mask("context_attention_mask", mask, "context_ids", ids)
    sources = [row if ids.shape[0] > 1 else 0 for row in range(rows)]
    return [[ids[source] if used is None else ids[source][used[source]]] for source in sources]


def _check_within(passages: Sequence[Passage], texts: Sequence[Tensor], row: int) -> None:
    check_documents("passages", passages, len(texts))
    for passage in passages:
        length = texts[passage.document].numel()
        if passage.end > length or passage.start < 0:
            raise ValueError(
                f"passages: expected ones within the {counted(length, 'token')} of row {row}'s text, got one up to "
                f"{passage.end}"
            )
