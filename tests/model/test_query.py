"""Which text picks the nodes, and that what is to be predicted does not."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sharedllm_ext import SharedLLMDataCollator

from . import builders


@pytest.fixture
def model():
    return builders.model(query_aware=True)


def _same(one, other) -> bool:
    return one.keys[1].shape == other.keys[1].shape and torch.equal(one.keys[1], other.keys[1])


@torch.no_grad()
def test_a_query_of_its_own(model) -> None:
    context, text = builders.ids(2, 256), builders.ids(2, 9)
    query, mask = builders.ids(2, 7), torch.ones(2, 7)
    mask[0, 4:] = 0
    want = model.compress(context, query_ids=query, query_attention_mask=mask)
    for labels in (None, text):
        output = model(text, context_ids=context, labels=labels, query_ids=query, query_attention_mask=mask)
        assert _same(output.memory, want)
    assert not _same(model(text, context_ids=context).memory, want)
    long = builders.ids(2, 100)
    split = model(long, query_ids=query).memory
    assert _same(split, model.compress(long[:, :-24], query_ids=query))
    no_query = model(text, context_ids=context, query_ids=query, query_attention_mask=torch.zeros(2, 7))
    assert _same(no_query.memory, model.compress(context))


@torch.no_grad()
def test_embeddings_as_running_text_and_as_query(model) -> None:
    context, text = builders.ids(2, 256), builders.ids(2, 9)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    embeds, labels = model.get_input_embeddings()(text), text.clone()
    labels[:, :5] = -100
    for extra in ({}, {"labels": labels}, {"attention_mask": mask}):
        want = model(text, context_ids=context, **extra)
        got = model(inputs_embeds=embeds, context_ids=context, **extra)
        torch.testing.assert_close(got.logits, want.logits)
        assert _same(got.memory, want.memory)
    query = {"query_embeds": embeds, "query_attention_mask": mask}
    want = model.compress(context, query_ids=text, query_attention_mask=mask)
    assert _same(model.compress(context, **query), want)
    picked = model.retrieve(context, **query)
    assert torch.equal(picked[0][0], model.retrieve(context, query_ids=text, query_attention_mask=mask)[0][0])


@torch.no_grad()
def test_labels_given_for_the_token_before_hide_the_answer_too(model) -> None:
    context, text = builders.ids(1, 256), builders.ids(1, 12)
    labels = text.clone()
    labels[:, :6] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    got = model(text, context_ids=context, shift_labels=shifted).memory
    assert _same(got, model.compress(context, query_ids=text[:, :6]))


class _Losses(Trainer):
    """Keeps the outputs that losses are taken of."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.kept = (loss.detach(), outputs)
        return (loss, outputs) if return_outputs else loss


def _trainer(model, folder: Path, **settings) -> _Losses:
    loss_function = settings.pop("compute_loss_func", None)
    arguments = TrainingArguments(folder, use_cpu=True, report_to=[], **settings)
    return _Losses(model, arguments, compute_loss_func=loss_function)


def _other_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum() * 0


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": _other_loss}])
@pytest.mark.parametrize("training", [True, False])
def test_labels_kept_from_the_model_do_not_pick(tmp_path: Path, model, settings: dict, training: bool) -> None:
    model.train(training)
    trainer = _trainer(model, tmp_path, **settings)
    context, text = builders.ids(1, 256), builders.ids(1, 20)
    other = text.clone()
    other[0, -1] = (text[0, -1] + 5) % 120 + 3
    memories, asked = [], []
    for ids in (text, other):
        labels = ids.clone()
        labels[:, :10] = -100
        inputs = {"input_ids": ids, "context_ids": context, "labels": labels}
        trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(10))
        memories.append(trainer.kept[1].memory)
        # the collator names the query, so that it is the prompt's here too
        batch = SharedLLMDataCollator()([{name: rows[0] for name, rows in inputs.items()}])
        trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(10))
        asked.append(trainer.kept[1].memory)
    assert _same(*memories) and _same(memories[0], model.compress(context))
    assert _same(*asked) and _same(asked[0], model.compress(context, query_ids=text[:, :10]))


def test_label_smoothing_shifts_labels(tmp_path: Path, model) -> None:
    text = builders.ids(2, 12)
    model.train()
    want = model(text, labels=text).loss.item()
    # next to no smoothing: the plain loss, of the token after and not of the token itself
    trainer = _trainer(model, tmp_path, label_smoothing_factor=1e-9)
    got = trainer.compute_loss(model, {"input_ids": text, "labels": text}).item()
    assert got == pytest.approx(want, rel=1e-5)
