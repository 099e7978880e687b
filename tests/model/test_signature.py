"""Whose memory is it: whatever changes what the compressor computes makes memories foreign, and nothing else does."""

import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharedllm_ext
from sharedllm_ext import ContextMemory, SharedLLMForCausalLM
from sharedllm_ext.model import signature
from sharedllm_ext.model.signature_fields import check_signature

from . import builders

Change = Callable[[Any], Any]
FOREIGN = "made by another model or another setting of this one; "


def accepts(model: Any, memory: ContextMemory) -> bool:
    """Whether the model reads the memory; a refusal must say what differs."""
    try:
        model.check_memory(memory)
    except ValueError as error:
        assert FOREIGN in str(error) and "expected" in str(error) and "\n" not in str(error)
        return False
    return True


class Adapter(nn.Module):
    """A projection with low-rank branches, of which one or none is active; other libraries have their own."""

    def __init__(self, layer: nn.Linear, size: float) -> None:
        super().__init__()
        self.base_layer, self.active, self.dropout, self.factor = layer, "a", nn.Dropout(0.5), 1.0
        shape = (4, layer.in_features), (layer.out_features, 4)
        self.down = nn.ParameterDict({name: nn.Parameter(torch.randn(shape[0]) * size) for name in "ab"})
        self.up = nn.ParameterDict({name: nn.Parameter(torch.randn(shape[1]) * size) for name in "ab"})
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if self.active is None:
            return out
        return out + self.factor * (self.dropout(x) @ self.down[self.active].T @ self.up[self.active].T)


def adapters(model: Any) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def with_adapters(size: float = 0.1) -> Any:
    model = builders.model()
    for layer in model.model.layers:
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj, size)
    return model.eval()


def set_all(model: Any, owner: Callable[[Any], Any], name: str, value: Any) -> None:
    for layer in model.model.layers:
        setattr(owner(layer), name, value)


