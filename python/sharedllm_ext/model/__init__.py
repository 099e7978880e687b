"""The SharedLLM model: configuration, context memory, compressor and decoder, registered with Transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from .collator import SharedLLMDataCollator
from .configuration import SharedLLMConfig
from .memory import ContextMemory
from .modeling import SharedLLMForCausalLM
from .published import load_published_checkpoint

AutoConfig.register("sharedllm", SharedLLMConfig, exist_ok=True)
AutoModelForCausalLM.register(SharedLLMConfig, SharedLLMForCausalLM, exist_ok=True)

__all__ = [
    "ContextMemory",
    "SharedLLMConfig",
    "SharedLLMDataCollator",
    "SharedLLMForCausalLM",
    "load_published_checkpoint",
]
