"""Why something is slow is said: decoding steps, fused layers, the attention's kernel; each reason in words."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache

import sharedllm_ext
from sharedllm_ext import SharedLLMForCausalLM, decoding_obstacle
from sharedllm_ext.model import slow_paths as slow_paths_module
from sharedllm_ext.model.decoding import DecodeRunner, PreallocatedCache, support
from sharedllm_ext.model.slow_paths import attention_obstacle, fusing_obstacle, slow_paths

from . import builders

NO_HOOK = "expected no hook and no forward of its own, got"
ENDS = "its handle's remove() ends it"
HOLE = torch.tensor([[1, 0, 1]])
STEPS: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "RUN_ON_CPU", True)
    monkeypatch.setattr(support, "_said", set())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ran: list[int] = []
    end = DecodeRunner._end
    monkeypatch.setattr(DecodeRunner, "_end", lambda *a: (ran.append(1), end(*a))[1])
    return ran


class Watcher:
    """A hook that is no function."""

    def __call__(self, *_: Any) -> None:
        return None


def _hooked(model: Any) -> None:
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)


def _own_forward(model: Any) -> None:
    model.model.norm.forward = lambda x: x


def _adapted(model: Any) -> None:
    class Adapter(nn.Linear):
        pass

    old = model.model.layers[3].mlp.down_proj
    model.model.layers[3].mlp.down_proj = Adapter(old.in_features, old.out_features, bias=False)


def _other_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm = nn.LayerNorm(64)


def _other_layer(model: Any) -> None:
    model.model.layers[2].mlp = nn.Sequential(model.model.layers[2].mlp)


def _mixed(model: Any) -> None:
    model.lm_head.bfloat16()


def _bounded(model: Any) -> None:
    model.model.embed_tokens.max_norm = 1.0


def _watched(model: Any) -> None:
    model.config.output_hidden_states = True


def _rope(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


def _gelu(model: Any) -> None:
    model.config.text_config.hidden_act = "gelu"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.train(), "model: expected evaluation mode (model.eval()), got training mode"),
        (
            _hooked,
            f"model.layers.1.self_attn: {NO_HOOK} forward hook `_hooked.<locals>.<lambda>` on FusedLlamaAttention; "
            f"{ENDS}",
        ),
        (
            lambda m: m.lm_head.register_forward_pre_hook(Watcher()),
            f"lm_head: {NO_HOOK} forward pre-hook `Watcher` on Linear; {ENDS}",
        ),
        (_own_forward, f"model.norm: {NO_HOOK} forward `_own_forward.<locals>.<lambda>` on FusedLlamaRMSNorm"),
        (_adapted, "model.layers.3.mlp.down_proj: expected a plain Linear, got Adapter"),
        (_other_norm, "model.layers.0.input_layernorm: expected LlamaRMSNorm, got LayerNorm"),
        (_mixed, "lm_head.weight: expected torch.float32 on cpu as the embedding, got torch.bfloat16 on cpu"),
        (_bounded, "model.embed_tokens: expected a plain Embedding, got Embedding"),
        (_watched, "config.output_hidden_states: expected False, got True"),
        (_rope, "rope_type: expected default, linear, llama3, yarn, got dynamic"),
        (_gelu, "hidden_act: expected silu, got gelu"),
        (lambda m: m.double(), "dtype: expected torch.float32 or torch.bfloat16, got torch.float64"),
    ],
)
def test_of_the_model(change: Any, reason: str) -> None:
    model = builders.model()
    assert decoding_obstacle(model) is None
    change(model)
    assert decoding_obstacle(model) == reason


def test_other_modules_are_named() -> None:
    model = builders.model()
    model.model.layers[2].mlp.__class__ = nn.Identity
    assert decoding_obstacle(model) == "model.layers.2: expected LlamaMLP, got Identity"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "generation mode: expected greedy_search or sample, got beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "generation mode: expected greedy_search or sample, got assisted_generation"),
        ({"use_cache": False}, "use_cache: expected True, got False"),
        ({"cache_implementation": "static"}, "cache_implementation: expected None, got 'static'"),
        ({"disable_compile": True}, "disable_compile: expected False, got True"),
        ({"output_attentions": True}, "output_attentions: expected False, got True"),
        ({"rows": 257}, "input_ids: expected at most 256 rows, got 257"),
        (
            {"attention_mask": HOLE},
            "attention_mask: expected padding on the left alone, got a zero after a token",
        ),
        (
            {"attention_mask": HOLE[None]},
            "attention_mask: expected shape [batch, tokens], got (1, 1, 3)",
        ),
        (
            {"past_key_values": DynamicCache()},
            "or the PreallocatedCache of an earlier generate, got DynamicCache",
        ),
    ],
)
def test_of_a_call(settings: dict[str, Any], reason: str) -> None:
    model = builders.model()
    got = decoding_obstacle(model, **settings)
    assert got is not None and got.endswith(reason)


def test_no_obstacle_in_usual_calls() -> None:
    model, mask = builders.model(), torch.tensor([[0, 0, 1], [1, 1, 1]])
    cache = PreallocatedCache(model.config.text_config)
    assert decoding_obstacle(model, rows=8, attention_mask=mask, past_key_values=cache, do_sample=True) is None


def test_of_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = builders.model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoding_obstacle(model) == "autocast: expected none, got one on cpu"
    memory = model.compress(builders.ids(1, 40)).to(torch.bfloat16)
    expected = "memory: expected torch.float32 on cpu as the model, got torch.bfloat16 on cpu"
    assert decoding_obstacle(model, memory=memory) == expected
    monkeypatch.setattr(support, "RUN_ON_CPU", False)
    assert decoding_obstacle(model) is None and decoding_obstacle(model.bfloat16()) is None
    got = decoding_obstacle(model.half())
    assert got == "dtype: expected torch.float32 or torch.bfloat16 on the CPU, got torch.float16"
    monkeypatch.setattr(support, "cpu_kernels", lambda: frozenset({"injected_attention"}))
    got = decoding_obstacle(model.float())
    assert got == "CPU library: expected kernels of decode_linear, injected_attention, got none of decode_linear"

    class Other(SharedLLMForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.__class__ = Other
    assert decoding_obstacle(model) == "model: expected the forward of SharedLLMForCausalLM, got another one"


@pytest.mark.parametrize(
    ("settings", "rows", "word"),
    [
        ({}, 1, None),
        ({"num_beams": 2}, 1, "beam_search"),
        ({}, 257, "at most 256 rows, got 257"),
        ({"use_cache": False}, 1, "use_cache"),
        ({"disable_compile": True}, 1, "disable_compile"),
        ({"past_key_values": True}, 1, "got DynamicCache"),
    ],
)
def test_generate_says_so_once(
    settings: dict[str, Any], rows: int, word: str | None, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, text = builders.model(), builders.ids(rows, 9)
    with caplog.at_level(logging.INFO, logger="sharedllm_ext"):
        for _ in range(2):
            own = dict(settings)
            if "past_key_values" in own:
                own["past_key_values"] = DynamicCache(config=model.config.text_config)
            model.generate(text, **own, **STEPS)
    said = [record.getMessage() for record in caplog.records if record.name == "sharedllm_ext"]
    if word is None:
        assert not said and len(steps) == 6
    else:
        assert not steps and len(said) == 1 and word in said[0] and "expected" in said[0]
        assert caplog.records[-1].levelno == logging.INFO


def test_what_generate_does_agrees_with_the_answer(steps: list[int]) -> None:
    model = builders.model()
    for change in (lambda m: None, _hooked, lambda m: m.train()):
        change(model)
        steps.clear()
        expected = decoding_obstacle(model) is None
        model.generate(builders.ids(1, 9), **STEPS)
        assert bool(steps) == expected


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        (torch_module.register_module_forward_hook, "forward hook"),
        (torch_module.register_module_forward_pre_hook, "forward pre-hook"),
        (torch_module.register_module_full_backward_hook, "backward hook"),
        (torch_module.register_module_full_backward_pre_hook, "backward pre-hook"),
    ],
)
def test_hooks_of_all_modules(register: Any, kind: str, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = builders.model(), builders.ids(1, 9)
    expected = model.generate(text, **STEPS)
    assert steps
    steps.clear()
    monkeypatch.setattr(slow_paths_module, "_obstacle_of", lambda _: None)
    assert fusing_obstacle(model) is None
    seen: set[nn.Module] = set()
    forward = kind.startswith("forward")
    handle = register(lambda module, *_: seen.add(module))
    try:
        got = f"got {kind} `test_hooks_of_all_modules.<locals>.<lambda>`; {ENDS}"
        # without gradients those of the backward pass have nothing to do
        reason = f"all modules: expected no hook and no forward of its own, {got}" if forward else None
        assert decoding_obstacle(model) == reason
        assert fusing_obstacle(model) == f"all modules: expected no hook, {got}"
        assert torch.equal(model.generate(text, **STEPS), expected) and bool(steps) != forward
    finally:
        handle.remove()
    if forward:
        assert {module for layer in model.model.layers for module in (layer, layer.mlp, layer.mlp.down_proj)} <= seen
    assert decoding_obstacle(model) is None and fusing_obstacle(model) is None


def test_fused_layers_and_attention_kernel() -> None:
    model = builders.model()
    assert fusing_obstacle(model) == "device: expected a CUDA device, got cpu"
    assert attention_obstacle(model) == "device: expected a CUDA device, got cpu"
    found = slow_paths(model)
    assert list(found) == ["layers", "attention"]
    model.train()
    assert slow_paths(model)["decoding"].startswith("model: expected evaluation mode")
    assert sharedllm_ext.decoding_obstacle is decoding_obstacle


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_cuda() -> None:
    model = builders.model().to("cuda", torch.bfloat16)
    assert fusing_obstacle(model) is decoding_obstacle(model) is attention_obstacle(model) is None
    odd = builders.model(base_fields={"head_dim": 20}).to("cuda", torch.bfloat16)
    expected = "head_dim: expected a multiple of 8 up to 256 (read in place by tensor core kernels), got 20"
    assert decoding_obstacle(odd) == attention_obstacle(odd) == expected
    assert decoding_obstacle(model.float()) == "dtype: expected torch.bfloat16 or torch.float16, got torch.float32"


def test_generate_says_what_is_not_fused_and_what_is_copied(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, once each; the tensor cores do not read heads of 20 in place."""
    monkeypatch.setattr(slow_paths_module, "DEVICE", "cpu")
    monkeypatch.setattr(slow_paths_module, "_obstacle_of", lambda model: None)
    model = builders.model(base_fields={"head_dim": 20})
    model.model.layers[1].mlp.register_forward_hook(lambda *arguments: None)
    memory = model.compress(builders.ids(1, 40))
    with caplog.at_level(logging.INFO, logger="sharedllm_ext"):
        for _ in range(2):
            model.generate(builders.ids(1, 4), memory=memory, max_new_tokens=2, do_sample=False)
    said = [record.getMessage() for record in caplog.records if record.name == "sharedllm_ext"]
    fused = [text for text in said if text.startswith("norms, attention or MLPs are not fused: model.layers.1 mlp: ")]
    what = "attention to the memory takes the general kernel or copies: head_dim: expected a multiple of 8"
    assert len(fused) == len([text for text in said if text.startswith(what)]) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sharedllm_ext"):
        model.generate(builders.ids(1, 4), memory=memory, max_new_tokens=2, do_sample=False)
    assert not [record for record in caplog.records if record.name == "sharedllm_ext"]
