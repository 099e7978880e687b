"""Every supported family: construction, equality with the base checkpoint, save and load."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM

from . import builders


@pytest.mark.parametrize("tie_compressor", [True, False])
@pytest.mark.parametrize("family", builders.FAMILIES)
@torch.no_grad()
def test_from_base_equals_base(family: str, tie_compressor: bool) -> None:
    base = builders.base(family)
    model = SharedLLMForCausalLM.from_base(base, **builders.TREE, tie_compressor=tie_compressor)
    text = builders.ids(2, 20)
    expected = base(text).logits
    assert torch.equal(model(text).logits, expected)
    assert torch.equal(model(text, context_ids=builders.ids(2, 100)).logits, expected)


@torch.no_grad()
def test_dropouts_behind_attention_and_mlp_are_the_base_s() -> None:
    base = builders.base("phi3", resid_pdrop=0.4).train()
    model = SharedLLMForCausalLM.from_base(base, **builders.TREE).train()
    text, logits = builders.ids(2, 20), []
    for one, training in ((base, True), (model, True), (model, False)):
        torch.manual_seed(7)
        logits.append(one.train(training)(text).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2], atol=1e-2)


@torch.no_grad()
def test_from_base_leaves_the_base_alone_and_shares_its_parameters() -> None:
    base = builders.base("qwen3")
    text = builders.ids(1, 20)
    before = copy.deepcopy(base)(text).logits
    model = SharedLLMForCausalLM.from_base(base, **builders.TREE)
    assert type(base.model.layers[0]).__name__ == "Qwen3DecoderLayer"
    assert model.model.layers[0].mlp.up_proj.weight is base.model.layers[0].mlp.up_proj.weight
    assert torch.equal(base(text).logits, before)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_base_path(tmp_path: Path, dtype: torch.dtype | None) -> None:
    base = builders.base("qwen2")
    base.save_pretrained(tmp_path)
    model = SharedLLMForCausalLM.from_base(tmp_path, **builders.TREE, dtype=dtype)
    assert model.dtype == (dtype or torch.float32)
    weight = base.model.layers[3].mlp.down_proj.weight.to(model.dtype)
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, weight)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("tie_compressor", [True, False])
@pytest.mark.parametrize("family", builders.FAMILIES)
@torch.no_grad()
def test_round_trip_is_exact(tmp_path: Path, family: str, tie_compressor: bool) -> None:
    model = builders.model(family, tie_compressor=tie_compressor, split_noise=1.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SharedLLMForCausalLM)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    config = AutoConfig.from_pretrained(tmp_path)
    for name in SharedLLMConfig.__annotations__:
        if name != "text_config":
            assert getattr(config, name) == getattr(model.config, name)
    assert config.text_config.model_type == model.config.text_config.model_type
    text, context = builders.ids(1, 20), builders.ids(1, 100)
    assert torch.equal(model(text, context_ids=context).logits, loaded(text, context_ids=context).logits)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_generate_with_memory(family: str) -> None:
    model = builders.model(family)
    text, context = builders.ids(2, 10), builders.ids(2, 70)
    memory = model.compress(context, query_ids=text)
    out = model.generate(text, memory=memory, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 16)
    running = text
    for _ in range(6):
        with torch.no_grad():
            logits = model(running, memory=memory).logits[:, -1]
        running = torch.cat((running, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, running)


@pytest.mark.parametrize("family", ["llama", *builders.LATER])
def test_random_initialisation_injects_nothing(family: str) -> None:
    config = SharedLLMConfig(text_config=builders.base(family).config, **builders.TREE)
    model = SharedLLMForCausalLM(config).eval()
    for layer, block in zip(model.model.layers, model.injected_blocks, strict=False):
        assert torch.equal(block.norm.weight, layer.input_layernorm.weight)
        assert block.q_norm is None or torch.equal(block.q_norm.weight, layer.self_attn.q_norm.weight)
    assert all(not block.o_proj.weight.any() for block in model.injected_blocks)
    assert all(block.q_proj.weight.any() for block in model.injected_blocks)


def test_untied_compressor_is_a_copy() -> None:
    model = builders.model(tie_compressor=False)
    lower = model.lower_model
    assert lower.embed_tokens is not model.model.embed_tokens
    assert torch.equal(lower.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert all(parameter.requires_grad for parameter in model.compressor.parameters())


def test_other_families_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected a base checkpoint of type llama, mistral, qwen2, qwen3, .* got 'gpt2'"
    ):
        SharedLLMForCausalLM.from_base(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)))