IN_PLACE: dict[str, tuple[Change, Change]] = {
    "norm epsilon": (
        lambda m: set_all(m, lambda layer: layer.input_layernorm, "variance_epsilon", 1e-3),
        lambda m: set_all(m, lambda layer: layer.input_layernorm, "variance_epsilon", 1e-6),
    ),
    "activation": (
        lambda m: set_all(m, lambda layer: layer.mlp, "act_fn", nn.GELU()),
        lambda m: set_all(m, lambda layer: layer.mlp, "act_fn", nn.SiLU()),
    ),
    "attention scale": (
        lambda m: set_all(m, lambda layer: layer.self_attn, "scaling", 0.3),
        lambda m: set_all(m, lambda layer: layer.self_attn, "scaling", 0.25),
    ),
    "frequencies": (
        lambda m: m.model.rotary_emb.original_inv_freq.mul_(2),
        lambda m: m.model.rotary_emb.original_inv_freq.div_(2),
    ),
    "factor of the rotary tables": (
        lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.1),
        lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.0),
    ),
    "a replaced forward": (
        lambda m: setattr(m.model.layers[0].mlp, "forward", lambda x: 0.5 * x),
        lambda m: delattr(m.model.layers[0].mlp, "forward"),
    ),
    "a weight": (
        lambda m: m.model.layers[1].self_attn.v_proj.weight.mul_(1.5),
        lambda m: m.model.layers[1].self_attn.v_proj.weight.div_(1.5),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", IN_PLACE)
@torch.no_grad()
def test_a_change_makes_memories_foreign(what: str, dtype: torch.dtype) -> None:
    change, back = IN_PLACE[what]
    model = builders.model(dtype=dtype)
    # one whose factors leave no rounding behind
    model.model.layers[1].self_attn.v_proj.weight.copy_(
        (torch.randn_like(model.model.layers[1].self_attn.v_proj.weight) * 4).round() / 8
    )
    memory = model.compress(builders.ids(1, 70))
    assert accepts(model, memory)
    change(model)
    assert not accepts(model, memory)
    back(model)
    assert accepts(model, memory)


@torch.no_grad()
def test_the_activation_of_fused_layers() -> None:
    model = builders.model(dtype=torch.bfloat16)
    memory = model.compress(builders.ids(1, 70))
    model.config.text_config.hidden_act = "gelu_pytorch_tanh"
    assert model.model.layers[0].mlp.config is model.config.text_config
    assert not accepts(model, memory)


FROM_CONFIG: dict[str, tuple[str, dict[str, Any], bool]] = {
    "rope theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10100.0}}, False),
    "rope type": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        False,
    ),
    "scaled rope": (
        "llama_rope_scaling",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.5,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        False,
    ),
    "norm epsilon": ("llama", {"rms_norm_eps": 1e-5}, False),
    "activation": ("llama", {"hidden_act": "gelu"}, False),
    "window": ("mistral", {"sliding_window": 6}, False),
    "no window": ("mistral", {"sliding_window": None}, False),
    "positions": ("llama", {"max_position_embeddings": 1024}, True),
    "cache": ("llama", {"use_cache": False}, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", FROM_CONFIG)
def test_other_configurations(tmp_path: Path, what: str, dtype: torch.dtype) -> None:
    family, fields, own = FROM_CONFIG[what]
    builders.model(family).save_pretrained(tmp_path)
    model = SharedLLMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model.compress(builders.ids(1, 70)).save(tmp_path / "memory")
    ContextMemory.load(tmp_path / "memory", model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = SharedLLMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    if own:
        ContextMemory.load(tmp_path / "memory", other)
    else:
        with pytest.raises(ValueError, match=f"^{tmp_path}/memory: memory: {FOREIGN}(rope|settings|probe): expected"):
            ContextMemory.load(tmp_path / "memory", other)


def test_a_window_that_no_node_reaches() -> None:
    model = builders.model("mistral")
    set_all(model, lambda layer: layer.self_attn, "sliding_window", 40)
    memory = model.compress(builders.ids(1, 70))
    set_all(model, lambda layer: layer.self_attn, "sliding_window", None)
    assert accepts(model, memory)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.1, 0.01])
def test_adapters_of_any_making(size: float) -> None:
    model = with_adapters(size)
    memory = model.compress(builders.ids(1, 70))
    for name, value in (("active", None), ("active", "b"), ("factor", 1.5)):
        for module in adapters(model):
            setattr(module, name, value)
        assert not accepts(model, memory), (name, value)
        other = model.compress(builders.ids(1, 70))
        for module in adapters(model):
            module.active, module.factor = "a", 1.0
        assert accepts(model, memory) and not accepts(model, other)


def test_dropout_does_not_matter() -> None:
    model = with_adapters()
    memory = model.compress(builders.ids(1, 70))
    copied = copy.deepcopy(model).train()
    for _ in range(3):
        assert accepts(copied, memory)
        copied.model.layers[0].mlp.mark = object()  # looked at again
    assert copied.training and all(module.training for module in copied.modules())


@pytest.fixture
def peft_model() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(builders.model(dtype=torch.bfloat16), config)
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # so little that bfloat16 hides most of it
                parameter.mul_(1e-3)
    return model.eval()


def test_peft(peft_model: Any) -> None:
    model: Any = peft_model.get_base_model()
    memory = model.compress(builders.ids(1, 70))
    with peft_model.disable_adapter():
        assert not accepts(model, memory)
    assert accepts(model, memory)
    peft_model.set_adapter("other")
    assert not accepts(model, memory)
    peft_model.set_adapter("default")
    assert accepts(model, memory)
    for layer in model.model.layers:
        layer.self_attn.v_proj.scale_layer(2.0)
    assert not accepts(model, memory)
    for layer in model.model.layers:
        layer.self_attn.v_proj.unscale_layer(2.0)
    assert accepts(model, memory)
    peft_model.merge_adapter()
    assert not accepts(model, memory)


# -- what is not a change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    builders.model(family).save_pretrained(tmp_path)
    # experts have no other products in float64
    options = {"experts_implementation": "eager"} if family == "qwen3_moe" else {}
    dtypes = (torch.float32, torch.float64, dtype)
    models = [SharedLLMForCausalLM.from_pretrained(tmp_path, dtype=d, **options) for d in dtypes]
    memories = [model.compress(builders.ids(1, 70)) for model in models]
    for model in models:
        # their weights are digested in bfloat16, which float16 cannot always follow
        same = [memory for memory in memories if memory.signature["weights"] == model.memory_signature()["weights"]]
        assert len(same) >= (3 if dtype == torch.bfloat16 else 1)
        assert all(accepts(model, memory) for memory in same)


def test_deep_models_in_another_dtype(tmp_path: Path) -> None:
    base = builders.base(num_hidden_layers=16)
    SharedLLMForCausalLM.from_base(base, **{**builders.TREE, "injection_layers": 16}).save_pretrained(tmp_path)
    one, other = (SharedLLMForCausalLM.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert accepts(other, one.compress(builders.ids(1, 70)))


def test_a_trained_model_in_another_dtype() -> None:
    folder = Path(sharedllm_ext.__file__).parent / "demo_model"
    one, other = (SharedLLMForCausalLM.from_pretrained(folder, dtype=d) for d in (torch.float32, torch.bfloat16))
    context = torch.randint(3, one.config.vocab_size, (1, 1500))
    assert accepts(other, one.compress(context)) and accepts(one, other.compress(context))


def test_threads_autocast_and_modes() -> None:
    model = builders.model()
    memory = model.compress(builders.ids(1, 70))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert accepts(copy.deepcopy(model), memory)
    finally:
        torch.set_num_threads(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert accepts(copy.deepcopy(model), memory)
    with torch.inference_mode():
        assert accepts(copy.deepcopy(model), memory)
    assert accepts(copy.deepcopy(model).train(), memory)
    assert accepts(pickle.loads(pickle.dumps(model)), memory)


def test_a_compressor_of_its_own() -> None:
    model = builders.model(tie_compressor=False)
    memory = model.compress(builders.ids(1, 70))
    set_all(model, lambda layer: layer.input_layernorm, "variance_epsilon", 1e-2)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2)
        model.injected_blocks[0].o_proj.weight.mul_(2)
    assert accepts(model, memory)
    model.compressor.layers[0].input_layernorm.variance_epsilon = 1e-2
    assert not accepts(model, memory)


def test_weights_that_are_not_finite() -> None:
    model = builders.model()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    memory = model.compress(builders.ids(1, 70))
    assert accepts(model, memory)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = 0.0
    assert not accepts(model, memory)


# -- when it is worked out --------------------------------------------------------------------------------------------


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    probe = signature._probe
    monkeypatch.setattr(signature, "_probe", lambda subject: calls.append(1) or probe(subject))
    return calls


@torch.no_grad()
def test_the_probe_runs_once(probes: list[int]) -> None:
    model, text = builders.model(), builders.ids(1, 6)
    for _ in range(2):
        memory = model.compress(builders.ids(1, 70))
        model(text, memory=memory)
        model.generate(text, memory=memory, max_new_tokens=3)
        model(text, context_ids=builders.ids(1, 40))
    assert len(probes) == 1
    for change, back in IN_PLACE.values():
        before = len(probes)
        change(model)
        back(model)
        model.compress(builders.ids(1, 70))
        model.compress(builders.ids(1, 70))
        assert len(probes) - before <= 1


def test_hooks_do_not_see_the_probe(probes: list[int]) -> None:
    model, seen = builders.model(), []
    hooks = [
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel())),
        model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0])),
    ]
    memory = model.compress(builders.ids(1, 70))
    assert len(probes) == 1 and signature._PROBE_TOKENS not in seen and seen
    for hook in hooks:
        hook.remove()
    assert accepts(model, memory) and len(probes) == 1


