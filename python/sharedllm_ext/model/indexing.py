"""A model's work with an index: a context compressed for all questions, and the memory that one question chooses."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .chunks import Chunk
from .compression import ContextCompression
from .context_index import ContextIndex, check_depth
from .layer_math import Fp8Products
from .levels import NodeTable, compress_levels, level_bytes
from .lower_model import LowerModel
from .managed_layers import check_whole
from .memory import ContextMemory
from .micro_batches import Work, in_micro_batches, memory_store, products_of, tree_shape
from .passages import CHUNKS
from .signature_fields import describe_difference, has_details
from .stopwatch import Stopwatch
from .tiered_memory import TieredMemory

# The number of chunks, nodes and slots follows from the ids' values.
_NOT_TRACED = "choose the memory first (memory = model.memory_for(index, …)) and give forward the memory"


class ContextIndexing(ContextCompression):
    """Mixin of the model: makes indexes, and memories from them."""

    @torch.compiler.disable(reason=_NOT_TRACED)
    @torch.no_grad()
    def index(
        self: Any,
        context_ids: Tensor,
        context_attention_mask: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ContextIndex:
        """Compress past contexts for all questions: every node that :meth:`compress` could retain for any of them.

        :meth:`memory_for` then gives each question its memory without compressing anything. An index takes about 3.5
        times the bytes of a memory, and ``tree_depth`` times the work of :meth:`compress`.

        Args:
            context_ids: ``[B, C]`` integers, one document a row; rows may be ragged, see the mask.
            context_attention_mask: ``[B, C]``, 0 for padding (on either side); default: no padding.
            progress: called with the context tokens compressed so far, after every micro-batch.

        Returns:
            The index; a document without tokens has no slots.

        Raises:
            ValueError: invalid shapes, dtypes, devices or token ids, a model in training mode, or one whose memory does
                not depend on the question; the message names what was expected.
        """
        _check_traced("index")
        lower = self.lower_model
        check_whole("index", lower.embed_tokens)
        if self.training:
            raise ValueError(
                "index: expected evaluation mode (model.eval()), got training mode, in which weights and splits change "
                "from step to step; compress makes the memories of a step"
            )
        if not self.config.query_aware:
            raise ValueError(
                "index: expected a model with config.query_aware, got one without: the memory that compress gives "
                "serves every question"
            )
        check_depth("index", self.config.tree_depth, self.config.chunk_size)
        watch = Stopwatch(self.device)
        work = self._prepare(context_ids, context_attention_mask, None, None, None)
        signature = functools.partial(self.memory_signature, fingerprint=True)
        index = _index_in_micro_batches(
            lower, work, self.config, self._fp8_products, signature, model_dtype=self.dtype, progress=progress
        )
        watch.lap("compress")
        watch.facts = {"context_tokens": sum(work.lengths), "chunks": len(work.chunks), "slots": index.num_slots}
        self._watch = watch
        return index

    @torch.compiler.disable(reason=_NOT_TRACED)
    @torch.no_grad()
    def memory_for(
        self: Any,
        index: ContextIndex | TieredMemory,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
        *,
        chunks: int | None = None,
    ) -> ContextMemory:
        """The memory that a question chooses: from an index, or of a tiered memory the chunks that answer it best.

        Of an index it is what :meth:`compress` gives for its context and the query.

        Only the query vector is computed; nodes are chosen and their slots copied. Without a query the right children
        are taken, as by :meth:`compress`. The index may be on another device, for example the CPU.

        Of a :class:`TieredMemory` the pick ranks the chunks by their best segments; the best ones are brought to the
        device by a side stream, a few layers at a time, while the host goes on.

        Args:
            index: from :meth:`index` of this model or of one with the same compressor; or a tiered memory.
            query_ids: ``[B, L]`` one query for each document of the index, or any number of them for an index of one
                document, which the memory then holds once for each query.
            query_attention_mask: ``[B, L]``, 0 for padding; a row without any token uses the right children.
            query_embeds: ``[B, L, d]`` embeddings of the query, instead of ``query_ids``.
            chunks: how many chunks of a tiered memory to read; default: 128.

        Returns:
            The memory, on the model's device.

        Raises:
            OSError: a page of the tiered memory cannot be read from the disk.
            TypeError: not a :class:`ContextIndex`.
            ValueError: another model's index, or invalid queries; the message names what was expected.
        """
        _check_traced("memory_for")
        check_whole("memory_for", self.lower_model.embed_tokens)
        if isinstance(index, TieredMemory):
            count = CHUNKS if chunks is None else chunks
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"chunks: expected an integer of at least 1, got {chunks!r}")
            if query_ids is None or query_embeds is not None:
                got = "none" if query_embeds is None else "query_embeds"
                raise ValueError(f"query_ids: expected the questions' tokens for a tiered memory, got {got}")
            picked: ContextMemory
            picked, _ = self._read_tiers(index, query_ids, query_attention_mask, (None, None), chunks=count)
            return picked
        if chunks is not None:
            raise ValueError(f"chunks: expected none for an index, of which all chunks are read, got {chunks!r}")
        self.check_index(index)
        watch = Stopwatch(self.device)
        given = query_ids if query_embeds is None else query_embeds
        rows = index.num_documents
        if rows == 1 and isinstance(given, Tensor) and given.dim():
            rows = max(1, given.shape[0])
        queries = self._rows_with_query(
            query_ids, query_attention_mask, query_embeds, rows, "document of the index (or an index of one document)"
        )
        query = has_query = None
        if queries is not None:
            tables = self._rope_tables(max([1, *queries[1]]), self.device)
            query, has_query = self._query_vectors(queries, tables)
        repeats = rows if index.num_documents == 1 and queries is not None else 1
        found = [
            index.choose(
                query if query is None or repeats == 1 else query[row : row + 1],
                has_query if has_query is None or repeats == 1 else has_query[row : row + 1],
            )
            for row in range(repeats)
        ]
        watch.lap("retrieve")
        memory = index.take(found, self.device)
        watch.lap("compress")
        chunks = sum(memory.num_chunks)
        watch.facts = {"context_tokens": sum(memory.num_tokens), "chunks": chunks, "slots": memory.num_slots}
        self._watch = watch
        return memory

    def check_index(self: Any, index: ContextIndex) -> None:
        """Refuse an index made by another model or tree.

        Raises:
            TypeError: not a :class:`ContextIndex`.
            ValueError: names the first difference.
        """
        if not isinstance(index, ContextIndex):
            raise TypeError(f"index: expected a ContextIndex, got {type(index).__name__}")
        signature = self.memory_signature(details=has_details(index.signature))
        difference = describe_difference(signature, index.signature)
        if difference is not None:
            raise ValueError(f"index: made by another model or another setting of this one; {difference}")


def _check_traced(name: str) -> None:
    if torch.compiler.is_exporting():
        raise ValueError(f"{name}: expected to run outside of torch.export, got a call inside; {_NOT_TRACED}")


def _index_in_micro_batches(
    lower: LowerModel,
    work: Work,
    config: Any,
    fp8: Fp8Products,
    signature: Callable[[], dict[str, Any]],
    *,
    model_dtype: torch.dtype,
    progress: Callable[[int], None] | None,
) -> ContextIndex:
    """Index all chunks, as many at a time as the configuration or free memory says; arguments as for
    :func:`compress_in_micro_batches`."""
    shape = tree_shape(config, training=False)
    table = NodeTable.of(work.chunks, shape)
    store = memory_store(lower, int(table.slots[:, 1].sum()), model_dtype, work.ids.device)
    layers, products = len(lower.layers), products_of(config, lower, fp8)
    # the next slot of each level
    slots = table.slots_of_levels()
    place = [sum(slots[:level]) for level in range(shape.depth)]
    by_level: list[list[Tensor]] = [[] for _ in range(shape.depth - 1)]

    def compress(part: Tensor, batch: Sequence[Chunk]) -> list[Tensor]:
        def write(layer: int, level: int, key: Tensor, value: Tensor) -> None:
            end = place[level] + key.shape[0]
            store[layer][place[level] : end] = key
            store[layers + layer][place[level] : end] = value

        return compress_levels(lower, part, batch, shape, work.tables, products, write)

    needed = level_bytes(lower, shape.depth)
    for batch, vectors in in_micro_batches(work, config, compress, store, token_bytes=needed):
        for level, count in enumerate(NodeTable.of(batch, shape).slots_of_levels()):
            place[level] += count
        for kept, new in zip(by_level, vectors, strict=True):
            kept.append(new)
        if progress is not None:
            progress(batch[-1].start + batch[-1].length)
    found = [vector for kept in by_level for vector in kept]
    width = lower.embed_tokens.weight.shape[-1]
    return ContextIndex(
        keys=store[:layers],
        values=store[layers:],
        vectors=torch.cat(found) if found else torch.empty((0, width), dtype=store[0].dtype, device=work.ids.device),
        num_tokens=work.lengths,
        tail_ids=[ids.tolist() for ids in _tails(work.ids, work.lengths, config.chunk_size)],
        signature=signature(),
    )


def _tails(ids: Tensor, lengths: list[int], chunk_size: int) -> list[Tensor]:
    """The tokens of each document's partial last chunk, of packed documents."""
    ends = itertools.accumulate(lengths)
    return [ids[end - length % chunk_size : end] for end, length in zip(ends, lengths, strict=True)]
