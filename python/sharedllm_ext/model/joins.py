"""What several rows of the operator have read, joined to what one batch row reads: by the log-sum-exp of each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .upload import upload

#: Elements of the queries that are laid out for the operator at once, once for each document that their row reads.
#: Longer texts are read in parts of as many tokens as fit; with 16 documents of an 8B model these are 256.
MOST_ELEMENTS = 1 << 24

#: ``(queries, tokens a row)`` of the operator's rows to attention and log-sum-exp.
Attend = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Joins(NamedTuple):
    """Batch rows that read several documents, each of which is a row of the operator.

    Attributes:
        rows: ``[P]`` the batch row of each document read, in the operator's order.
        parts: ``(n, place [R * n])`` for each number ``n`` of documents: where the operator has those of the ``R`` rows
            that read so many.
        place: ``[B]`` where each batch row is among the rows of all parts; ``None``: in the batch's own order.
    """

    rows: Tensor
    parts: list[tuple[int, Tensor]]
    place: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[int], batch: int, device: torch.device) -> "Joins":
        """For the batch row of each document read, in the operator's order; each of ``batch`` rows reads one at least.

        What a row reads is joined in that order, too.
        """
        places: list[list[int]] = [[] for _ in range(batch)]
        for at, row in enumerate(rows):
            places[row].append(at)
        by_count: dict[int, list[int]] = {}
        for row, own in enumerate(places):
            by_count.setdefault(len(own), []).append(row)
        order = [row for own in by_count.values() for row in own]
        parts = [
            (count, upload(torch.tensor([at for row in own for at in places[row]]), device))
            for count, own in by_count.items()
        ]
        place = None
        if order != list(range(batch)):
            place = upload(torch.tensor(sorted(range(batch), key=order.__getitem__)), device)
        return cls(upload(torch.tensor(list(rows)), device), parts, place)

    def attend(self, query: Tensor, length: int, attend: Attend) -> tuple[Tensor, Tensor]:
        """What the queries ``[B * length, Hq, D]`` read of all documents of their rows: attention and log-sum-exp."""
        most = max(1, MOST_ELEMENTS // max(1, self.rows.shape[0] * query.shape[1] * query.shape[2]))
        rows = query.unflatten(0, (-1, length))
        read = [self._attend(part, attend) for part in rows.split(most, 1)] if length > most else None
        out, lse = self._attend(rows, attend) if read is None else (torch.cat(x, 1) for x in zip(*read, strict=True))
        return out.flatten(0, 1), lse.flatten(0, 1)

    def _attend(self, rows: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """The same of ``[B, L, Hq, D]``, by rows."""
        length = rows.shape[1]
        read = attend(rows.index_select(0, self.rows).flatten(0, 1), length)
        out, lse = (x.unflatten(0, (-1, length)) for x in read)
        joined = []
        for count, place in self.parts:
            own = out.index_select(0, place), lse.index_select(0, place)
            joined.append(own if count == 1 else join(*(x.unflatten(0, (-1, count)) for x in own)))
        outs, lses = zip(*joined, strict=True)
        return self._in_order(outs), self._in_order(lses)

    def _in_order(self, parts: tuple[Tensor, ...]) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if self.place is None else whole.index_select(0, self.place)


def join(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all slots, from attention over disjoint parts of them.

    ``sum(exp(lse_i) out_i) / sum(exp(lse_i))`` and ``log(sum(exp(lse_i)))``.

    Args:
        out: ``[R, n, …, D]`` of ``n`` parts.
        lse: ``[R, n, …]`` float32 or float64; -inf for a part without slots.

    Returns:
        ``[R, …, D]`` in the parts' dtype, zeros where no part has slots, and ``[R, …]``.
    """
    # only what is finite may be subtracted; the result does not depend on it
    most = lse.detach().amax(1, keepdim=True).clamp(min=torch.finfo(lse.dtype).min)
    weights = torch.exp(lse - most)
    total = weights.sum(1, keepdim=True)
    weights = weights / total.clamp(min=torch.finfo(lse.dtype).tiny)
    joined = (out.to(lse.dtype) * weights.unsqueeze(-1)).sum(1)
    return joined.to(out.dtype), (total.log() + most).squeeze(1)
