"""What a question reads of a tiered memory: some chunks of its documents."""

import dataclasses
import os

import torch

from ..counted import counted
from .memory import ContextMemory


@dataclasses.dataclass
class PickedMemory(ContextMemory):
    """Some chunks of each document, for questions; made by ``model.memory_for`` and :meth:`TieredMemory.select_chunks`.

    ``num_chunks`` and ``num_tokens`` are those of the whole documents: questions stand at their ends.

    Attributes:
        chunks: the chunks of each document that are here.
    """

    chunks: list[list[int]] = dataclasses.field(kw_only=True, compare=False)

    def expect_whole(self) -> None:
        """Refuse a memory of some chunks.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"memory: expected all chunks of its documents, got {counted(sum(map(len, self.chunks)), 'picked one')}; "
            "use the TieredMemory that they are of"
        )

    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
        """Not of some chunks: see :meth:`TieredMemory.save`.

        Raises:
            ValueError: always.
        """
        self.expect_whole()


# sample inputs are read without trust
torch.serialization.add_safe_globals([PickedMemory])
