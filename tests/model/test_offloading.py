"""Weights that accelerate keeps on the CPU or on disk between calls: the same logits, memories and tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from sharedllm_ext import ContextMemory, SharedLLMForCausalLM
from sharedllm_ext.model.signature_fields import describe_difference

from . import builders

CPU = torch.device("cpu")
MIXED = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
}


def _loaded(model: SharedLLMForCausalLM, folder: Path, device_map: Any) -> SharedLLMForCausalLM:
    model.save_pretrained(folder / "model")
    return SharedLLMForCausalLM.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=folder / "weights"
    )


WAYS: dict[str, Callable[[SharedLLMForCausalLM, Path], Any]] = {
    "cpu": lambda model, _: cpu_offload(model, execution_device=CPU),
    "cpu, whole layers": lambda model, _: cpu_offload(
        model,
        execution_device=CPU,
        preload_module_classes=["InjectedLlamaDecoderLayer", "CompressorLlamaDecoderLayer", "LlamaDecoderLayer"],
    ),
    "cpu, buffers too": lambda model, _: cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatched": lambda model, folder: dispatch_model(model, MIXED, main_device="cpu", offload_dir=folder),
    "loaded, some layers on disk": lambda model, folder: _loaded(model, folder, MIXED),
    "loaded, all on disk": lambda model, folder: _loaded(model, folder, {"": "disk"}),
}


@pytest.mark.parametrize("family", builders.LATER)
@pytest.mark.parametrize("way", ["cpu", "cpu, buffers too", "loaded, all on disk"])
def test_offloaded_weights_of_every_family(tmp_path: Path, way: str, family: str) -> None:
    _check_offloaded(tmp_path, way, builders.model(family))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_give_the_same(tmp_path: Path, way: str, tied: bool) -> None:
    if not tied and way in ("dispatched", "loaded, some layers on disk"):
        pytest.skip("this map names no place for the compressor")
    _check_offloaded(tmp_path, way, builders.model(tie_compressor=tied))


@torch.no_grad()
def _check_offloaded(tmp_path: Path, way: str, model: SharedLLMForCausalLM) -> None:
    text, context = builders.ids(2, 10), builders.ids(2, 130)
    want, plain = model(text, context_ids=context), model(text).logits
    tokens = model.generate(text, context_ids=context, max_new_tokens=4, do_sample=False)
    nodes = model.retrieve(context, query_ids=text)
    want.memory.save(tmp_path / "memory.safetensors")

    offloaded = WAYS[way](model, tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    got = offloaded(text, context_ids=context)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-4)
    # weights read from a file may lie elsewhere in memory, and round otherwise in the last digit
    assert describe_difference(want.memory.signature, got.memory.signature) is None
    torch.testing.assert_close(offloaded(text).logits, plain, atol=1e-5, rtol=1e-4)
    memory = ContextMemory.load(tmp_path / "memory.safetensors", offloaded)
    torch.testing.assert_close(offloaded(text, memory=memory).logits, want.logits, atol=1e-5, rtol=1e-4)
    again = offloaded.generate(text, context_ids=context, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, tokens)
    for (picked, _), (expected, _) in zip(offloaded.retrieve(context, query_ids=text), nodes, strict=True):
        assert torch.equal(picked, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert offloaded(text, context_ids=context).logits.isfinite().all()


@torch.no_grad()
def test_other_weights_are_told_apart_when_offloaded() -> None:
    model = builders.model()
    context = builders.ids(1, 70)
    memory = model.compress(context)
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(ValueError, match="made by another model"):
        model(builders.ids(1, 5), memory=memory)
