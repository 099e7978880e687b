"""The context memory: what the compressor hands to the decoder."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..counted import counted
from .memory_fields import (
    FIELDS,
    KINDS,
    Tail,
    check_fields,
    check_origin,
    describe_memory,
    describe_origin,
    fields_of,
    file_version,
    has_origin,
    integer_shapes,
    open_memory,
    restore_origin,
    shape_of,
)
from .memory_file import DTYPES, MEMORY, MemoryFile, tensor_names
from .memory_rows import Row, Span, beside, document_of, expect_document, rows_of, spans_of
from .memory_writer import shards_of, write_tensors
from .protocols import Decoder
from .signature_fields import describe_difference
from .sources import Source
from .storage import Version, join, runs_of


@dataclasses.dataclass
class ContextMemory:
    """Compressed keys and values of one or more documents, for the ``M`` injected layers.

    Attributes:
        keys: ``M`` tensors ``[S, Hkv, D]``; all documents' slots one after the other, keys rotated by position in their
            node plus chunk index.
        values: ``M`` tensors ``[S, Hkv, D]``.
        cu_slots: cumulative slots by document, ``documents + 1`` integers.
        num_chunks: chunks of each document.
        num_tokens: context tokens of each document.
        memory_index: the document that each batch row reads, or a tuple of several; rows may share documents.
        signature: the memory's maker: model sizes, tree and a fingerprint of the compressor's weights.
        tails: the partial last chunk of each document, ``None`` where its token ids are not known (as in files of
            versions 1 and 2): such a document cannot go on. Without a partial chunk it can.
        sources: where each document comes from, ``None`` where that is not known; see :meth:`with_sources`.
        version: the storage that a memory made by ``append`` lies in.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cu_slots: list[int]
    num_chunks: list[int]
    num_tokens: list[int]
    memory_index: list[Row]
    signature: dict[str, Any]
    tails: list[Tail | None] | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)
    sources: list[Source | None] | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)
    version: Version | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        # a memory that compiled code makes is gone when its graph ends
        if self.version is None or torch.compiler.is_compiling():
            return
        lists = (self.keys, self.values)
        if self.version.overwritten or self.version.storage.holds(lists):
            self.version.watch(lists)
        else:
            # tensors of their own
            self.version = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own, or cannot tell."""
        return {name: value for name, value in vars(self).items() if name != "version"}

    #: Processes that hold the slots, and what joins the attention to each one's; see sharedllm_ext.distributed.
    processes: ClassVar[int] = 1
    merge: ClassVar[Callable[..., Tensor] | None] = None

    @property
    def num_documents(self) -> int:
        """Documents held."""
        return len(self.num_chunks)

    @property
    def batch_size(self) -> int:
        """Batch rows that read the memory."""
        return len(self.memory_index)

    @property
    def num_slots(self) -> int:
        """Slots of one layer, over all documents."""
        return self.cu_slots[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def device(self) -> torch.device:
        """Device of the keys and values."""
        return self.keys[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys and values."""
        return self.keys[0].dtype

    def to(self, *args: Any, **kwargs: Any) -> "ContextMemory":
        """The memory on another device or in another dtype, arguments as for :meth:`torch.Tensor.to`."""
        keys, values = ([tensor.to(*args, **kwargs) for tensor in part] for part in (self.keys, self.values))
        device, tails = keys[0].device, self.tails
        if tails is not None:
            tails = [None if tail is None else tail._replace(token_ids=tail.token_ids.to(device)) for tail in tails]
        return dataclasses.replace(self, keys=keys, values=values, tails=tails)

    def float(self) -> "ContextMemory":
        """The memory in float32; mixed-precision wrappers call this on all 16-bit outputs of a model."""
        return self.to(torch.float32)

    def expand(self, repeats: int) -> "ContextMemory":
        """Every batch row ``repeats`` times in a row (beams, returned sequences); keys and values are not copied."""
        rows = [row for row in self.memory_index for _ in range(repeats)]
        return dataclasses.replace(self, memory_index=rows)

    def select(self, rows: Sequence[int]) -> "ContextMemory":
        """The given batch rows, in that order; keys and values are not copied.

        Raises:
            IndexError: a row is not in ``0 .. batch_size-1``.
        """
        for row in rows:
            if not 0 <= row < self.batch_size:
                raise IndexError(f"rows: expected batch rows 0 to {self.batch_size - 1}, got {row}")
        return dataclasses.replace(self, memory_index=[self.memory_index[row] for row in rows])

    def with_rows(self, documents: Sequence[int | Sequence[int]]) -> "ContextMemory":
        """The same documents, read by other batch rows; keys and values are not copied.

        A row that reads several documents reads one text: the documents one after the other, in the order given, each
        with its own last chunk. The softmax goes over the slots of all of them, and positions count the chunks of all
        of them. Where each but the last ends with a full chunk, that equals :meth:`compress` of that text, if nodes do
        not depend on a query.

        Args:
            documents: for each row a document or a list of documents: ``[[0, 3], 7, [1, 2, 4]]``.

        Raises:
            IndexError: a document is not in ``0 .. num_documents-1``.
            TypeError: something that is no document and no list of documents.
            ValueError: no row, a row without documents, or one that names a document twice.
        """
        return dataclasses.replace(self, memory_index=rows_of(documents, self.num_documents))

    def select_documents(self, documents: Sequence[int]) -> "ContextMemory":
        """Some documents, in that order, each read by a row of its own; for rows of several see :meth:`with_rows`.

        Consecutive documents are a view of this memory: nothing is copied. Others are copied.

        Raises:
            IndexError: a document is not in ``0 .. num_documents-1``.
            TypeError: a list of documents in place of one.
        """
        self.expect_whole()
        for document in documents:
            expect_document(document)
            if not 0 <= document < self.num_documents:
                raise IndexError(f"documents: expected 0 to {self.num_documents - 1}, got {document}")
        runs = runs_of([(self.cu_slots[document], self.cu_slots[document + 1]) for document in documents])

        def take(tensor: Tensor) -> Tensor:
            parts = [tensor[first:end] for first, end in runs]
            return parts[0] if len(parts) == 1 else torch.cat([tensor[:0], *parts])

        slots = (self.cu_slots[document + 1] - self.cu_slots[document] for document in documents)
        return dataclasses.replace(
            self,
            keys=[take(key) for key in self.keys],
            values=[take(value) for value in self.values],
            cu_slots=[0, *itertools.accumulate(slots)],
            num_chunks=[self.num_chunks[document] for document in documents],
            num_tokens=[self.num_tokens[document] for document in documents],
            memory_index=list(range(len(documents))),
            tails=None if self.tails is None else [self.tails[document] for document in documents],
            sources=None if self.sources is None else [self.sources[document] for document in documents],
        )

    @classmethod
    def concat(cls, memories: Sequence["ContextMemory"]) -> "ContextMemory":
        """The documents of several memories of one model beside each other, and their rows one after the other.

        Memories that lie one after the other, as views of :meth:`select_documents` may, are not copied. Others are,
        once.

        Raises:
            ValueError: there is none, or they differ in model, tree, device or dtype.
        """
        if not memories:
            raise ValueError("memories: expected at least one, got none")
        first = memories[0]
        for index, other in enumerate(memories):
            other.expect_whole()
            difference = describe_difference(first.signature, other.signature)
            if difference is not None:
                raise ValueError(f"memories[{index}]: expected one of the same model as the first; {difference}")
            if (other.device, other.dtype) != (first.device, first.dtype):
                raise ValueError(
                    f"memories[{index}]: expected {first.device} and {first.dtype} as the first, got "
                    f"{other.device} and {other.dtype}"
                )
        if len(memories) == 1:
            return first
        documents = [0, *itertools.accumulate(memory.num_documents for memory in memories)]
        known: dict[str, Any] = {}
        for name in ("tails", "sources"):
            if any(getattr(memory, name) is not None for memory in memories):
                lists = (getattr(memory, name) or [None] * memory.num_documents for memory in memories)
                known[name] = list(itertools.chain.from_iterable(lists))
        # two versions are used up at different times
        copy = len({id(memory.version) for memory in memories}) > 1
        return cls(
            keys=[join(parts, copy=copy) for parts in zip(*(memory.keys for memory in memories), strict=True)],
            values=[join(parts, copy=copy) for parts in zip(*(memory.values for memory in memories), strict=True)],
            cu_slots=[0, *itertools.accumulate(b - a for m in memories for a, b in itertools.pairwise(m.cu_slots))],
            num_chunks=[chunks for memory in memories for chunks in memory.num_chunks],
            num_tokens=[tokens for memory in memories for tokens in memory.num_tokens],
            memory_index=[
                row
                for memory, begin in zip(memories, documents, strict=False)
                for row in beside(memory.memory_index, begin)
            ],
            signature=first.signature,
            # dropped where the tensors are copies
            version=None if copy else first.version,
            **known,
        )

    def cpu(self) -> "ContextMemory":
        """The memory on the CPU."""
        return self.to("cpu")

    def pin(self) -> "ContextMemory":
        """A copy in page-locked memory of the CPU, from which CUDA copies without waiting for it."""
        keys, values = ([tensor.pin_memory() for tensor in part] for part in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)

    def describe(self) -> dict[str, Any]:
        """What it holds: documents, tokens, chunks, slots, bytes by kind, device, model, tokenizers, sources."""
        return describe_memory(self)

    def with_sources(self, sources: Sequence[Source | None]) -> "ContextMemory":
        """The memory with the source of each document, ``None`` for one that is not known; nothing is copied.

        With token ids, passages are found without the context; with characters, they say where they stand.

        Raises:
            ValueError: a source of another number of tokens, or of other tokens than the memory's last ones.
        """
        if len(sources) != self.num_documents:
            raise ValueError(f"sources: expected {self.num_documents}, one for each document, got {len(sources)}")
        for document, source in enumerate(sources):
            if source is None:
                continue
            name = f"sources[{document}]"
            source.check(name, self.num_tokens[document])
            tail, ids = None if self.tails is None else self.tails[document], source.token_ids
            if tail is None or ids is None or not len(tail.token_ids):
                continue
            if not torch.equal(ids[-len(tail.token_ids) :], tail.token_ids.cpu()):
                raise ValueError(f"{name}: expected the tokens that the memory was made of, got others at their end")
        return dataclasses.replace(self, sources=list(sources))

    def slot_ranges(self) -> list[tuple[int, int]]:
        """First slot and end of every batch row's memory.

        Raises:
            ValueError: a row reads several documents; :meth:`spans` has the slots of each.
        """
        read = (document_of(self.memory_index, row) for row in range(self.batch_size))
        return [(self.cu_slots[document], self.cu_slots[document + 1]) for document in read]

    def spans(self, offset: int) -> list[tuple[Span, ...]]:
        """What every batch row reads, and from which positions; see :func:`~.memory_rows.spans_of`."""
        return [spans_of(row, self.cu_slots, self.num_chunks, offset) for row in self.memory_index]

    def expect_whole(self) -> None:
        """Refuse a memory that is a part of one.

        Raises:
            ValueError: other processes hold the other slots.
        """
        if self.processes > 1:
            raise ValueError(
                "memory: expected all slots in this process, got those of one of "
                f"{counted(self.processes, 'process')}; gather() puts them together"
            )

    def expect_same(self, **inputs: Tensor | None) -> None:
        """Called with the inputs of a ``forward``: processes that share a memory must have the same."""

    @contextlib.contextmanager
    def generate_alike(self, text: Any, config: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        """Around a ``generate`` and its arguments: processes that share a memory must choose the same tokens."""
        yield

    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
        """Write the memory to a safetensors file with a header that names model, layers and tree.

        The file appears, or replaces an older one, when it is complete. Links are followed.

        Args:
            path: the file.
            max_shard_size: bytes, or a text such as ``"5GB"``: keys and values are written to several files beside this
                one, of at most so many bytes each (one tensor is not cut). The file names them; only all together are
                the memory.

        Raises:
            ValueError: ``path`` is a folder or a device, or the memory's fields contradict each other.
            OSError: the file cannot be written.
        """
        fields, tensors = self.contents()
        shards = [] if max_shard_size is None else shards_of(tensors, max_shard_size)
        version = file_version(MEMORY, self.memory_index, self.sources)
        if version == 3 and not shards and not has_origin(self.tails, self.sources):
            # as older versions of this package read it
            write_tensors(path, fields, tensors, version=2)
            return
        told, integers = describe_origin("memory", self.tails, self.sources, fields)
        written = {**({} if shards else tensors), **integers}
        write_tensors(path, {**fields, **told}, written, version=version, shards=shards)

    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A file's fields, and keys and values by their names in it.

        Raises:
            ValueError: they contradict each other.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        check_fields("memory", fields)
        names, shape = tensor_names(KINDS, fields["signature"]["injection_layers"]), shape_of(fields)
        if len(self.keys) + len(self.values) != len(names):
            raise ValueError(
                f"memory: expected {counted(len(names), 'key')} and values, got {len(self.keys) + len(self.values)}"
            )
        tensors = dict(zip(names, (*self.keys, *self.values), strict=True))
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES or tensor.dtype != self.dtype:
                raise ValueError(
                    f"memory: expected {name} of shape {shape} and one floating-point dtype, got "
                    f"{tuple(tensor.shape)} and {tensor.dtype}"
                )
        return fields, tensors

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Decoder | None = None,
        device: torch.device | str | None = None,
        *,
        verify: bool = True,
        mmap: bool = False,
    ) -> "ContextMemory":
        """Read a memory written by :meth:`save`.

        By default the tensors are read, not mapped: the files may be changed or removed afterwards.

        Args:
            path: the file; its shards are found beside it.
            model: the model that will read it; the memory must be its own. Also the default device.
            device: where to put the tensors; default: the model's device, or the CPU.
            verify: whether to compare the checksums of the keys and values; files of version 1 have none.
            mmap: whether tensors on the CPU are maps of the files, whose pages are read when they are used. Writing to
                such a tensor does not change the file. :meth:`save` replaces files, which leaves the map as it is; but
                a program that makes a mapped file shorter ends this process at the next use (SIGBUS).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file or a shard is missing, truncated, damaged or no context memory, or another model made
                it.
        """
        target = torch.device(device) if device is not None else (model.device if model is not None else "cpu")
        with open_memory(path) as file:
            return cls.read(file, model, torch.device(target), verify=verify, mmap=mmap)

    @classmethod
    def read(
        cls,
        file: MemoryFile,
        model: Decoder | None,
        target: torch.device,
        *,
        verify: bool = True,
        mmap: bool = False,
        others: Mapping[str, tuple[int, ...]] | None = None,
    ) -> "ContextMemory":
        """The memory in an open file, which may hold ``others`` of these shapes beside it; see :meth:`load`."""
        # before another model's gigabytes are read
        outline = cls.outline(file, others, model)
        fields = {name: getattr(outline, name) for name in FIELDS}
        layers, integers = len(outline.keys), integer_shapes(file.header, fields)
        found = file.read(list(integers), lambda tensor: tensor, verify=verify)
        names = tensor_names(KINDS, layers)
        tensors = file.read(names, lambda tensor: tensor.to(target), verify=verify, mapped=mmap)
        origin = restore_origin(file.header, dict(zip(integers, found, strict=True)), fields, target)
        return cls(keys=tensors[:layers], values=tensors[layers:], **fields, **origin)

    @classmethod
    def outline(
        cls, file: MemoryFile, others: Mapping[str, tuple[int, ...]] | None = None, model: Decoder | None = None
    ) -> "ContextMemory":
        """The memory in an open file without its data: tensors on the device ``meta``.

        Args:
            file: with its shards.
            others: shapes of what it holds beside the memory.
            model: the one that must have made it, if any.

        Raises:
            ValueError: the file's fields and tensors contradict each other, or another model made it.
        """
        fields = fields_of(file.header)
        check_fields(file.name, fields)
        told = check_origin(file.name, file.header, fields)
        layers, shape = fields["signature"]["injection_layers"], shape_of(fields)
        integers, meta = integer_shapes(file.header, fields), torch.device("meta")
        _, dtype = file.expect(KINDS, layers, shape, {**integers, **(others or {})})
        part = [torch.empty(shape, dtype=dtype, device=meta)] * layers
        none = {name: torch.empty(size, dtype=torch.int32, device=meta) for name, size in integers.items()}
        outline = cls(keys=part, values=part, **fields, **restore_origin(told, none, fields, meta))
        if model is not None:
            try:
                model.check_memory(outline)
            except ValueError as error:
                raise ValueError(f"{file.name}: {error}") from None
        return outline


