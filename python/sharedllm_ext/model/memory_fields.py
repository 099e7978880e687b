"""What a memory's file holds beside keys and values, and whether it fits together."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..counted import counted
from .memory_file import CONVERSATION, MEMORY, FileFormat, MemoryFile, are_sizes, shorten
from .memory_rows import Row, documents_of
from .signature_fields import check_signature
from .sources import Source, SourceText

KINDS = ("keys", "values")
# what a file's header holds beside its format
FIELDS = ("cu_slots", "num_chunks", "num_tokens", "memory_index", "signature")
# of one stretch of text in a header
_TEXT = {"tokens", "token_ids", "offsets", "characters", "sha256"}
# and of one with a name of its own, in files since these versions
_NAMED = _TEXT | {"name", "line_ends", "heading"}
_NAMED_SINCE = {MEMORY.name: 5, CONVERSATION.name: 3}


class Tail(NamedTuple):
    """A document's partial last chunk, which is compressed again when the document goes on.

    Attributes:
        token_ids: its tokens, int32.
        slots: slots of one layer that it has in the memory.
    """

    token_ids: Tensor
    slots: int


def shape_of(fields: dict[str, Any]) -> tuple[int, int, int]:
    """Shape of every tensor, by checked fields."""
    signature = fields["signature"]
    return fields["cu_slots"][-1], signature["num_key_value_heads"], signature["head_dim"]


def check_fields(name: str, fields: dict[str, Any]) -> None:
    """Check a memory's fields, also against each other.

    Raises:
        ValueError: 'name: expected …, got …'.
    """

    def expect(right: bool, expected: str, got: Any) -> None:
        if not right:
            raise ValueError(f"{name}: expected {expected}, got {shorten(got)}")

    signature = fields["signature"]
    check_signature(name, signature)
    for field in ("cu_slots", "num_chunks", "num_tokens"):
        values = fields[field]
        expect(are_sizes(values), f"{field} to be a list of integers of at least 0", values)
    cu_slots, num_chunks, num_tokens = fields["cu_slots"], fields["num_chunks"], fields["num_tokens"]
    documents = len(num_chunks)
    expect(
        len(num_tokens) == documents,
        f"num_tokens of {counted(documents, 'document')} as in num_chunks",
        len(num_tokens),
    )
    expect(
        len(cu_slots) == documents + 1, f"{documents + 1} cu_slots for {counted(documents, 'document')}", len(cu_slots)
    )
    expect(cu_slots[0] == 0, "cu_slots to begin with 0", cu_slots[0])
    size, node = signature["chunk_size"], signature["slots_per_node"]
    chunk = (signature["tree_depth"] + 1) * node
    for document, (chunks, tokens) in enumerate(zip(num_chunks, num_tokens, strict=True)):
        where = f"of document {document}"
        count = -(-tokens // size)
        expect(
            chunks == count,
            f"num_chunks {where} to be {count} for {counted(tokens, 'token')} in chunks of {size}",
            chunks,
        )
        slots = cu_slots[document + 1] - cu_slots[document]
        expect(slots >= 0, f"cu_slots to rise at document {document}", cu_slots[document : document + 2])
        # the nodes of a chunk hold each of its tokens once
        full, rest = divmod(tokens, size)
        least, most = (full * min(size, slots_of) + min(rest, slots_of) for slots_of in (node, chunk))
        expect(least <= slots <= most, f"{least} to {counted(most, 'slot')} {where} by its tokens and the tree", slots)
    rows = fields["memory_index"]
    expect(isinstance(rows, list), "memory_index to be a list", rows)
    for row in rows:
        own = list(row) if isinstance(row, (list, tuple)) else [row]
        right = are_sizes(own) and len(set(own)) == len(own) and (len(own) > 1 or type(row) is int)
        expect(
            right, "memory_index to be a list of integers of at least 0, or of two or more different ones a row", row
        )
        expect(max(own) < documents, f"memory_index from 0 to {documents - 1}", row)


def has_rows_of_several(rows: Sequence[Row]) -> bool:
    """Whether a batch row reads several documents."""
    return any(isinstance(row, tuple) for row in rows)


def file_version(form: FileFormat, rows: Sequence[Row], sources: Sequence[Source | None] | None) -> int:
    """The version of a memory's or a conversation's file that holds tails and sources: the oldest that can."""
    latest = _NAMED_SINCE[form.name]
    if any(_is_named(text) for source in sources or () if source is not None for text in source.texts):
        return latest
    return latest - 1 if has_rows_of_several(rows) else latest - 2


def fields_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """A memory's fields from a header; not checked."""
    fields = {name: header[name] for name in FIELDS}
    if isinstance(fields["memory_index"], list):
        fields["memory_index"] = [tuple(row) if isinstance(row, list) else row for row in fields["memory_index"]]
    return fields


