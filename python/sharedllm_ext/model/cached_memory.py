"""The memory that a cache of keys and values was made with: over the cache alone the text would be another one."""

import dataclasses
from typing import Any

from transformers.cache_utils import Cache

from .memory import ContextMemory

_ATTRIBUTE = "_sharedllm_memory"


@dataclasses.dataclass(eq=False)
class _Read:
    """What a cache's text has read; copies of the cache share it, since it is large and no call changes it.

    Attributes:
        memory: the memory.
        completes: whether it is read again where no other is given.
    """

    memory: ContextMemory
    completes: bool

    def __copy__(self) -> "_Read":
        return dataclasses.replace(self)

    def __deepcopy__(self, _: Any) -> "_Read":
        return dataclasses.replace(self)


def remember_memory(cache: Cache, memory: ContextMemory, *, completes: bool) -> None:
    """Note with a cache the memory that its text has read.

    Args:
        cache: the cache.
        memory: the memory.
        completes: whether calls over the cache without a memory read this one: the model has made it itself, of a
            context or of a text that was split, and the caller may not know of it.
    """
    read = getattr(cache, _ATTRIBUTE, None)
    if read is None or read.memory is not memory:
        setattr(cache, _ATTRIBUTE, _Read(memory, completes))
    elif completes:
        read.completes = True


def has_read(cache: Cache | None, memory: ContextMemory) -> bool:
    """Whether the latest text of a cache has read this memory."""
    read = getattr(cache, _ATTRIBUTE, None)
    return read is not None and read.memory is memory


def remembered_memory(cache: Cache | None) -> ContextMemory | None:
    """The memory that calls over a cache read where none is given; ``None`` for an empty cache, or one without."""
    read = getattr(cache, _ATTRIBUTE, None)
    if cache is None or read is None or not read.completes or cache.get_seq_length() == 0:
        return None
    return read.memory
