"""Pages of a tiered memory, the tiers that hold them, and tensors that a side stream is still writing."""

import dataclasses
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .page_files import Place


class Arriving(list[Tensor]):
    """Tensors by layer that a side stream is still writing: who takes one makes the current stream wait for it."""

    def __init__(self, tensors: Sequence[Tensor], events: Sequence[Any]) -> None:
        super().__init__(tensors)
        self._events, self._device = list(events), tensors[0].device

    def __getitem__(self, index: Any) -> Any:
        # a graph is captured on a stream that has waited already, and cannot wait for work outside of it
        if not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self._device)
            for event in self._events[index] if isinstance(index, slice) else (self._events[index],):
                stream.wait_event(event)
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: Any) -> Any:
        return list(self) + other

    # copies are complete
    def __reduce__(self) -> Any:
        return list, (list(self),)


@dataclasses.dataclass(frozen=True)
class PageForm:
    """Sizes of a memory's pages.

    Attributes:
        layers: ``M``.
        heads, size: ``Hkv`` and ``D``.
        dtype: of keys and values.
    """

    layers: int
    heads: int
    size: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot in all layers."""
        return 2 * self.layers * self.heads * self.size * self.dtype.itemsize

    def shape(self, slots: int) -> tuple[int, ...]:
        """``[M, 2, slots, Hkv, D]``, keys before values."""
        return self.layers, 2, slots, self.heads, self.size


class Page:
    """Consecutive slots of one document in all layers, ``[M, 2, slots, Hkv, D]``; never changed.

    Attributes:
        number: its own.
        form, slots: its sizes.
        copies: its tensors by tier, the fastest first, ``None`` where that tier has none.
        place: its copy on disk.
        ready: when the copy in main memory is complete.
    """

    __slots__ = ("__weakref__", "_dead", "copies", "form", "number", "place", "ready", "slots")

    def __init__(self, number: int, form: PageForm, slots: int, tiers: int, dead: "deque[tuple[int, Any]]") -> None:
        self.number, self.form, self.slots = number, form, slots
        self.copies: list[Tensor | None] = [None] * tiers
        self.place: Place | None = None
        self.ready: Any = None
        self._dead = dead

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return self.slots * self.form.slot_bytes

    # locks may be held: only noted here
    def __del__(self) -> None:
        self._dead.append((self.number, self.place))


class Tier:
    """Pages in one kind of memory, the one that was not used for longest first."""

    def __init__(self, name: str, device: torch.device, budget: int | None, *, pinned: bool) -> None:
        self.name, self.device, self.budget, self.pinned = name, device, budget, pinned
        self.nbytes = 0
        self._held: OrderedDict[int, tuple[weakref.ref[Page], int]] = OrderedDict()

    @property
    def is_full(self) -> bool:
        return self.budget is not None and self.nbytes > self.budget

    def add(self, page: Page) -> None:
        self._held[page.number] = weakref.ref(page), page.nbytes
        self.nbytes += page.nbytes

    def remove(self, number: int) -> None:
        found = self._held.pop(number, None)
        self.nbytes -= 0 if found is None else found[1]

    def use(self, page: Page) -> None:
        if page.number in self._held:
            self._held.move_to_end(page.number)

    def oldest(self) -> Page | None:
        """The page that was not used for longest; ``None`` for one that nobody has any more."""
        number, (reference, _) = next(iter(self._held.items()))
        page = reference()
        if page is None:
            self.remove(number)
        return page

    def empty(self, form: PageForm, slots: int) -> Tensor:
        if self.pinned:
            return torch.empty(form.shape(slots), dtype=form.dtype, pin_memory=True)
        return torch.empty(form.shape(slots), dtype=form.dtype, device=self.device)
