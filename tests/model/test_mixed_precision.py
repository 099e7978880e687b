"""Weights, autocast, adapters and memory of different precision in one model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from sharedllm_ext import SharedLLMDataCollator, SharedLLMForCausalLM

from . import builders

HALVES = [torch.bfloat16, torch.float16]
ROWS = [{"input_ids": builders.ids(n), "context_ids": builders.ids(9 * n)} for n in (5, 9, 7, 3)]


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got.float() - want.float()).norm() < 0.03 * want.float().norm())


def _freeze_all_but_blocks(model: SharedLLMForCausalLM) -> SharedLLMForCausalLM:
    model.requires_grad_(False)
    for block in model.injected_blocks:
        block.requires_grad_(True)
    return model


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", *builders.LATER])
@torch.no_grad()
def test_autocast_reads_and_writes_memories_of_its_own_dtype(family: str, dtype: torch.dtype) -> None:
    model = builders.model(family, query_aware=False)
    text, context = builders.ids(2, 12), builders.ids(2, 130)
    want = model(text, context_ids=context)
    with torch.autocast("cpu", dtype=dtype):
        got = model(text, context_ids=context)
        again = model(text, memory=got.memory)
        other = model(text, memory=want.memory)
        generated = model.generate(text, context_ids=context, max_new_tokens=3, do_sample=False)
    assert got.memory.dtype == dtype
    assert _close(got.logits, want.logits) and _close(other.logits, want.logits)
    assert torch.equal(again.logits, got.logits)
    assert generated.shape == (2, 15)
    # a memory belongs to the weights, whatever it was made in
    assert _close(model(text, memory=got.memory).logits, want.logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", *builders.CONTINUOUS])
def test_gradients_under_autocast(family: str, tied: bool) -> None:
    model = builders.model(family, tie_compressor=tied).train()
    text, context = builders.ids(2, 12), builders.ids(2, 130)
    labels = text.clone()
    labels[:, :6] = -100
    model(text, context_ids=context, labels=labels).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(text, context_ids=context, labels=labels)
    assert output.memory.dtype == torch.bfloat16
    output.loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert (gradient - want[name]).norm() < 0.1 * want[name].norm() + 1e-4, name


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", *builders.LATER])
def test_injected_blocks_in_float32_over_a_16_bit_base(family: str, train: bool) -> None:
    model = builders.model(family, query_aware=False).train(train)
    text, context = builders.ids(2, 12), builders.ids(2, 130)
    with torch.no_grad():
        want = model(text, context_ids=context).logits
    _freeze_all_but_blocks(model.bfloat16())
    for block in model.injected_blocks:
        block.float()
    output = model(text, context_ids=context, labels=text)
    assert output.logits.dtype == torch.bfloat16 and _close(output.logits, want)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for b in model.injected_blocks for p in b.parameters())


@pytest.mark.parametrize("train", [False, True])
def test_compressor_in_float32_under_a_16_bit_decoder(train: bool) -> None:
    model = builders.model(tie_compressor=False).train(train)
    text, context = builders.ids(2, 12), builders.ids(2, 130)
    model.bfloat16()
    model.compressor.float()
    output = model(text, context_ids=context)
    assert output.memory.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()
    output.logits.sum().backward()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_trainer_in_bfloat16(tmp_path: Path, family: str) -> None:
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True, bf16=True
    )
    model = builders.model(family).train()
    trainer = Trainer(model, arguments, SharedLLMDataCollator(), train_dataset=ROWS, eval_dataset=ROWS)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_accelerate_converts_the_memory_with_the_outputs() -> None:
    model = builders.model()
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    text, context = builders.ids(2, 12), builders.ids(2, 130)
    output = prepared(text, context_ids=context)
    assert output.logits.dtype == output.memory.dtype == torch.float32
    again = prepared(text, memory=output.memory)
    assert _close(again.logits, output.logits)


@pytest.mark.parametrize("tied", [True, False])
def test_noise_on_embeddings(tmp_path: Path, tied: bool) -> None:
    # the noise's hook takes embeddings of [rows, tokens, width]
    seen = []
    model = builders.model(tie_compressor=tied).train()
    embedding = model.model.embed_tokens if tied else model.compressor.embed_tokens
    embedding.register_forward_hook(lambda _, args, out: seen.append((args[0].dim(), out.dim())))
    arguments = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], save_strategy="no", use_cpu=True, neftune_noise_alpha=5.0
    )
    trainer = Trainer(model, arguments, SharedLLMDataCollator(), train_dataset=ROWS)
    assert trainer.train().training_loss > 0
    assert seen and set(seen) == {(2, 3)}


def _with_lora(model: SharedLLMForCausalLM, **fields: Any) -> Any:
    return get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "o_proj"], **fields}))


def test_dora_on_a_zero_projection_is_refused_by_name() -> None:
    model = SharedLLMForCausalLM.from_base(builders.base(), **builders.TREE)
    text, context = builders.ids(1, 8), builders.ids(1, 70)
    with pytest.raises(ValueError, match=r"injection\.o_proj: expected no rows of zeros under DoRA.* got 64 of 64"):
        _with_lora(model, use_dora=True)(text, context_ids=context)


@pytest.mark.parametrize("exclude", [True, False])
def test_dora_elsewhere_or_on_a_trained_projection(exclude: bool) -> None:
    model = builders.model() if not exclude else SharedLLMForCausalLM.from_base(builders.base(), **builders.TREE)
    fields = {"exclude_modules": r".*injection.*", "modules_to_save": ["injection"]} if exclude else {}
    adapted = _with_lora(model, use_dora=True, **fields)
    adapted(builders.ids(1, 8), context_ids=builders.ids(1, 70)).logits.sum().backward()
    found = [p.grad for name, p in adapted.named_parameters() if "magnitude" in name and p.grad is not None]
    assert found and all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_over_a_16_bit_base(autocast: bool) -> None:
    adapted = _with_lora(builders.model(dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = adapted(builders.ids(1, 8), context_ids=builders.ids(1, 70), labels=builders.ids(1, 8)).loss
    loss.backward()
    assert loss.isfinite()
