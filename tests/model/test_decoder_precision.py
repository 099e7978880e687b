"""A decoder in 8 bits: what it computes, what it keeps and frees, and what is refused."""

import copy
import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharedllm_ext import ContextMemory, ContinuousBatch, SharedLLMForCausalLM, decoding_obstacle, ops
from sharedllm_ext.model import fp8_linear, layer_math
from sharedllm_ext.model.cache_name import CACHE_NAME
from sharedllm_ext.model.decoder_precision import _linear_places
from sharedllm_ext.model.decoding import PreallocatedCache, session, support
from sharedllm_ext.model.fp8_linear import Fp8Linear

from . import builders

#: Without experts, which stay as they are.
FAMILIES = [family for family in builders.FAMILIES if family != "qwen3_moe"]
STEPS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@torch.no_grad()
def rounded(model: Any) -> Any:
    """A copy with the numbers in the weights' own dtype that 8 bits stand for; its compressor keeps its own."""
    assert model.compressor is not None
    twin = copy.deepcopy(model)
    for _, parent, name in _linear_places(twin):
        module = getattr(parent, name)
        codes, scale = ops.quantize_rows_fp8(module.weight)
        module.weight = nn.Parameter((codes.float() * scale).to(module.weight.dtype))
    return twin


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_decoder_computes_with_rounded_weights(family: str) -> None:
    model = builders.model(family, tie_compressor=False)
    twin = rounded(model)
    context, text = builders.ids(2, 100), builders.ids(2, 20)
    plain = model(text, context_ids=context).logits
    model.quantize_decoder()
    got, expected = model(text, context_ids=context), twin(text, context_ids=context)
    for own, other in zip(got.memory.keys, expected.memory.keys, strict=True):
        assert torch.equal(own, other)
    assert error(got.logits, expected.logits) < 1e-5
    assert 1e-3 < error(got.logits, plain) < 0.5
    assert all(type(getattr(parent, name)) is Fp8Linear for _, parent, name in _linear_places(model))


@pytest.mark.parametrize("family", builders.DECODED)
@pytest.mark.parametrize("with_memory", [False, True])
def test_steps(steps: list[int], family: str, with_memory: bool) -> None:
    model = builders.model(family)
    model.quantize_decoder()
    assert decoding_obstacle(model) is None
    text = builders.ids(3, 10)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    more = {"context_ids": builders.ids(3, 70)} if with_memory else {}
    settings = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True, **more, **STEPS}
    expected = model.generate(text, disable_compile=True, **settings)
    assert not steps
    got = model.generate(text, **settings)
    assert steps == list(range(10, 17))
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=5e-5)


@pytest.mark.parametrize("rows", [1, 8])
def test_steps_of_rows_in_bfloat16(steps: list[int], rows: int) -> None:
    model = builders.model(dtype=torch.bfloat16, tie_compressor=False)
    twin = rounded(model)
    model.quantize_decoder()
    text, context = builders.ids(rows, 9), builders.ids(1, 70)
    settings = {"return_dict_in_generate": True, "output_logits": True, **STEPS}
    got = model.generate(text, memory=model.compress(context), **settings)
    assert len(steps) == 7
    with torch.no_grad():
        expected = twin(got.sequences[:, :-1], memory=twin.compress(context)).logits[:, 8:]
    assert error(torch.stack(got.logits, 1), expected) < 0.05


