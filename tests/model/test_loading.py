"""Checkpoints that lack weights, hold others or broken ones; vocabularies of another size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sharedllm_ext import SharedLLMForCausalLM

from . import builders

State = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    builders.model(tie_compressor=False).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, how: Callable[[State], object]) -> None:
    state = load_file(folder / "model.safetensors")
    how(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def drop(*parts: str) -> Callable[[State], object]:
    def how(state: State) -> None:
        for name in [name for name in state if any(part in name for part in parts)]:
            del state[name]

    return how


@torch.no_grad()
def test_blocks_without_weights_add_nothing(folder: Path) -> None:
    change(folder, drop(".injection."))
    loaded, info = SharedLLMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert len(info["missing_keys"]) == 6
    fresh = SharedLLMForCausalLM(loaded.config)
    for block, made in zip(loaded.injected_blocks, fresh.injected_blocks, strict=True):
        assert not block.o_proj.weight.any() and not made.o_proj.weight.any()
        assert (block.norm.weight == 1).all() and (made.norm.weight == 1).all()
        torch.testing.assert_close(block.q_proj.weight.std(), made.q_proj.weight.std(), rtol=0.1, atol=0)
    text = builders.ids(1, 8)
    assert torch.equal(loaded(text, context_ids=builders.ids(1, 70)).logits, loaded(text).logits)


@torch.no_grad()
def test_one_block_without_weights(folder: Path) -> None:
    before = SharedLLMForCausalLM.from_pretrained(folder)
    change(folder, drop("layers.1.injection."))
    loaded = SharedLLMForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.injected_blocks[0].o_proj.weight, before.injected_blocks[0].o_proj.weight)
    assert not loaded.injected_blocks[1].o_proj.weight.any()


def more_layers(state: State) -> None:
    for name in [name for name in state if name.startswith("model.layers.1.injection.")]:
        state[name.replace("layers.1.", "layers.2.")] = state[name].clone()


def broken(value: float, name: str) -> Callable[[State], object]:
    return lambda state: state[name].view(-1).__setitem__(3, value)


WRONG: dict[str, tuple[Callable[[State], object], str]] = {
    "a query projection": (drop("layers.0.injection.q_proj"), r"got none for model.layers.0.injection.q_proj.weight$"),
    "norms": (drop("injection.norm"), r"none for model.layers.0.injection.norm.weight, model.layers.1.injection.norm"),
    "the compressor": (drop("compressor."), r"got none for compressor.embed_tokens.weight, .* and \d+ more"),
    "more blocks": (more_layers, r"injection_layers=2 .*got others besides: model.layers.2.injection.norm.weight, "),
    "NaN": (broken(float("nan"), "model.layers.3.mlp.up_proj.weight"), r"NaN in model.layers.3.mlp.up_proj.weight$"),
    "inf": (broken(-float("inf"), "compressor.norm.weight"), r"expected finite weights, got .* in compressor.norm"),
}


@pytest.mark.parametrize("what", WRONG)
def test_noise_is_refused(folder: Path, what: str) -> None:
    how, message = WRONG[what]
    change(folder, how)
    with pytest.raises(ValueError, match=message) as caught:
        SharedLLMForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_weights_are_finite(folder: Path, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    change(folder, lambda state: state["model.norm.weight"].copy_(torch.tensor([most, -most] * 32)))
    SharedLLMForCausalLM.from_pretrained(folder, dtype=dtype)


def test_compressor_that_the_configuration_does_not_know(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_compressor": True}))
    with pytest.raises(ValueError, match="tie_compressor=True as in its configuration, got others besides: compressor"):
        SharedLLMForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("size", [{"new_num_tokens": 140}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 48}])
def test_vocabulary_of_another_size(tmp_path: Path, family: str, size: dict[str, int]) -> None:
    model = builders.model(family, tie_compressor=False)
    before = model.compressor.embed_tokens.weight.detach().clone()
    model.compressor.embed_tokens.weight.data.mul_(1.5)
    embeddings = model.resize_token_embeddings(**size)
    own, rows = model.compressor.embed_tokens, embeddings.num_embeddings
    assert rows == size.get("new_num_tokens", 144)
    assert embeddings is model.model.embed_tokens and own.num_embeddings == rows == model.config.vocab_size
    assert model.compressor.config.vocab_size == rows == model.lm_head.out_features
    kept = min(rows, builders.VOCABULARY)
    assert torch.equal(own.weight[:kept], before[:kept] * 1.5)
    assert torch.equal(own.weight[kept:], embeddings.weight[kept:])
    assert own.weight.requires_grad
    context, text = torch.randint(rows, (1, 70)), torch.randint(rows, (1, 8))
    context[0, 5] = rows - 1
    with torch.no_grad():
        logits = model(text, context_ids=context).logits
        model.save_pretrained(tmp_path)
        loaded = SharedLLMForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(text, context_ids=context).logits, logits)
    model.train()
    model(text, context_ids=context, labels=text).loss.backward()
    assert own.weight.grad is not None and own.weight.grad[rows - 1].any()


def test_one_vocabulary_alone_is_refused(tmp_path: Path) -> None:
    message = "compressor: expected an embedding of {} tokens as in the decoder, got {}; resize_token_embeddings of the"
    model = builders.model(tie_compressor=False)
    model.set_input_embeddings(torch.nn.Embedding(140, 64))
    with pytest.raises(ValueError, match=message.format(140, 128)):
        model.compress(builders.ids(1, 40))
    model = builders.model(tie_compressor=False)
    model.compressor.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=message.format(128, 100)):
        model(builders.ids(1, 4), context_ids=builders.ids(1, 40))
    with pytest.raises(ValueError, match=message.format(128, 100)):
        model.save_pretrained(tmp_path)
