"""A memory in tiers: its pages lie on the device, in main memory or on disk, and a question reads some chunks."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from .memory import ContextMemory
from .memory_fields import (
    FIELDS,
    KINDS,
    Tail,
    check_fields,
    describe_documents,
    describe_origin,
    file_version,
    integer_shapes,
    open_memory,
    restore_origin,
    shape_of,
)
from .memory_file import MEMORY, bytes_of, tensor_names
from .memory_rows import Row, beside, documents_of, expect_document, rows_of
from .memory_tiers import MemoryTiers
from .memory_writer import TensorInParts, shards_of, write_tensors
from .page_files import FilePlace, OpenFile
from .pages import Page, PageForm
from .pick_index import PickIndex
from .picked_memory import PickedMemory
from .signature_fields import describe_difference
from .sources import Source
from .tiered_document import TieredDocument, chunk_slots, document_of


@dataclasses.dataclass(eq=False)
class TieredMemory:
    """The memory of one or more documents, in pages that :class:`MemoryTiers` holds.

    Made by ``model.offload`` of a :class:`ContextMemory`, or by :meth:`load`; ``model.append`` makes it longer. A
    question reads some chunks of it, which ``model.memory_for`` picks and brings to the device.

    Pages never change, and memories share them: selections and concatenations copy nothing.

    Attributes:
        documents: what is held of each.
        memory_index: the document that each batch row reads, or a tuple of several.
        signature: see :class:`ContextMemory`.
        form: sizes of the pages.
        chunk_slots: slots of a full chunk in one layer.
        tiers: where the pages are.
    """

    documents: list[TieredDocument]
    memory_index: list[Row]
    signature: dict[str, Any]
    form: PageForm
    chunk_slots: int
    tiers: MemoryTiers

    #: As of a :class:`ContextMemory` that does not lie in a storage.
    version = None
    processes = 1

    def __reduce__(self) -> Any:
        raise TypeError(
            "memory: expected a TieredMemory to stay in its tiers, got a pickle or a copy; use save and load"
        )

    @property
    def num_documents(self) -> int:
        """Documents held."""
        return len(self.documents)

    @property
    def batch_size(self) -> int:
        """Batch rows that read the memory."""
        return len(self.memory_index)

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each document."""
        return [document.num_tokens for document in self.documents]

    @property
    def num_chunks(self) -> list[int]:
        """Chunks of each document."""
        return [-(-tokens // self.signature["chunk_size"]) for tokens in self.num_tokens]

    @property
    def cu_slots(self) -> list[int]:
        """Cumulative slots by document, ``documents + 1`` integers."""
        return [0, *itertools.accumulate(document.num_slots for document in self.documents)]

    @property
    def num_slots(self) -> int:
        """Slots of one layer, over all documents."""
        return self.cu_slots[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, each counted once."""
        return self.num_slots * self.form.slot_bytes

    @property
    def tails(self) -> list[Tail | None]:
        """The partial last chunk of each document."""
        return [document.tail for document in self.documents]

    @property
    def sources(self) -> list[Source | None]:
        """Where each document comes from."""
        return [document.source for document in self.documents]

    @property
    def device(self) -> torch.device:
        """Where questions read it."""
        return self.tiers.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys and values."""
        return self.form.dtype

    @property
    def page_slots(self) -> int:
        """Slots of a full page: whole chunks."""
        return self.chunk_slots * -(-self.tiers.page_bytes // max(1, self.chunk_slots * self.form.slot_bytes))

    def expect_whole(self) -> None:
        """It has all chunks."""

    # -- rows and documents -------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> "TieredMemory":
        """The given batch rows, in that order.

        Raises:
            IndexError: a row is not in ``0 .. batch_size-1``.
        """
        for row in rows:
            if not 0 <= row < self.batch_size:
                raise IndexError(f"rows: expected batch rows 0 to {self.batch_size - 1}, got {row}")
        return dataclasses.replace(self, memory_index=[self.memory_index[row] for row in rows])

    def expand(self, repeats: int) -> "TieredMemory":
        """Every batch row ``repeats`` times in a row."""
        return self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def with_rows(self, documents: Sequence[int | Sequence[int]]) -> "TieredMemory":
        """The same documents, read by other batch rows, as :meth:`ContextMemory.with_rows`; nothing is copied.

        Raises:
            IndexError: a document is not in ``0 .. num_documents-1``.
            TypeError: something that is no document and no list of documents.
            ValueError: no row, a row without documents, or one that names a document twice.
        """
        return dataclasses.replace(self, memory_index=rows_of(documents, self.num_documents))

    def select_documents(self, documents: Sequence[int]) -> "TieredMemory":
        """Some documents, in that order, each read by a row of its own; nothing is copied.

        Raises:
            IndexError: a document is not in ``0 .. num_documents-1``.
            TypeError: a list of documents in place of one.
        """
        for document in documents:
            expect_document(document)
            if not 0 <= document < self.num_documents:
                raise IndexError(f"documents: expected 0 to {self.num_documents - 1}, got {document}")
        chosen = [self.documents[document] for document in documents]
        return dataclasses.replace(self, documents=chosen, memory_index=list(range(len(chosen))))

    @classmethod
    def concat(cls, memories: Sequence["TieredMemory"]) -> "TieredMemory":
        """The documents of several memories of the same tiers beside each other, and their rows one after the other.

        Nothing is copied.

        Raises:
            ValueError: there is none, or they differ in model, tree, dtype or tiers.
        """
        if not memories:
            raise ValueError("memories: expected at least one, got none")
        first = memories[0]
        begins = itertools.accumulate((memory.num_documents for memory in memories), initial=0)
        rows: list[Row] = []
        for index, (other, begin) in enumerate(zip(memories, begins, strict=False)):
            difference = describe_difference(first.signature, other.signature)
            if difference is not None:
                raise ValueError(f"memories[{index}]: expected one of the same model as the first; {difference}")
            if other.tiers is not first.tiers or other.form != first.form:
                what = "dtype" if other.tiers is first.tiers else "tiers"
                raise ValueError(f"memories[{index}]: expected the {what} of the first, got others")
            rows += beside(other.memory_index, begin)
        documents = [document for memory in memories for document in memory.documents]
        return dataclasses.replace(first, documents=documents, memory_index=rows)

    # -- reading ------------------------------------------------------------------------------------------------------

    def select_chunks(self, chunks: Sequence[Sequence[int]]) -> PickedMemory:
        """Some chunks of what each batch row reads, on the device.

        On CUDA they are brought by a side stream while the host goes on; what takes a layer of the result waits for it
        on the device. Rows that read the same chunks of a document share them.

        Args:
            chunks: of each row, in any order; the result has them in the document's. Of a row that reads several
                documents, chunks are counted over all of them.

        Returns:
            A memory for ``forward`` and ``generate``.

        Raises:
            IndexError: a chunk is not in what its row reads.
            OSError: a page cannot be read from the disk.
            ValueError: not one list for each row.
        """
        if len(chunks) != self.batch_size:
            raise ValueError(
                f"chunks: expected {counted(self.batch_size, 'list')}, one for each batch row, got {len(chunks)}"
            )
        groups: dict[tuple[int, tuple[int, ...]], int] = {}
        rows: list[Row] = []
        for row, (read, chosen) in enumerate(zip(self.memory_index, chunks, strict=True)):
            own = [groups.setdefault(part, len(groups)) for part in self._chunks_of(row, documents_of(read), chosen)]
            rows.append(tuple(own) if len(own) > 1 else own[0])
        keys, values, cu_slots = self._gathered([self._parts(document, own) for document, own in groups])
        picked = [document for document, _ in groups]
        return PickedMemory(
            keys=keys,
            values=values,
            cu_slots=cu_slots,
            num_chunks=[self.num_chunks[document] for document in picked],
            num_tokens=[self.num_tokens[document] for document in picked],
            memory_index=rows,
            signature=self.signature,
            sources=[self.documents[document].source for document in picked],
            chunks=[list(own) for _, own in groups],
        )

    def _chunks_of(
        self, row: int, documents: Sequence[int], chosen: Sequence[int]
    ) -> list[tuple[int, tuple[int, ...]]]:
        """The documents of a row, each with the chunks of it that are among those ``chosen`` of all of them."""
        counts = [self.num_chunks[document] for document in documents]
        for chunk in chosen:
            if not 0 <= chunk < sum(counts):
                of = f"document {documents[0]}" if len(documents) == 1 else f"documents {list(documents)}"
                raise IndexError(f"chunks[{row}]: expected chunks 0 to {sum(counts) - 1} of {of}, got {chunk}")
        begins = itertools.accumulate(counts, initial=0)
        return [
            (document, tuple(sorted({chunk - begin for chunk in chosen if begin <= chunk < begin + count})))
            for document, count, begin in zip(documents, counts, begins, strict=False)
        ]

    def gather(self) -> ContextMemory:
        """The whole memory, on the device.

        Raises:
            OSError: a page cannot be read from the disk.
        """
        parts = [[(page, 0, page.slots) for page in document.pages] for document in self.documents]
        keys, values, cu_slots = self._gathered(parts)
        return ContextMemory(
            keys=keys,
            values=values,
            cu_slots=cu_slots,
            num_chunks=self.num_chunks,
            num_tokens=self.num_tokens,
            memory_index=list(self.memory_index),
            signature=self.signature,
            tails=[None if t is None else t._replace(token_ids=t.token_ids.to(self.device)) for t in self.tails],
            sources=self.sources if any(source is not None for source in self.sources) else None,
        )

    def _gathered(
        self, parts: Sequence[Sequence[tuple[Page, int, int]]]
    ) -> tuple[list[Tensor], list[Tensor], list[int]]:
        slots = [sum(end - first for _, first, end in own) for own in parts]
        keys, values = self.tiers.gather([part for own in parts for part in own], self.form)
        return keys, values, [0, *itertools.accumulate(slots)]

    def _parts(self, document: int, chunks: Iterable[int]) -> list[tuple[Page, int, int]]:
        """Where chunks of a document, in its order, lie in its pages; neighbours in one page are one part."""
        own = self.documents[document]
        parts: list[tuple[Page, int, int]] = []
        for chunk in chunks:
            first = chunk * self.chunk_slots
            end = min(first + self.chunk_slots, own.num_slots)
            number, offset = divmod(first, self.page_slots)
            page = own.pages[number]
            if parts and parts[-1][0] is page and parts[-1][2] == offset:
                parts[-1] = page, parts[-1][1], offset + end - first
            else:
                parts.append((page, offset, offset + end - first))
        return parts

    def pick_index(self, document: int, ids: Tensor, model: Any) -> PickIndex:
        """What a question is compared with in a document.

        Args:
            document: which.
            ids: ``[T]`` its tokens, on the device.
            model: whose pick asks.

        Raises:
            ValueError: the memory does not know the document's tokens or has others, or was made by a model without a
                pick.
        """
        own = self.documents[document]
        held = None if own.source is None else own.source.token_ids
        if held is None or own.pick is None:
            what = "the token ids of its documents (sources)" if held is None else "a pick's keys"
            raise ValueError(f"memory: expected a TieredMemory with {what}, got one without for document {document}")
        if not torch.equal(held.to(ids.device), ids.to(torch.int32)):
            raise ValueError("context_ids: expected the text that the memory was made of, got another")
        return own.pick.index(ids, model.config, model.pick, model.dtype)

    # -- tiers --------------------------------------------------------------------------------------------------------

    def move(self, tier: str, documents: Sequence[int] | None = None) -> None:
        """Bring pages to a tier by hand, and drop their copies in faster ones.

        The tier's budget holds: what exceeds it moves on, pages that were not used for longest first.

        Args:
            tier: ``"device"``, ``"host"`` or ``"disk"``; on the CPU ``"memory"`` or ``"disk"``.
            documents: whose; default: all.

        Raises:
            MemoryError: no tier has room for a page. No page is lost.
            OSError: the disk has no room, or a page cannot be read from it. No page is lost.
            ValueError: there is no such tier.
        """
        chosen = range(self.num_documents) if documents is None else documents
        self.tiers.move([page for document in chosen for page in self.documents[document].pages], tier)

    def describe(self) -> dict[str, Any]:
        """What it holds, in a dictionary that JSON can hold; as of a :class:`ContextMemory`, and ``tiers``.

        ``tiers`` has the bytes by tier; a page that has copies in two tiers counts in both. ``pick_bytes`` are those of
        the pick's keys, which stay on the device.
        """
        pages = [page for document in self.documents for page in document.pages]
        picks = {id(document.pick): document.pick for document in self.documents if document.pick is not None}
        return {
            **describe_documents(self),
            "layers": self.form.layers,
            "key_bytes": self.nbytes // 2,
            "value_bytes": self.nbytes // 2,
            "tiers": self.tiers.nbytes(pages),
            "pick_bytes": sum(pick.nbytes for pick in picks.values()),
        }

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = "5GB") -> None:
        """Write the file that :meth:`ContextMemory.save` writes of the whole memory, page by page.

        Args:
            path: the file.
            max_shard_size: see there; ``None`` for one file.

        Raises:
            OSError: the file cannot be written, or a page not read.
            ValueError: ``path`` is a folder or a device.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        check_fields("memory", fields)
        shape = shape_of(fields)

        def parts(index: int) -> Iterator[Tensor]:
            return (self.tiers.part(page, index) for document in self.documents for page in document.pages)

        tensors = {
            name: TensorInParts(shape, self.dtype, functools.partial(parts, 2 * layer + kind))
            for kind, of_kind in enumerate(KINDS)
            for layer, name in enumerate(tensor_names([of_kind], self.form.layers))
        }
        shards = [] if max_shard_size is None else shards_of(tensors, max_shard_size)
        told, integers = describe_origin("memory", self.tails, self.sources, fields)
        version, held = file_version(MEMORY, self.memory_index, self.sources), {} if shards else tensors
        write_tensors(path, {**fields, **told}, {**held, **integers}, version=version, shards=shards)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Any, tiers: MemoryTiers, *, verify: bool = True
    ) -> "TieredMemory":
        """The memory in a file that a memory's ``save`` has written: the file is its disk tier.

        The files stay open as long as the memory lives, so they may be removed or replaced; but they must not be
        changed. Of a model with a pick the keys of its layers are read at once.

        Args:
            path: the file; its shards are found beside it.
            model: the model that will read it.
            tiers: where pages will lie.
            verify: whether to compare the checksums of the keys and values, for which all of them are read.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file or a shard is missing, truncated, damaged or no context memory, another model made it,
                or its tokens are not those that it was made of.
        """
        file = open_memory(path)
        try:
            outline = ContextMemory.outline(file, model=model)
            fields = {name: getattr(outline, name) for name in FIELDS}
            layers, (_, heads, size), dtype = len(outline.keys), outline.keys[0].shape, outline.dtype
            integers = integer_shapes(file.header, fields)
            found = file.read(list(integers), lambda tensor: tensor, verify=False)
            if verify:
                file.verify([*tensor_names(KINDS, layers), *integers])
            origin = restore_origin(file.header, dict(zip(integers, found, strict=True)), fields, torch.device("cpu"))
        except BaseException:
            file.__exit__()
            raise
        # as a page has its parts: by layer
        source = OpenFile(file, [f"{kind}.{layer}" for layer in range(layers) for kind in KINDS])
        form = PageForm(layers, heads, size, dtype)
        memory = cls([], list(fields["memory_index"]), fields["signature"], form, chunk_slots(model.config), tiers)

        def rows(begin: int, name: str, first: int, end: int) -> Tensor:
            tensor = torch.empty((end - first, heads, size), dtype=dtype, device="cpu")
            file.read_slots(name, begin + first, begin + end, bytes_of(tensor))
            return tensor

        count = len(fields["num_tokens"])
        tails, sources = origin.get("tails") or [None] * count, origin.get("sources") or [None] * count
        for document, (begin, end) in enumerate(itertools.pairwise(fields["cu_slots"])):
            pages = []
            for first in range(begin, end, memory.page_slots):
                last = min(first + memory.page_slots, end)
                pages.append(tiers.insert_from_disk(FilePlace(source, first, last), form, last - first))
            held = fields["num_tokens"][document], tails[document], sources[document]
            own = functools.partial(rows, begin)
            memory.documents.append(document_of(model, tiers.device, memory.chunk_slots, pages, *held, own))
        return memory
