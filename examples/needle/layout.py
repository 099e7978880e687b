"""Which tokens of a chunk the memory keeps, and the segments that the pick chooses from: numbers only, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A chunk split by the fixed policy (always the right child), each retained node cut into equal strides.

    Attributes:
        chunk_size: tokens of a chunk.
        tree_depth: splits of a chunk; it retains ``tree_depth + 1`` nodes.
        slots_per_node: strides of a node; one token of each is kept as a slot.
        keep_stride_ends: keep the last token of each stride. The first one, as published, leaves what follows a node's
            last slot unseen: the last 15 tokens of a node of 512.
    """

    chunk_size: int = 1024
    tree_depth: int = 3
    slots_per_node: int = 32
    keep_stride_ends: bool = True

    def __post_init__(self) -> None:
        if self.chunk_size % (1 << self.tree_depth) or self.segment % self.slots_per_node:
            raise ValueError(
                f"layout: expected leaves of a whole number of strides, got chunk_size {self.chunk_size}, "
                f"tree_depth {self.tree_depth}, slots_per_node {self.slots_per_node}"
            )
        if self.slots_per_node % (1 << (self.tree_depth - 1)):
            raise ValueError(
                f"slots_per_node: expected a multiple of {1 << (self.tree_depth - 1)}, so that strides end"
            )

    @property
    def segment(self) -> int:
        """Tokens of a segment: what a leaf holds."""
        return self.chunk_size >> self.tree_depth

    @property
    def margin(self) -> int:
        """Tokens before and after a picked segment that are read with it."""
        return self.segment // 2

    @property
    def segments_per_chunk(self) -> int:
        return 1 << self.tree_depth

    @property
    def slots_per_chunk(self) -> int:
        return self.slots_per_node * (self.tree_depth + 1)

    @property
    def nodes(self) -> list[tuple[int, int]]:
        """First token and end of the retained nodes, in the order of the text."""
        spans, start = [], 0
        for level in range(1, self.tree_depth + 1):
            length = self.chunk_size >> level
            spans.append((start, start + length))
            start += length
        return [*spans, (start, self.chunk_size)]

    def kept(self, length: int) -> slice:
        """The kept tokens of a node of ``length`` tokens."""
        stride = length // self.slots_per_node
        return slice(stride - 1 if self.keep_stride_ends else 0, None, stride)

    def slot_tokens(self) -> list[int]:
        """The token of the chunk that each of its slots keeps."""
        return [token for start, end in self.nodes for token in range(start, end)[self.kept(end - start)]]

    def slot_segments(self) -> list[int]:
        """The segment of the chunk that each of its slots lies in."""
        return [token // self.segment for token in self.slot_tokens()]
