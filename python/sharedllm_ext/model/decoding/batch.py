"""Continuous batching: questions join and leave while the others go on, and one step decodes a token of each."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...counted import counted
from ..cache_name import CACHE_NAME
from ..inputs import end_ids
from ..memory import ContextMemory
from ..memory_file import shorten
from ..upload import upload
from . import support
from .cache import PreallocatedCache
from .groups import MemoryGroups, Read, room_of
from .layers import weights_of
from .rows_step import RowsStep, to_host
from .step import state_of_step
from .support import MAX_BATCH, obstacle_in_call, obstacle_in_model

#: Rows of a step: the live ones are rounded up to one of these, each with a graph of its own.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Graphs that are kept, of numbers of rows and of memories.
KEPT_GRAPHS = 16
Choice = Callable[[Tensor, "list[Question]"], Tensor]


class Question:
    """A question of a :class:`ContinuousBatch`.

    Attributes:
        tokens: what was generated so far.
        finished: ``None`` while it is live; ``"end"`` after an end token, ``"length"`` after ``max_new_tokens``,
            ``"removed"`` after :meth:`ContinuousBatch.remove`.
        max_new_tokens: most tokens of the answer.
        ends: the end tokens.
    """

    def __init__(self, max_new_tokens: int, ends: frozenset[int], memory: ContextMemory | None) -> None:
        self.tokens: list[int] = []
        self.finished: str | None = None
        self.max_new_tokens, self.ends = max_new_tokens, ends
        # of one row
        self._memory = memory
        self._reads: tuple[Read, ...] = ()
        self._row = -1
        # keys and values in its row
        self._length = 0
        # of the next token, before its first step
        self._logits: Tensor | None = None


class ContinuousBatch:
    """Answers many questions at once: they join and leave at any time, and each step gives every live one a token.

    A step reads the weights once for all questions, and a memory once for all that read it. On CUDA it is one graph for
    each number of rows (rounded up to 1, 2, 4, …), which is captured again when a question brings another memory.

    The model is examined when a question joins, as it is then. One thread and one CUDA stream may use a batch.

    Args:
        model: a model whose decoding steps run by their own operators, see :func:`~sharedllm_ext.decoding_obstacle`.
        rows: most live questions, at most 256.
        tokens: most tokens of a question and its answer; ``rows * tokens`` are the size of the cache.
        choose: ``(logits [n, vocabulary], questions)`` to the next token of each, ``[n]``; default: the likeliest.

    Raises:
        ValueError: ``rows`` or ``tokens`` out of range.
    """

    def __init__(self, model: Any, *, rows: int = 64, tokens: int = 512, choose: Choice | None = None) -> None:
        if not 1 <= rows <= MAX_BATCH:
            raise ValueError(f"rows: expected 1 to {MAX_BATCH}, got {rows}")
        if tokens < 2:
            raise ValueError(f"tokens: expected at least 2, for a question and an answer, got {tokens}")
        self.model, self.rows, self.tokens = model, rows, tokens
        self._choose = choose or _likeliest
        self._live: list[Question] = []
        self._storages: list[tuple[Tensor, Tensor]] = []
        # tokens, lengths, padding, and which rows are live
        self._buffers: list[Tensor] = []
        self._scratch: PreallocatedCache | None = None
        self._memories: list[ContextMemory] = []
        self._state: tuple[Any, ...] = ()
        self._steps: collections.OrderedDict[tuple[Any, ...], RowsStep] = collections.OrderedDict()
        self._held: list[Tensor] = []
        self._watched: list[Tensor] = []
        self._order: tuple[list[int], Tensor] | None = None
        # whether the device does not know yet which rows are live
        self._moved = True
        # logits of a step, the questions that it was of, their rows, and what the parameters were
        self._pending: tuple[Tensor, list[Question], list[int], int] | None = None

    @property
    def live(self) -> list[Question]:
        """Questions that get a token in the next step, in the order in which they joined."""
        return list(self._live)

    @property
    def free(self) -> int:
        """How many questions may join now."""
        return self.rows - len(self._live)

    def add(
        self,
        text: Tensor | Sequence[int],
        memory: ContextMemory | None = None,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Question:
        """Read a question, which joins the batch.

        Args:
            text: ``[L]`` or ``[1, L]`` token ids.
            memory: of one row, or ``None``.
            max_new_tokens: of the answer; default: what ``tokens`` leaves room for.
            eos_token_id: the tokens that end the answer; default: those of the model's generation configuration, ``[]``
                for none.

        Returns:
            Its handle, for :meth:`step` and :meth:`remove`.

        Raises:
            ValueError: no row is free, the text has no room, or the model cannot decode by steps.
        """
        ids = _ids_of(text)
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id}
        return self.add_all([ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids], memory, **settings)[0]

    @torch.no_grad()
    def add_all(
        self,
        texts: Sequence[Tensor | Sequence[int]],
        memory: ContextMemory | None = None,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> list[Question]:
        """Read several questions in one forward pass; arguments as for :meth:`add`.

        Args:
            texts: token ids ``[L]`` of each, which may be of different lengths.
            memory: of as many rows, or of one for all.
            max_new_tokens, eos_token_id: of each.
        """
        ids = [_ids_of(text) for text in texts]
        if not ids:
            return []
        lengths = self._check(ids, memory, max_new_tokens)
        width, device = max(lengths), self.model.device
        padded, mask = torch.zeros(len(ids), width, dtype=torch.int64), torch.zeros(len(ids), width, dtype=torch.int64)
        for row, (text, length) in enumerate(zip(ids, lengths, strict=True)):
            padded[row, width - length :], mask[row, width - length :] = text, 1
        inputs: dict[str, Any] = {"input_ids": upload(padded, device)}
        if min(lengths) < width:
            inputs["attention_mask"] = upload(mask, device)
            inputs["position_ids"] = upload((mask.cumsum(1) - 1).clamp(min=0), device)
        cache = self._empty_cache(len(ids))
        inputs[CACHE_NAME] = cache
        logits = self.model(**inputs, memory=memory, use_cache=True, logits_to_keep=1, split_window=False).logits[:, -1]
        self._make_room(cache)
        ends = _ends(self.model, eos_token_id)
        rows = self._free_rows(len(ids))
        questions = []
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            own = None if memory is None else memory.select([index if memory.batch_size > 1 else 0])
            question = Question(max_new_tokens or self.tokens - length, ends, own)
            question._row, question._length, question._logits = row, length, logits[index]
            questions.append(question)
        self._store(cache, questions)
        self._live += questions
        self._moved = True
        self._look_up()
        return questions

    @torch.no_grad()
    def step(self) -> dict[Question, int]:
        """Decode a token of every live question; those that it ends are not live any more.

        Returns:
            The token of each, in the order in which they joined; empty if none is live.
        """
        if not self._live:
            return {}
        if self._pending is not None and self._pending[3] != self._version():
            # it has read what has changed since; its tokens are still there
            for question in self._pending[1]:
                question._length -= 1
            self._pending, self._moved = None, True
        if self._pending is None:
            self._launch()
        questions = self._live
        chosen = self._choose(self._next_logits(), list(questions))
        if chosen.shape != (len(questions),):
            raise ValueError(f"choose: expected tokens of shape ({len(questions)},), got {tuple(chosen.shape)}")
        chosen = chosen.to(self._buffers[0])
        self._buffers[0].index_copy_(0, self._index([question._row for question in questions]), chosen)
        copied = to_host(chosen)
        for question in questions:
            question._logits = None
        self._pending = None
        # those that end for their length are known before their token is
        last = [question for question in questions if len(question.tokens) + 1 >= question.max_new_tokens]
        for question in last:
            question.finished = "length"
        self._keep_live()
        if (chosen.is_cuda or support.RUN_ON_CPU) and self._live:
            # while the host looks at this step's tokens the device goes on
            self._launch()
        tokens = copied()
        for question, token in zip(questions, tokens, strict=True):
            question.tokens.append(token)
            if token in question.ends:
                question.finished = "end"
        self._keep_live()
        return dict(zip(questions, tokens, strict=True))

    def remove(self, question: Question) -> None:
        """End a question before its time.

        Raises:
            ValueError: it is not live in this batch.
        """
        if question not in self._live:
            raise ValueError(f"question: expected a live one of this batch, got one that is {question.finished}")
        question.finished = "removed"
        self._keep_live()

    def answer(
        self,
        texts: Sequence[Tensor | Sequence[int]],
        memory: ContextMemory | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """The answers of any number of questions, which wait for a free row; arguments as for :meth:`add_all`.

        Other questions of the batch go on meanwhile.
        """
        asked: list[Question] = []
        try:
            while len(asked) < len(texts) or any(question.finished is None for question in asked):
                some = range(len(asked), min(len(asked) + self.free, len(texts)))
                own = memory if memory is None or memory.batch_size == 1 else memory.select(some)
                asked += self.add_all([texts[index] for index in some], own, **settings)
                self.step()
        finally:
            for question in asked:
                if question.finished is None:
                    self.remove(question)
        return [question.tokens for question in asked]

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _check(self, ids: list[Tensor], memory: ContextMemory | None, new: int | None) -> list[int]:
        """Lengths of texts that fit, into a model that takes steps."""
        if len(ids) > self.free:
            most = f"at most {self.free} (the free rows of {self.rows})"
            most = most if self.free else "none while all rows are taken: step until a question ends, or remove one"
            raise ValueError(f"texts: expected {most}; got {len(ids)}")
        if memory is not None and memory.batch_size not in (1, len(ids)):
            rows = "1 row" if len(ids) == 1 else f"1 or {counted(len(ids), 'row')}, one for each text"
            raise ValueError(f"memory: expected {rows}, got {memory.batch_size}")
        if new is not None and new < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {new}")
        for text in ids:
            if text.dim() != 1 or not len(text) or text.is_floating_point():
                raise ValueError(f"text: expected token ids of shape [tokens], got {text.dtype} {tuple(text.shape)}")
            if len(text) + (new or 1) > self.tokens:
                most, more = counted(self.tokens, "token"), new or 1
                raise ValueError(f"text: expected at most {most} with its answer, got {len(text)} and {more} more")
        obstacle = obstacle_in_model(self.model) or obstacle_in_call(self.model, self.rows, memory, None)
        if obstacle is not None:
            raise ValueError(f"model: expected one that decodes by steps; {obstacle}")
        return [len(text) for text in ids]

    def _empty_cache(self, rows: int) -> PreallocatedCache:
        """A cache that a text of so many rows is read into, before it is copied to their places."""
        cache = self._scratch
        storage = None if cache is None else cache.layers[0]._key_storage
        if cache is None or storage is None or storage.shape[0] != rows:
            cache = self._scratch = PreallocatedCache(self.model.config.text_config, limit=self.tokens)
        elif cache.get_seq_length():
            cache.crop(-cache.get_seq_length())
        return cache

    @torch.inference_mode(False)
    def _make_room(self, cache: PreallocatedCache) -> None:
        """The storage of all rows, like that of a cache."""
        if self._storages:
            return
        device = self.model.device
        for layer in cache.layers:
            keys, values = layer.storage
            self._storages.append(
                (
                    keys.new_zeros((self.rows, self.tokens, *keys.shape[2:])),
                    values.new_zeros((self.rows, self.tokens, *values.shape[2:])),
                )
            )
        self._buffers = [torch.zeros(self.rows, dtype=torch.int64, device=device) for _ in range(4)]

    def _free_rows(self, count: int) -> list[int]:
        taken = {question._row for question in self._live}
        return [row for row in range(self.rows) if row not in taken][:count]

    def _store(self, cache: PreallocatedCache, questions: list[Question]) -> None:
        targets, sources = [], []
        for layer, storage in zip(cache.layers, self._storages, strict=True):
            for target, source in zip(storage, layer.storage, strict=True):
                for index, question in enumerate(questions):
                    length = question._length
                    end = cache.get_seq_length()
                    targets.append(target[question._row, :length])
                    sources.append(source[index, end - length : end])
        torch._foreach_copy_(targets, sources)

    def _keep_live(self) -> None:
        still = [question for question in self._live if question.finished is None]
        self._moved = self._moved or len(still) < len(self._live)
        self._live = still

    def _gather_rows(self) -> int:
        """Rows of the next step, with the live ones moved to the front if that makes them fewer."""
        needed = _rounded(len(self._live), self.rows)
        taken = {question._row: question for question in self._live}
        if _rounded(max(taken) + 1, self.rows) > needed:
            free = iter([row for row in range(needed) if row not in taken])
            for row in sorted(row for row in taken if row >= needed):
                question, to = taken[row], next(free)
                for keys, values in self._storages:
                    for storage in (keys, values):
                        storage[to, : question._length] = storage[row, : question._length]
                self._buffers[0][to] = self._buffers[0][row]
                question._row, self._moved = to, True
        return needed

    # -- steps --------------------------------------------------------------------------------------------------------

    def _version(self) -> int:
        return sum(tensor._version for tensor in self._watched)

    def _look_up(self) -> None:
        """What the live questions read of model and memories, after one has joined."""
        state = state_of_step(self.model, None)
        if state != self._state:
            self._steps.clear()
        self._state = state
        read = {id(question._memory): question._memory for question in self._live if question._memory is not None}
        known = [_address(memory) for memory in self._memories]
        if any(_address(memory) not in known for memory in read.values()):
            # memories of questions that have left stay until another one comes
            self._memories = list({_address(memory): memory for memory in read.values()}.values())
            known = [_address(memory) for memory in self._memories]
            for key in [key for key in self._steps if not set(key[2]) <= set(known)]:
                del self._steps[key]
        offset = self.model.config.query_position_offset
        for question in self._live:
            memory = question._memory
            if memory is not None:
                source, (spans,) = known.index(_address(memory)), memory.spans(offset)
                question._reads = tuple(Read(source, *span) for span in spans)
        tensors = [*weights_of(self.model), *(x for m in self._memories for x in (*m.keys, *m.values))]
        # graphs read them where they are
        self._held = [tensor.detach() for tensor in tensors]
        self._watched = [tensor for tensor in self._held if not tensor.is_inference()]

    def _launch(self) -> None:
        """Start a step of the questions that have a token to be read."""
        fed = [question for question in self._live if question._logits is None]
        if not fed:
            return
        for memory in self._memories:
            if memory.version is not None:
                memory.version.check()
        rows = self._gather_rows()
        step = self._step_of(rows)
        if self._moved:
            self._tell(step, rows, fed)
        logits = step.run()
        # those that have just joined are live from the next step on
        self._moved = len(fed) < len(self._live)
        for question in fed:
            question._length += 1
        self._pending = (logits, fed, [question._row for question in fed], self._version())

    def _tell(self, step: "RowsStep", rows: int, fed: list[Question]) -> None:
        lengths, live = [0] * self.rows, [0] * self.rows
        for question in self._live:
            # those that have just joined are not written over
            lengths[question._row] = question._length
        for question in fed:
            live[question._row] = 1
        device = self._buffers[0].device
        for buffer, values in ((self._buffers[1], lengths), (self._buffers[3], live)):
            buffer.copy_(upload(torch.tensor(values), device))
        if step.groups is not None:
            reads: list[tuple[Read, ...]] = [()] * rows
            for question in fed:
                reads[question._row] = question._reads
            step.groups.put(reads)

    def _next_logits(self) -> Tensor:
        """Logits ``[n, vocabulary]`` of the live questions' next tokens."""
        fresh = [question._logits for question in self._live if question._logits is not None]
        if self._pending is None:
            return torch.stack(fresh)
        logits, questions, rows, _ = self._pending
        at = dict(zip(questions, rows, strict=True))
        kept = [at[question] for question in self._live if question._logits is None]
        in_front = kept == list(range(len(kept)))
        logits = logits[: len(kept)] if in_front else logits.index_select(0, self._index(kept))
        # those that have joined come last
        return torch.cat((logits, torch.stack(fresh))) if fresh else logits

    def _index(self, rows: list[int]) -> Tensor:
        """Rows as a tensor, kept for the next step."""
        if self._order is None or self._order[0] != rows:
            self._order = rows, upload(torch.tensor(rows), self._buffers[0].device)
        return self._order[1]

    def _step_of(self, rows: int) -> "RowsStep":
        memories, groups = self._memories, room_of([q._reads for q in self._live], len(self._memories))
        if groups is None:
            memories = []
        elif isinstance(groups, Read):
            memories, groups = [memories[groups.source]], groups._replace(source=0)
        key = (rows, groups, tuple(map(_address, memories)))
        step = self._steps.get(key)
        # another graph knows nothing of the rows
        self._moved = self._moved or step is None or next(reversed(self._steps)) != key
        if step is None:
            step = self._new_step(rows, memories, groups)
        self._steps[key] = step
        self._steps.move_to_end(key)
        while len(self._steps) > KEPT_GRAPHS:
            self._steps.popitem(last=False)
        return step

    @torch.inference_mode(False)
    @torch.no_grad()
    def _new_step(self, rows: int, memories: list[ContextMemory], groups: Any) -> "RowsStep":
        model, device = self.model, self.model.device
        layers = list(model.model.layers)
        found = model._rope_tables(self.tokens, device, layers)
        context = None
        if memories:
            # of a row that reads all documents
            most = max(sum(memory.num_chunks) for memory in memories) + model.config.query_position_offset
            reading = layers[: model.config.injection_layers]
            tables = model._rope_tables(max(most, 0) + 1, device, reading)
            sources = [(memory.keys, memory.values) for memory in memories]
            context = MemoryGroups(sources, rows, groups, [tables.of(layer) for layer in reading], device)
        shapes = tuple((memory.keys[0].shape, memory.keys[0].stride()) for memory in memories)
        return RowsStep(
            model,
            [(keys[:rows], values[:rows]) for keys, values in self._storages],
            [buffer[:rows] for buffer in self._buffers],
            groups=context,
            tables=[found.of(layer) for layer in layers],
            kernels=("rows", rows, groups, shapes, self._state, self._storages[0][0].shape),
        )


def _ids_of(text: Any) -> Tensor:
    if isinstance(text, Sequence) and not len(text):
        # torch takes it for a tensor of floating point
        return torch.zeros(0, dtype=torch.int64)
    try:
        return torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"text: expected token ids of shape [tokens], got {shorten(text)}; a tokenizer makes them of text"
        ) from None


def _rounded(count: int, most: int) -> int:
    return min(next(rows for rows in ROWS if rows >= count), most)


def _address(memory: ContextMemory) -> tuple[Any, ...]:
    """Where a memory's tensors lie."""
    return tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in (*memory.keys, *memory.values))


def _likeliest(logits: Tensor, questions: list[Question]) -> Tensor:
    return logits.float().argmax(-1)


def _ends(model: Any, given: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset(end_ids(model.generation_config.eos_token_id if given is None else given))
