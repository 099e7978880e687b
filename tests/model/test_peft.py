"""PEFT: adapters on a SharedLLM model."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from . import builders

peft: Any = pytest.importorskip("peft")


@pytest.mark.parametrize("config", ["LoraConfig", "LoHaConfig", "AdaLoraConfig"])
def test_default_target_modules_reach_the_injected_blocks(config: str) -> None:
    settings = getattr(peft, config)(task_type="CAUSAL_LM", **({"total_step": 10} if config == "AdaLoraConfig" else {}))
    adapted = peft.get_peft_model(builders.model(), settings)
    assert set(settings.target_modules) == {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"}
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("injection.o_proj" in name for name in trained)
    assert any("self_attn.k_proj" in name for name in trained)


def test_joined_projections_are_adapted_and_read() -> None:
    model: Any = builders.model("phi3")
    context, text = builders.ids(1, 70), builders.ids(1, 10)
    before = model.compress(context)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("self_attn.qkv_proj" in name for name in trained)
    with_adapter = model.compress(context)
    assert not torch.allclose(with_adapter.keys[0], before.keys[0], atol=1e-3)
    adapted.train()(input_ids=text, context_ids=context, labels=text).loss.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for n, p in adapted.named_parameters()
        if "0.self_attn.qkv" in n and p.requires_grad
    )
    merged = adapted.eval().merge_and_unload()
    again = merged.compress(context)
    torch.testing.assert_close(again.keys, with_adapter.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.values, with_adapter.values, atol=1e-4, rtol=1e-4)


def test_other_methods_adapt_what_they_adapt_in_llama() -> None:
    settings = peft.IA3Config(task_type="CAUSAL_LM")
    peft.get_peft_model(builders.model(), settings)
    assert set(settings.target_modules) == {"k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("order", ["import peft, sharedllm_ext", "import sharedllm_ext, peft"])
def test_defaults_do_not_depend_on_the_order_of_imports(order: str) -> None:
    script = (
        f"{order}; from transformers import LlamaConfig;"
        "config = sharedllm_ext.SharedLLMConfig(text_config=LlamaConfig(num_hidden_layers=4));"
        "config.to_dict(); from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table;"
        "assert 'o_proj' in table['sharedllm']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
