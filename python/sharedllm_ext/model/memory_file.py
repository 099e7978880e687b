"""Files of context memories and indexes: safetensors, replaced as a whole or not at all, and checked before use.

The file's metadata hold ``header``, a JSON object, and since version 2 ``sha256`` of that text; the header holds the
CRC-32 of every tensor's bytes. Nothing is mapped: a file that shrinks later cannot harm a memory that was read.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A kind of file.

    Attributes:
        name: what its header's ``format`` says.
        noun: what errors call it.
        fields: the header's fields, by version.
    """

    name: str
    noun: str
    fields: Mapping[int, Set[str]]

    @property
    def version(self) -> int:
        """The latest, which is written."""
        return max(self.fields)


_FIELDS = {"format", "version", "cu_slots", "num_chunks", "num_tokens", "memory_index", "signature"}
MEMORY = FileFormat("sharedllm-context-memory", "context memory", {1: _FIELDS, 2: _FIELDS | {"checksums"}})
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# what a memory's tensors may be
DTYPES = {dtype: name for name, dtype in _DTYPES.items()}
# as in the safetensors library
_LONGEST_HEADER = 100_000_000
# read or written and summed while it is in the cache
_PIECE = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def write_tensors(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor], form: FileFormat = MEMORY
) -> None:
    """Write tensors and their header to a file, which is replaced when the new one is complete.

    Symbolic links are followed, the permissions of an existing file kept; a new one gets those of any new file.
    Leftovers of an interrupted call are removed; files that another process is writing are not.

    Args:
        path: the file; its folder must exist.
        header: what ``json`` can write.
        tensors: on any device.
        form: the kind of file.

    Raises:
        ValueError: ``path`` is something else than a regular file.
        OSError: the file cannot be written.
    """
    target = _target(path, form.noun)
    folder, base = os.path.split(target)
    mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else None
    # of a fixed length, however long the file's own name is
    prefix = f".sharedllm-{hashlib.sha256(os.fsencode(base)).hexdigest()[:16]}-"
    try:
        _clear(folder, prefix, form)
        with _temporary(folder, prefix) as (temporary, file):
            _write(file, header, tensors, form)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
    except OSError as error:
        # by the name that the caller knows
        raise OSError(error.errno, error.strerror, target) from None


def _target(path: str | os.PathLike[str], noun: str) -> str:
    name = os.fsdecode(path)
    kind = _kind(name)
    if kind is None and name.endswith(os.sep):
        kind = "a folder's name"
    if kind is not None:
        raise ValueError(f"{noun} file: expected a regular file or a new name, got {name!r}, which is {kind}")
    target = os.path.realpath(name)
    if not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(
            f"{noun} file: expected an existing folder, got {os.path.dirname(target)!r}, which does not exist"
        )
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    return target


def _kind(name: str) -> str | None:
    """The kind of an existing path that is not a regular file; links are followed."""
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


@contextlib.contextmanager
def _temporary(folder: str, prefix: str) -> Iterator[tuple[str, BinaryIO]]:
    """A new file in the folder, locked as long as it is open and gone afterwards unless it was renamed."""
    while True:
        name = os.path.join(folder, f"{prefix}{secrets.token_hex(8)}.partial")
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb", buffering=_PIECE) as file:
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    # another process is removing it
                    continue
                except OSError:
                    # a file system without locks: no process can remove leftovers there either
                    pass
                if os.fstat(descriptor).st_nlink == 0:
                    # another process has removed it already
                    continue
                yield name, file
                return
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)


def _clear(folder: str, prefix: str, form: FileFormat) -> None:
    """Remove leftovers of interrupted calls: files with their name and content, and without a lock."""
    for entry in os.listdir(folder):
        random = entry.removeprefix(prefix).removesuffix(".partial")
        if entry != f"{prefix}{random}.partial" or len(random) != 16:
            continue
        name = os.path.join(folder, entry)
        # whatever cannot be opened, locked or removed is not ours to remove
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                begin = os.pread(descriptor, 128, 0)
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and (not begin or form.name.encode() in begin):
                    os.unlink(name)
            finally:
                os.close(descriptor)


