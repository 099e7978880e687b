"""What the rows of a step read where rows come and go, each with a memory of its own or of others too."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..injection import InjectedContext
from ..joins import join
from ..rotary import Tables
from ..upload import upload


class Read(NamedTuple):
    """What a row reads of a memory's tensors.

    Attributes:
        source: which of the step's tensors.
        slots: first slot and end.
        position: rotary position of the query.
    """

    source: int
    slots: tuple[int, int]
    position: int


class Room(NamedTuple):
    """How much the rows of a step may read.

    Attributes:
        groups: most different reads of each source.
        each: most reads of a row.
        reads: most reads of all rows together; counts only where ``each`` is not 1.
    """

    groups: tuple[int, ...]
    each: int = 1
    reads: int = 0


def room_of(reads: Sequence[tuple[Read, ...]], sources: int) -> Room | Read | None:
    """What a step needs whose rows read this: what all of them read, if that is one thing, or room for it.

    Room grows by powers of two, so that few graphs serve many steps; ``None`` where nothing is read.
    """
    different, each = {read for own in reads for read in own}, max(map(len, reads))
    if each == 0:
        return None
    if each == 1 and len(different) == 1 and all(reads):
        return next(iter(different))
    groups = tuple(_power(sum(read.source == source for read in different)) for source in range(sources))
    return Room(groups, _power(each), _power(sum(map(len, reads))) if each > 1 else 0)


def _power(count: int) -> int:
    """The power of two that is not below a count."""
    return 1 << max(0, count - 1).bit_length()


class MemoryGroups:
    """Like :class:`~sharedllm_ext.model.injection.InjectedContext` for one token a row, with rows that change.

    Rows that read the same are one row of the operator. Which ones do is read from the device, so that a graph need not
    be captured again. Where all rows read the same, padding included, nothing has to be put in order. Where a row may
    read several documents, each is a row of the operator, and what they give is joined.

    Args:
        sources: keys and values ``[S, Hkv, D]`` of each layer, of each memory.
        rows: of the step.
        groups: how much there is room for, or what all rows read.
        tables: cos and sin of each layer.
        device: of all of them.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        sources: Sequence[tuple[list[Tensor], list[Tensor]]],
        rows: int,
        groups: Room | Read,
        tables: Sequence[Tables],
        device: torch.device,
    ) -> None:
        self._rows, self._device = rows, device
        self._room = None if isinstance(groups, Read) else groups
        # where queries lie for the operator; a row that reads less than others needs a place where nothing is read
        self._places = rows if isinstance(groups, Read) or groups.each == 1 else groups.reads + 1
        #: of each layer, of each source
        self.keys = [list(keys) for keys in zip(*(keys for keys, _ in sources), strict=True)]
        self.values = [list(values) for values in zip(*(values for _, values in sources), strict=True)]
        cos, sin = ([table[side] for table in tables] for side in (0, 1))

        def integers(values: Any) -> Tensor:
            return upload(torch.tensor(values, dtype=torch.int64), device)

        self._order = self._place = None
        if self._room is not None:
            self._order, self._place = integers([0] * self._places), integers([0] * rows * self._room.each)
        moved = (None, None) if self._joins else (self._order, self._place)
        self._contexts: list[InjectedContext] = []
        for index in range(len(sources)):
            if isinstance(groups, Read):
                cu_q, slots, positions = [0, rows], [groups.slots], [groups.position]
            else:
                # rows of others come before and after
                count = groups.groups[index] + 2
                cu_q, slots, positions = [0] * (count + 1), [(0, 0)] * count, [0] * count
            buffers = (integers(cu_q), integers(slots), integers(positions))
            self._contexts.append(InjectedContext([], [], *buffers, cos, sin, order=moved[0], place=moved[1]))

    @property
    def _joins(self) -> bool:
        """Whether a row may read several documents."""
        return self._room is not None and self._room.each > 1

    def put(self, reads: Sequence[Sequence[Read]]) -> None:
        """Say what each row reads, which may be nothing; not more than there is room for."""
        if self._room is None or self._order is None or self._place is None:
            return
        laid = sorted((read, row) for row, own in enumerate(reads) for read in own)
        order = [row for _, row in laid]
        if self._joins:
            places: list[list[int]] = [[] for _ in reads]
            for at, row in enumerate(order):
                places[row].append(at)
            # behind all reads there is one of nothing
            place = [at for own in places for at in own + [len(order)] * (self._room.each - len(own))]
            order += [0] * (self._places - len(order))
        else:
            order += [row for row, own in enumerate(reads) if not own]
            place = sorted(range(self._rows), key=order.__getitem__)
        for buffer, values in ((self._order, order), (self._place, place)):
            self._fill(buffer, values)
        for index, (context, room) in enumerate(zip(self._contexts, self._room.groups, strict=True)):
            own: dict[Read, int] = {}
            for read, _ in laid:
                if read.source == index:
                    own[read] = own.get(read, 0) + 1
            begin = sum(read.source < index for read, _ in laid)
            cu_q, slots, positions = [0, begin], [(0, 0)], [0]
            for read, count in own.items():
                cu_q.append(cu_q[-1] + count)
                slots.append(read.slots)
                positions.append(read.position)
            spare = room - len(own)
            cu_q += [cu_q[-1]] * spare + [self._places]
            slots += [(0, 0)] * (spare + 1)
            positions += [0] * (spare + 1)
            self._fill(context.cu_q, cu_q)
            self._fill(context.slot_range, slots)
            self._fill(context.q_position, positions)

    def _fill(self, buffer: Tensor, values: Any) -> None:
        buffer.copy_(upload(torch.tensor(values, dtype=torch.int64).view(buffer.shape), self._device))

    def attend(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, layer: int, scale: float
    ) -> Tensor:
        """What the queries ``[rows, Hq, D]`` read of a layer's keys and values of each source; same shape."""
        if self._joins:
            return self._joined(query, keys, values, layer=layer, scale=scale)
        out: Tensor | None = None
        for context, key, value in zip(self._contexts, keys, values, strict=True):
            part = context.attend(query, key, value, layer=layer, scale=scale)
            # zeros for the rows of other sources
            out = part if out is None else out.add_(part)
        assert out is not None
        return out

    def _joined(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, layer: int, scale: float
    ) -> Tensor:
        assert self._order is not None and self._place is not None and self._room is not None
        taken, read = query.index_select(0, self._order), None
        for context, key, value in zip(self._contexts, keys, values, strict=True):
            out, lse = context.read(taken, key, value, layer=layer, scale=scale)
            # zeros, and -inf, for the reads of other sources
            read = (out, lse) if read is None else (read[0].add_(out), torch.maximum(read[1], lse))
        assert read is not None
        own = (x.index_select(0, self._place).unflatten(0, (self._rows, self._room.each)) for x in read)
        return join(*own)[0]
