"""What describes the rows of a ragged batch: five arguments that always go together."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_cumulative, check_inside, check_rotary, check_tensor, check_that


class Rows(NamedTuple):
    """Queries, slots and rotation of the ``B`` rows; the arguments of :func:`~sharedllm_ext.ops.injected_attention`."""

    cu_q: Tensor  # [B + 1] int64
    slot_range: Tensor  # [B, 2] int64
    q_position: Tensor  # [B] int64
    cos: Tensor  # [P, R/2] float32
    sin: Tensor  # [P, R/2] float32

    def check(self, head_size: int, device: torch.device) -> None:
        """Check dtypes, shapes and devices."""
        check_tensor("q_position", self.q_position, ("B",), torch.int64, device)
        rows = self.q_position.shape[0]
        check_tensor("cu_q", self.cu_q, (rows + 1,), torch.int64, device)
        check_tensor("slot_range", self.slot_range, (rows, 2), torch.int64, device)
        check_rotary(self.cos, self.sin, head_size, device)

    def check_values(self, queries: int, slots: int) -> None:
        """Check what the numbers say (CPU tensors only): the C++ operator does so by itself, the reference does not."""
        check_cumulative("cu_q", self.cu_q, queries)
        for row, (begin, end) in enumerate(self.slot_range.tolist()):
            check_that(0 <= begin <= end <= slots, f"slot_range[{row}]", f"0 <= begin <= end <= {slots}", (begin, end))
        check_inside("q_position", self.q_position, 0, self.cos.shape[0])

    def query_tables(self, queries: int) -> tuple[Tensor, Tensor]:
        """Rows of the rotary tables of every query, ``[T, R/2]``."""
        position = torch.repeat_interleave(self.q_position, self.cu_q.diff(), output_size=queries)
        return self.cos[position], self.sin[position]