def _write(file: BinaryIO, header: Mapping[str, Any], tensors: Mapping[str, Tensor], form: FileFormat) -> None:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = DTYPES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    checksums = dict.fromkeys(tensors, 0)

    def head() -> bytes:
        fields = {"format": form.name, "version": form.version, **header}
        text = json.dumps({**fields, "checksums": {name: f"{crc:08x}" for name, crc in checksums.items()}})
        metadata = {"header": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        whole = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        return (len(whole) + -len(whole) % 8).to_bytes(8, "little") + whole.ljust(len(whole) + -len(whole) % 8)

    # of the final length; the checksums are filled in later
    file.write(head())
    for name, tensor in tensors.items():
        data = _bytes_of(tensor.detach().cpu().contiguous())
        for first in range(0, len(data), _PIECE):
            piece = data[first : first + _PIECE]
            checksums[name] = zlib.crc32(piece, checksums[name])
            file.write(piece)
    file.seek(0)
    file.write(head())


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of a file: dtype, shape, first byte in the file and bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class MemoryFile:
    """An open file with a consistent header; a context manager.

    Attributes:
        name: as the caller wrote it.
        header: the header's fields; their values are not checked.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: no regular file, none of this kind, of another version, truncated, or a header that was changed.
    """

    def __init__(self, path: str | os.PathLike[str], form: FileFormat = MEMORY) -> None:
        self.name, self._form = (name := os.fsdecode(path)), form
        try:
            # opening a FIFO would wait for its writer
            self._descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(f"{form.noun} file: expected a file, got {name!r}, which does not exist") from None
        except OSError as error:
            kind = _kind(name)
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
            self.header, self._entries = self._read_head(status.st_size)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

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
            raise self._error(f"{count} tensors for {layers} layers", str(len(self._entries)))
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

    def read(self, names: list[str], finish: Callable[[Tensor], Tensor], *, verify: bool) -> list[Tensor]:
        """Read tensors.

        Args:
            names: which.
            finish: called with each of them, for example to move it to a device.
            verify: whether to compare checksums, where the file has them.

        Raises:
            ValueError: the file ends early, or the data are not what was written.
        """
        checksums = self.header.get("checksums") if verify else None
        if checksums is not None and (not isinstance(checksums, dict) or set(checksums) != set(self._entries)):
            raise self._error("a checksum for every tensor", shorten(checksums))

        def read(name: str) -> Tensor:
            tensor, crc = self._read_tensor(name, checksums is not None)
            if checksums is not None and f"{crc:08x}" != checksums[name]:
                raise self._error(f"{name} with CRC-32 {shorten(checksums[name])}", f"{crc:08x}: the data were changed")
            return finish(tensor)

        # reading and summing run outside of Python's lock
        with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
            return list(pool.map(read, names))

    def _read_tensor(self, name: str, summed: bool) -> tuple[Tensor, int]:
        entry = self._entries[name]
        tensor, crc, done = torch.empty(entry.shape, dtype=entry.dtype, device="cpu"), 0, 0
        data = _bytes_of(tensor)
        while done < entry.nbytes:
            piece = data[done : done + _PIECE]
            count = os.preadv(self._descriptor, [piece], entry.begin + done)
            if count == 0:
                raise self._truncated(f"{entry.nbytes} bytes of {name}", str(done))
            crc = zlib.crc32(piece[:count], crc) if summed else 0
            done += count
        return tensor, crc

    def _read_head(self, size: int) -> tuple[dict[str, Any], dict[str, _Entry]]:
        prefix = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise self._truncated(
                f"a header of 2 to {max(2, min(size - 8, _LONGEST_HEADER))} bytes",
                f"{length}" if len(prefix) == 8 else f"a file of {len(prefix)} bytes",
            )
        head = self._json(os.pread(self._descriptor, length, 8), "the safetensors header")
        metadata = head.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not isinstance(metadata.get("header"), str):
            raise self._foreign("a safetensors file without that header")
        text = metadata["header"]
        header = self._json(text, "the header")
        form, found = self._form, header.get("format")
        if found != form.name:
            ours = isinstance(found, str) and found.startswith("sharedllm-")
            raise self._foreign(f"a {shorten(found)} file" if ours else "a safetensors file without that header")
        version = header.get("version")
        if not isinstance(version, int) or version not in form.fields:
            versions = "version 1" if form.version == 1 else f"version 1 to {form.version}"
            raise ValueError(f"{self.name}: expected {form.name} {versions}, got {shorten(version)}")
        if set(header) != form.fields[version]:
            fields = ", ".join(sorted(set(header) ^ form.fields[version]))[:200]
            raise self._error(f"the fields of version {version}", f"others: missing or unknown are {fields}")
        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
        if "checksums" in header and metadata.get("sha256") != digest:
            raise self._error("a header with its SHA-256", "another one: the header was changed")
        return header, self._check_entries(head, 8 + length, size)

    def _check_entries(self, head: dict[str, Any], first: int, size: int) -> dict[str, _Entry]:
        entries = {name: self._entry(name, value, first) for name, value in head.items()}
        end = first
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if entry.begin != end:
                raise self._error(f"{name!r} to begin at byte {end - first} of the data", str(entry.begin - first))
            end += entry.nbytes
        if end != size:
            raise self._truncated(f"a file of {end} bytes", str(size))
        return entries

    def _entry(self, name: str, value: Any, first: int) -> _Entry:
        fields = value if isinstance(value, dict) else {}
        dtype_name, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (are_sizes(shape) and are_sizes(offsets) and len(offsets) == 2 and isinstance(dtype_name, str)):
            raise self._error(f"dtype, shape and data_offsets of {name!r}", shorten(value))
        if dtype_name not in _DTYPES:
            raise self._error(f"one of the dtypes {', '.join(_DTYPES)} for {name!r}", shorten(dtype_name))
        dtype, (begin, end) = _DTYPES[dtype_name], offsets
        nbytes = dtype.itemsize
        for length in shape:
            nbytes *= length
        if nbytes != end - begin:
            raise self._error(f"{nbytes} bytes of {name!r} by its shape and dtype", f"{end - begin} by its offsets")
        return _Entry(dtype, tuple(shape), first + begin, nbytes)

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
            f"{self.name}: expected a complete {self._form.name} file, got a truncated or foreign one (expected "
            f"{expected}, got {got})"
        )

    def _foreign(self, got: str) -> ValueError:
        return ValueError(f"{self.name}: expected a {self._form.name} file, got {got}")


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
