"""Training: gradients, labels, collator, Trainer, gradient checkpointing."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sharedllm_ext import ContextMemory, SharedLLMDataCollator
from sharedllm_ext.model import compressor

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


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("layers", [2, 3])
def test_no_gradient_goes_through_node_vectors(
    checkpointing: bool, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward pass is slow; without gradients it is what attends at the kept positions."""
    model = builders.model(injection_layers=layers, query_aware=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen: list[bool] = []

    def watched(query: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        out = node_vectors(query, *arguments, **settings)
        seen.append(out.requires_grad)
        return out

    node_vectors = compressor.node_vectors
    monkeypatch.setattr(compressor, "node_vectors", watched)
    context = builders.ids(2, 70)
    trained = model.compress(context)
    assert not seen and trained.keys[-1].requires_grad
    model.requires_grad_(False)
    frozen = model.compress(context)
    assert seen == [False]
    for got, expected in zip((*trained.keys, *trained.values), (*frozen.keys, *frozen.values), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_memory_serves_several_questions(tied: bool, checkpointing: bool) -> None:
    model = builders.model(query_aware=False, tie_compressor=tied).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    context, questions = builders.ids(1, 70), [builders.ids(2, 8) for _ in range(3)]

    def gradients(losses) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients([model(q, context_ids=context.expand(2, -1), labels=q).loss for q in questions])
    memory = model.compress(context)
    got = gradients([model(q, memory=memory, labels=q).loss for q in questions])
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


def test_memory_of_a_model_in_training_holds_until_the_next_step(tmp_path: Path, model) -> None:
    text, context = builders.ids(1, 8), builders.ids(1, 70)
    output = model(text, context_ids=context, labels=text)
    # the output's own, in either mode
    first = model(text, memory=output.memory).logits
    torch.testing.assert_close(first, output.logits)
    torch.testing.assert_close(model.eval()(text, memory=output.memory).logits, output.logits)
    assert model.generate(text, memory=output.memory, max_new_tokens=2).shape[1] > 8
    model.train()
    copied = copy.deepcopy(model)
    output.memory.save(tmp_path / "memory")
    output.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for reader, memory in (
        (model, output.memory),
        (copied, output.memory),
        (builders.model().train(), output.memory),
        (model, ContextMemory.load(tmp_path / "memory")),
    ):
        with pytest.raises(ValueError, match=r"memory: expected one made since the weights last changed"):
            reader(text, memory=memory)
    # weights that no step changes keep their memories
    for parameter in model.compressor.parameters() if model.compressor is not None else model.model.parameters():
        parameter.requires_grad_(False)
    memory = model.compress(context)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(text, memory=memory, labels=text).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["llama", *builders.LATER])
def test_gradient_against_finite_differences(family: str) -> None:
    # a choice of experts would jump
    every = {"num_experts_per_tok": 4} if family == "qwen3_moe" else {}
    model = builders.model(family, base_fields=every, query_aware=False, dtype=torch.float64).train()
    text, context = builders.ids(1, 6), builders.ids(1, 40)
    found = _gradients(model, text, context)
    names = [
        name for name in found if re.search(r"layers\.(0.self_attn.(k|qkv)|1.self_attn.(v|qkv))_proj.weight", name)
    ]
    assert len(names) == 2
    for name in names:
        parameter = dict(model.named_parameters())[name]
        direction = torch.randn_like(parameter)
        step, losses = 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(model(text, context_ids=context, labels=text).loss.item())
                parameter.sub_(direction, alpha=sign * step)
        expected = (losses[0] - losses[1]) / (2 * step)
        # Transformers' norms and loss round to float32, which bounds the difference quotient
        assert (found[name] * direction).sum().item() == pytest.approx(expected, rel=2e-3, abs=5e-4)


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
@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_compressor": False}, {"query_aware": False}, *({"family": family} for family in builders.LATER)],
    ids=str,
)
def test_gradient_checkpointing_changes_nothing(fields: dict[str, Any], reentrant: bool) -> None:
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


def test_collator_leaves_out_what_masks_hide() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0]},
        {
            "input_ids": [0, 9, 10, 11, 12],
            "attention_mask": torch.tensor([0, 1, 1, 1, 1]),
            "labels": [1, -100, -100, 11, 12],
            "context_ids": [0, 0, 20, 21],
            "context_attention_mask": [0, 0, 1, 1],
        },
        {"input_ids": [3], "context_ids": [22], "query_ids": [30, 31, 0], "query_attention_mask": [1, 1, 0]},
    ]
    batch = SharedLLMDataCollator(pad_token_id=1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [3, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [-100, -100, 11, 12], [3, -100, -100, -100]]
    assert batch["context_ids"].tolist() == [[1, 1], [20, 21], [22, 1]]
    assert batch["context_attention_mask"].tolist() == [[0, 0], [1, 1], [1, 0]]
    # the text before the first label, unless the example names another
    assert batch["query_ids"].tolist() == [[1, 1], [9, 10], [30, 31]]
    assert batch["query_attention_mask"].tolist() == [[0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"position_ids": [0, 1]}, r"example 0: expected fields of input_ids, .*, got 'position_ids'"),
        ({"text": "a"}, r"got 'text'"),
        ({"attention_mask": [1]}, r"expected attention_mask of the shape of the running text \(2,\), got \(1,\)"),
        ({"context_ids": [1], "context_attention_mask": [1, 1]}, r"context_attention_mask of the shape of context_ids"),
        ({"context_attention_mask": [1, 1]}, r"context_attention_mask of the shape of context_ids \(0,\), got \(2,\)"),
        ({"context_ids": [0.5]}, r"expected integers in context_ids, got dtype torch.float32"),
        ({"context_ids": [[1, 2]]}, r"expected context_ids of one dimension, got shape \(1, 2\)"),
    ],
)
def test_collator_refuses_what_it_cannot_honour(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedLLMDataCollator()([{"input_ids": [1, 2], **row}])


def test_collator_splits_long_texts(tmp_path: Path, model) -> None:
    with pytest.raises(ValueError, match="window: expected None or at least 1 token, got 0"):
        SharedLLMDataCollator(window=0)
    model.config.split_noise = 0.0
    window = model.config.window
    rows = [{"input_ids": builders.ids(n).tolist()} for n in (60, 20, 41)]
    batch = SharedLLMDataCollator(window=window)(rows)
    whole = SharedLLMDataCollator()(rows)
    split, plain = model(**batch), model(**whole)
    torch.testing.assert_close(split.loss, plain.loss, atol=1e-5, rtol=0)
    assert split.memory.num_tokens == plain.memory.num_tokens == [60 - window, 0, 41 - window]
    # what a loss outside of the model needs: as many logits as labels
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        label_smoothing_factor=0.1, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, SharedLLMDataCollator(window=window), train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0 and trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"labels: expected them in training with an input_ids longer"):
        Trainer(model, arguments, SharedLLMDataCollator(), train_dataset=rows).train()
    longer = {"input_ids": list(range(3, 33)), "context_ids": [1, 2]}
    assert SharedLLMDataCollator(window=24)([longer])["context_ids"].tolist() == [[1, 2, *range(3, 9)]]


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
