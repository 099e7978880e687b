"""The index of a context: the slots of all nodes that any question could retain, and the vectors it chooses by."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from ..ops import context_tree_select, topk_nodes
from .chunks import Chunk, cut_into_chunks
from .levels import NodeTable
from .memory import ContextMemory
from .memory_fields import Tail
from .memory_file import DTYPES, FileFormat, MemoryFile, are_sizes, shorten, tensor_names
from .memory_writer import write_tensors
from .protocols import Decoder
from .signature_fields import check_signature
from .tree import ContextTree, TreeShape, kept_tokens
from .upload import upload

_KINDS = ("keys", "values")
# what a file's header holds beside its format
_FIELDS = ("num_tokens", "tail_ids", "signature")
INDEX = FileFormat("sharedllm-context-index", "context index", {1: {"format", "version", "checksums", *_FIELDS}})


@dataclasses.dataclass
class ContextIndex:
    """What a question could choose from one or more documents, for the ``M`` injected layers.

    Attributes:
        keys: ``M`` tensors ``[R, Hkv, D]``: the slots of all nodes of the first level below the chunks, of all
            documents one after the other, then those of the next level, and so on; keys are rotated by position in
            their node plus chunk index.
        values: ``M`` tensors ``[R, Hkv, D]``.
        vectors: ``[N, d]`` vectors of the nodes of all levels but the last, in the same order.
        num_tokens: context tokens of each document.
        tail_ids: token ids of each document's partial last chunk, which a memory needs to go on.
        signature: the index's maker: model sizes, tree and a fingerprint of the compressor's weights.
    """

    keys: list[Tensor]
    values: list[Tensor]
    vectors: Tensor
    num_tokens: list[int]
    tail_ids: list[list[int]]
    signature: dict[str, Any]

    @property
    def num_documents(self) -> int:
        """Documents held."""
        return len(self.num_tokens)

    @property
    def num_chunks(self) -> list[int]:
        """Chunks of each document."""
        return [-(-tokens // self.signature["chunk_size"]) for tokens in self.num_tokens]

    @property
    def num_slots(self) -> int:
        """Slots of one layer, over all nodes and documents."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and vectors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.vectors))

    @property
    def device(self) -> torch.device:
        """Device of the keys, values and vectors."""
        return self.keys[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys and values."""
        return self.keys[0].dtype

    def to(self, *args: Any, **kwargs: Any) -> "ContextIndex":
        """The index on another device or in another dtype, arguments as for :meth:`torch.Tensor.to`.

        Vectors in another dtype may choose other nodes where two children are almost equally similar to a question.
        """
        return dataclasses.replace(
            self,
            keys=[key.to(*args, **kwargs) for key in self.keys],
            values=[value.to(*args, **kwargs) for value in self.values],
            vectors=self.vectors.to(*args, **kwargs),
        )

    def describe(self) -> dict[str, Any]:
        """What it holds, in numbers: documents, tokens, chunks, nodes, slots, layers, bytes, dtype and device."""
        chunks, depth = sum(self.num_chunks), self.signature["tree_depth"]
        return {
            "documents": self.num_documents,
            "tokens": sum(self.num_tokens),
            "chunks": chunks,
            "nodes": chunks * (2 ** (depth + 1) - 2),
            "slots": self.num_slots,
            "layers": len(self.keys),
            "vector_bytes": self.vectors.nbytes,
            "bytes": self.nbytes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    def choose(self, query: Tensor | None, has_query: list[bool] | None) -> tuple[Tensor, list[int]]:
        """The slots that a query retains of every chunk.

        Args:
            query: ``[documents, d]`` query vectors, or ``None`` for the fixed policy (always the right child).
            has_query: for each document, whether its query counts.

        Returns:
            ``[S]`` int64 rows of ``keys`` and ``values`` on their device, in a memory's order; slots of each chunk.
        """
        signature = self.signature
        shape = TreeShape(signature["tree_depth"], signature["slots_per_node"])
        chunks = cut_into_chunks(self.num_tokens, signature["chunk_size"])
        if not chunks:
            return torch.empty(0, dtype=torch.int64, device=self.device), []
        table = NodeTable.of(chunks, shape)
        lengths = torch.cat([level[..., 1].flatten() for level in table.spans])
        # one copy to the device
        columns = upload(torch.cat((table.slots, lengths.unsqueeze(1)), 1), self.device)
        chosen = _chosen_nodes(self.vectors, columns[:, 2], chunks, shape.depth, query, has_query)
        spans = columns[:, :2][chosen]
        kept = kept_tokens(chunks, shape, ContextTree(spans, None))
        begin, count = spans.flatten(0, 1).unbind(1)
        total = sum(kept)
        before = count.cumsum(0) - count
        rows = torch.repeat_interleave(begin - before, count, output_size=total)
        rows += torch.arange(total, device=self.device)
        per_chunk = shape.depth + 1
        return rows, [sum(kept[place : place + per_chunk]) for place in range(0, len(kept), per_chunk)]

    def take(self, chosen: list[tuple[Tensor, list[int]]], device: torch.device) -> ContextMemory:
        """The memory of chosen slots, on a device; it holds the documents once for each result of :meth:`choose`."""
        index = torch.cat([rows for rows, _ in chosen])
        cu_slots = [0]
        tails: list[Tail | None] = []
        for _, slots in chosen:
            first = 0
            for count, ids in zip(self.num_chunks, self.tail_ids, strict=True):
                own, first = slots[first : first + count], first + count
                cu_slots.append(cu_slots[-1] + sum(own))
                tails.append(Tail(torch.tensor(ids, dtype=torch.int32, device=device), own[-1] if ids else 0))
        return ContextMemory(
            keys=[key.index_select(0, index).to(device) for key in self.keys],
            values=[value.index_select(0, index).to(device) for value in self.values],
            cu_slots=cu_slots,
            num_chunks=self.num_chunks * len(chosen),
            num_tokens=self.num_tokens * len(chosen),
            memory_index=list(range(self.num_documents * len(chosen))),
            signature=self.signature,
            tails=tails,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a safetensors file with a header that names model, layers and tree.

        The file appears, or replaces an older one, when it is complete. Links are followed.

        Raises:
            ValueError: ``path`` is a folder or a device, or the index's fields contradict each other.
            OSError: the file cannot be written.
        """
        fields = {name: getattr(self, name) for name in _FIELDS}
        _check_fields("index", fields)
        names, (shape, vectors) = tensor_names(_KINDS, fields["signature"]["injection_layers"]), _shapes(fields)
        if len(self.keys) + len(self.values) != len(names):
            raise ValueError(
                f"index: expected {counted(len(names), 'key')} and values, got {len(self.keys) + len(self.values)}"
            )
        tensors = dict(zip(names, (*self.keys, *self.values), strict=True))
        for name, tensor in {**tensors, "vectors": self.vectors}.items():
            expected, dtype = (vectors, tensor.dtype) if name == "vectors" else (shape, self.dtype)
            if tuple(tensor.shape) != expected or tensor.dtype not in DTYPES or tensor.dtype != dtype:
                raise ValueError(
                    f"index: expected {name} of shape {expected} and one floating-point dtype, got "
                    f"{tuple(tensor.shape)} and {tensor.dtype}"
                )
        write_tensors(path, fields, {**tensors, "vectors": self.vectors}, INDEX)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Decoder | None = None,
        device: torch.device | str | None = None,
        *,
        verify: bool = True,
    ) -> "ContextIndex":
        """Read an index written by :meth:`save`.

        The tensors are read, not mapped: the file may be changed or removed afterwards.

        Args:
            path: the file.
            model: the model that will use it; the index must be its own. Also the default device.
            device: where to put the tensors; default: the model's device, or the CPU.
            verify: whether to compare the checksums of the tensors.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, damaged or no context index, or another model made it.
        """
        target = torch.device(device) if device is not None else (model.device if model is not None else "cpu")
        with MemoryFile(path, INDEX) as file:
            fields = {name: file.header[name] for name in _FIELDS}
            _check_fields(file.name, fields)
            layers, (shape, vectors) = fields["signature"]["injection_layers"], _shapes(fields)
            names, dtype = file.expect(_KINDS, layers, shape, {"vectors": vectors})
            if model is not None:
                # before another model's gigabytes are read
                outline = [torch.empty(shape, dtype=dtype, device="meta")] * layers
                try:
                    model.check_index(cls(keys=outline, values=outline, vectors=outline[0], **fields))
                except ValueError as error:
                    raise ValueError(f"{file.name}: {error}") from None
            tensors = file.read([*names, "vectors"], lambda tensor: tensor.to(target), verify=verify)
        return cls(keys=tensors[:layers], values=tensors[layers:-1], vectors=tensors[-1], **fields)


