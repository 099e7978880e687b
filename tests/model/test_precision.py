"""The model on every device and in every precision against the oracle."""

import copy

import pytest
import torch
from torch import Tensor

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model import compressor
from sharedllm_ext.reference import model as reference

from ..support import needs_cuda
from . import builders

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
# the factors of longrope are of another head size, and experts have no products in float64 but one
FIXED = builders.FIXED
TREE = {"injection_layers": 3, "chunk_size": 256, "slots_per_node": 16, "window": 64}


def build(family: str = "llama", **fields) -> SharedLLMForCausalLM:
    own = {"num_attention_heads": 6, "hidden_size": 384} if family == "qwen2" else {}
    base = builders.base(family, **{**SIZES, **own, "initializer_range": 0.05})
    model = SharedLLMForCausalLM.from_base(base, **{**TREE, **fields})
    for block in model.injected_blocks:
        torch.nn.init.normal_(block.o_proj.weight, std=0.05)
    return model


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", *FIXED])
@torch.no_grad()
def test_greedy_tokens_equal_the_oracle(device: torch.device, family: str) -> None:
    model = build(family)
    context, text = builders.ids(1, 1000), builders.ids(1, 12)
    oracle = copy.deepcopy(model).double()
    memory = reference.compress(oracle, context[0], text[0])
    expected = text[0]
    for _ in range(8):
        expected = torch.cat((expected, reference.logits(oracle, expected, memory)[-1:].argmax(-1)))
    got = model.to(device).generate(
        text.to(device), context_ids=context.to(device), max_new_tokens=8, eos_token_id=None, do_sample=False
    )
    assert got[0].tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", *FIXED])
@torch.no_grad()
def test_half_precision_error_is_at_most_twice_plain_pytorch(device: torch.device, family: str) -> None:
    # the fixed policy: a tie of two nodes that rounding decides would be an error of another kind
    model = build(family, query_aware=False).to(torch.bfloat16)
    context, text = builders.ids(1, 1000), builders.ids(1, 40)
    oracle = copy.deepcopy(model).double()
    memory = reference.compress(oracle, context[0])
    exact = reference.logits(oracle, text[0], memory)
    plain_memory = reference.compress(model, context[0])
    plain = reference.logits(model, text[0], plain_memory)
    output = model.to(device)(text.to(device), context_ids=context.to(device))
    for layer in range(TREE["injection_layers"]):
        for got, same, want in (
            (output.memory.keys, plain_memory.keys, memory.keys),
            (output.memory.values, plain_memory.values, memory.values),
        ):
            wanted = torch.cat(want[layer])
            assert error(got[layer], wanted) <= 2 * error(torch.cat(same[layer]), wanted), layer
    assert error(output.logits[0], exact) <= 2 * error(plain, exact)


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("length", [1000, 256, 37, 1])
@torch.no_grad()
def test_packed_nodes_equal_nodes_by_length(family: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family).to("cuda", torch.bfloat16)
    context, text = builders.ids(1, length).cuda(), builders.ids(1, 12).cuda()
    packed = model.compress(context, query_ids=text)
    monkeypatch.setattr(compressor, "_takes_packed_nodes", lambda _: False)
    by_length = model.compress(context, query_ids=text)
    for got, want in zip((*packed.keys, *packed.values), (*by_length.keys, *by_length.values), strict=True):
        assert error(got, want.double().cpu()) < 0.02


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_nodes_have_the_gradients_of_nodes_by_length(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, tie_compressor=False, query_aware=False).to("cuda", torch.bfloat16).train()
    context, text = builders.ids(1, 1000).cuda(), builders.ids(1, 12).cuda()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(text, context_ids=context, labels=text).loss.backward()
        return [layer.self_attn.k_proj.weight.grad.clone() for layer in model.compressor.layers]

    packed = gradients()
    monkeypatch.setattr(compressor, "_takes_packed_nodes", lambda _: False)
    for got, want in zip(packed, gradients(), strict=True):
        assert want.norm() > 0
        assert error(got, want.double().cpu()) < 0.05


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="torch sees no CUDA device of compute capability 8.9 or newer",
)
@torch.no_grad()
def test_fp8_compressor_is_near() -> None:
    model = build(query_aware=False).to("cuda", torch.bfloat16)
    context, text = builders.ids(1, 1000).cuda(), builders.ids(1, 40).cuda()
    exact = model(text, context_ids=context)
    model.config.compressor_precision = "fp8"
    output = model(text, context_ids=context)
    for layer in range(TREE["injection_layers"]):
        assert error(output.memory.keys[layer], exact.memory.keys[layer].double().cpu()) < 0.2
    assert not torch.equal(output.memory.keys[1], exact.memory.keys[1])
    assert error(output.logits, exact.logits.double().cpu()) < 0.2
    # new weights are quantised anew
    model.model.layers[0].mlp.down_proj.weight.mul_(2)
    changed = model(text, context_ids=context)
    assert error(changed.memory.keys[1], output.memory.keys[1].double().cpu()) > 0.01


@torch.no_grad()
def test_fp8_compressor_says_what_it_needs() -> None:
    model = build(compressor_precision="fp8")
    with pytest.raises(ValueError, match=r"compressor_precision='fp8': expected a CUDA device .* got cpu"):
        model.compress(builders.ids(1, 300))
    model.config.compressor_precision = "model"
    assert model.compress(builders.ids(1, 300)).num_slots > 0
