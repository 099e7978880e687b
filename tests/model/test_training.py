"""Training: gradients, labels, collator, Trainer, gradient checkpointing."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sharedllm_ext import SharedLLMDataCollator

from . import builders


@pytest.fixture
def model():
    return builders.model(split_noise=2.0).train()


def _gradients(model, text, context) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(text, context_ids=context, labels=text).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_gets_a_gradient(model) -> None:
    found = _gradients(model, builders.ids(2, 10), builders.ids(2, 70))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


def test_untied_compressor_gets_gradients() -> None:
    model = builders.model(tie_compressor=False).train()
    found = _gradients(model, builders.ids(2, 10), builders.ids(2, 70))
    compressor = {name for name in found if name.startswith("compressor.")}
    # the last compressor layer only projects keys and values; its queries, output and MLP are never used
    assert "compressor.layers.0.mlp.up_proj.weight" in compressor
    assert "compressor.layers.1.self_attn.v_proj.weight" in compressor
    assert "compressor.layers.1.mlp.up_proj.weight" not in compressor


def test_gradient_against_finite_differences() -> None:
    model = builders.model(query_aware=False, dtype=torch.float64).train()
    text, context = builders.ids(1, 6), builders.ids(1, 40)
    found = _gradients(model, text, context)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        parameter = dict(model.named_parameters())[name]
        direction = torch.randn_like(parameter)
        step, losses = 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(model(text, context_ids=context, labels=text).loss.item())
                parameter.sub_(direction, alpha=sign * step)
        expected = (losses[0] - losses[1]) / (2 * step)
        # Transformers' norms round to float32, which bounds the difference quotient
        assert (found[name] * direction).sum().item() == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_frozen_compressor_builds_no_graph(model) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.injected_blocks:
        block.requires_grad_(True)
    output = model(builders.ids(1, 8), context_ids=builders.ids(1, 70), labels=builders.ids(1, 8))
    assert not output.memory.keys[0].requires_grad
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for block in model.injected_blocks for p in block.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fields", [{}, {"tie_compressor": False}, {"query_aware": False}])
def test_gradient_checkpointing_changes_nothing(fields: dict[str, bool], reentrant: bool) -> None:
    model = builders.model(**fields).train()
    text, context = builders.ids(2, 10), builders.ids(2, 70)
    expected = _gradients(model, text, context)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = _gradients(model, text, context)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_over_frozen_embeddings(model, reentrant: bool) -> None:
    model.requires_grad_(False)
    for block in model.injected_blocks:
        block.requires_grad_(True)
    text, context = builders.ids(2, 10), builders.ids(2, 70)
    model.config.split_noise = 0.0
    expected = _gradients(model, text, context)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = _gradients(model, text, context)
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_split_noise_is_drawn_in_training_only(model) -> None:
    context = builders.ids(1, 64)
    draws = [model.compress(context, generator=torch.Generator().manual_seed(i)).values[1] for i in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])
    model.eval()
    assert torch.equal(model.compress(context).values[1], model.compress(context).values[1])


def test_choice_does_not_see_what_is_predicted(model) -> None:
    model.eval()
    context, text = builders.ids(1, 256), builders.ids(1, 12)
    labels = text.clone()
    labels[:, :6] = -100
    changed = text.clone()
    changed[:, 6:] = builders.ids(1, 6)
    with torch.no_grad():
        one = model(text, context_ids=context, labels=labels).memory
        other = model(changed, context_ids=context, labels=labels).memory
        prompt = model.compress(context, query_ids=text[:, :6])
        without = model(text, context_ids=context, labels=text).memory
        fixed = model.compress(context)
    assert torch.equal(one.keys[1], other.keys[1]) and torch.equal(one.keys[1], prompt.keys[1])
    assert torch.equal(without.keys[1], fixed.keys[1])


def test_loss_of_a_long_plain_input_is_that_of_its_window(model) -> None:
    model.eval()
    long, window = builders.ids(1, 90), model.config.window
    with torch.no_grad():
        whole = model(long, labels=long)
        split = model(long[:, -window:], context_ids=long[:, :-window], labels=long[:, -window:])
    assert torch.equal(whole.loss, split.loss)


def test_collator_pads_and_masks() -> None:
    rows = [{"input_ids": [5, 6, 7], "context_ids": [8, 9]}, {"input_ids": [5], "labels": [-100]}]
    batch = SharedLLMDataCollator(pad_token_id=1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["context_ids"].tolist() == [[8, 9], [1, 1]]
    assert batch["context_attention_mask"].tolist() == [[1, 1], [0, 0]]
    assert "context_ids" not in SharedLLMDataCollator()([{"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"example 0: expected 'input_ids', got \['text'\]"):
        SharedLLMDataCollator()([{"text": "a"}])
    with pytest.raises(ValueError, match=r"example 0: expected labels of the running text's shape \(2,\), got \(1,\)"):
        SharedLLMDataCollator()([{"input_ids": [1, 2], "labels": [1]}])


def test_trainer_trains_and_evaluates(tmp_path: Path, model) -> None:
    rows = [{"input_ids": builders.ids(n), "context_ids": builders.ids(9 * n)} for n in (5, 9, 7, 3)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    before = model.injected_blocks[0].q_proj.weight.detach().clone()
    trainer = Trainer(model, arguments, SharedLLMDataCollator(), train_dataset=rows, eval_dataset=rows)
    result = trainer.train()
    assert result.training_loss > 0
    assert not torch.equal(model.injected_blocks[0].q_proj.weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
