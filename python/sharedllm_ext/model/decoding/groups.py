"""What the rows of a step read where rows come and go, each with a memory of its own or of others too."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..injection import InjectedContext
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


class MemoryGroups:
    """Like :class:`~sharedllm_ext.model.injection.InjectedContext` for one token a row, with rows that change.

    Rows that read the same are one row of the operator. Which ones do is read from the device, so that a graph need not
    be captured again. Where all rows read the same, padding included, nothing has to be put in order.

    Args:
        sources: keys and values ``[S, Hkv, D]`` of each layer, of each memory.
        rows: of the step.
        groups: most different reads of each source, or what all rows read.
        tables: cos and sin of each layer.
        device: of all of them.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        sources: Sequence[tuple[list[Tensor], list[Tensor]]],
        rows: int,
        groups: Sequence[int] | Read,
        tables: Sequence[Tables],
        device: torch.device,
    ) -> None:
        self._rows, self._device = rows, device
        self._groups = None if isinstance(groups, Read) else list(groups)
        #: of each layer, of each source
        self.keys = [list(keys) for keys in zip(*(keys for keys, _ in sources), strict=True)]
        self.values = [list(values) for values in zip(*(values for _, values in sources), strict=True)]
        cos, sin = ([table[side] for table in tables] for side in (0, 1))

        def integers(values: Any) -> Tensor:
            return upload(torch.tensor(values, dtype=torch.int64), device)

        self._order, self._place = (None if self._groups is None else integers([0] * rows) for _ in range(2))
        self._contexts: list[InjectedContext] = []
        for index in range(len(sources)):
            if isinstance(groups, Read):
                cu_q, slots, positions = [0, rows], [groups.slots], [groups.position]
            else:
                # rows of others come before and after
                count = groups[index] + 2
                cu_q, slots, positions = [0] * (count + 1), [(0, 0)] * count, [0] * count
            buffers = (integers(cu_q), integers(slots), integers(positions))
            self._contexts.append(InjectedContext([], [], *buffers, cos, sin, order=self._order, place=self._place))

    def put(self, reads: Sequence[Read | None]) -> None:
        """Say what each row reads, ``None`` for nothing; not more groups of a source than it has room for."""
        if self._groups is None or self._order is None or self._place is None:
            return
        order = sorted(range(self._rows), key=lambda row: (reads[row] is None, reads[row] or (), row))
        place = sorted(range(self._rows), key=order.__getitem__)
        for buffer, values in ((self._order, order), (self._place, place)):
            self._fill(buffer, values)
        for index, (context, room) in enumerate(zip(self._contexts, self._groups, strict=True)):
            own: dict[Read, int] = {}
            for row in order:
                read = reads[row]
                if read is not None and read.source == index:
                    own[read] = own.get(read, 0) + 1
            begin = sum(read is not None and read.source < index for read in reads)
            cu_q, slots, positions = [0, begin], [(0, 0)], [0]
            for read, count in own.items():
                cu_q.append(cu_q[-1] + count)
                slots.append(read.slots)
                positions.append(read.position)
            spare = room - len(own)
            cu_q += [cu_q[-1]] * spare + [self._rows]
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
        out: Tensor | None = None
        for context, key, value in zip(self._contexts, keys, values, strict=True):
            part = context.attend(query, key, value, layer=layer, scale=scale)
            # zeros for the rows of other sources
            out = part if out is None else out.add_(part)
        assert out is not None
        return out
