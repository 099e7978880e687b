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
    """Output of ``generate`` with ``return_dict_in_generate=True``: Transformers' own and the memory it read.

    ``passages`` are those that were read, for each row of ``input_ids``, or ``None``.
    """

    memory: ContextMemory | None = None
    passages: Any = None


@dataclasses.dataclass
class SharedLLMGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """The same with beams."""

    memory: ContextMemory | None = None
    passages: Any = None


_WITH_MEMORY: dict[type, Any] = {
    GenerateDecoderOnlyOutput: SharedLLMGenerateOutput,
    GenerateBeamDecoderOnlyOutput: SharedLLMGenerateBeamOutput,
}


def with_memory(result: Any, memory: ContextMemory | None, passages: Any = None) -> Any:
    """What ``generate`` returns, with the memory and passages that were read."""
    if memory is None or not isinstance(result, ModelOutput):
        return result
    output = _WITH_MEMORY.get(type(result))
    if output is None:
        # output of a custom loop
        result.memory = memory
        if passages is not None:
            result.passages = passages
        return result
    own = {"memory": memory, "passages": passages}
    fields: Any = dataclasses.fields(output)
    return output(**{f.name: getattr(result, f.name) for f in fields if f.name not in own}, **own)