def test_rows_beyond_the_kernels(steps: list[int]) -> None:
    model = builders.model()
    text = builders.ids(17, 5)
    assert decoding_obstacle(model, rows=17) is None
    settings: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    before = model.generate(text[:2], **settings)
    # what is known of the model is known anew
    model.quantize_decoder()
    assert decoding_obstacle(model, rows=16) is None
    assert decoding_obstacle(model, rows=17) == "input_ids: expected at most 16 rows of a decoder in 8 bits, got 17"
    steps.clear()
    many = model.generate(text, **settings)
    assert not steps and many.shape == (17, 8)
    # nor is a step started ahead, where no mask has told the rows before
    cache = PreallocatedCache(model.config.text_config)
    with torch.no_grad():
        model(input_ids=text, use_cache=True, **{CACHE_NAME: cache})
        call = session.DecodeCall(model, model._rope_tables, None, None, cache=cache)
        call.run_ahead(text[:, -1])
    assert call.runner is None
    assert model.generate(text[:2], **settings).shape == before.shape and steps
    batch = ContinuousBatch(model, rows=17, tokens=16)
    with pytest.raises(ValueError, match="at most 16 rows of a decoder in 8 bits, got 17"):
        batch.add(text[0])
    batch = ContinuousBatch(model, rows=4, tokens=16)
    answers = batch.answer(list(text[:6]), max_new_tokens=3, eos_token_id=[])
    alone = ContinuousBatch(model, rows=1, tokens=16)
    assert answers == [alone.answer([row], max_new_tokens=3, eos_token_id=[])[0] for row in text[:6]]


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "phi3", "gemma3_text"])
@torch.no_grad()
def test_memories_stay(family: str, tmp_path: Path) -> None:
    """The tied compressor keeps its weights: memories of before and after are the same, and each model takes both."""
    model = builders.model(family)
    before = copy.deepcopy(model)
    context, text = builders.ids(1, 100), builders.ids(1, 12)
    old = before.compress(context, query_ids=text)
    model.quantize_decoder()
    new = model.compress(context, query_ids=text)
    for layer in range(2):
        assert torch.equal(old.keys[layer], new.keys[layer]) and torch.equal(old.values[layer], new.values[layer])
    assert new.signature == old.signature
    old.save(tmp_path / "old.safetensors")
    got = model(text, memory=ContextMemory.load(tmp_path / "old.safetensors", model)).logits
    assert torch.equal(got, model(text, memory=new).logits)
    assert before(text, memory=new).logits.isfinite().all()


@torch.no_grad()
def test_what_is_rounded_is_freed() -> None:
    base = builders.base("llama")
    model = SharedLLMForCausalLM.from_base(base, **builders.TREE)
    del base
    upper = [weakref.ref(layer.mlp.gate_proj.weight) for layer in model.model.layers]
    block = weakref.ref(model.injected_blocks[0].q_proj.weight)
    model.quantize_decoder()
    gc.collect()
    # the tied compressor has two layers
    assert [ref() is None for ref in upper] == [False, False, True, True]
    assert block() is None
    assert model.compressor.layers[0].mlp.gate_proj.weight is upper[0]()
    assert model.compressor.embed_tokens.weight is model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    alone = builders.model(tie_compressor=False)
    own = alone.compressor
    alone.quantize_decoder()
    assert alone.compressor is own
    numbers = sum(module.codes.numel() for module in alone.modules() if type(module) is Fp8Linear)
    expected = sum(p.numel() for name, p in builders.model().named_parameters() if name.endswith("proj.weight"))
    assert numbers == expected


@torch.no_grad()
def test_a_compressor_in_8_bits_shares_them() -> None:
    model = builders.model(compressor_precision="fp8")
    model.quantize_decoder()
    assert model.compressor is None
    assert not any(name.endswith("proj.weight") for name, _ in model.named_parameters())
    model.config.compressor_precision = "model"
    with pytest.raises(ValueError, match="compressor_precision: expected 'fp8', as the tied compressor shares"):
        model.compress(builders.ids(1, 100))
    first, second = builders.model(compressor_precision="fp8"), builders.model(compressor_precision="fp8")
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.model.layers[0].mlp.down_proj.weight.add_(0.1)
    first.quantize_decoder()
    second.quantize_decoder()
    assert first.memory_signature()["weights"] != second.memory_signature()["weights"]


@torch.no_grad()
def test_changes_of_dtype_keep_codes_and_scales() -> None:
    model = builders.model("qwen2")
    model.quantize_decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for change in (lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: copy.deepcopy(m)):
        model = change(model)
        module = model.model.layers[3].self_attn.q_proj
        assert module.codes.dtype == torch.float8_e4m3fn and module.scale.dtype == torch.float32
        assert module.bias.dtype == model.dtype
        for name, tensor in model.state_dict().items():
            if name.endswith(("codes", "scale")):
                assert torch.equal(tensor.float(), before[name].float()), name
        assert model(builders.ids(1, 30)).logits.dtype == model.dtype
    assert model.to("meta").model.layers[0].mlp.down_proj.codes.is_meta


