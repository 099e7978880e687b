"""Decoding of one and of eight rows that share a memory of 16384 slots: a step's operators beside the model's forward.

Random weights in two shapes: SmolLM2-135M's and the demo model's, both with 4 injected layers, in float32.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sharedllm_ext import ContextMemory, SharedLLMForCausalLM

pytestmark = pytest.mark.benchmark(max_time=2, min_rounds=3, warmup=True, warmup_iterations=1)

SLOTS, PROMPT, TOKENS = 16384, 16, 8
SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "demo model": {
        "hidden_size": 256,
        "intermediate_size": 800,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}


def build(shape: str, device: torch.device) -> tuple[Any, ContextMemory]:
    """A model and a memory of one document, both random."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192))
    model = SharedLLMForCausalLM.from_base(base, injection_layers=4).eval().to(device)
    with torch.no_grad():
        memory = model.compress(torch.randint(4000, (1, 1024), device=device))
    _, heads, size = memory.keys[0].shape
    keys, values = ([torch.randn(SLOTS, heads, size, device=device) for _ in range(4)] for _ in range(2))
    tokens = SLOTS * 8
    return model, ContextMemory(keys, values, [0, SLOTS], [tokens // 1024], [tokens], [0], memory.signature)


@pytest.fixture(scope="module", params=SHAPES)
def built(request: pytest.FixtureRequest) -> tuple[str, Any, ContextMemory]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return request.param, *build(request.param, device)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("how", ["ours", "eager"])
def test_generate(
    measure: Callable[[str, Callable[[], object]], None], built: tuple[str, Any, ContextMemory], rows: int, how: str
) -> None:
    shape, model, memory = built
    if model.device.type != "cpu":
        pytest.skip("bench_end_to_end.py measures decoding on CUDA, where float32 takes no steps")
    text = torch.randint(4000, (rows, PROMPT), device=model.device)
    settings: dict[str, Any] = {"memory": memory, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"max_new_tokens": TOKENS, "disable_compile": how == "eager"}
    measure(f"generate, {shape}, {rows} rows, {TOKENS} tokens", lambda: model.generate(text, **settings))
