"""SharedLLM: long contexts for short-context language models by multi-scale self-injection.

Importing the package registers the model type ``sharedllm`` with Transformers' Auto classes.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

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
    "__version__",
    "decoding_obstacle",
    "load_published_checkpoint",
    "ops",
    "reference",
]

if TYPE_CHECKING:
    from . import ops, reference
    from .model import (
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


def __getattr__(name: str) -> Any:
    if name in ("ops", "reference", "model"):
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(importlib.import_module(".model", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# The package's own programs (`sharedllm`, `python -m sharedllm_ext…`: Python locates those with argv[0] == "-m") import
# what they need themselves: their help is instant, and `info` reports a broken installation instead of failing on it.
if os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") not in ("-m", "sharedllm"):
    importlib.import_module(".model.registered", __name__)
