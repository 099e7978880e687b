"""What forward and generate return: Transformers' own outputs, and the memory that was read."""

import dataclasses
from typing import Any

from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .memory import ContextMemory


@dataclasses.dataclass
class SharedLLMOutput(CausalLMOutputWithPast):
    """Output of :class:`SharedLLMForCausalLM`: Transformers' causal language model output and the memory it read."""

    memory: ContextMemory | None = None


@dataclasses.dataclass
class SharedLLMGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of ``generate`` with ``return_dict_in_generate=True``: Transformers' own and the memory it read."""

    memory: ContextMemory | None = None


@dataclasses.dataclass
class SharedLLMGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """The same with beams."""

    memory: ContextMemory | None = None


_WITH_MEMORY: dict[type, Any] = {
    GenerateDecoderOnlyOutput: SharedLLMGenerateOutput,
    GenerateBeamDecoderOnlyOutput: SharedLLMGenerateBeamOutput,
}


def with_memory(result: Any, memory: ContextMemory | None) -> Any:
    """What ``generate`` returns, with the memory that was read."""
    if memory is None or not isinstance(result, ModelOutput):
        return result
    output = _WITH_MEMORY.get(type(result))
    if output is None:
        # output of a custom loop
        result.memory = memory
        return result
    fields: Any = dataclasses.fields(output)
    return output(**{f.name: getattr(result, f.name) for f in fields if f.name != "memory"}, memory=memory)
