"""Storage in which a memory grows: tensors with spare slots, which the versions of one memory share.

Slots of full chunks never change, so an old version stays readable as long as nothing was written before its end.
The slots of a partial last chunk are written anew when the document goes on: versions that end with them are then used
up, and their tensors replaced by :data:`OVERWRITTEN`, which refuses every use.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_USED_UP = (
    "memory: expected the memory that append has returned, got the one given to it, whose last chunk was written anew; "
    "append(…, keep=True) leaves it readable"
)


class _Overwritten:
    """Stands for a tensor whose slots now hold those of another version."""

    __slots__ = ()

    def __getattr__(self, _: str) -> Any:
        raise ValueError(_USED_UP)

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise ValueError(_USED_UP)

    def __repr__(self) -> str:
        return "OVERWRITTEN"


OVERWRITTEN: Any = _Overwritten()


class Storage:
    """Tensors ``[capacity, Hkv, D]``, keys of all layers before values, and the version that may go on in them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.newest: Version | None = None
        # two threads may append to one version: only one of them goes on in place
        self.lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Slots that there is room for."""
        return self.tensors[0].shape[0]

    def holds(self, lists: Sequence[list[Tensor]]) -> bool:
        """Whether these keys and values lie in it, wherever they begin."""
        tensors = [tensor for part in lists for tensor in part]
        return len(tensors) == len(self.tensors) and all(
            isinstance(one, Tensor) and one.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            for one, own in zip(tensors, self.tensors, strict=True)
        )

    def views(self, slots: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the first slots."""
        half = len(self.tensors) // 2
        tensors = [tensor[:slots] for tensor in self.tensors]
        return tensors[:half], tensors[half:]


class Version:
    """One version of a memory in a storage.

    Attributes:
        storage: where it lies, from slot 0 on.
        slots: how many slots of one layer it has; views of it may have fewer.
        overwritten: whether another version has written slots of it.
    """

    def __init__(self, storage: Storage, slots: int) -> None:
        self.storage, self.slots, self.overwritten = storage, slots, False
        self._lists: list[list[Tensor]] = []

    def watch(self, lists: Sequence[list[Tensor]]) -> None:
        """Note lists of its tensors, whose entries are replaced when the version is used up."""
        for one in lists:
            if not any(one is known for known in self._lists):
                self._lists.append(one)

    def check(self) -> None:
        """Refuse a version that was used up.

        Raises:
            ValueError: says what to use.
        """
        if self.overwritten:
            raise ValueError(_USED_UP)

    def use_up(self) -> None:
        """Replace the tensors of every object of this version."""
        self.overwritten = True
        for one in self._lists:
            one[:] = [OVERWRITTEN] * len(one)
        self._lists.clear()


# where slots come from: the memory so far (0) or what is new (1), first slot and end
Piece = tuple[int, int, int]


@torch.no_grad()
def grow(
    old: Sequence[Tensor], new: Sequence[Tensor], pieces: Sequence[Piece], version: Version | None, *, keep: bool
) -> tuple[Version, int]:
    """A version whose slots are the pieces, one after the other; in place where the storage allows it.

    In place, only what comes after the first piece is written. That takes as much room as the slots of the memory so
    far that move, of one layer.

    Args:
        old: ``2 M`` tensors ``[S, Hkv, D]`` of the memory so far.
        new: ``2 M`` tensors of what is new.
        pieces: the first one is the begin of the memory so far, possibly of no slots.
        version: of the memory so far, if it lies in a storage.
        keep: whether that version must stay readable.

    Returns:
        The version, and its slots.

    Raises:
        ValueError: the version was used up.
    """
    total = sum(end - begin for _, begin, end in pieces)
    fixed = pieces[0][2]
    if version is not None:
        storage = version.storage
        with storage.lock:
            version.check()
            spoils = old[0].shape[0] > fixed
            # a view of some documents is not all that would be written over
            goes_on = storage.newest is version and old[0].shape[0] == version.slots
            if goes_on and total <= storage.capacity and not (keep and spoils):
                old = list(old)
                storage.newest = next_version = Version(storage, total)
                if spoils:
                    # before the first write: an interrupted call leaves no version that reads something else
                    version.use_up()
                for target, before, after in zip(storage.tensors, old, new, strict=True):
                    moved = [
                        before[begin:end].clone() if source == 0 else after[begin:end]
                        for source, begin, end in pieces[1:]
                    ]
                    _write(target, fixed, moved)
                return next_version, total
    storage = Storage(_with_room(old, total, lambda target, i: _fill(target, old[i], new[i], pieces)))
    storage.newest = Version(storage, total)
    return storage.newest, total


def _with_room(old: Sequence[Tensor], slots: int, fill: Callable[[Tensor, int], None]) -> list[Tensor]:
    """New tensors for twice as many slots, or if the device has no memory for that, for as many."""
    # written in inference mode as well as outside
    with torch.inference_mode(False), torch.no_grad():
        for capacity in (2 * slots, slots):
            tensors: list[Tensor] = []
            try:
                for i, tensor in enumerate(old):
                    tensors.append(tensor.new_empty((capacity, *tensor.shape[1:])))
                    fill(tensors[i], i)
                return tensors
            except torch.OutOfMemoryError:
                if capacity == slots:
                    raise
            # outside of the handler, which would keep the tensors alive
            del tensors
            torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def _fill(target: Tensor, old: Tensor, new: Tensor, pieces: Sequence[Piece]) -> None:
    _write(target, 0, [(old, new)[source][begin:end] for source, begin, end in pieces])


def _write(target: Tensor, first: int, parts: Sequence[Tensor]) -> None:
    for part in parts:
        target[first : first + part.shape[0]] = part
        first += part.shape[0]


def runs_of(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of slots, put together where one begins at the end of the one before."""
    runs: list[tuple[int, int]] = []
    for first, end in spans:
        if runs and runs[-1][1] == first:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((first, end))
    return runs


def join(parts: Sequence[Tensor], *, copy: bool) -> Tensor:
    """Tensors ``[S_i, …]`` one after the other: a copy, or a view where that is how they lie in one storage."""
    held = [part for part in parts if part.shape[0]]
    if not held:
        return parts[0]
    first, place = held[0], held[0].data_ptr()
    for part in held:
        alike = part.stride() == first.stride() and part.is_contiguous() and not part.requires_grad
        own = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if copy or not (alike and own and part.data_ptr() == place):
            return torch.cat(held)
        place += part.nbytes
    slots = sum(part.shape[0] for part in held)
    return first.as_strided((slots, *first.shape[1:]), first.stride(), first.storage_offset())