@torch.no_grad()
def test_products_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(48, 100)
    module, x = Fp8Linear(linear), torch.randn(3, 11, 48)
    assert module(x).shape == (3, 11, 100) and module(x[:0]).shape == (0, 11, 100)
    expected = torch.nn.functional.linear(x, module.codes.float() * module.scale, linear.bias)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x[0, :2]), expected[0, :2])
    torch.testing.assert_close(module(x[:1], slice(10, 30)), expected[:1, :, 10:30])
    monkeypatch.setattr(fp8_linear, "_BLOCK_ELEMENTS", 48 * 7)
    torch.testing.assert_close(module(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_from_base_from_pretrained_and_adapters(tmp_path: Path) -> None:
    base = builders.base("llama_tied")
    base.save_pretrained(tmp_path / "base")
    direct = SharedLLMForCausalLM.from_base(tmp_path / "base", decoder_precision="fp8", **builders.TREE)
    assert type(direct.model.layers[0].mlp.down_proj) is Fp8Linear and type(direct.lm_head) is nn.Linear
    assert direct.lm_head.weight is direct.model.embed_tokens.weight and direct.config.decoder_precision == "fp8"

    plain = SharedLLMForCausalLM.from_base(tmp_path / "base", **builders.TREE)
    with torch.no_grad():
        for block in plain.injected_blocks:
            nn.init.normal_(block.o_proj.weight, std=0.1)
    plain.save_pretrained(tmp_path / "model")
    plain.save_adapter(tmp_path / "adapter.safetensors", tmp_path / "base")
    context, text = builders.ids(1, 100), builders.ids(1, 12)
    loaded = SharedLLMForCausalLM.from_pretrained(tmp_path / "model", decoder_precision="fp8")
    adapted = SharedLLMForCausalLM.from_adapter(
        tmp_path / "adapter.safetensors", tmp_path / "base", decoder_precision="fp8"
    )
    plain.quantize_decoder()
    with torch.no_grad():
        expected = plain(text, context_ids=context).logits
        for model in (loaded, adapted):
            assert torch.equal(model(text, context_ids=context).logits, expected)
    # a configuration that says so, beside the checkpoint's weights
    again = SharedLLMForCausalLM.from_pretrained(tmp_path / "model")
    again.config.decoder_precision = "fp8"
    again.save_pretrained(tmp_path / "eight")
    with torch.no_grad():
        own = SharedLLMForCausalLM.from_pretrained(tmp_path / "eight")
        assert torch.equal(own(text, context_ids=context).logits, expected)
    state = SharedLLMForCausalLM.from_pretrained(tmp_path / "eight", decoder_precision="model").state_dict()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())


def test_what_is_refused(tmp_path: Path) -> None:
    model, text = builders.model(), builders.ids(1, 12)
    model.config.decoder_precision = "fp8"
    with pytest.raises(
        ValueError, match=r"decoder_precision='fp8': expected weights in 8 bits, got those of the check"
    ):
        model(text)
    model.quantize_decoder()
    model.quantize_decoder()
    advice = "expected the checkpoint's own weights, got a decoder in 8 bits, which lacks them; load the checkpoint"
    with pytest.raises(ValueError, match=f"save_pretrained: {advice}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=f"save_adapter: {advice}"):
        model.save_adapter(tmp_path / "adapter", builders.base())
    with pytest.raises(ValueError, match=f"resize_token_embeddings: {advice}"):
        model.resize_token_embeddings(200)
    embeds = model.get_input_embeddings()(text).detach().requires_grad_()
    with pytest.raises(
        ValueError, match="decoder_precision='fp8': expected to run without gradients, got an input that"
    ):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"decoder_precision='fp8': expected evaluation mode \(model.eval\(\)\), got"):
        model.train()(text)
    model.eval().config.decoder_precision = "model"
    with pytest.raises(
        ValueError, match="decoder_precision: expected 'fp8', as the weights are in 8 bits, got 'model'"
    ):
        model(text)
    with pytest.raises(ValueError, match="decoder_precision: expected model or fp8, got 'int4'"):
        builders.model(decoder_precision="int4")


def test_layers_that_cannot_be_rounded() -> None:
    experts = builders.model("qwen3_moe")
    with pytest.raises(
        ValueError, match="decoder_precision='fp8': expected Qwen3MoeMLP as layer 0's mlp, got Qwen3MoeSp"
    ):
        experts.quantize_decoder()
    hooked = builders.model()
    handle = hooked.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.q_proj: expected a plain Linear, got Linear with ho"
    ):
        hooked.quantize_decoder()
    handle.remove()
    with torch.no_grad():
        hooked.model.layers[2].mlp.up_proj.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj: expected finite weights, got infinities or NaN"):
        hooked.quantize_decoder()
    empty = builders.model().to("meta")
    with pytest.raises(ValueError, match=r"expected weights in memory, got torch.float32 on meta"):
        empty.quantize_decoder()


