"""What the next run of the needle experiment changes, at tiny size on the CPU: texts, windows, losses."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from .test_needle_example import (
    HALF,
    SIZES,
    SMALL,
    batches,
    byte_classes,
    data,
    frame_of,
    needle,
    questions,
    shared_words,
    source_of,
    tiny_base,
    tiny_retriever,
    train,
)

# the example's folder is on the path by now
from layout import Layout  # isort: skip
from mix import Mix  # isort: skip

__all__ = ["data"]


def test_windows_of_fewer_passages_in_any_order(data: Path) -> None:
    source = source_of(data, "train", 2)
    batch = batches.Batch(*map(torch.from_numpy, batches.make_batch(source, SIZES)))
    torch.manual_seed(0)
    scores = torch.randn(6, 32)
    own = torch.stack([scores[batch.reader[b], 16 * b : 16 * b + 16] for b in range(2)])
    by_words = torch.randn(2, 16)
    batch.word_scores.copy_(by_words)
    batch.by_words.copy_(torch.tensor([False, True]))
    batch.passages.copy_(torch.tensor([3, 8]))
    batch.order[0] = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
    batch.order[1] = -1
    batch.needed.zero_()
    batch.needed[0, own[0].argmin()] = True
    batch.left_out.zero_()
    batch.left_out[1, by_words[1].argmax()] = True
    frame = frame_of(source)
    ids, tail = train.windows(tiny_retriever(tiny_base(), HALF), batch, scores, frame, 2)
    length = frame.separators.shape[1] + 256
    # three passages: the needed one and the two best; by rank the needed one is last, and so is it in the topk's order
    best = own[0].argsort(descending=True)[:2].tolist()
    chosen = [int(own[0].argmin()), *best]
    expected = [chosen[1], chosen[2], chosen[0]]  # by the numbers 0.1, 0.2, 0.3
    ranks = [0, 1, 2]
    # of the search by words without its best, in the text's order
    second = by_words[1].argsort(descending=True)[1:9].tolist()
    wanted = [(expected, ranks), (sorted(second), [second.index(s) for s in sorted(second)])]
    for b, (segments, ranks) in enumerate(wanted):
        text = batch.chunks[4 * b : 4 * b + 4].flatten()
        assert ids[b, : len(source.user)].tolist() == source.user
        assert tail[b] == len(source.user) + len(segments) * length
        assert ids[b, tail[b] : tail[b] + batch.tail.shape[1]].equal(batch.tail[b])
        passages = ids[b, len(source.user) : tail[b]].view(len(segments), length)
        for passage, segment, rank in zip(passages, segments, ranks, strict=True):
            start = min(max(0, 128 * segment - 64), 2048 - 256)
            assert passage.equal(torch.cat((frame.separators[rank], text[start : start + 256])))


def test_the_answer_may_be_absent(data: Path) -> None:
    source = source_of(data, "train", 3, mix=dataclasses.replace(Mix(), absent=1.0))
    seen = 0
    for _ in range(8):
        batch = batches.make_batch(source, SIZES)
        for b in range(SIZES.contexts):
            if not batch.left_out[b].any():
                continue
            seen += 1
            said = bytes(batch.answers[b][batch.answers[b] != batches.IGNORED].tolist()).decode()
            assert said in {text + "\x02" for text in (batches.ABSENT, batches.ABSENT_AFTER_LEAD)}
            assert not batch.needed[b].any()
            # no passage that may be read has a token of the right segments
            right = np.nonzero(batch.targets[batch.reader[b], 16 * b : 16 * b + 16])[0]
            assert batch.left_out[b][right].all()
    assert seen
    row = questions.Row([], [], [], [(130, 4)])
    # the first and the last passage are moved into the text: read from 0 to 255, and from 1792
    assert np.nonzero(batches.reading(row, HALF, 16))[0].tolist() == [0, 1]
    assert np.nonzero(batches.reading(questions.Row([], [], [], [(1800, 8)]), HALF, 16))[0].tolist() == [13, 14, 15]


def test_many_statements_of_one_form_with_keys_alike(data: Path) -> None:
    source = source_of(data, "train", 4)
    counts, shared = [], []
    for _ in range(60):
        count = source._count()
        counts.append(count)
        needles = source.needles(source.wordings, count, questions.ADJECTIVE_NOUN, None, alike=1.0)
        assert len(set(needles.keys)) == count == len(needles.item.statements)
        shared.append(count - len({key.split()[1] for key in needles.keys}))
    assert min(counts) < 7 < max(counts) and sum(shared) > sum(counts) / 3
    # single words are keys, too, and these are 30
    assert max(counts) == 15
    source.words = [f"word{i}" for i in range(200)]
    counts = [source._count() for _ in range(100)]
    assert max(counts) > 16 and min(counts) < 7 and any(7 <= count <= 16 for count in counts)
    assert len(source.needles(source.wordings, 64, 5).keys) == 64
    item = source._asked_less(source.needles(source.wordings, 30, 0, 0).item)
    assert len(item.asked) == source.mix.asked and len(item.statements) == 30
    for asked in item.asked:
        assert isinstance(asked.value, str) and asked.value in item.statements[asked.statements[0]]
    others = [source.several() for _ in range(30)]
    assert any(len(item.statements) - len(item.asked[0].statements) > 2 for item in others)


def test_the_pick_without_words_is_trained_too(data: Path) -> None:
    layout = Layout(chunk_size=128, tree_depth=2, slots_per_node=8)
    ours, source = tiny_retriever(tiny_base(), layout), source_of(data, "train", 7, layout)
    batch = batches.Batch(
        *map(torch.from_numpy, batches.make_batch(source, dataclasses.replace(SIZES, chunks=8, questions=2)))
    )

    def pick(hidden: float) -> float:
        weights = train.LossWeights(hidden)
        return train.losses(ours, batch, frame_of(source), 2, weights)[1][1].item()

    with torch.no_grad():
        both, layers, half = pick(0.0), pick(1.0), pick(0.5)
        weights = ours.compressor_weights()
        keys = ours.compress(weights, batch.chunks)[1]
        scores = ours.scores(weights, batch.questions, batch.question_used, keys, None)
    assert layers == pytest.approx(train.pick_loss(scores, batch.targets, batch.compared).item(), rel=1e-5)
    assert both != pytest.approx(layers, rel=1e-3) and half == pytest.approx((both + layers) / 2, rel=1e-5)


def test_other_layers_may_read_the_memory() -> None:
    config = tiny_base().config.to_dict()
    read = {name: needle.Shape.of(config, 2, name).read_layers for name in needle.READING}
    assert read == {"lowest": [0, 1], "top": [1, 2], "interleaved": [0, 1]}
    with pytest.raises(ValueError, match="reading: expected one of lowest, top, interleaved, got 'all'"):
        needle.Shape.of(config, 2, "all")
    weights = {n.removeprefix("model."): p.detach() for n, p in tiny_base().named_parameters()}
    torch.manual_seed(1)
    top = needle.Retriever(needle.Shape.of(config, 2, "top"), SMALL, weights, byte_classes(), needle.Ranks(4, 4, 4, 2))
    assert top.injected.norm[0].equal(weights["layers.1.input_layernorm.weight"])
    with torch.no_grad():
        memory = top.place(top.compress(top.base, torch.randint(0, 256, (2, 64)))[0], torch.tensor([0, 1]), 1)
        ids, nowhere = torch.randint(0, 256, (1, 20)), torch.tensor([3])
        before = top.decode(top.base, ids, None, nowhere)
        # the last block of two is read in the last layer of three
        top.injected.output_up[1].normal_()
        assert not top.decode(top.base, ids, memory, nowhere).allclose(before)


def test_a_step_waits_for_no_value(data: Path) -> None:
    """What a CUDA graph needs, as far as it can be seen without one: no value is read, no size depends on one."""
    layout = Layout(chunk_size=128, tree_depth=2, slots_per_node=8)
    ours, source = tiny_retriever(tiny_base(), layout), source_of(data, "train", 7, layout)
    batch = batches.Batch(*map(torch.from_numpy, batches.make_batch(source, dataclasses.replace(SIZES, chunks=8))))
    frame = frame_of(source)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss, reports = train.losses(ours, batch, frame, 2, train.LossWeights())
        assert loss.shape == () and reports.shape == (4,)
        with pytest.raises(DataDependentOutputException):
            loss.item()
        with pytest.raises(DynamicOutputShapeException):
            batch.needed.nonzero()


def test_training_begins_with_an_adapter() -> None:
    base = tiny_base()
    layout = Layout(chunk_size=128, tree_depth=2, slots_per_node=8)
    ours, other = tiny_retriever(base, layout), tiny_retriever(base, layout)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    train.begin_with(ours, other)
    assert all(a.equal(b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    ours.pick.beta.data.zero_()
    assert other.pick.beta.all()
    # a retriever with more words begins without them
    wide = tiny_retriever(base, layout, (*shared_words.RUNS, shared_words.WIDE))
    train.begin_with(wide, other)
    assert wide.pick.word_beta[:, :3].equal(other.pick.word_beta) and not wide.pick.word_beta[:, 3:].any()
    with pytest.raises(SystemExit, match=r"--init: expected an adapter with words .*got one with .*margin=64"):
        train.begin_with(ours, wide)
    smaller = tiny_retriever(base, dataclasses.replace(layout, tree_depth=1))
    with pytest.raises(SystemExit, match=r"--init: expected an adapter with Layout\(.*tree_depth=2.*tree_depth=1"):
        train.begin_with(ours, smaller)
