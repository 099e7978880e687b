"""The SharedLLM model: configuration, context memory, compressor and decoder, registered with Transformers.

The names come with the first use of one: what describes a file of a memory needs no Transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .registered import (
        ContextIndex,
        ContextMemory,
        ContinuousBatch,
        Conversation,
        MemoryTiers,
        SharedLLMConfig,
        SharedLLMDataCollator,
        SharedLLMForCausalLM,
        TieredMemory,
        decoding_obstacle,
        load_published_checkpoint,
    )

__all__ = [
    "ContextIndex",
    "ContextMemory",
    "ContinuousBatch",
    "Conversation",
    "MemoryTiers",
    "SharedLLMConfig",
    "SharedLLMDataCollator",
    "SharedLLMForCausalLM",
    "TieredMemory",
    "decoding_obstacle",
    "load_published_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".registered", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
