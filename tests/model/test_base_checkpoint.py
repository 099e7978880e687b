"""What from_base takes and refuses: options, quantised and adapted models, checkpoints that are not whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model.families import projection

from . import builders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved base checkpoint."""
    builders.base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(base: Any, **options: Any) -> SharedLLMForCausalLM:
    """The model in small sizes."""
    return SharedLLMForCausalLM.from_base(base, **{**builders.TREE, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"injection_layers": 9}, "injection_layers: expected at least 1 and at most 4"),
        ({"window": "4k"}, "window: expected an integer, got '4k'"),
        (
            {"chunks": 3, "cache_dir": "x"},
            "fields: expected fields of SharedLLMConfig .*, got cache_dir, chunks;",
        ),
    ],
)
def test_fields_are_checked_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(ValueError, match=message):
        build(folder, **options)


def test_options_of_loading_reach_the_base(folder: Path) -> None:
    model = build(str(folder), attn_implementation="eager", device_map="cpu", revision="main", token=False)
    assert model.config._attn_implementation == "eager"
    assert model.model.config._attn_implementation == "eager"
    text = builders.ids(1, 8)
    assert model(text, output_attentions=True).attentions is not None


def test_a_model_keeps_its_attention_implementation() -> None:
    base = builders.base()
    base.set_attn_implementation("eager")
    assert build(base).model.config._attn_implementation == "eager"


def test_options_of_loading_are_refused_with_a_model() -> None:
    with pytest.raises(ValueError, match=r"revision, token: expected None with a model as base .*, got v1, a token"):
        build(builders.base(), revision="v1", token="hf_secret")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"expected a base checkpoint of type llama, mistral, qwen2, qwen3, .* got 'gpt2'"),
        ({"model_type": "sharedllm"}, r"got 'sharedllm'; it is one already, load it with from_pretrained"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, r"got 'own'"),
    ],
)
def test_another_family_is_named_before_anything_is_read(folder: Path, change: dict[str, Any], message: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        build(folder)


def test_a_checkpoint_that_lacks_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"got one that lacks 1 tensor, the first is model\.layers\.1\.mlp\.up_proj"):
        build(folder)


def test_a_checkpoint_of_other_shapes_than_it_says(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 100}))
    with pytest.raises(ValueError, match=r"expected \S+ of shape \(100, 64\) by its configuration, got \(128, 64\)"):
        build(folder)


def test_models_that_are_no_base() -> None:
    config: Any = builders.base().config
    with pytest.raises(ValueError, match=r"expected a causal language model .*, got LlamaModel"):
        build(LlamaModel(config))
    with pytest.raises(ValueError, match=r"got LlamaForSequenceClassification"):
        build(LlamaForSequenceClassification(config))
    with pytest.raises(TypeError, match=r"base: expected a path, a hub name or a Transformers model, got Linear"):
        build(nn.Linear(2, 2))
    with torch.device("meta"):
        empty = builders.base()
    with pytest.raises(ValueError, match=r"base: expected all weights on one device, got meta"):
        build(empty)


def test_adapters_are_named() -> None:
    peft: Any = pytest.importorskip("peft")
    base = builders.base()
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"got PeftModelForCausalLM; merge its adapters first"):
        build(adapted)
    with pytest.raises(ValueError, match=r"expected a model without adapters, got one on model\.layers\.0"):
        build(base)
    merged = adapted.merge_and_unload()
    text = builders.ids(1, 8)
    assert torch.equal(build(merged)(text).logits, merged(text).logits)


class Int8Linear(nn.Module):
    """A quantised layer as libraries make them: integers and scales as buffers or parameters, a product of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Buffer(scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised(family: str) -> Any:
    """A base checkpoint whose layers hold 8-bit integers."""
    base = builders.base(family)
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            base.set_submodule(name, Int8Linear(module))
    return base


@pytest.mark.parametrize("family", ["llama", "qwen2", *builders.LATER])
@torch.no_grad()
def test_quantised_layers_are_taken_as_they_are(family: str) -> None:
    base = quantised(family)
    model = build(base)
    text, context = builders.ids(1, 12), builders.ids(1, 70)
    assert model.model.layers[1].self_attn.o_proj is base.model.layers[1].self_attn.o_proj
    assert torch.equal(model(text).logits, base(text).logits)
    # the new blocks start from the same projection, in floating point
    own, theirs = model.injected_blocks[0].q_proj, projection(base.model.layers[0].self_attn, "q")
    assert type(own) is nn.Linear
    rows = torch.randn(5, own.in_features)
    torch.testing.assert_close(own(rows), theirs(rows))
    for block in model.injected_blocks:
        nn.init.normal_(block.o_proj.weight, std=0.1)
    memory = model.compress(context, query_ids=text)
    assert not torch.allclose(model(text, memory=memory).logits, base(text).logits)
    assert model.generate(text, memory=memory, max_new_tokens=3).shape == (1, 15)


def test_quantised_bases_are_not_trained_as_compressors() -> None:
    with pytest.raises(ValueError, match=r"tie_compressor: expected True with a quantised base"):
        build(quantised("llama"), tie_compressor=False)
    with pytest.raises(ValueError, match=r"compressor_precision: expected 'model' with a quantised base, got 'fp8'"):
        build(quantised("llama"), compressor_precision="fp8")


class Int8Tensor(Tensor):
    """Integers and scales behind the face of a float tensor, as torchao has them; few operators take it."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Int8Tensor":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        """The values."""
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            raise NotImplementedError(f"{func} for {cls.__name__}")
        return func(*(x.dequantize() if isinstance(x, Int8Tensor) else x for x in args), **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_weights_that_are_tensors_of_another_class(family: str) -> None:
    base = builders.base(family)
    for name, module in base.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            codes = (module.weight / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Tensor(codes, scale), requires_grad=False)
    model = build(base)
    text, context = builders.ids(1, 12), builders.ids(1, 70)
    assert torch.equal(model(text).logits, base(text).logits)
    own = model.injected_blocks[1].q_proj
    assert type(own.weight) is nn.Parameter
    theirs: Any = base.model.layers[1].self_attn
    whole = theirs.qkv_proj if family == "phi3" else theirs.q_proj
    torch.testing.assert_close(own.weight, whole.weight.dequantize()[: own.out_features])
    memory = model.compress(context, query_ids=text)
    signature = memory.signature
    assert model.generate(text, memory=memory, max_new_tokens=3).shape == (1, 15)
    # the memory of other weights is another one
    layer = model.model.layers[0].self_attn
    changed = layer.qkv_proj if family == "phi3" else layer.k_proj
    changed.weight = nn.Parameter(Int8Tensor(changed.weight.codes // 2, changed.weight.scale), False)
    assert model.compress(context, query_ids=text).signature != signature
    with pytest.raises(ValueError, match="memory: made by another model"):
        model(text, memory=memory)
