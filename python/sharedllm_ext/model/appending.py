"""A memory that grows: more tokens at the end of its documents, at the cost of one chunk."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..counted import counted
from .inputs import check_ids, check_mask, padded_rows
from .memory import ContextMemory
from .memory_fields import Tail
from .memory_tiers import MemoryTiers
from .sources import Source, SourceText
from .storage import Piece, grow
from .tiered_appending import append_to_tiers, offload
from .tiered_memory import TieredMemory
from .training_mark import is_training_mark

AnyMemory = TypeVar("AnyMemory", ContextMemory, TieredMemory)
_NOT_TRACED = "append outside of the graph and give forward the memory"


class ContextAppending:
    """Mixin of the model: appends to memories.

    A method of the model, as :meth:`compress` is: a memory holds what was computed, and no weights to compute more.
    """

    @torch.compiler.disable(reason=_NOT_TRACED)
    @torch.no_grad()
    def append(
        self: Any,
        memory: AnyMemory,
        context_ids: Tensor,
        context_attention_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
        documents: Sequence[int] | None = None,
        sources: Sequence[Source | None] | None = None,
        keep: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> AnyMemory:
        """The memory of longer documents: more tokens at the end of those that the batch rows read.

        Equal to compressing the whole documents anew. Full chunks are not touched; a partial last chunk is compressed
        again from its token ids, which the memory has kept. The cost is that of the new tokens and of one chunk,
        whatever the memory's length: it has spare room, which is doubled when it is used up. (Where a document that is
        not the last one of the memory goes on, the slots of the documents after it move.)

        The result is written into the room of the memory given, where that has any. What the given memory reads is
        never changed without a word: if its last chunk was partial, it is used up, and every use of it, or of a view
        made of it, is an error. So write ``memory = model.append(memory, ids)``, or give ``keep=True``.

        Args:
            memory: one of this model.
            context_ids: ``[B, C]`` the tokens to append, one row for each batch row of the memory, or for ``rows``.
            context_attention_mask: ``[B, C]``, 0 for padding (on either side); rows without tokens are left as they
                are.
            query_ids, query_attention_mask, query_embeds: as for :meth:`compress`; equal to compressing anew where they
                are what the memory was made with.
            rows: batch rows of the memory, one for each row of ``context_ids``. A document that several batch rows read
                may go on by one of them, and does for all. Of a row that reads several documents it is not known which
                one goes on: it is refused.
            documents: documents of the memory, one for each row of ``context_ids``, in place of ``rows``.
            sources: of each row of ``context_ids``, the source of what is appended. Without it, a memory that knows its
                documents' token ids keeps knowing them; characters of later tokens are then not known.
            keep: whether the given memory must stay readable, if need be by copying it.
            progress: called with the tokens compressed so far, those of partial last chunks included.

        Returns:
            The longer memory; the same object if there is nothing to append.

        Raises:
            IndexError: a row or a document is not in the memory.
            ValueError: invalid inputs, or a memory of another model, of a model in training, without the token ids of
                its last chunk, or used up; or rows that read several documents.
        """
        self.check_memory(memory, tiered=True)
        memory.expect_whole()
        if isinstance(memory, ContextMemory) and any(t.requires_grad for t in (*memory.keys, *memory.values)):
            raise ValueError(
                "memory: expected one without gradients, got one of a model in training; compress the whole text again"
            )
        check_ids(self, "context_ids", context_ids, range_too=True)
        used = check_mask("context_attention_mask", context_attention_mask, "context_ids", context_ids)
        for name, query in (("query_ids", query_ids), ("query_embeds", query_embeds)):
            if isinstance(query, Tensor) and query.shape[:1] != context_ids.shape[:1]:
                raise ValueError(
                    f"{name}: expected {counted(context_ids.shape[0], 'row')}, one for each row of context_ids, got "
                    f"shape {tuple(query.shape)}"
                )
        if memory.device != context_ids.device:
            raise ValueError(
                f"memory: expected device {context_ids.device} as context_ids, got {memory.device}; use memory.to(…)"
            )
        lengths = [context_ids.shape[1]] * context_ids.shape[0] if used is None else used.sum(1).tolist()
        source_of = _documents(memory, lengths, rows, documents)
        if not source_of:
            return memory
        size, texts = self.config.chunk_size, []
        known = _known_sources(memory, sources, lengths)
        for document, row in source_of.items():
            new = context_ids[row] if used is None else context_ids[row][used[row]]
            if known is not None:
                known[document] = _extended(
                    known[document], None if sources is None else sources[row], new, memory.num_tokens[document]
                )
            texts.append(torch.cat((tail_of(memory, document, size).token_ids.to(new), new)))
        own = list(source_of.values())
        queries = [None if given is None else given[own] for given in (query_ids, query_attention_mask, query_embeds)]
        if isinstance(memory, TieredMemory):
            named = dict(zip(source_of, texts, strict=True))
            return append_to_tiers(self, memory, named, queries, known, keep=keep, progress=progress)
        ids, mask = padded_rows(texts)
        part = self._compress_part(
            ids,
            mask,
            *queries,
            first_chunks=[memory.num_tokens[document] // size for document in source_of],
            name="append",
            progress=progress,
            training=False,
        )
        joined = _joined(memory, part, list(source_of), size, keep=keep)
        return joined if known is None else dataclasses.replace(joined, sources=known)

    @torch.compiler.disable(reason=_NOT_TRACED)
    @torch.no_grad()
    def offload(self: Any, memory: ContextMemory, tiers: MemoryTiers) -> TieredMemory:
        """The memory in tiers: on the device, in main memory and on disk, whichever have room for it.

        What is given stays as it is. To stream a text into tiers, begin with an empty memory and append:
        ``model.append(model.offload(model.compress(ids[:, :0]), tiers), ids)``. Of a model with a pick the keys of its
        layers stay on the device.

        Args:
            memory: one of this model, on any device.
            tiers: where it will lie.

        Raises:
            MemoryError: the tiers have no room, and no folder for the disk.
            OSError: the disk has no room.
            TypeError: not a :class:`ContextMemory`.
            ValueError: a memory of another model, of a model in training, with gradients, or of chunks whose slots
                depend on the question; or tiers of another device.
        """
        self.check_memory(memory)
        memory.expect_whole()
        if is_training_mark(memory.signature.get("weights")):
            raise ValueError("memory: expected one of a model in evaluation mode, got one made in training")
        if tiers.device != self.device:
            raise ValueError(f"tiers: expected device {self.device} as the model, got {tiers.device}")
        return offload(self, memory, tiers)


def _documents(
    memory: ContextMemory | TieredMemory,
    lengths: list[int],
    rows: Sequence[int] | None,
    documents: Sequence[int] | None,
) -> dict[int, int]:
    """The documents that go on, in their order, and the row of ``context_ids`` that has the tokens of each."""
    if documents is not None:
        return _named_documents(memory, lengths, rows, documents)
    if rows is None and len(lengths) != memory.batch_size:
        raise ValueError(
            f"context_ids: expected {counted(memory.batch_size, 'row')} as in the memory, or rows=[…] that names "
            f"theirs, got {len(lengths)}"
        )
    named = range(memory.batch_size) if rows is None else rows
    if len(named) != len(lengths):
        raise ValueError(
            f"rows: expected {counted(len(lengths), 'batch row')}, one for each row of context_ids, got {len(named)}"
        )
    found: dict[int, int] = {}
    for source, (row, length) in enumerate(zip(named, lengths, strict=True)):
        if not 0 <= row < memory.batch_size:
            raise IndexError(f"rows: expected batch rows 0 to {memory.batch_size - 1}, got {row}")
        if not length:
            continue
        own = memory.memory_index[row]
        if isinstance(own, tuple):
            raise ValueError(
                f"rows: expected batch rows that read one document each, got row {row}, which reads documents "
                f"{list(own)}; documents=[…] names the one that goes on"
            )
        document = own
        if document in found:
            raise ValueError(
                f"rows: expected batch rows of different documents, got rows {named[found[document]]} and {row}, which "
                f"both read document {document}"
            )
        found[document] = source
    return dict(sorted(found.items()))


def _named_documents(
    memory: ContextMemory | TieredMemory, lengths: list[int], rows: Sequence[int] | None, documents: Sequence[int]
) -> dict[int, int]:
    if rows is not None:
        raise ValueError("rows, documents: expected at most one of them, got both")
    if len(documents) != len(lengths):
        raise ValueError(f"documents: expected {len(lengths)}, one for each row of context_ids, got {len(documents)}")
    for document in documents:
        if not 0 <= document < memory.num_documents:
            raise IndexError(f"documents: expected 0 to {memory.num_documents - 1}, got {document}")
    if len(set(documents)) != len(documents):
        raise ValueError(f"documents: expected different ones, got {list(documents)}")
    return {document: row for document, row in sorted(zip(documents, range(len(lengths)), strict=True)) if lengths[row]}


def _known_sources(
    memory: ContextMemory | TieredMemory, sources: Sequence[Source | None] | None, lengths: list[int]
) -> list[Source | None] | None:
    """The sources of the memory's documents so far, after a check of those of what is appended."""
    if sources is not None and len(sources) != len(lengths):
        raise ValueError(f"sources: expected {len(lengths)}, one for each row of context_ids, got {len(sources)}")
    for row, (source, length) in enumerate(zip(sources or (), lengths, strict=bool(sources))):
        if source is not None:
            source.check(f"sources[{row}]", length)
    if memory.sources is None and sources is None:
        return None
    return [None] * memory.num_documents if memory.sources is None else list(memory.sources)


