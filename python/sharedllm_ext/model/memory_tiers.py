"""Tiers of memories: pages of keys and values on the device, in main memory and on disk, each with a byte budget."""

import itertools
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from .memory_file import bytes_of
from .memory_writer import bytes_in
from .page_files import Place, SpillFile
from .pages import Arriving, Page, PageForm, Tier

#: Layers are brought in so many groups: the first one arrives while the others are still on their way.
LAYER_GROUPS = 4
# what is brought at a time beside the result; a question's chunks are usually less
_STAGED_BYTES = 2 << 30
# reads of pages at a time
_READERS = 8


class MemoryTiers:
    """Where the pages of tiered memories lie: on the device, in main memory, on disk.

    A new page begins in the first tier. What exceeds a tier's budget goes to the next one, pages that were not used for
    longest first. A page that is used gets a copy in the faster tiers, where their budgets have room for one at all;
    slower tiers keep theirs. What a question reads comes on top of the budgets, and so do the pick's keys, which stay
    on the device. Several memories may share tiers, and several threads may ask.

    On a CUDA device the tiers are ``device``, ``host`` (page-locked memory) and ``disk``, on the CPU ``memory`` and
    ``disk``.

    Args:
        device: where questions are answered, the model's.
        device_bytes: budget on a CUDA device, in bytes or as a text such as ``"2GB"`` (of 10^9 bytes).
        host_bytes: budget in main memory; ``None`` for no limit.
        folder: for the disk tier, a file without a name that is gone with the process; ``None`` for no such tier.
        page_bytes: a page holds as few chunks as reach it.
        pin: whether main memory is page-locked, on CUDA; copies are then asynchronous, and much faster.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no sizes.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        device_bytes: int | str = 0,
        host_bytes: int | str | None = None,
        folder: str | os.PathLike[str] | None = None,
        page_bytes: int | str = 1 << 22,
        pin: bool = True,
    ) -> None:
        given = torch.device(device)
        if given.type == "cuda" and given.index is None:
            given = torch.device("cuda", torch.cuda.current_device())
        self.device = given
        on_device = bytes_in("device_bytes", device_bytes, least=0)
        host = None if host_bytes is None else bytes_in("host_bytes", host_bytes, least=0)
        self.page_bytes = bytes_in("page_bytes", page_bytes, least=1)
        cpu = torch.device("cpu")
        if given.type == "cpu":
            if on_device:
                raise ValueError(
                    f"device_bytes: expected 0 on the CPU, whose memory host_bytes limits, got {on_device}"
                )
            self._tiers = [Tier("memory", cpu, host, pinned=False)]
        else:
            self._tiers = [
                Tier("device", given, on_device, pinned=False),
                Tier("host", cpu, host, pinned=pin),
            ]
        self._spill = None if folder is None else SpillFile(folder)
        self._on_disk: dict[int, int] = {}
        # all copies from and to the device, in the order in which they were asked for
        self._side = torch.cuda.Stream(given) if given.type == "cuda" else None
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._dead: deque[tuple[int, Any]] = deque()

    def __reduce__(self) -> Any:
        raise TypeError(
            "tiers: expected to stay where they are, got a pickle or a copy; use TieredMemory.save and load"
        )

    @property
    def tier_names(self) -> list[str]:
        """The tiers, the fastest first."""
        return [*(tier.name for tier in self._tiers), "disk"]

    def nbytes(self, pages: Sequence[Page] | None = None) -> dict[str, int]:
        """Bytes by tier of some pages, or of all; a page counts in every tier that has a copy of it."""
        with self._lock:
            self._bury()
            if pages is None:
                return {**{tier.name: tier.nbytes for tier in self._tiers}, "disk": sum(self._on_disk.values())}
            unique = {page.number: page for page in pages}.values()
            found = {
                tier.name: sum(page.nbytes for page in unique if page.copies[index] is not None)
                for index, tier in enumerate(self._tiers)
            }
            return {**found, "disk": sum(page.nbytes for page in unique if page.place is not None)}

    # -- pages come and go --------------------------------------------------------------------------------------------

    def insert(self, tensor: Tensor, form: PageForm) -> Page:
        """A page of a tensor ``[M, 2, slots, Hkv, D]`` on the device, which must not be changed afterwards.

        Raises:
            MemoryError: the tiers have no room, and there is none for the disk.
            OSError: the disk has no room. In both cases all other pages stay.
        """
        page = Page(next(self._numbers), form, tensor.shape[2], len(self._tiers), self._dead)
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            tensor.record_stream(self._side)
        with self._lock:
            self._bury()
            self._keep(page, 0, tensor)
            self._make_room(0)
        return page

    def insert_from_disk(self, place: Place, form: PageForm, slots: int) -> Page:
        """A page that lies in a file already."""
        page = Page(next(self._numbers), form, slots, len(self._tiers), self._dead)
        page.place = place
        with self._lock:
            self._on_disk[page.number] = page.nbytes
        return page

    def move(self, pages: Sequence[Page], tier: str) -> None:
        """Bring pages to a tier, and drop their copies in faster ones.

        Raises:
            MemoryError, OSError: the tier has no room; no page is lost.
            ValueError: there is no such tier.
        """
        if tier not in self.tier_names:
            raise ValueError(f"tier: expected one of {', '.join(self.tier_names)}, got {tier!r}")
        index = self.tier_names.index(tier)
        for page in pages:
            if index == len(self._tiers):
                with self._lock:
                    self._to_disk(page)
                    self._drop_above(page, index)
                continue
            host = self._on_host([page], keep=index == len(self._tiers) - 1).get(page.number)
            with self._lock:
                if page.copies[index] is None:
                    if host is None:
                        # it is in a faster tier alone
                        self._down(page, index - 1)
                    else:
                        last = index == len(self._tiers) - 1
                        self._keep(page, index, host if last else self._copied(page, host, index))
                self._drop_above(page, index)
                self._make_room(index)

    def _drop_above(self, page: Page, index: int) -> None:
        for faster in range(index):
            self._drop(page, faster)

    def _bury(self) -> None:
        """Forget pages that nobody has any more; their tensors are gone already."""
        while self._dead:
            number, place = self._dead.popleft()
            for tier in self._tiers:
                tier.remove(number)
            self._on_disk.pop(number, None)
            if place is not None:
                place.free()

    def _keep(self, page: Page, index: int, tensor: Tensor) -> None:
        page.copies[index] = tensor
        self._tiers[index].add(page)

    def _drop(self, page: Page, index: int) -> None:
        if page.copies[index] is not None:
            page.copies[index] = None
            self._tiers[index].remove(page.number)

    def _make_room(self, index: int) -> None:
        """Move what exceeds a tier's budget to the next one."""
        tier = self._tiers[index]
        while tier.is_full:
            page = tier.oldest()
            if page is None:
                continue
            elsewhere = page.place is not None or any(
                copy is not None for other, copy in enumerate(page.copies) if other != index
            )
            if not elsewhere:
                self._down(page, index)
            self._drop(page, index)
            if index + 1 < len(self._tiers):
                self._make_room(index + 1)

    def _down(self, page: Page, index: int) -> None:
        """Copy a page from a tier to the next one."""
        if index + 1 == len(self._tiers):
            self._to_disk(page)
            return
        source = page.copies[index]
        assert source is not None
        self._keep(page, index + 1, self._copied(page, source, index + 1))

    def _copied(self, page: Page, source: Tensor, index: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if self._side is None:
                return source.clone()
            with torch.cuda.stream(self._side):
                target = self._tiers[index].empty(page.form, page.slots)
                target.copy_(source, non_blocking=True)
                if target.device.type == "cpu":
                    page.ready = self._side.record_event()
        return target

    def _to_disk(self, page: Page) -> None:
        if page.place is not None:
            return
        if self._spill is None:
            tier = self._tiers[-1]
            raise MemoryError(
                f"tiers: expected a folder for what exceeds host_bytes, got none; {tier.name!r} holds "
                f"{counted(tier.nbytes, 'byte')}, of a budget of {tier.budget}"
            )
        copies = [copy for copy in page.copies if copy is not None]
        page.place = self._spill.write(bytes_of(self._settled(page, copies[-1])))
        self._on_disk[page.number] = page.nbytes

    def _settled(self, page: Page, copy: Tensor) -> Tensor:
        """A copy on the CPU that is complete."""
        if copy.device.type != "cpu":
            assert self._side is not None
            with torch.cuda.stream(self._side):
                return copy.cpu()
        if page.ready is not None:
            page.ready.synchronize()
        return copy

    # -- reading ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gather(self, parts: Sequence[tuple[Page, int, int]], form: PageForm) -> tuple[list[Tensor], list[Tensor]]:
        """Slots of pages, one after the other, on the device.

        On CUDA the copies run on a side stream, a few layers at a time; who takes a layer from the lists makes the
        current stream wait for it.

        Args:
            parts: pages, each with its first slot and end.
            form: of all of them.

        Returns:
            Keys and values by layer, ``[S, Hkv, D]`` each.

        Raises:
            OSError: a page cannot be read from the disk.
        """
        shape = sum(end - first for _, first, end in parts), form.heads, form.size
        # read in later calls, which may be outside inference mode
        with torch.inference_mode(False):
            lists = [
                [torch.empty(shape, dtype=form.dtype, device=self.device) for _ in range(form.layers)] for _ in range(2)
            ]
        if self._side is not None:
            # what the allocator gives may be in use on the current stream until now
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            for tensor in itertools.chain(*lists):
                tensor.record_stream(self._side)
        events: list[Any] = [None] * form.layers
        at = 0
        most = max(1, _STAGED_BYTES // max(1, form.slot_bytes * max((page.slots for page, _, _ in parts), default=1)))
        for begin in range(0, len(parts), most):
            batch = parts[begin : begin + most]
            self._fill(batch, lists, at, events)
            at += sum(end - first for _, first, end in batch)
        if self._side is None:
            return lists[0], lists[1]
        if not parts:
            events = [self._side.record_event()] * form.layers
        return Arriving(lists[0], events), Arriving(lists[1], events)

    def _fill(
        self, parts: Sequence[tuple[Page, int, int]], lists: list[list[Tensor]], at: int, events: list[Any]
    ) -> None:
        pages = list({page.number: page for page, _, _ in parts}.values())
        found: dict[int, Tensor] = {}
        with self._lock:
            self._bury()
            for page in pages:
                for index, tier in enumerate(self._tiers):
                    tier.use(page)
                    copy = page.copies[index]
                    if index == 0 and copy is not None:
                        found[page.number] = copy
        far = [page for page in pages if page.number not in found]
        host = self._on_host(far)
        if len(self._tiers) == 1:
            found |= host
            host = {}
        layers, slots = len(lists[0]), sum(end - first for _, first, end in parts)
        with torch.inference_mode(False), torch.cuda.stream(self._side):
            staged = {number: torch.empty_like(tensor, device=self.device) for number, tensor in host.items()}
            found |= staged
            taken = [found[page.number].flatten(0, 1)[:, first:end].unbind(0) for page, first, end in parts]
            step = -(-layers // LAYER_GROUPS)
            for group in range(0, layers, step):
                inside = range(group, min(group + step, layers))
                for number, target in staged.items():
                    target[group : group + step].copy_(host[number][group : group + step], non_blocking=True)
                for layer, (kind, outs) in itertools.product(inside, enumerate(lists)):
                    torch.cat([part[2 * layer + kind] for part in taken], out=outs[layer][at : at + slots])
                if self._side is not None:
                    events[group : group + step] = [self._side.record_event()] * len(inside)
        with self._lock:
            for page in far:
                if page.number in staged:
                    self._promote(page, 0, staged[page.number])

    def _on_host(self, pages: Sequence[Page], *, keep: bool = True) -> dict[int, Tensor]:
        """Copies in main memory by number, read from the disk where there is none; none of a page on the device alone.

        Args:
            pages: which.
            keep: whether to keep what was read in its tier, within the budget.
        """
        found: dict[int, Tensor] = {}
        missing = []
        with self._lock:
            for page in pages:
                copy = page.copies[-1]
                if copy is not None:
                    found[page.number] = copy
                elif page.place is not None:
                    missing.append(page)
        tier = self._tiers[-1]

        def read(page: Page) -> Tensor:
            tensor = tier.empty(page.form, page.slots)
            assert page.place is not None
            page.place.read(0, bytes_of(tensor))
            return tensor

        # outside of inference mode: the tensors are kept
        with torch.inference_mode(False):
            if len(missing) > 1:
                with ThreadPoolExecutor(min(_READERS, len(missing))) as pool:
                    tensors = list(pool.map(read, missing))
            else:
                tensors = [read(page) for page in missing]
        with self._lock:
            for page, tensor in zip(missing, tensors, strict=True):
                found[page.number] = tensor
                if keep:
                    self._promote(page, len(self._tiers) - 1, tensor)
        return found

    def _promote(self, page: Page, index: int, tensor: Tensor) -> None:
        """Keep a further copy of a page in a tier, if others can make room for it."""
        tier = self._tiers[index]
        if page.copies[index] is not None or (tier.budget is not None and page.nbytes > tier.budget):
            return
        self._keep(page, index, tensor)
        try:
            self._make_room(index)
        except (OSError, MemoryError):
            # it is held elsewhere, others may not be: a question needs no room that there is not
            self._drop(page, index)

    def part(self, page: Page, index: int) -> Tensor:
        """Slots ``[slots, Hkv, D]`` on the CPU of one layer's keys (``2 * layer``) or values (``2 * layer + 1``)."""
        with self._lock:
            copy = next((copy for copy in reversed(page.copies) if copy is not None), None)
        if copy is not None:
            return self._settled(page, copy.flatten(0, 1)[index])
        form = page.form
        tensor = torch.empty((page.slots, form.heads, form.size), dtype=form.dtype, device="cpu")
        assert page.place is not None
        page.place.read(index * tensor.nbytes, bytes_of(tensor))
        return tensor
