"""The memory that a KV cache was made with: without it the cached text would have another meaning."""

import dataclasses
from typing import Any

from transformers.cache_utils import Cache

from .memory import ContextMemory

_ATTRIBUTE = "_sharedllm_memory"


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """The memory that a cache's text has read; copies of the cache share it, as it is large and never changes."""

    memory: ContextMemory

    def __copy__(self) -> "_Read":
        return self

    def __deepcopy__(self, _: Any) -> "_Read":
        return self


def remember_memory(cache: Cache, memory: ContextMemory) -> None:
    """Attach to a cache the memory that its text has read."""
    if not has_read(cache, memory):
        setattr(cache, _ATTRIBUTE, _Read(memory))


def has_read(cache: Cache | None, memory: ContextMemory) -> bool:
    """Whether the latest text of a cache has read this memory."""
    read = getattr(cache, _ATTRIBUTE, None)
    return read is not None and read.memory is memory


def forget_memory(cache: Cache) -> None:
    """Mark a cache that is filled without a memory."""
    if hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)


def remembered_memory(cache: Cache | None) -> ContextMemory | None:
    """The memory that calls over a cache read if none is given; ``None`` for an empty cache or one without."""
    read = getattr(cache, _ATTRIBUTE, None)
    if cache is None or read is None or cache.get_seq_length() == 0:
        return None
    return read.memory