def describe_documents(memory: Any) -> dict[str, Any]:
    """What a memory holds but its bytes, in words and numbers that JSON can hold."""
    signature = memory.signature
    sources = memory.sources or [None] * memory.num_documents
    documents = [
        {
            "name": None if source is None else source.name,
            "tokens": tokens,
            "chunks": chunks,
            "sha256": None if source is None else source.sha256,
            "tokenizer": None if source is None else source.tokenizer,
            "characters": None if source is None else [text.characters for text in source.texts],
            "names": None if source is None else source.names,
            # whether passages are found without the context, and say where they stand
            "token_ids": _have(source, "token_ids"),
            "places": _have(source, "offsets"),
        }
        for source, tokens, chunks in zip(sources, memory.num_tokens, memory.num_chunks, strict=True)
    ]
    held = [text for source in sources if source is not None for text in source.texts]
    return {
        "documents": documents,
        "rows": memory.batch_size,
        "row_documents": [list(documents_of(row)) for row in memory.memory_index],
        "tokens": sum(memory.num_tokens),
        "chunks": sum(memory.num_chunks),
        "slots": memory.num_slots,
        "source_bytes": sum(
            part.nbytes for text in held for part in (text.token_ids, text.offsets) if part is not None
        ),
        "dtype": str(memory.dtype).removeprefix("torch."),
        "device": str(memory.device),
        "model": {
            name: signature[name] for name in ("model_type", "hidden_size", "chunk_size", "tree_depth", "weights")
        },
    }


def _have(source: Source | None, what: str) -> bool:
    """Whether all of a document's texts have token ids, or offsets."""
    return source is not None and all(getattr(text, what) is not None for text in source.texts)


def describe_memory(memory: Any) -> dict[str, Any]:
    """What a memory in tensors holds, in words and numbers that JSON can hold."""
    storage = None if memory.version is None else memory.version.storage
    return {
        **describe_documents(memory),
        "layers": len(memory.keys),
        "key_bytes": sum(key.nbytes for key in memory.keys),
        "value_bytes": sum(value.nbytes for value in memory.values),
        # with the room in which it grows
        "reserved_bytes": memory.nbytes if storage is None else sum(tensor.nbytes for tensor in storage.tensors),
    }


# -- tails and sources ------------------------------------------------------------------------------------------------


def has_origin(tails: Sequence[Tail | None] | None, sources: Sequence[Source | None] | None) -> bool:
    """Whether tails and sources tell anything that a file of version 2 does not."""
    return sources is not None or any(tail is not None and len(tail.token_ids) for tail in tails or ())


