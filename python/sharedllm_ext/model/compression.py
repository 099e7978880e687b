"""A model's work on a context: compressing it, showing which nodes are retained, checking whose a memory is."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from .chunks import cut_into_chunks
from .examined import examined
from .injection import InjectedContext
from .inputs import check_embeds, check_ids, check_mask
from .lower_model import LowerModel, embed_tokens, query_vectors
from .managed_layers import check_whole, refuse_plan
from .memory import ContextMemory
from .micro_batches import Work, compress_in_micro_batches, tree_shape
from .rotary import LayerTables, Rotation, rotations_of
from .signature import Subject, memory_signature
from .signature_fields import describe_difference, has_details
from .stopwatch import Stopwatch
from .tiered_memory import TieredMemory
from .training_mark import is_training_mark
from .tree import choose_nodes

# The number of chunks, nodes and slots follows from the ids' values.
_NOT_TRACED = "compress the context first (memory = model.compress(context_ids, …)) and give forward the memory"


class ContextCompression:
    """Mixin of the model: makes memories and checks them."""

    @property
    def lower_model(self: Any) -> LowerModel:
        """The compressor's modules; the decoder's own while they are tied."""
        source = self.model if self.compressor is None else self.compressor
        layers = list(itertools.islice(source.layers, self.config.injection_layers))
        return LowerModel(source.embed_tokens, layers, source.norm)

    def _check_vocabularies(self: Any) -> None:
        if self.compressor is None:
            return
        expected, got = (getattr(m.embed_tokens, "num_embeddings", None) for m in (self.model, self.compressor))
        if expected != got and expected is not None and got is not None:
            raise ValueError(
                f"compressor: expected an embedding of {expected} tokens as in the decoder, got {got}; "
                "resize_token_embeddings of the whole model changes both"
            )

    # -- compression --------------------------------------------------------------------------------------------------

    @torch.compiler.disable(reason=_NOT_TRACED)
    def compress(
        self: Any,
        context_ids: Tensor,
        context_attention_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] | None = None,
        query_embeds: Tensor | None = None,
        training: bool | None = None,
    ) -> ContextMemory:
        """Compress past contexts into a memory.

        Gradients reach the compressor in training mode only. There the model reads the memory until its weights change:
        one context may serve several questions, whose losses are summed before the backward pass.

        Args:
            context_ids: ``[B, C]`` integers, one document a row; rows may be ragged, see the mask.
            context_attention_mask: ``[B, C]``, 0 for padding (on either side); default: no padding.
            query_ids: ``[B, L]`` the running text whose last token picks the nodes (``config.query_aware``); without it
                the right children are taken, as for language modelling.
            query_attention_mask: ``[B, L]``, 0 for padding; a row without any token uses the right children.
            generator: source of the split noise (training mode, ``config.split_noise > 0``).
            progress: called with the context tokens compressed so far, after every micro-batch.
            query_embeds: ``[B, L, d]`` embeddings of the query, instead of ``query_ids``.
            training: whether it is for training (gradients, split noise, checkpoints); default: the model's mode.

        Returns:
            The memory; a document without tokens has no slots.

        Raises:
            ValueError: invalid shapes, dtypes, devices or token ids; the message names what was expected.
        """
        return self._compress_part(
            context_ids,
            context_attention_mask,
            query_ids,
            query_attention_mask,
            query_embeds,
            generator=generator,
            progress=progress,
            training=training,
        )

    def _compress_part(
        self: Any,
        context_ids: Tensor,
        context_attention_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
        *,
        first_chunks: Sequence[int] | None = None,
        name: str = "compress",
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] | None = None,
        training: bool | None = None,
    ) -> ContextMemory:
        """:meth:`compress` of parts of documents, each a slice of its document's chunks.

        Chunks do not see each other: the parts of a document, put one after the other, are its memory.

        Args:
            context_ids: ``[B, C]``, one part a row, with its mask; a part that its document goes on after ends with a
                full chunk.
            query_ids, query_attention_mask, query_embeds: one row for each part, the query of its document.
            first_chunks: index of each part's first chunk in its document; default: 0.
            name: the caller's, for errors.
            context_attention_mask, generator, progress, training: as for :meth:`compress`.

        Returns:
            A memory whose documents are the parts, counted from each part's own begin; keys are rotated by the chunks'
            indices in the whole documents.
        """
        if torch.compiler.is_exporting():
            raise ValueError(f"{name}: expected to run outside of torch.export, got a call inside; {_NOT_TRACED}")
        lower = self.lower_model
        check_whole(name, lower.embed_tokens)
        watch = Stopwatch(self.device)
        training = self.training if training is None else training
        with torch.set_grad_enabled(training and torch.is_grad_enabled() and _any_trainable(lower)):
            work = self._prepare(
                context_ids, context_attention_mask, query_ids, query_attention_mask, query_embeds, first_chunks
            )
            watch.lap("retrieve")
            # weights in training change with every step, too often for a digest of them
            signature = functools.partial(self.memory_signature, fingerprint=not training)
            checkpointing = training and bool(getattr(self.model, "gradient_checkpointing", False))
            memory = compress_in_micro_batches(
                lower,
                work,
                self.config,
                self._fp8_products,
                signature,
                model_dtype=self.dtype,
                generator=generator,
                watch=watch,
                progress=progress,
                training=training,
                checkpointing=checkpointing,
            )
        watch.lap("compress")
        watch.facts = {"context_tokens": sum(work.lengths), "chunks": len(work.chunks), "slots": memory.num_slots}
        self._watch = watch
        return memory

    @torch.no_grad()
    def retrieve(
        self: Any,
        context_ids: Tensor,
        context_attention_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The nodes that :meth:`compress` retains, to inspect what a query picks; arguments as there.

        Returns:
            For each document: nodes ``[n, tree_depth + 1, 2]`` int64, (first token, length) in the document, in slot
            order (leaf left, leaf right, then from the deepest level to the chunk's child); and the cosine similarities
            of left and right child at each level, ``[n, tree_depth - 1, 2]``, -inf for an empty child, or ``None``
            without a query.
        """
        lower = self.lower_model
        check_whole("retrieve", lower.embed_tokens)
        work = self._prepare(context_ids, context_attention_mask, query_ids, query_attention_mask, query_embeds)
        found: list[tuple[Tensor, Tensor | None]] = []
        for document, count in enumerate(work.counts):
            chunks = [chunk for chunk in work.chunks if chunk.document == document]
            if not chunks:
                found.append((torch.empty((0, self.config.tree_depth + 1, 2), dtype=torch.int64), None))
                continue
            part = work.ids[chunks[0].start : chunks[-1].start + chunks[-1].length]
            embeddings = embed_tokens(lower, part)
            shape = tree_shape(self.config, self.training)
            tree = choose_nodes(lower, embeddings, chunks, shape, work.tables, work.query, work.has_query)
            assert tree.nodes.shape[0] == count
            found.append((tree.nodes, tree.similarity))
        return found

    def _prepare(
        self: Any,
        context_ids: Tensor,
        context_mask: Tensor | None,
        query_ids: Tensor | None,
        query_mask: Tensor | None,
        query_embeds: Tensor | None,
        first_chunks: Sequence[int] | None = None,
    ) -> Work:
        """Check and pack the inputs, cut the chunks, compute tables and query vectors."""
        self._check_vocabularies()
        check_ids(self, "context_ids", context_ids, range_too=True)
        mask = check_mask("context_attention_mask", context_mask, "context_ids", context_ids)
        lengths = [context_ids.shape[1]] * context_ids.shape[0] if mask is None else mask.sum(1).tolist()
        ids = context_ids.flatten() if mask is None else context_ids[mask]
        size = self.config.chunk_size
        counts = [-(-length // size) for length in lengths]
        firsts = [0] * len(lengths) if first_chunks is None else list(first_chunks)
        if len(firsts) != len(lengths) or any(first < 0 for first in firsts):
            raise ValueError(f"first_chunks: expected {counted(len(lengths), 'integer')} of at least 0, got {firsts}")
        indices = (first + count for first, count in zip(firsts, counts, strict=True))
        queries = self._rows_with_query(query_ids, query_mask, query_embeds, len(lengths))
        longest = 0 if queries is None else max(queries[1], default=0)
        tables = self._rope_tables(max([size, longest, *indices]) + size, context_ids.device)
        query, has_query = self._query_vectors(queries, tables)
        return Work(ids, lengths, cut_into_chunks(lengths, size, firsts), counts, tables, query, has_query)

    @property
    def last_timings(self: Any) -> dict[str, float]:
        """Of the latest :meth:`compress`, ``index`` or ``memory_for``: seconds in ``retrieve`` (query vector and choice
        of nodes) and ``compress`` (everything else), and the counts ``context_tokens``, ``chunks`` and ``slots``.
        Empty before the first."""
        return {} if self._watch is None else self._watch.read()

    def _query_vectors(
        self: Any, queries: tuple[Tensor, list[int]] | None, tables: LayerTables
    ) -> tuple[Tensor | None, list[bool] | None]:
        """Query vectors ``[B, d]`` and which rows have one; ``None`` where none has."""
        if queries is None or not any(queries[1]):
            return None, None
        # tied, the compressor's own are what the decoder's were made of, if those are in 8 bits
        layers = (self.lower_model if self.config.tie_compressor else self.model).layers
        upper = LowerModel(self.model.embed_tokens, layers[:1], self.model.norm)
        return query_vectors(upper, queries[0], queries[1], tables), [length > 0 for length in queries[1]]

    def _rows_with_query(
        self: Any,
        query_ids: Tensor | None,
        mask: Tensor | None,
        query_embeds: Tensor | None,
        documents: int,
        of: str = "row of context_ids",
    ) -> tuple[Tensor, list[int]] | None:
        """Packed query tokens (or their embeddings) and how many each document has; ``None`` without a query."""
        if query_ids is not None and query_embeds is not None:
            raise ValueError("query_ids, query_embeds: expected at most one of them, got both")
        query = query_ids if query_embeds is None else query_embeds
        if query is None:
            if mask is not None:
                raise ValueError("query_attention_mask: expected query_ids with it, got none")
            return None
        name = "query_ids" if query_embeds is None else "query_embeds"
        if query_embeds is None:
            check_ids(self, name, query, range_too=True)
        else:
            check_embeds(self, name, query)
        if query.shape[0] != documents:
            raise ValueError(f"{name}: expected {counted(documents, 'row')}, one for each {of}, got {query.shape[0]}")
        used = check_mask("query_attention_mask", mask, name, query)
        if not self.config.query_aware:
            return None
        if used is None:
            return query.flatten(0, 1), [query.shape[1]] * documents
        return query[used], used.sum(1).tolist()

    def _reading_layers(self: Any) -> list[Any]:
        """The layers that read the memory; a slice of the module list would be another module, made anew."""
        return list(itertools.islice(self.model.layers, self.config.injection_layers))

    def _context_of(self: Any, memory: ContextMemory, shape: Sequence[int], device: torch.device) -> InjectedContext:
        """What the injected blocks read for inputs of a shape ``[B, L, ...]``."""
        return InjectedContext.of(
            memory,
            shape[0],
            shape[1],
            device,
            offset=self.config.query_position_offset,
            tables=self._rope_tables,
            layers=self._reading_layers(),
        )

    def _rotations(self: Any, layers: Iterable[Any] | None = None) -> dict[str, Rotation]:
        """The rotations of decoder layers by name; default: those that read the memory."""
        own = self._reading_layers() if layers is None else layers
        return rotations_of(self.model.rotary_emb, own)

    def _rope_tables(self: Any, rows: int, device: torch.device, layers: Iterable[Any] | None = None) -> LayerTables:
        """cos and sin of decoder layers, at least ``rows`` positions; default: of those that read the memory."""
        return self._tables.get(self._rotations(layers), rows, device)

    # -- memories and models ------------------------------------------------------------------------------------------

    def memory_signature(self: Any, *, fingerprint: bool = True, details: bool = True) -> dict[str, Any]:
        """What a memory must share with the model that reads it: sizes, tree, and what the compressor computes.

        Args:
            fingerprint: whether to include a digest of the weights; else, for a memory of a model in training, a mark
                of the present compressor takes its place, valid in this process until it changes.
            details: whether to include more than sizes and weights. That runs the compressor on a few fixed tokens,
                once for as long as nothing in it changes.
        """
        subject = Subject(
            self.lower_model, self._rotations(), self._rope_tables, self.config.chunk_size, self.config.slot_position
        )
        facts = None if torch.compiler.is_compiling() else examined(self).facts
        if fingerprint:
            return memory_signature(self.config, subject, self._fingerprint.of(subject, details=details, facts=facts))
        return memory_signature(self.config, subject, {"weights": self._training_mark.of(subject)})

    def check_memory(self: Any, memory: ContextMemory | TieredMemory, *, tiered: bool = False) -> None:
        """Refuse a memory made by another model or tree, or by this one in training before its weights changed.

        Args:
            memory: to check.
            tiered: whether a :class:`TieredMemory` will do.

        Raises:
            TypeError: not a :class:`ContextMemory`.
            ValueError: names the first difference, or says that the memory was used up by ``append``.
        """
        if isinstance(memory, TieredMemory) and not tiered:
            raise TypeError(
                "memory: expected a ContextMemory, got a TieredMemory; model.memory_for(memory, question_ids) or "
                "memory.select_chunks(…) brings some chunks of it to the device, memory.gather() all of them"
            )
        if not isinstance(memory, (ContextMemory, TieredMemory)):
            raise TypeError(f"memory: expected a ContextMemory, got {type(memory).__name__}")
        refuse_plan("memory", self.model.embed_tokens)
        if memory.version is not None:
            memory.version.check()
        in_training = is_training_mark(memory.signature.get("weights"))
        signature = self.memory_signature(fingerprint=not in_training, details=has_details(memory.signature))
        difference = describe_difference(signature, memory.signature)
        if difference is not None and in_training and difference.startswith("weights: "):
            raise ValueError(
                "memory: expected one made since the weights last changed, got one made in training before a step or "
                "by another model; compress the context again after every step"
            )
        if difference is not None:
            raise ValueError(f"memory: made by another model or another setting of this one; {difference}")


def _any_trainable(lower: LowerModel) -> bool:
    modules = (lower.embed_tokens, lower.norm, *lower.layers)
    return any(
        parameter.requires_grad
        for module in modules
        for name, parameter in module.named_parameters()
        if not name.startswith("injection.")
    )
