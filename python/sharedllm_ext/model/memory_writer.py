"""Writing files of context memories and indexes: in place of an older one as a whole, or not at all.

A memory may be written as several files: shards, and a file that names them. The shards have names of their own, so the
older memory stays whole until the file that names the new ones takes its place; shards that nothing names are removed
by the call that wrote them, or by a later one.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .memory_file import MEMORY, NAMES, PIECE, SHARD, FileFormat, bytes_of, kind_of
from .raw_bytes import crc32

_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# a file's own name in those of its shards, which are longer
_LONGEST_STEM = 160
# the rest of a piece is copied to it, what exceeds it is not
_BUFFER = 1 << 16
# where large data begin in a file: as PyTorch's tensors in memory, so that copies between them are faster
_ALIGNMENT = 64
# seconds for another process to replace a file; after them older shards are left to a later call
_PATIENCE = 10.0


@dataclasses.dataclass(frozen=True)
class TensorInParts:
    """A tensor that is never there as a whole.

    Attributes:
        shape, dtype: of the whole.
        parts: gives tensors that are the whole one after the other, along the first dimension.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


Writable = Tensor | TensorInParts


def write_tensors(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    tensors: Mapping[str, Writable],
    form: FileFormat = MEMORY,
    version: int | None = None,
    shards: Sequence[Mapping[str, Writable]] = (),
) -> None:
    """Write tensors and their header to a file, which is replaced when the new one is complete.

    Symbolic links are followed, the permissions of an existing file kept; a new one gets those of any new file.
    Leftovers of an interrupted call are removed; files that another process is writing are not.

    Args:
        path: the file; its folder must exist.
        header: what ``json`` can write.
        tensors: on any device.
        form: the kind of file.
        version: of the format; default: the latest.
        shards: tensors of further files beside this one, whose names and digests are put into the header.

    Raises:
        ValueError: ``path`` is something else than a regular file.
        OSError: the file cannot be written.
    """
    target = _target(path, form.noun)
    folder, base = os.path.split(target)
    mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else None
    # of a fixed length, however long the file's own name is
    prefix = f".sharedllm-{hashlib.sha256(os.fsencode(base)).hexdigest()[:16]}-"
    written: list[dict[str, str]] = []
    try:
        _clear(folder, prefix, form)
        with contextlib.ExitStack() as stack:
            whole = stack.enter_context(_undone(folder, written))
            for name, part in zip(_shard_names(base, len(shards)), shards, strict=True):
                # locked until the file that names it is in place
                temporary, file = stack.enter_context(_temporary(folder, prefix))
                digest = _write(file, {}, part, SHARD, SHARD.version)
                _finish(file, mode)
                written.append({"file": name, "sha256": digest})
                os.replace(temporary, os.path.join(folder, name))
            temporary, file = stack.enter_context(_temporary(folder, prefix))
            fields = {**header, "shards": written} if "shards" in form.fields[version or form.version] else header
            _write(file, fields, tensors, form, version or form.version)
            _finish(file, mode)
            with _folder(folder) as (descriptor, alone):
                if shards:
                    os.fsync(descriptor)
                os.replace(temporary, target)
                whole.append(True)
                if alone:
                    _clear_shards(folder, base, {shard["file"] for shard in written})
    except OSError as error:
        # by the name that the caller knows
        raise OSError(error.errno, error.strerror, target) from None