@pytest.fixture
def rounding(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that rounds rows to 8 bits; the CPU does so here, by its own kernels of the same operators."""
    if device.type == "cpu":
        for module in (fp8_linear, layer_math):
            monkeypatch.setattr(module, "multiplies_fp8", lambda device: True)
        monkeypatch.setattr(layer_math, "inference_only", lambda x: x.dtype in layer_math.FUSED_DTYPES)
        monkeypatch.setattr(support, "RUN_ON_CPU", True)
    elif torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("compute capability 8.9 or newer is needed")
    return device


@pytest.mark.parametrize(
    ("family", "compressor_precision"),
    [*itertools.product(["llama", "mistral", "qwen2", "qwen3", "llama_tied"], ["model", "fp8"]), ("phi3", "model")],
)
@torch.no_grad()
def test_rows_in_8_bits(rounding: torch.device, family: str, compressor_precision: str) -> None:
    """Prompts of many rows are rounded as well, decoding steps are not."""
    sizes = {"hidden_size": 384 if family == "qwen2" else 256, "intermediate_size": 512, "initializer_range": 0.05}
    model = builders.model(family, base_fields=sizes, tie_compressor=compressor_precision == "fp8")
    model = model.to(rounding, torch.bfloat16)
    twin = copy.deepcopy(model)
    if model.compressor is not None:
        twin = rounded(twin)
    model.config.compressor_precision = twin.config.compressor_precision = compressor_precision
    model.quantize_decoder()
    context, text = builders.ids(1, 1000).to(rounding), builders.ids(1, 40).to(rounding)
    memory, other = model.compress(context), twin.compress(context)
    for layer in range(2):
        assert error(memory.keys[layer], other.keys[layer]) < (1e-6 if compressor_precision == "model" else 0.2)
    got, expected = model(text, memory=memory).logits, twin(text, memory=other).logits
    assert 1e-3 < error(got, expected) < 0.25
    down = model.model.layers[0].mlp.down_proj
    rows = torch.empty(9, down.in_features, device=rounding, dtype=torch.bfloat16)
    assert down.takes_codes(rows) and not down.takes_codes(rows[:8])
    out = model.generate(text, memory=memory, return_dict_in_generate=True, output_logits=True, **STEPS)
    again = model(out.sequences[:, :-1], memory=memory).logits[:, 39:]
    assert error(torch.stack(out.logits, 1), again) < 0.15
    assert (support.obstacle_in_model(model) is None) == (family in builders.DECODED)


@torch.no_grad()
def test_joined_projections_have_no_compressor_in_8_bits(rounding: torch.device) -> None:
    model = builders.model("phi3", compressor_precision="fp8").to(rounding, torch.bfloat16)
    model.quantize_decoder()
    message = "expected a plain bfloat16 Linear as layer 0's qkv_proj, got LinearPart, torch.float8_e4m3fn"
    with pytest.raises(ValueError, match=f"compressor_precision='fp8': {message}"):
        model.compress(builders.ids(1, 100).to(rounding))
