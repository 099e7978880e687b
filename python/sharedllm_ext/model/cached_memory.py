"""The memory that a cache of keys and values was made with: over the cache alone the text would be another one."""

from typing import Any

from transformers.cache_utils import Cache

from .memory import ContextMemory

_ATTRIBUTE = "_sharedllm_memory"


class _Shared:
    """A memory that copies of its cache share: it is large, and no call changes it."""

    def __init__(self, memory: ContextMemory) -> None:
        self.memory = memory

    def __copy__(self) -> "_Shared":
        return self

    def __deepcopy__(self, _: Any) -> "_Shared":
        return self


def remember_memory(cache: Cache, memory: ContextMemory) -> None:
    """Keep with the cache what its texts were read with."""
    shared = getattr(cache, _ATTRIBUTE, None)
    if shared is None or shared.memory is not memory:
        setattr(cache, _ATTRIBUTE, _Shared(memory))


def remembered_memory(cache: Cache | None) -> ContextMemory | None:
    """The memory that a cache was made with; ``None`` for one without, or an empty cache."""
    shared = getattr(cache, _ATTRIBUTE, None)
    return None if cache is None or shared is None or cache.get_seq_length() == 0 else shared.memory