def _extended(before: Source | None, more: Source | None, tokens: Tensor, so_far: int) -> Source | None:
    """The source of a document of ``so_far`` tokens that goes on."""
    if before is None and (more is None or so_far):
        return None if more is None else Source((SourceText(so_far), *more.texts), more.name, more.tokenizer)
    return more if before is None else before.extended(more, tokens)


def tail_of(memory: ContextMemory | TieredMemory, document: int, chunk_size: int) -> Tail:
    """A document's partial last chunk.

    Raises:
        ValueError: its token ids are not known, so the document cannot go on.
    """
    rest = memory.num_tokens[document] % chunk_size
    if not rest:
        return Tail(torch.empty(0, dtype=torch.int32), 0)
    tail = None if memory.tails is None else memory.tails[document]
    if tail is None:
        raise ValueError(
            f"memory: expected the token ids of the last {counted(rest, 'token')} of document {document} (tails), got "
            "none; compress the whole text again"
        )
    return tail


def _joined(
    memory: ContextMemory, part: ContextMemory, documents: list[int], chunk_size: int, *, keep: bool
) -> ContextMemory:
    """A memory whose documents go on with those of ``part``, each from its last full chunk on."""
    num_tokens, num_chunks = list(memory.num_tokens), list(memory.num_chunks)
    tails: list[Tail | None] = [None] * memory.num_documents if memory.tails is None else list(memory.tails)
    pieces: list[Piece] = []
    cu_slots, begin = [0], 0
    for document, (first, end) in enumerate(itertools.pairwise(memory.cu_slots)):
        slots = end - first
        if document in documents:
            place = documents.index(document)
            kept = end - tail_of(memory, document, chunk_size).slots
            pieces += [(0, begin, kept), (1, part.cu_slots[place], part.cu_slots[place + 1])]
            begin = end
            slots = kept - first + part.cu_slots[place + 1] - part.cu_slots[place]
            full, rest = divmod(num_tokens[document], chunk_size)
            num_tokens[document] += part.num_tokens[place] - rest
            num_chunks[document] = full + part.num_chunks[place]
            tails[document] = None if part.tails is None else part.tails[place]
        cu_slots.append(cu_slots[-1] + slots)
    pieces.append((0, begin, memory.num_slots))
    version, total = grow((*memory.keys, *memory.values), (*part.keys, *part.values), pieces, memory.version, keep=keep)
    keys, values = version.storage.views(total)
    return ContextMemory(
        keys=keys,
        values=values,
        cu_slots=cu_slots,
        num_chunks=num_chunks,
        num_tokens=num_tokens,
        memory_index=list(memory.memory_index),
        signature=memory.signature,
        tails=tails,
        version=version,
    )
