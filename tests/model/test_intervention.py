"""Hooks, replaced forwards, modes: what users and other libraries do to a model must neither be skipped nor spoilt."""

import pytest
import torch
from torch import Tensor

from sharedllm_ext.model import layer_math
from sharedllm_ext.model.decoding import PreallocatedCache, PreallocatedLayer

from . import builders


@pytest.fixture
def model():
    return builders.model()


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in place as on CUDA in half precision, on the CPU."""
    monkeypatch.setattr(layer_math, "inference_only", lambda x: not torch.is_grad_enabled())


@pytest.mark.parametrize("layer", [0, 3])
@torch.no_grad()
def test_replaced_mlp_is_called(model, layer: int) -> None:
    calls = []
    mlp = model.model.layers[layer].mlp
    mlp.forward = lambda x: calls.append(1) or type(mlp).forward(mlp, x)
    model(builders.ids(1, 5), context_ids=builders.ids(1, 40))
    assert calls


def test_backward_hooks_of_every_mlp_run(model) -> None:
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, index=index: calls.append(index))
    text = builders.ids(1, 6)
    model(text, labels=text).loss.backward()
    assert sorted(calls) == [0, 1, 2, 3]


@torch.no_grad()
def test_hooks_keep_what_they_saw(model, in_place: None) -> None:
    layer, kept = model.model.layers[0], {}

    def keep(name: str, tensor: Tensor) -> None:
        kept[name] = tensor, tensor.clone()

    layer.injection.register_forward_hook(lambda m, args, out: keep("injection output", out))
    layer.injection.register_forward_pre_hook(lambda m, args: keep("injection input", args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: keep("norm input", args[0]))
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: keep("embeddings", out))
    text, context = builders.ids(1, 6), builders.ids(1, 40)
    logits = model(text, context_ids=context, output_hidden_states=True)
    assert len(kept) == 4
    for name, (tensor, copy) in kept.items():
        assert torch.equal(tensor, copy), name
    assert torch.isfinite(logits.logits).all()


@torch.no_grad()
def test_sums_in_place_change_nothing(model, monkeypatch: pytest.MonkeyPatch) -> None:
    text, context = builders.ids(1, 6), builders.ids(1, 70)
    expected = model(text, context_ids=context, output_hidden_states=True)
    monkeypatch.setattr(layer_math, "inference_only", lambda x: not torch.is_grad_enabled())
    got = model(text, context_ids=context, output_hidden_states=True)
    for one, other in zip((got.logits, *got.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_training_after_inference_mode(model) -> None:
    text, context = builders.ids(1, 6), builders.ids(1, 40)
    with torch.inference_mode():
        model(text, context_ids=context)
    model.train()
    model(text, context_ids=context, labels=text).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = builders.model()
        assert model.compress(builders.ids(1, 40)).num_slots > 0


def test_failed_generate_leaves_the_modes_alone(model) -> None:
    model.train()
    model.model.layers[1].eval()
    with pytest.raises(ValueError, match="context_ids"):
        model.generate(builders.ids(1, 5), context_ids=builders.ids(1, 40).float(), max_new_tokens=2)
    model.generate(builders.ids(1, 5), context_ids=builders.ids(1, 40), max_new_tokens=2)
    assert model.training and not model.model.layers[1].training and model.model.layers[2].training


def _layer(rows: int = 3, tokens: int = 5) -> PreallocatedLayer:
    layer = PreallocatedLayer()
    layer.update(torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4))
    return layer


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 3)])
def test_cache_takes_a_part_of_its_rows(part: slice) -> None:
    layer = _layer()
    keys, values = layer.keys[part].clone(), layer.values[part].clone()
    layer.keys, layer.values = layer.keys[part], layer.values[part]
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_caches_do_not_share_what_one_was_given() -> None:
    one, other = _layer(1), _layer(1)
    before = one.keys.clone()
    other.keys, other.values = one.keys, one.values
    other.crop(-1)
    other.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    assert torch.equal(one.keys, before)


def test_gradients_pass_through_a_cache(model) -> None:
    text = builders.ids(1, 6)
    grads = []
    for cache in (None, PreallocatedCache(model.config.text_config)):
        model.zero_grad()
        first = model(text[:, :3], past_key_values=cache, use_cache=True)
        second = model(text[:, 3:], past_key_values=first.past_key_values, use_cache=True)
        second.logits.sum().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)
