"""PEFT: adapters on a SharedLLM model."""

import subprocess
import sys
from typing import Any

import pytest

from . import builders

peft: Any = pytest.importorskip("peft")


@pytest.mark.parametrize("config", ["LoraConfig", "LoHaConfig", "AdaLoraConfig"])
def test_default_target_modules_reach_the_injected_blocks(config: str) -> None:
    settings = getattr(peft, config)(task_type="CAUSAL_LM", **({"total_step": 10} if config == "AdaLoraConfig" else {}))
    adapted = peft.get_peft_model(builders.model(), settings)
    assert set(settings.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("injection.o_proj" in name for name in trained)
    assert any("self_attn.k_proj" in name for name in trained)


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