def describe_origin(
    name: str, tails: Sequence[Tail | None] | None, sources: Sequence[Source | None] | None, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header's entries for tails and sources, and their tensors.

    Raises:
        ValueError: they contradict the memory's fields.
    """
    known = [tail for tail in tails or () if tail is not None]
    told: dict[str, Any] = {
        "tails": None if tails is None else [None if tail is None else tail.slots for tail in tails],
        "sources": None if sources is None else [None if source is None else _told(source) for source in sources],
    }
    check_origin(name, told, fields)
    texts = [text for source in sources or () if source is not None for text in source.texts]
    ids = [text.token_ids for text in texts if text.token_ids is not None]
    offsets = [text.offsets for text in texts if text.offsets is not None]
    nothing = torch.empty(0, dtype=torch.int32)
    tensors = {
        "tail_ids": torch.cat([nothing, *(tail.token_ids.cpu() for tail in known)]),
        "token_ids": torch.cat([nothing, *ids]),
        "offsets": torch.cat([nothing.view(0, 2), *offsets]),
    }
    for key, shape in integer_shapes(told, fields).items():
        if tuple(tensors[key].shape) != shape or tensors[key].dtype != torch.int32:
            raise ValueError(
                f"{name}: expected {key} of shape {shape}, int32, got {tuple(tensors[key].shape)}, {tensors[key].dtype}"
            )
    return told, tensors


def check_origin(name: str, header: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check what a header says of tails and sources against the memory's fields; it may say nothing.

    Raises:
        ValueError: 'name: expected …, got …'.
    """

    def expect(right: bool, expected: str, got: Any) -> None:
        if not right:
            raise ValueError(f"{name}: expected {expected}, got {shorten(got)}")

    documents, signature = len(fields["num_tokens"]), fields["signature"]
    # a header that is being written has no format yet
    form = header.get("format")
    may_have_names = form is None or header["version"] >= _NAMED_SINCE[form]
    tails, sources = header.get("tails"), header.get("sources")
    for key, values in (("tails", tails), ("sources", sources)):
        right = values is None or (isinstance(values, list) and len(values) == documents)
        expect(right, f"{key} to be null or a list of {documents}", values)
    most = (signature["tree_depth"] + 1) * signature["slots_per_node"]
    for document, slots in enumerate(tails or ()):
        rest = fields["num_tokens"][document] % signature["chunk_size"]
        held = fields["cu_slots"][document + 1] - fields["cu_slots"][document]
        low, high = min(rest, 1), min(rest, most, held)
        right = slots is None or (type(slots) is int and low <= slots <= high)
        expect(
            right,
            f"{low} to {counted(high, 'slot')} in the last {counted(rest, 'token')} of document {document}",
            slots,
        )
    for document, source in enumerate(sources or ()):
        if source is None:
            continue
        where = f"of document {document}"
        right = isinstance(source, dict) and set(source) == {"name", "tokenizer", "texts"}
        expect(right, f"name, tokenizer and texts of the source {where}", source)
        for key in ("name", "tokenizer"):
            expect(_is_text(source[key]), f"the source's {key} {where} to be null or a text", source[key])
        expect(isinstance(source["texts"], list), f"the source's texts {where} to be a list", source["texts"])
        for text in source["texts"]:
            named = isinstance(text, dict) and set(text) == _NAMED and may_have_names
            right = named or (isinstance(text, dict) and set(text) == _TEXT)
            expect(right, f"{', '.join(sorted(_TEXT))} of a text {where}", text)
            sizes = [text["tokens"], 0 if text["characters"] is None else text["characters"]]
            expect(are_sizes(sizes), f"tokens and characters of a text {where} of at least 0", sizes)
            flags = [text["token_ids"], text["offsets"]]
            expect(
                all(type(flag) is bool for flag in flags), f"token_ids and offsets {where} to be true or false", flags
            )
            expect(_is_text(text["sha256"]), f"the SHA-256 of a text {where} to be null or a text", text["sha256"])
            if named:
                expect(_is_text(text["name"]), f"the name of a text {where} to be null or a text", text["name"])
                lines = [0 if text["line_ends"] is None else text["line_ends"], text["heading"]]
                expect(are_sizes(lines), f"line_ends and heading of a text {where} of at least 0", lines)
        total, tokens = sum(text["tokens"] for text in source["texts"]), fields["num_tokens"][document]
        expect(total == tokens, f"texts of {counted(tokens, 'token')} {where}", total)
    return header


def integer_shapes(header: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of int32 by a checked header; none in files of older versions."""
    if "tails" not in header:
        return {}
    size = fields["signature"]["chunk_size"]
    rests = [
        tokens % size
        for tokens, slots in zip(fields["num_tokens"], header["tails"] or (), strict=bool(header["tails"]))
        if slots is not None
    ]
    texts = [text for source in header["sources"] or () if source is not None for text in source["texts"]]
    return {
        "tail_ids": (sum(rests),),
        "token_ids": (sum(text["tokens"] for text in texts if text["token_ids"]),),
        "offsets": (sum(text["tokens"] for text in texts if text["offsets"]), 2),
    }


def restore_origin(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Tails, on a device, and sources from a checked header and its tensors."""
    if "tails" not in header:
        return {}
    rest = dict(tensors)

    def take(key: str, count: int) -> Tensor:
        taken, rest[key] = rest[key][:count], rest[key][count:]
        return taken

    tails = sources = None
    if header["tails"] is not None:
        size = fields["signature"]["chunk_size"]
        tails = [
            None if slots is None else Tail(take("tail_ids", tokens % size).to(device), slots)
            for tokens, slots in zip(fields["num_tokens"], header["tails"], strict=True)
        ]
    if header["sources"] is not None:
        sources = [None if source is None else _source(source, take) for source in header["sources"]]
    return {"tails": tails, "sources": sources}


def _told(source: Source) -> dict[str, Any]:
    texts = [
        {
            "tokens": text.tokens,
            "token_ids": text.token_ids is not None,
            "offsets": text.offsets is not None,
            "characters": text.characters,
            "sha256": text.sha256,
            **({"name": text.name, "line_ends": text.line_ends, "heading": text.heading} if _is_named(text) else {}),
        }
        for text in source.texts
    ]
    return {"name": source.name, "tokenizer": source.tokenizer, "texts": texts}


def _source(told: Mapping[str, Any], take: Callable[[str, int], Tensor]) -> Source:
    texts = [
        SourceText(
            text["tokens"],
            take("token_ids", text["tokens"]) if text["token_ids"] else None,
            take("offsets", text["tokens"]) if text["offsets"] else None,
            text["characters"],
            text["sha256"],
            text.get("name"),
            text.get("line_ends"),
            text.get("heading", 0),
        )
        for text in told["texts"]
    ]
    return Source(tuple(texts), told["name"], told["tokenizer"])


def _is_named(text: SourceText) -> bool:
    return (text.name, text.line_ends, text.heading) != (None, None, 0)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


# -- shards -----------------------------------------------------------------------------------------------------------


def open_memory(path: str | os.PathLike[str], *others: FileFormat) -> MemoryFile:
    """Open a memory's file and its shards.

    Args:
        path: the file.
        others: other kinds that it may be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or a shard is missing, damaged or no context memory.
    """
    seen: set[str | None] = set()
    while True:
        file = MemoryFile(path, MEMORY, *others)
        try:
            for shard in _shards(file):
                try:
                    file.attach(shard["file"], shard["sha256"])
                except FileNotFoundError:
                    raise _MissingShardError(shard["file"]) from None
            return file
        except _MissingShardError as error:
            file.__exit__()
            if file.digest in seen:
                raise ValueError(f"{file.name}: expected its shard {error.args[0]!r} beside it, got none") from None
            # another process may have replaced the memory between the two
            seen.add(file.digest)
        except BaseException:
            file.__exit__()
            raise


class _MissingShardError(Exception):
    """A file that a memory names is not there."""


def _shards(file: MemoryFile) -> list[dict[str, str]]:
    shards = file.header.get("shards", [])
    right = isinstance(shards, list) and all(
        isinstance(shard, dict)
        and set(shard) == {"file", "sha256"}
        and all(isinstance(value, str) for value in shard.values())
        and shard["file"] == os.path.basename(shard["file"])
        and shard["file"] not in ("", ".", "..")
        and "\0" not in shard["file"]
        for shard in shards
    )
    if not right:
        raise ValueError(f"{file.name}: expected shards to be a list of names and SHA-256, got {shorten(shards)}")
    return shards
