"""All of the model, registered with Transformers: whoever imports this may load checkpoints by Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .collator import SharedLLMDataCollator
from .configuration import SharedLLMConfig
from .context_index import ContextIndex
from .conversation import Conversation
from .decoding import ContinuousBatch, decoding_obstacle
from .memory import ContextMemory
from .memory_tiers import MemoryTiers
from .modeling import SharedLLMForCausalLM
from .published import load_published_checkpoint
from .tiered_memory import TieredMemory

AutoConfig.register("sharedllm", SharedLLMConfig, exist_ok=True)
AutoModelForCausalLM.register(SharedLLMConfig, SharedLLMForCausalLM, exist_ok=True)
# Trainer shifts labels for its label smoothing only where it knows the class by name
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["sharedllm"] = SharedLLMForCausalLM.__name__

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
