"""Files of context memories and indexes: safetensors, replaced as a whole or not at all, and checked before use.

The file's metadata hold ``header``, a JSON object, and since version 2 ``sha256`` of that text; the header holds the
CRC-32 of every tensor's bytes. A memory may have shards: files of their own kind beside it, which it names with the
digests of their headers. Unless the caller asks for maps, nothing is mapped: a file that shrinks later cannot harm a
memory that was read.
"""

import dataclasses
import hashlib
import json
import math
import mmap
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..counted import counted
from .raw_bytes import crc32, populate


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A kind of file.

    Attributes:
        name: what its header's ``format`` says.
        noun: what errors call it.
        fields: the header's fields, by version.
        integers: names of tensors of int32; all others are of floating point.
    """

    name: str
    noun: str
    fields: Mapping[int, Set[str]]
    integers: Set[str] = frozenset()

    @property
    def version(self) -> int:
        """The latest."""
        return max(self.fields)


_FIELDS = {"format", "version", "cu_slots", "num_chunks", "num_tokens", "memory_index", "signature"}
_FIELDS_3 = _FIELDS | {"checksums", "tails", "sources", "shards"}
MEMORY = FileFormat(
    "sharedllm-context-memory",
    "context memory",
    # version 4: a batch row may read several documents; version 5: texts of a document may have names of their own
    {1: _FIELDS, 2: _FIELDS | {"checksums"}, **dict.fromkeys((3, 4, 5), _FIELDS_3)},
    frozenset(("tail_ids", "token_ids", "offsets")),
)
#: A conversation: its memory, and its running text.
CONVERSATION = FileFormat(
    "sharedllm-conversation",
    "conversation",
    # version 2: the batch row may read several documents; version 3: texts may have names of their own
    dict.fromkeys((1, 2, 3), (_FIELDS_3 - {"shards"}) | {"window", "keep_first", "tokenizer"}),
    MEMORY.integers | {"running_ids"},
)
#: One of the files beside a memory's own that hold its keys and values.
SHARD = FileFormat("sharedllm-context-memory-shard", "context memory shard", {1: {"format", "version", "checksums"}})
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# what a memory's tensors may be
DTYPES = {dtype: name for name, dtype in _DTYPES.items()}
NAMES = {**DTYPES, torch.int32: "I32"}
# as in the safetensors library
_LONGEST_HEADER = 100_000_000
# read or written and summed while it is in the cache
PIECE = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def kind_of(name: str) -> str | None:
    """The kind of an existing path that is not a regular file; links are followed."""
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of a file: the file, dtype, shape, first byte in the file and bytes."""

    descriptor: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class MemoryFile:
    """An open file with a consistent header; a context manager.

    Attributes:
        name: as the caller wrote it.
        form: the kind that it is, one of those that were expected.
        header: the header's fields; their values are not checked.
        digest: SHA-256 of the header, where the file has one.
        size: bytes, without those of shards.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: no regular file, none of this kind, of another version, truncated, or a header that was changed.
    """

    def __init__(self, path: str | os.PathLike[str], form: FileFormat = MEMORY, *others: FileFormat) -> None:
        self.name, self.form = (name := os.fsdecode(path)), form
        self.digest: str | None = None
        self._shards: list[MemoryFile] = []
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        try:
            # opening a FIFO would wait for its writer
            self._descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(f"{form.noun} file: expected a file, got {name!r}, which does not exist") from None
        except OSError as error:
            kind = kind_of(name)
            if kind is None:
                raise
            raise ValueError(f"{form.noun} file: expected a regular file, got {name!r}, which is {kind}") from error
        try:
            status = os.fstat(self._descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise FileNotFoundError(f"{form.noun} file: expected a file, got {name!r}, which is a folder")
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(
                    f"{form.noun} file: expected a regular file, got {name!r}, which is "
                    f"{_KINDS.get(stat.S_IFMT(status.st_mode), 'none')}"
                )
            self.header, self._entries = self._read_head(status.st_size, (form, *others))
            self.size = status.st_size
            self._owners: dict[str, MemoryFile] = dict.fromkeys(self._entries, self)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(self, *error: object) -> None:
        # mapped tensors keep their map
        for file in (self, *self._shards):
            os.close(file._descriptor)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._entries)

    @property
    def total_size(self) -> int:
        """Bytes of the file and its shards."""
        return sum(file.size for file in (self, *self._shards))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._entries:
            raise self._error(f"a tensor {name}", "none")
        return self._entries[name].shape

    def attach(self, name: str, digest: str) -> None:
        """Take the tensors of a shard for this file's own.

        Args:
            name: of the shard, beside this file.
            digest: of its header.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another memory, or has a tensor that is there already.
        """
        folder = os.path.dirname(os.path.realpath(self.name))
        shard = MemoryFile(os.path.join(folder, name), SHARD)
        self._shards.append(shard)
        if shard.digest != digest:
            raise self._error(
                f"a shard {name!r} whose header has the SHA-256 {shorten(digest)}", f"{shard.digest}: another memory's"
            )
        for tensor, entry in shard._entries.items():
            if tensor in self._entries:
                raise self._error(f"one tensor {tensor!r} in all shards", "two")
            self._entries[tensor] = entry
            self._owners[tensor] = shard

    def expect(
        self,
        kinds: Sequence[str],
        layers: int,
        shape: tuple[int, ...],
        others: Mapping[str, tuple[int, ...]] | None = None,
    ) -> tuple[list[str], torch.dtype]:
        """Check that the file holds ``kind.0 … kind.{layers - 1}`` of every kind, of this shape and of one dtype.

        Args:
            kinds, layers, shape: what the file holds of every layer.
            others: shapes of what it holds beside them, of any dtype.

        Returns:
            The tensors' names, by kind, and their dtype.

        Raises:
            ValueError: names what differs.
        """
        others = others or {}
        count = layers * len(kinds) + len(others)
        if len(self._entries) != count:
            raise self._error(f"{counted(count, 'tensor')} for {counted(layers, 'layer')}", str(len(self._entries)))
        names = tensor_names(kinds, layers)
        shapes = {**dict.fromkeys(names, shape), **others}
        for name, expected in shapes.items():
            entry = self._entries.get(name)
            if entry is None:
                raise self._error(f"a tensor {name}", f"none, but {min(set(self._entries) - set(shapes))!r}")
            if entry.shape != expected:
                raise self._error(f"{name} of shape {expected}", str(entry.shape))
        dtypes = {self._entries[name].dtype for name in names}
        if len(dtypes) != 1:
            raise self._error("one dtype for all tensors", ", ".join(sorted(map(str, dtypes))))
        return names, dtypes.pop()

    def read(
        self, names: list[str], finish: Callable[[Tensor], Tensor], *, verify: bool, mapped: bool = False
    ) -> list[Tensor]:
        """Read tensors.

        Args:
            names: which.
            finish: called with each of them, for example to move it to a device.
            verify: whether to compare checksums, where the file has them.
            mapped: whether they may be maps of the file, copied where they are written to.

        Raises:
            ValueError: the file ends early, or the data are not what was written.
        """
        sums = self._sums() if verify else {}

        def read(name: str) -> Tensor:
            get = self._map_tensor if mapped else self._read_tensor
            tensor, crc = get(name, name in sums)
            if name in sums and f"{crc:08x}" != sums[name]:
                owner = self._owners[name]
                raise owner._error(f"{name} with CRC-32 {shorten(sums[name])}", f"{crc:08x}: the data were changed")
            return finish(tensor)

        # reading and summing run outside of Python's lock
        with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
            return list(pool.map(read, names))

    def verify(self, names: Sequence[str]) -> None:
        """Compare the checksums of tensors, where the file has them; little is held at a time.

        Raises:
            ValueError: the file ends early, or the data are not what was written.
        """
        sums = self._sums()

        def check(name: str) -> None:
            entry, crc = self._entries[name], 0
            buffer = memoryview(bytearray(min(PIECE, entry.nbytes)))
            for done in range(0, entry.nbytes, PIECE):
                piece = buffer[: min(PIECE, entry.nbytes - done)]
                self._fill(name, entry.begin + done, piece)
                crc = crc32(piece, crc)
            if f"{crc:08x}" != sums[name]:
                owner = self._owners[name]
                raise owner._error(f"{name} with CRC-32 {shorten(sums[name])}", f"{crc:08x}: the data were changed")

        with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
            list(pool.map(check, [name for name in names if name in sums]))

    def slot_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor."""
        entry = self._entries[name]
        return math.prod(entry.shape[1:]) * entry.dtype.itemsize

    def read_slots(self, name: str, first: int, end: int, data: memoryview) -> None:
        """Read rows ``first`` to ``end`` of a tensor, without a comparison of checksums.

        Raises:
            ValueError: the file is shorter than it was.
        """
        size = self.slot_bytes(name)
        self._fill(name, self._entries[name].begin + first * size, data[: (end - first) * size])

    def _fill(self, name: str, begin: int, data: memoryview) -> None:
        entry, done = self._entries[name], 0
        while done < data.nbytes:
            count = os.preadv(entry.descriptor, [data[done:]], begin + done)
            if not count:
                raise self._owners[name]._truncated(
                    f"{counted(data.nbytes, 'byte')} of {name} at byte {begin}", str(done)
                )
            done += count

    def _sums(self) -> dict[str, Any]:
        """Checksums of all tensors, as far as the files have them."""
        sums: dict[str, Any] = {}
        for file in (self, *self._shards):
            own = {name for name, owner in self._owners.items() if owner is file}
            found = file.header.get("checksums")
            if found is not None and (not isinstance(found, dict) or set(found) != own):
                raise file._error("a checksum for every tensor", shorten(found))
            sums |= found or {}
        return sums

    def _map_tensor(self, name: str, summed: bool) -> tuple[Tensor, int]:
        entry = self._entries[name]
        if not entry.nbytes or entry.begin % entry.dtype.itemsize:
            return self._read_tensor(name, summed)
        if entry.begin + entry.nbytes > os.fstat(entry.descriptor).st_size:
            raise self._owners[name]._truncated(f"{name} of {counted(entry.nbytes, 'byte')}", "a shorter file")
        with self._lock:
            if entry.descriptor not in self._maps:
                # private: what is written to a tensor is not written to the file
                self._maps[entry.descriptor] = mmap.mmap(entry.descriptor, 0, access=mmap.ACCESS_COPY)
            whole = self._maps[entry.descriptor]
        crc = 0
        if summed:
            with memoryview(whole) as view:
                for first in range(entry.begin, entry.begin + entry.nbytes, PIECE):
                    crc = crc32(view[first : min(first + PIECE, entry.begin + entry.nbytes)], crc)
        flat = torch.frombuffer(whole, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
        return flat.view(entry.dtype).view(entry.shape), crc

    def _read_tensor(self, name: str, summed: bool) -> tuple[Tensor, int]:
        entry = self._entries[name]
        tensor, crc, done = torch.empty(entry.shape, dtype=entry.dtype, device="cpu"), 0, 0
        data = bytes_of(tensor)
        while done < entry.nbytes:
            piece = data[done : done + PIECE]
            populate(piece)
            count = os.preadv(entry.descriptor, [piece], entry.begin + done)
            if count == 0:
                raise self._owners[name]._truncated(f"{counted(entry.nbytes, 'byte')} of {name}", str(done))
            crc = crc32(piece[:count], crc) if summed else 0
            done += count
        return tensor, crc

    def _read_head(self, size: int, forms: Sequence[FileFormat]) -> tuple[dict[str, Any], dict[str, _Entry]]:
        prefix = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if not prefix:
            raise ValueError(f"{self.name}: expected a {self.form.name} file, got an empty one")
        longest = min(size - 8, _LONGEST_HEADER)
        if longest < 2:
            raise self._truncated("a file of at least 10 bytes", str(size))
        if length > _LONGEST_HEADER:
            raise self._foreign("one that begins with other bytes")
        if not 2 <= length <= longest:
            raise self._truncated(f"a header of 2 to {counted(longest, 'byte')}", str(length))
        head = self._json(os.pread(self._descriptor, length, 8), "the safetensors header")
        metadata = head.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not isinstance(metadata.get("header"), str):
            raise self._foreign("a safetensors file without that header")
        text = metadata["header"]
        header = self._json(text, "the header")
        found = header.get("format")
        form = next((one for one in forms if one.name == found), None)
        if form is None:
            ours = isinstance(found, str) and found.startswith("sharedllm-")
            raise self._foreign(f"a {shorten(found)} file" if ours else "a safetensors file without that header")
        self.form, version = form, header.get("version")
        if not isinstance(version, int) or version not in form.fields:
            versions = "version 1" if form.version == 1 else f"version 1 to {form.version}"
            raise ValueError(f"{self.name}: expected {form.name} {versions}, got {shorten(version)}")
        if set(header) != form.fields[version]:
            fields = ", ".join(sorted(set(header) ^ form.fields[version]))[:200]
            raise self._error(f"the fields of version {version}", f"others: missing or unknown are {fields}")
        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
        if "checksums" in header and metadata.get("sha256") != digest:
            raise self._error("a header with its SHA-256", "another one: the header was changed")
        self.digest = digest if "checksums" in header else None
        return header, self._check_entries(head, 8 + length, size)

    def _check_entries(self, head: dict[str, Any], first: int, size: int) -> dict[str, _Entry]:
        entries = {name: self._entry(name, value, first) for name, value in head.items()}
        end = first
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if entry.begin != end:
                raise self._error(f"{name!r} to begin at byte {end - first} of the data", str(entry.begin - first))
            end += entry.nbytes
        if end != size:
            raise self._truncated(f"a file of {counted(end, 'byte')}", str(size))
        return entries

    def _entry(self, name: str, value: Any, first: int) -> _Entry:
        fields = value if isinstance(value, dict) else {}
        dtype_name, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (are_sizes(shape) and are_sizes(offsets) and len(offsets) == 2 and isinstance(dtype_name, str)):
            raise self._error(f"dtype, shape and data_offsets of {name!r}", shorten(value))
        dtypes = {"I32": torch.int32} if name in self.form.integers else _DTYPES
        if dtype_name not in dtypes:
            which = f"one of the dtypes {', '.join(dtypes)}" if len(dtypes) > 1 else "dtype I32"
            raise self._error(f"{which} for {name!r}", shorten(dtype_name))
        dtype, (begin, end) = dtypes[dtype_name], offsets
        nbytes = dtype.itemsize
        for length in shape:
            nbytes *= length
        if nbytes != end - begin:
            raise self._error(
                f"{counted(nbytes, 'byte')} of {name!r} by its shape and dtype", f"{end - begin} by its offsets"
            )
        return _Entry(self._descriptor, dtype, tuple(shape), first + begin, nbytes)

    def _json(self, text: str | bytes, what: str) -> dict[str, Any]:
        try:
            value = json.loads(
                text if isinstance(text, str) else text.decode(),
                object_pairs_hook=_without_repetition,
                parse_constant=_refuse_constant,
            )
        except (ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise self._truncated(f"{what} to be JSON", f"something else ({reason[:120]})") from None
        if not isinstance(value, dict):
            raise self._truncated(f"{what} to be a JSON object", type(value).__name__)
        return value

    def _error(self, expected: str, got: str) -> ValueError:
        return ValueError(f"{self.name}: expected {expected}, got {got}")

    def _truncated(self, expected: str, got: str) -> ValueError:
        return ValueError(
            f"{self.name}: expected a complete {self.form.name} file, got a truncated or foreign one (expected "
            f"{expected}, got {got})"
        )

    def _foreign(self, got: str) -> ValueError:
        return ValueError(f"{self.name}: expected a {self.form.name} file, got {got}")


def tensor_names(kinds: Sequence[str], layers: int) -> list[str]:
    """Names of a file's tensors, all layers of the first kind before those of the next one."""
    return [f"{kind}.{i}" for kind in kinds for i in range(layers)]


def are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether a value that JSON has given is a list of sizes or offsets."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def shorten(value: Any) -> str:
    """A value from a file, for an error text."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name stands there twice")
    return fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