def _chosen_nodes(
    vectors: Tensor,
    lengths: Tensor,
    chunks: list[Chunk],
    depth: int,
    query: Tensor | None,
    has_query: list[bool] | None,
) -> Tensor:
    """The retained nodes ``[n, depth + 1]`` of each chunk in slot order, by number in the :class:`NodeTable`."""
    device, count, pairs = lengths.device, len(chunks), vectors.shape[0] // 2
    nodes = torch.stack((torch.arange(lengths.shape[0], device=device), lengths), 1)[: 2 * pairs]
    choice = None
    if query is not None and pairs:
        # all levels at once: which child of every node is the more similar one
        document = torch.tensor([chunk.document for chunk in chunks])
        document = torch.cat([document.repeat_interleave(2**level) for level in range(depth - 1)])
        groups, siblings = upload(document, device), torch.arange(0, 2 * pairs + 1, 2, device=device)
        best, _ = topk_nodes(query.to(vectors), vectors, siblings, groups, 1, nodes[:, 1] > 0)
        choice = best[:, 0] - siblings[:-1]
        if has_query is not None and not all(has_query):
            counts = upload(torch.tensor(has_query), device)
            choice = torch.where(counts[groups], choice, 1)
    picked, other = (spans[:, 0] for spans in context_tree_select(nodes.view(pairs, 2, 2), choice))
    pair, retained = torch.arange(count, device=device), []
    for _ in range(depth - 1):
        retained.append(other[pair])
        pair = picked[pair] + count
    return torch.stack((2 * pair, 2 * pair + 1, *reversed(retained)), 1)


