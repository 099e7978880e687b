"""Where pages of a memory lie on disk: in a file of their own, or in the files of a memory that was saved."""

import errno
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

from ..counted import counted
from .memory_file import MemoryFile


class Place(Protocol):
    """A page on disk, its bytes in the page's order."""

    def read(self, first: int, data: memoryview) -> None:
        """Fill ``data`` with the page's bytes from ``first`` on; whole parts of a layer only.

        Raises:
            OSError: the file cannot be read, or is shorter than it was.
        """

    def free(self) -> None:
        """Give the room back."""


class SpillFile:
    """A file without a name in a folder, for pages that main memory has no room for.

    It is gone when the process ends, however that happens. Pages are written once and never changed.

    Args:
        folder: where; it must exist.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: no file can be made in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fsdecode(folder)
        if not os.path.isdir(self.folder):
            raise FileNotFoundError(f"folder: expected an existing folder, got {self.folder!r}")
        # open as long as this object lives
        self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self._end = 0
        # first byte and size, in the order of the file, no two of them adjacent
        self._free: list[tuple[int, int]] = []

    def write(self, data: memoryview) -> "SpillPlace":
        """Write a page.

        Raises:
            OSError: there is no room; nothing else is lost.
        """
        size = data.nbytes
        with self._lock:
            first = self._take(size)
        try:
            done = 0
            while done < size:
                done += os.pwrite(self._file.fileno(), data[done:], first + done)
        except OSError as error:
            self.give(first, size)
            raise OSError(
                error.errno,
                f"tiers: expected room for a page of {counted(size, 'byte')} in {self.folder!r}, got: "
                f"{error.strerror}. What the memories hold stays as it is; make room on the disk, or give a larger "
                "host_bytes",
            ) from None
        return SpillPlace(self, first, size)

    def read(self, first: int, data: memoryview) -> None:
        """Fill ``data`` from a place in the file."""
        done = 0
        while done < data.nbytes:
            count = os.preadv(self._file.fileno(), [data[done:]], first + done)
            if not count:
                raise OSError(
                    errno.EIO,
                    f"tiers: expected {counted(data.nbytes, 'byte')} at byte {first} of the spill file in "
                    f"{self.folder!r}, got {done}: the file was made shorter",
                )
            done += count

    def give(self, first: int, size: int) -> None:
        """Give room back: it is used again, and what is free at the end of the file goes back to the disk."""
        with self._lock:
            spans = sorted([*self._free, (first, size)])
            joined: list[tuple[int, int]] = []
            for begin, length in spans:
                if joined and sum(joined[-1]) == begin:
                    joined[-1] = joined[-1][0], joined[-1][1] + length
                else:
                    joined.append((begin, length))
            if joined and sum(joined[-1]) == self._end:
                self._end = joined.pop()[0]
                os.ftruncate(self._file.fileno(), self._end)
            self._free = joined

    def _take(self, size: int) -> int:
        for index, (first, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(first + size, room - size)] if room > size else []
                return first
        first = self._end
        self._end += size
        return first


class SpillPlace:
    """A page in a :class:`SpillFile`."""

    def __init__(self, file: SpillFile, first: int, size: int) -> None:
        self._file, self._first, self._size = file, first, size

    def read(self, first: int, data: memoryview) -> None:
        """See :class:`Place`."""
        self._file.read(self._first + first, data)

    def free(self) -> None:
        """See :class:`Place`."""
        self._file.give(self._first, self._size)


class OpenFile:
    """The files of a memory, open as long as this object lives: removed or replaced files are still read.

    Args:
        file: with all its shards.
        names: of the tensors, in the order of a page's parts.
    """

    def __init__(self, file: MemoryFile, names: Sequence[str]) -> None:
        self.file, self.names = file, list(names)
        weakref.finalize(self, file.__exit__)


class FilePlace:
    """Slots of all tensors in the files of a memory.

    Args:
        source: the files.
        first, end: the slots.
    """

    def __init__(self, source: OpenFile, first: int, end: int) -> None:
        self._source, self._first, self._end = source, first, end

    def read(self, first: int, data: memoryview) -> None:
        """See :class:`Place`."""
        file, names = self._source.file, self._source.names
        size = (self._end - self._first) * file.slot_bytes(names[0])
        if not size:
            return
        for part in range(data.nbytes // size):
            name = names[first // size + part]
            file.read_slots(name, self._first, self._end, data[part * size : (part + 1) * size])

    def free(self) -> None:
        """The files are not the page's own."""