def choosing_alike(memory: ContextMemory | None, *call: Any) -> contextlib.AbstractContextManager[None]:
    """:meth:`ContextMemory.generate_alike` of a memory, if there is one."""
    return contextlib.nullcontext() if memory is None else memory.generate_alike(*call)


class _Signature(dict[str, Any]):
    """A signature, which alone counts when trees are compared or written, and what else a memory has."""

    more: dict[str, Any]


def _context(memory: ContextMemory) -> dict[str, Any]:
    if torch.compiler.is_compiling():
        # a graph knows plain dictionaries
        return memory.signature
    signature = _Signature(memory.signature)
    signature.more = {name: getattr(memory, name) for name in _MORE}
    return signature


def _flatten(memory: ContextMemory) -> tuple[list[Any], Any]:
    return [getattr(memory, name) for name in _LEAVES], _context(memory)


def _flatten_with_keys(memory: ContextMemory) -> tuple[list[Any], Any]:
    return [(pytree.GetAttrKey(name), getattr(memory, name)) for name in _LEAVES], _context(memory)


def _unflatten(values: Iterable[Any], signature: Any) -> ContextMemory:
    # of a program that was saved, only the signature
    more = signature.more if isinstance(signature, _Signature) else {}
    return ContextMemory(**dict(zip(_LEAVES, values, strict=True)), signature=dict(signature), **more)


# an input of exported programs: leaves that come later would be another input
_LEAVES = ("keys", "values", *FIELDS[:-1])
_MORE = tuple(field.name for field in dataclasses.fields(ContextMemory) if field.name not in (*_LEAVES, "signature"))
pytree.register_pytree_node(
    ContextMemory,
    _flatten,
    _unflatten,
    serialized_type_name="sharedllm_ext.ContextMemory",
    flatten_with_keys_fn=_flatten_with_keys,
)
# their sample inputs are read without trust
torch.serialization.add_safe_globals([ContextMemory, Tail])