def _shapes(fields: dict[str, Any]) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Shapes of keys and values, and of the vectors, by checked fields."""
    signature = fields["signature"]
    size, depth, slots = (signature[name] for name in ("chunk_size", "tree_depth", "slots_per_node"))

    def slots_of(length: int) -> int:
        # halves of halves differ by one token at most
        levels = [divmod(length, 2**level) for level in range(1, depth + 1)]
        return sum(
            (2**level - longer) * min(shorter, slots) + longer * min(shorter + 1, slots)
            for level, (shorter, longer) in enumerate(levels, 1)
        )

    chunks, total = 0, 0
    for tokens in fields["num_tokens"]:
        whole, rest = divmod(tokens, size)
        chunks += whole + bool(rest)
        total += whole * slots_of(size) + slots_of(rest)
    shape = (total, signature["num_key_value_heads"], signature["head_dim"])
    return shape, (chunks * (2**depth - 2), signature["hidden_size"])


def check_depth(name: str, tree_depth: int, chunk_size: int) -> None:
    """An index holds every node, so there must not be more leaves than tokens.

    Raises:
        ValueError: 'name: expected …, got …'.
    """
    most = chunk_size.bit_length() - 1
    if not 1 <= tree_depth <= most:
        raise ValueError(
            f"{name}: expected a tree_depth of 1 to {most} by the chunk_size of {chunk_size}, got {tree_depth}; nodes "
            "below that depth hold no tokens"
        )


def _check_fields(name: str, fields: dict[str, Any]) -> None:
    """Check an index's fields.

    Raises:
        ValueError: 'name: expected …, got …'.
    """
    signature, tokens = fields["signature"], fields["num_tokens"]
    check_signature(name, signature)
    check_depth(name, signature["tree_depth"], signature["chunk_size"])
    if not are_sizes(tokens):
        raise ValueError(f"{name}: expected num_tokens to be a list of integers of at least 0, got {shorten(tokens)}")
    tails, rests = fields["tail_ids"], [count % signature["chunk_size"] for count in tokens]
    right = isinstance(tails, list) and all(are_sizes(ids) and max(ids, default=0) < 2**31 for ids in tails)
    if not right or [len(ids) for ids in tails] != rests:
        raise ValueError(f"{name}: expected tail_ids of {shorten(rests)} token ids, got {shorten(tails)}")


# sample inputs of exported programs and the like are read without trust
torch.serialization.add_safe_globals([ContextIndex])
