"""The losses against what is computed by hand, gradients of exactly what is trained, one batch that is learnt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model.adapter import base_digests, write_adapter
from sharedllm_ext.model.families import attention_norm
from sharedllm_ext.model.passages import Passage
from sharedllm_ext.model.pick import slot_places
from sharedllm_ext.model.word_index import RUNS
from sharedllm_ext.training import Losses, Trained, Weights, merge_updates, parse_parts
from sharedllm_ext.training.losses import Counts, count, pick_scores, placed_memory
from sharedllm_ext.training.trained import SCALE, LowRankLinear, remove_lora

from .conftest import PASSAGES


def closed(batch: Any, *, spread: bool = True) -> Any:
    """The batch with all gates open, its chunks where they stand in their own context if not spread."""
    batch = batch._replace(gates=[True] * len(batch.examples))
    if spread:
        return batch
    return batch._replace(chunk_index=[torch.arange(6).numpy()] * len(batch.examples), end=6)


@pytest.mark.parametrize("runs", [RUNS, (*RUNS, (1, 64))])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_those_of_find_passages(build: Any, mix: Any, tied: bool, runs: Any) -> None:
    """One context alone: the same segments in the same order as the model finds without gradients."""
    model = build(tie_compressor=tied, word_runs=runs).eval()
    batch = mix().batch(3, 0)
    batch = batch._replace(examples=batch.examples[:1])
    (example,) = batch.examples
    context = torch.from_numpy(example.context)
    memory = model.compress(context[None], training=True)
    scores = pick_scores(model, memory, [slot_places(len(context), model.config)], batch)
    assert scores.shape == (3, 48)
    for row, question in zip(scores, example.questions, strict=True):
        (found,) = model.find_passages(torch.tensor([question.question]), context[None], count=48)
        expected = torch.empty(48)
        expected[[p.segment for p in found]] = torch.tensor([p.score for p in found])
        torch.testing.assert_close(row.detach(), expected, rtol=1e-4, atol=1e-4)


def test_the_window_is_the_passage_prompt(build: Any, mix: Any, losses: Any, tokenizer: Any) -> None:
    model = build()
    example = mix().batch(1, 0).examples[0]._replace(turns=[0])
    question = example.questions[0]._replace(places=[(37, 1)])
    example = example._replace(questions=[question, *example.questions[1:]])
    scores = torch.randn(len(example.questions), 48, generator=torch.Generator().manual_seed(0))
    needed = {4}
    ((ids, labels),) = losses(model).windows([example], scores)
    boosted = scores[0].clone()
    boosted[list(needed)] += 1e4
    picked = set(boosted.topk(PASSAGES).indices.tolist())
    assert needed <= picked
    order = sorted(picked, key=lambda s: -scores[0, s])
    context = torch.from_numpy(example.context)
    passages = []
    for segment in picked:
        start = max(0, min(segment * 8 - 4, len(context) - 16))
        passages.append(Passage(start, start + 16, segment, order.index(segment), 0.0))
    prompt = model.passage_prompt(tokenizer, context, passages, "Q")
    (mark,) = tokenizer("Q").input_ids
    expected = [t for token in prompt[0].tolist() for t in (question.question if token == mark else [token])]
    answer = [*question.answer, tokenizer.eos_token_id]
    assert ids == expected + answer
    assert labels == [-100] * len(expected) + answer


def test_losses_by_hand(build: Any, mix: Any, losses: Any) -> None:
    """Answers and text as the model's own forward gives them, the pick as a softmax over all segments of the batch."""
    model, batch = build().eval(), closed(mix().batch(7, 0), spread=False)
    objective = losses(model)
    sums = objective(batch)
    counts = count(batch, objective.prompt, True)
    contexts = torch.stack([torch.from_numpy(e.context) for e in batch.examples])
    memory = model.compress(contexts)
    scores = pick_scores(model, memory, [slot_places(contexts.shape[1], model.config)] * 2, batch)
    text = answer = pick = 0.0
    answered = picked = row = 0
    for i, example in enumerate(batch.examples):
        alone = memory.select([i])
        running = torch.from_numpy(example.running)[None]
        # queries stand at chunks + offset in the model's own forward too
        logits = model(running, memory=alone).logits[0, :-1]
        text += F.cross_entropy(logits, running[0, 1:], reduction="sum").item()
        ids, labels = (torch.tensor([x]) for x in objective.windows(batch.examples, scores)[i])
        logits = model(ids, memory=alone).logits[0, :-1]
        answer += F.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        answered += int((labels != -100).sum())
        for question in example.questions:
            values = scores[row].tolist()
            wanted = sorted({48 * i + (a + k) // 8 for a, n in question.places for k in range(n)})
            own = values if question.everywhere else values[48 * i : 48 * i + 48]
            norm = math.log(sum(math.exp(v) for v in own))
            pick -= sum(values[s] - norm for s in wanted) / len(wanted)
            picked, row = picked + 1, row + 1
    assert counts == Counts(answered, picked, 2 * 23)
    for got, expected in zip(sums, (answer, pick, text), strict=False):
        assert got.item() == pytest.approx(expected, rel=1e-4)
    weights = Weights(answer=2.0, pick=0.5, text=0.25)
    total = 2 * answer / answered + 0.5 * pick / picked + 0.25 * text / 46
    assert sums.total(counts, weights).item() == pytest.approx(total, rel=1e-4)


def test_moved_chunks_are_those_of_a_longer_document(build: Any, mix: Any) -> None:
    """Keys at drawn positions equal those of chunks that stand there, and a closed gate reads nothing."""
    model, batch = build().eval(), mix().batch(2, 0)
    batch = batch._replace(gates=[True, False], chunk_index=[torch.arange(6).numpy() + 3] * 2, end=9)
    contexts = torch.stack([torch.from_numpy(e.context) for e in batch.examples])
    memory = model.compress(contexts, training=True)
    placed = placed_memory(model, memory, [slot_places(contexts.shape[1], model.config)] * 2, batch)
    longer = model.compress(torch.cat((torch.full((1, 3 * 64), 9), contexts[:1]), 1))
    for got, expected in zip(placed.keys, longer.keys, strict=True):
        torch.testing.assert_close(got[: placed.cu_slots[1]], expected[-placed.cu_slots[1] :], rtol=1e-4, atol=1e-5)
    assert placed.num_chunks == [9, 9, 0] and placed.memory_index == [0, 2]
    assert placed.slot_ranges()[1][0] == placed.slot_ranges()[1][1]
    running = torch.from_numpy(batch.examples[1].running)[None]
    plain = model(running).logits
    read = model(running, memory=memory.select([1])).logits
    model.check_memory = lambda memory: None
    closed_gate = model(running.expand(2, -1), memory=placed).logits[1:]
    torch.testing.assert_close(closed_gate, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(read, plain, atol=1e-3)


@pytest.mark.parametrize(
    "parts", ["injected", "injected,upper", "injected,compressor", "injected:2,upper:2,compressor:2"]
)
def test_gradients_reach_what_is_trained(build: Any, mix: Any, losses: Any, parts: str) -> None:
    model = build()
    trained = Trained(model, parse_parts(parts))
    for parameter in trained.parameters.values():
        # updates begin with zero, where the other side would get no gradient
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    losses(model)(closed(mix().batch(0, 0))).total(Counts(1, 1, 1), Weights()).backward()
    missing = [n for n, p in trained.parameters.items() if p.grad is None or not p.grad.any()]
    assert missing == []
    assert [n for n, p in model.named_parameters() if p.grad is not None and n not in trained.parameters] == []
    names = " ".join(trained.parameters)
    assert ("compressor" in parts) == ("compressor." in names) and "pick.beta" in names
    assert ("upper" in parts) == ("layers.2.self_attn" in names)
    assert (":2" in parts) == ("q_proj.up" in names)


def test_updates_merge(build: Any, mix: Any, losses: Any) -> None:
    model, batch = build(), closed(mix().batch(0, 0))
    plain = losses(model)(batch)
    trained = Trained(model, parse_parts("injected:3,upper:3,compressor:3"))
    torch.testing.assert_close(losses(model)(batch), plain)
    name = "compressor.layers.0.mlp.up_proj"
    weight = model.get_parameter(f"{name}.weight").detach().clone()
    for own, parameter in trained.parameters.items():
        if own.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.1)
    up, down = (model.get_parameter(f"{name}.{own}").detach().clone() for own in ("up", "down"))
    changed = [term.detach() for term in losses(model)(batch)]
    merge_updates(model)
    torch.testing.assert_close(model.get_parameter(f"{name}.weight"), weight + SCALE * up @ down)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    torch.testing.assert_close([term.detach() for term in losses(model)(batch)], changed, rtol=1e-4, atol=1e-4)
    assert abs(changed[0] - plain[0].detach()) > 1e-3


def gradients(model: Any, losses: Any, batches: list[Any], parts: str = "injected,upper,compressor") -> list[Any]:
    """Sums of the losses over the batches, and the gradients of their means."""
    trained = Trained(model, parse_parts(parts))
    objective = losses(model)
    counts = [count(batch, objective.prompt, model.pick is not None) for batch in batches]
    total = sum(counts[1:], counts[0])
    found = torch.zeros(4)
    for batch in batches:
        sums = objective(batch)
        sums.total(total, Weights()).backward()
        found += torch.stack([term.detach().float() for term in sums])
    return [found, *(p.grad for p in trained.parameters.values() if p.grad is not None)]


@pytest.mark.parametrize("parts", ["injected,upper,compressor", "injected,upper:2,compressor:2"])
def test_checkpointing_changes_nothing(build: Any, mix: Any, losses: Any, parts: str) -> None:
    batch = mix().batch(0, 0)
    plain = gradients(build(), losses, [batch], parts)
    model = build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[bool] = []
    # before: computing again ends with the last tensor that is needed
    model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    kept = gradients(model, losses, [batch], parts)
    # each of the two texts once more in the backward pass
    assert len(calls) == 4
    assert len(plain) == len(kept) and all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_batch_are_the_batch(build: Any, mix: Any, losses: Any, tied: bool) -> None:
    """Answers and text; a pick compares the segments of one batch, so that its loss is another for other batches."""
    batch, parts = mix().batch(0, 0), "injected,upper" if tied else "injected,upper,compressor"
    halves = [
        batch._replace(examples=batch.examples[i : i + 1], gates=[True], chunk_index=batch.chunk_index[i : i + 1])
        for i in range(2)
    ]
    models = [build(pick_layers=None, tie_compressor=tied) for _ in range(2)]
    whole = gradients(models[0], losses, [batch._replace(gates=[True, True])], parts)
    torch.testing.assert_close(gradients(models[1], losses, halves, parts), whole, rtol=1e-4, atol=1e-6)


def test_gradients_in_bfloat16_point_the_same_way(build: Any, mix: Any, losses: Any) -> None:
    batch = closed(mix().batch(0, 0))
    exact = gradients(build(), losses, [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(build(), losses, [batch])
    assert all(gradient.dtype == torch.float32 for gradient in rounded)
    one, other = (torch.cat([g.flatten() for g in found[1:]]) for found in (exact, rounded))
    assert not torch.equal(one, other) and F.cosine_similarity(one, other, dim=0) > 0.99


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_weights_in_bfloat16_give_the_same_products(build: Any, mix: Any, losses: Any, tied: bool) -> None:
    batch, parts = closed(mix().batch(0, 0)), "injected,upper:2" if tied else "injected,upper,compressor"
    found, sizes = [], []
    for dtype in (None, torch.bfloat16):
        model = build(tie_compressor=tied)
        trained = Trained(model, parse_parts(parts), frozen_dtype=dtype)
        objective = losses(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = objective(batch)
        sums.total(count(batch, objective.prompt, True), Weights()).backward()
        assert all(p.dtype == torch.float32 for p in trained.parameters.values())
        found.append([*(t.detach() for t in sums), *(p.grad for p in trained.parameters.values())])
        sizes.append(sum(p.nbytes for p in model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == model.model.layers[2].mlp.up_proj.weight.dtype == torch.bfloat16
    assert sizes[1] < 0.8 * sizes[0]


def test_embeddings_that_are_output_projections_stay(build: Any) -> None:
    model = build()
    model.lm_head.weight = model.model.embed_tokens.weight
    Trained(model, parse_parts("injected"), frozen_dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("parts", ["injected,upper:2", "injected:3,upper:2,compressor:4"])
def test_lora_layers_of_peft_train_and_are_written(
    build: Any, mix: Any, losses: Any, base: Any, tmp_path: Any, parts: str
) -> None:
    """The adapter of PEFT's layers gives the losses of the model in training; names and sizes are those of our own."""
    pytest.importorskip("peft")
    batch, model = closed(mix().batch(0, 0)), build(random=False)
    own = Trained(build(random=False), parse_parts(parts)).adapter_tensors()
    digests = base_digests(model)
    trained = Trained(model, parse_parts(parts), seed=5, peft=True)
    shapes = [{name: t.shape for name, t in one.items()} for one in (own, trained.adapter_tensors())]
    assert shapes[0] == shapes[1]
    objective = losses(model)
    optimizer = torch.optim.AdamW(trained.parameters.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        objective(batch).total(count(batch, objective.prompt, True), Weights()).backward()
        assert all(p.grad is not None for p in trained.parameters.values())
        assert all(p.grad is None for n, p in model.named_parameters() if n not in trained.parameters)
        optimizer.step()
    expected = [term.item() for term in objective(batch)]
    tensors = {name: tensor.detach().clone() for name, tensor in trained.adapter_tensors().items()}
    assert all(t.any() for name, t in tensors.items() if name.endswith((":up", ":down")))
    remove_lora(model)
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    write_adapter(tmp_path / "a.safetensors", model, tensors, base="b", scale=SCALE, digests=digests)
    loaded = SharedLLMForCausalLM.from_adapter(tmp_path / "a.safetensors", base)
    assert [term.item() for term in losses(loaded)(batch)] == pytest.approx(expected, rel=1e-4)


def test_models_without_a_pick_learn_from_the_memory_alone(build: Any, mix: Any, losses: Any) -> None:
    model = build(pick_layers=None)
    batch = closed(mix().batch(0, 0))
    objective = losses(model)
    sums = objective(batch)
    assert sums.pick == 0 and sums.answer > 0 and count(batch, objective.prompt, False).pick == 0
    example = batch.examples[0]
    tokens = [
        t
        for n, i in enumerate(example.turns)
        for t in objective.prompt.turn(example.questions[i].question, example.questions[i].answer, first=n == 0)[0]
    ]
    assert objective.windows(batch.examples, None)[0][0] == objective.prompt.begin + tokens


def test_autocast_computes_in_bfloat16(build: Any, mix: Any, losses: Any) -> None:
    model, batch = build(), closed(mix().batch(0, 0))
    Trained(model, parse_parts("injected,upper,compressor:2"))
    exact = losses(model)(batch)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = losses(model)(batch)
    assert set(seen) == {torch.bfloat16}
    for got, expected in zip(rounded[:3], exact[:3], strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=0.05)
    rounded.total(Counts(1, 1, 1), Weights()).backward()
    assert model.pick.queries[0].weight.grad.dtype == torch.float32


def test_one_batch_is_learnt(build: Any, mix: Any, losses: Any) -> None:
    model, batch = build(random=False), closed(mix().batch(0, 0))
    trained = Trained(model, parse_parts("injected,upper,compressor"))
    objective, counts = losses(model), count(batch, losses(model).prompt, True)
    optimizer = torch.optim.AdamW(trained.parameters.values(), lr=1e-2)
    history = []
    for _ in range(40):
        sums = objective(batch)
        optimizer.zero_grad()
        sums.total(counts, Weights()).backward()
        optimizer.step()
        history.append([(term / n).item() for term, n in zip(sums, counts, strict=False)])
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < 0.75 * first, history
    assert history[-1][1] < 0.2 * history[0][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("injected,lower", "expected parts of injected, upper, compressor, got 'lower'"),
        ("injected,upper,upper", "expected each part once, got 'injected,upper,upper'"),
        ("upper", "expected injected among the parts, without which no memory is read, got 'upper'"),
        ("injected:0", "expected a rank of at least 1 after 'injected', got '0'"),
    ],
)
def test_wrong_parts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_parts(text)


def test_models_that_cannot_be_trained_so_are_refused(build: Any, losses: Callable[[Any], Losses]) -> None:
    assert [tuple(p) for p in parse_parts("injected, upper:4,compressor", 8)] == [
        ("injected", None),
        ("upper", 4),
        ("compressor", 8),
    ]
    with pytest.raises(ValueError, match="expected tie_compressor=False for compressor, got True"):
        Trained(build(tie_compressor=True), parse_parts("injected,compressor"))
    with pytest.raises(ValueError, match="expected injection_layers below the base's 3 layers for upper, got 3"):
        Trained(build(injection_layers=3), parse_parts("injected,upper"))
    with pytest.raises(ValueError, match=r"expected float32 parameters where they are trained, got .* half precision"):
        Trained(build(dtype=torch.bfloat16), parse_parts("injected"))
    with pytest.raises(ValueError, match="query_aware: expected False"):
        losses(build(query_aware=True, pick_layers=None))
    with pytest.raises(ValueError, match=r"split_noise: expected 0 for this training, got 2\.0"):
        losses(build(split_noise=2.0))


def test_the_last_compressor_layer_trains_what_is_read(build: Any) -> None:
    model = build()
    names = set(Trained(model, parse_parts("injected,compressor")).parameters)
    last = {name for name in names if name.startswith("compressor.layers.1.")}
    assert last == {
        f"compressor.layers.1.{own}.weight" for own in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm")
    }
    assert attention_norm(model.compressor.layers[1]).weight.requires_grad
    assert not model.compressor.embed_tokens.weight.requires_grad