def shards_of(tensors: Mapping[str, Writable], most: int | str) -> list[dict[str, Writable]]:
    """Cut tensors into shards of at most so many bytes, in their order; a larger tensor has a shard of its own.

    Args:
        tensors: what to write.
        most: bytes, or a text such as ``"5GB"`` (of 10^9 bytes).

    Raises:
        ValueError: the size is none.
    """
    limit = bytes_in("max_shard_size", most, least=1)
    shards: list[dict[str, Writable]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def bytes_in(name: str, size: int | str, *, least: int) -> int:
    """A number of bytes, given as such or as a text such as ``"5GB"`` (of 10^9 bytes).

    Args:
        name: of the argument, for the error.
        size: what was given.
        least: the smallest size.

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B|)", str(size).strip().upper())
    number = -1 if found is None or isinstance(size, (bool, float)) else int(float(found[1]) * _SIZES[found[2]])
    if number < least:
        raise ValueError(f"{name}: expected a number of bytes from {least} on, or a text such as '5GB', got {size!r}")
    return number


def _finish(file: BinaryIO, mode: int | None) -> None:
    if mode is not None:
        os.fchmod(file.fileno(), mode)
    file.flush()
    os.fsync(file.fileno())


def _shard_names(base: str, count: int) -> list[str]:
    token = secrets.token_hex(8)
    return [f"{_stem(base)}.{token}-{i:05}-of-{count:05}" for i in range(1, count + 1)]


def _stem(base: str) -> str:
    if len(os.fsencode(base)) <= _LONGEST_STEM:
        return base
    return f"sharedllm-{hashlib.sha256(os.fsencode(base)).hexdigest()[:16]}"


@contextlib.contextmanager
def _undone(folder: str, written: list[dict[str, str]]) -> Iterator[list[bool]]:
    """Remove shards at the end, unless something was put into the list: the file that names them is in place."""
    whole: list[bool] = []
    try:
        yield whole
    finally:
        for shard in () if whole else written:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, shard["file"]))


@contextlib.contextmanager
def _folder(folder: str) -> Iterator[tuple[int, bool]]:
    """A folder's descriptor, and whether no other process replaces a memory in it or removes its shards meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline, alone = time.monotonic() + _PATIENCE, False
    try:
        while not alone and time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                # a file system without locks
                break
        yield descriptor, alone
    finally:
        os.close(descriptor)


def _clear_shards(folder: str, base: str, named: set[str]) -> None:
    """Remove shards of a file's older contents, and those of interrupted calls: without a lock."""
    pattern = re.compile(re.escape(_stem(base)) + r"\.[0-9a-f]{16}-\d{5}-of-\d{5}")
    for entry in os.listdir(folder):
        if entry not in named and pattern.fullmatch(entry):
            _remove_if_ours(os.path.join(folder, entry), SHARD)


def _target(path: str | os.PathLike[str], noun: str) -> str:
    name = os.fsdecode(path)
    kind = kind_of(name)
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


@contextlib.contextmanager
def _temporary(folder: str, prefix: str) -> Iterator[tuple[str, BinaryIO]]:
    """A new file in the folder, locked as long as it is open and gone afterwards unless it was renamed."""
    while True:
        name = os.path.join(folder, f"{prefix}{secrets.token_hex(8)}.partial")
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb", buffering=_BUFFER) as file:
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
        if entry == f"{prefix}{random}.partial" and len(random) == 16:
            _remove_if_ours(os.path.join(folder, entry), form)


def _remove_if_ours(name: str, form: FileFormat) -> None:
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


def _write(
    file: BinaryIO, header: Mapping[str, Any], tensors: Mapping[str, Writable], form: FileFormat, version: int
) -> str:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    checksums, aligned = dict.fromkeys(tensors, 0), _ALIGNMENT if end >= PIECE else 8

    def text() -> str:
        fields = {"format": form.name, "version": version, **header}
        return json.dumps({**fields, "checksums": {name: f"{crc:08x}" for name, crc in checksums.items()}})

    def head(text: str) -> bytes:
        metadata = {"header": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        whole = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        length = len(whole) + -(8 + len(whole)) % aligned
        return length.to_bytes(8, "little") + whole.ljust(length)

    # of the final length; the checksums are filled in later
    file.write(head(text()))
    for name, tensor in tensors.items():
        for part in [tensor] if isinstance(tensor, Tensor) else tensor.parts():
            data = bytes_of(part.detach().cpu().contiguous())
            for first in range(0, len(data), PIECE):
                piece = data[first : first + PIECE]
                checksums[name] = crc32(piece, checksums[name])
                file.write(piece)
    file.seek(0)
    file.write(head(text()))
    return hashlib.sha256(text().encode()).hexdigest()
