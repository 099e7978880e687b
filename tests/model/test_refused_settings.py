"""Settings of base checkpoints that cannot be honoured are refused by name, not left out."""

from typing import Any

import pytest
from transformers import AutoConfig

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM

from . import builders

REFUSED = {
    "balancing loss": (
        "qwen3_moe",
        {"output_router_logits": True},
        r"text_config\.output_router_logits: expected False \(the experts' balancing loss .*\), got True",
    ),
    "bidirectional attention": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        r"text_config\.use_bidirectional_attention: expected False, .*, got True",
    ),
    "rotation by the length": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        r"text_config\.rope_parameters\['full_attention'\]: expected a rope_type that .*, got 'dynamic'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    family, fields, message = REFUSED[case]
    base = builders.base(family, **fields)
    with pytest.raises(ValueError, match=message):
        SharedLLMForCausalLM.from_base(base, **builders.TREE)
    with pytest.raises(ValueError, match=message):
        SharedLLMConfig(text_config=base.config.to_dict(), **builders.TREE)


def test_router_logits_of_one_call() -> None:
    model: Any = builders.model("qwen3_moe")
    with pytest.raises(ValueError, match=r"output_router_logits: expected False .*, got True"):
        model(builders.ids(1, 4), output_router_logits=True)
    assert model(builders.ids(1, 4), output_router_logits=False).logits is not None


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_computed_as_in_the_base(implementation: str) -> None:
    base = builders.base("qwen3_moe")
    base.set_experts_implementation(implementation)
    model = SharedLLMForCausalLM.from_base(base, **builders.TREE, tie_compressor=False)
    for part in (model.model, model.compressor):
        assert part.config._experts_implementation == implementation
    assert AutoConfig.for_model("qwen3_moe")._experts_implementation is None