def test_old_memories_are_checked_by_their_fingerprint(probes: list[int]) -> None:
    model = builders.model()
    memory = model.compress(builders.ids(1, 70))
    old = copy.copy(memory)
    old.signature = {
        name: value for name, value in memory.signature.items() if name not in ("rope", "settings", "probe")
    }
    before = len(probes)
    assert accepts(copy.deepcopy(model), old) and len(probes) == before
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(0.1)
    assert not accepts(model, old) and len(probes) == before


def test_training_pays_for_no_probe(probes: list[int]) -> None:
    model = builders.model().train()
    memory = model.compress(builders.ids(1, 70))
    model(builders.ids(1, 6), memory=memory, labels=builders.ids(1, 6)).loss.backward()
    assert not probes
    set_all(model, lambda layer: layer.self_attn, "scaling", 0.3)
    with pytest.raises(ValueError, match="compress the context again"):
        model.check_memory(memory)


def test_threads_agree() -> None:
    model, results = builders.model(), []
    reference = copy.deepcopy(model).memory_signature()
    threads = [threading.Thread(target=lambda: results.append(model.memory_signature())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [reference] * 8


# -- signatures of files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rope", [1.0, "x"], "rope to be a list of numbers"),
        ("rope", [float("inf")], "rope to be a list of numbers"),
        ("settings", None, "settings to be a text, got None"),
        ("probe", {}, "probe to be numbers of all layers"),
        ("probe", {"epsilon": 0.1, "values": [[0.0] * 9] * 4}, "probe to be numbers of all layers"),
        ("probe", {"epsilon": 0.1, "values": [[0.0] * 8] * 5}, "probe to be numbers of all layers"),
        ("probe", {"epsilon": None, "values": [[0.0] * 9] * 5}, "probe to be numbers of all layers"),
        ("more", 1, "expected a signature of"),
    ],
)
def test_signatures_are_checked(name: str, value: Any, message: str) -> None:
    memory = builders.model().compress(builders.ids(1, 40))
    check_signature("file", memory.signature)
    with pytest.raises(ValueError, match=f"file: expected .*{message}|file: {message}"):
        check_signature("file", {**memory.signature, name: value})
