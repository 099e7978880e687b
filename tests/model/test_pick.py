"""Finding passages: where slots stand, words, the pick's scores, batches, memories, bad input."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from sharedllm_ext import ContextMemory, MemoryTiers, SharedLLMConfig, SharedLLMForCausalLM
from sharedllm_ext.model.families import attention_norm, projection
from sharedllm_ext.model.pick import slot_places, unrotated
from sharedllm_ext.model.sources import Source
from sharedllm_ext.model.word_index import RUNS, Run, WordIndex, joint_evidence, run_codes

from ..support import needs_cuda
from .builders import FAMILIES, base

CHUNK, SEGMENT = 64, 8
# as examples/needle trains them with --wide
FOUR = (*RUNS, Run(1, 64))
# without a margin, longer than a segment with its margins, wider than a text
ODD = ((3, 5), (1, 0), (2, 0), (8, 1), (8, 3), (1, 200), (2, 7))
ALL_RUNS = [pytest.param(RUNS, id="three"), pytest.param(FOUR, id="four"), pytest.param(ODD, id="odd")]
FIELDS: dict[str, Any] = {
    "injection_layers": 3,
    "chunk_size": CHUNK,
    "tree_depth": 3,
    "slots_per_node": 4,
    "query_aware": False,
    "tie_compressor": False,
    "pick_layers": [0, 2],
    "segment_size": SEGMENT,
    "segment_margin": 4,
    "slot_position": "end",
}


def build_base(family: str) -> Any:
    torch.manual_seed(0)
    return base(family)


def random_pick(model: Any) -> None:
    """Random weights in place of those that a pick begins with; classes that tell all tokens apart but two."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.pick.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.pick.token_class.copy_(torch.arange(model.pick.token_class.numel()))
        model.pick.token_class[3] = 2


def build(**fields: Any) -> Any:
    model = SharedLLMForCausalLM.from_base(build_base("llama").double(), **{**FIELDS, **fields})
    random_pick(model)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 90, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK, 2 * CHUNK + 1, CHUNK + 37, 5, 1])
@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("slots", [4, 5, 16])
def test_slots_stand_where_the_memory_has_them(length: int, position: str, slots: int) -> None:
    """Layer 0's values and unrotated keys are those of the tokens that ``slot_places`` names."""
    model = build(slot_position=position, slots_per_node=slots)
    ids = tokens(1, length, seed=length)
    memory = model.compress(ids)
    places = slot_places(length, model.config)
    assert places.token.numel() == memory.num_slots
    layer = model.compressor.layers[0]
    normed = attention_norm(layer)(model.compressor.embed_tokens(ids[0, places.token]))
    heads = (memory.num_slots, *memory.keys[0].shape[1:])
    value, key = (projection(layer.self_attn, name)(normed).view(heads) for name in ("v", "k"))
    torch.testing.assert_close(memory.values[0], value, rtol=0, atol=1e-12)
    tables = model._rope_tables(4 * CHUNK, ids.device).of(layer)
    # the tables are float32
    found = unrotated(memory.keys[0], tables, places.position)
    torch.testing.assert_close(found.float(), key.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_keys_of_every_family_lose_their_rotation(family: str) -> None:
    fields = {**FIELDS, "injection_layers": 2, "pick_layers": [0, 1], "slot_position": "start"}
    base = build_base(family)
    model: Any = SharedLLMForCausalLM.from_base(base, **fields)
    ids = tokens(1, 2 * CHUNK)
    memory, places = model.compress(ids), slot_places(2 * CHUNK, model.config)
    # the same slots as if they all stood at position 0 of chunk 0: compress each kept token alone
    alone = SharedLLMForCausalLM.from_base(build_base(family), **{**fields, "chunk_size": 8, "segment_size": 4})
    layer = model.compressor.layers[0]
    tables = model._rope_tables(4 * CHUNK, ids.device).of(layer)
    keys = unrotated(memory.keys[0], tables, places.position)
    for slot in (0, 3, memory.num_slots - 1):
        token = int(places.token[slot])
        single = alone.compress(ids[:, token : token + 1]).keys[0][0]
        # at position 0 a rotation changes nothing but the length of what it turns, and that of longrope alone
        turned = slice(0, 2 * tables[0].shape[1])
        single[..., turned] /= tables[0][0, 0]
        torch.testing.assert_close(keys[slot], single, rtol=1e-4, atol=1e-5)


def test_every_token_reaches_a_slot_at_the_end_of_its_stride() -> None:
    """Published slots leave a node's last tokens unread; those at the ends do not."""
    unread: dict[str, list[int]] = {}
    for position in ("start", "end"):
        model = build(slot_position=position)
        ids = tokens(1, CHUNK)
        memory = model.compress(ids)
        unread[position] = []
        for place in range(CHUNK):
            changed = ids.clone()
            changed[0, place] = 91
            other = model.compress(changed)
            pairs = zip((*memory.keys, *memory.values), (*other.keys, *other.values), strict=True)
            if all(torch.equal(a, b) for a, b in pairs):
                unread[position].append(place)
    assert unread["end"] == []
    # the nodes [0, 32), [32, 48), [48, 56), [56, 64) in strides of 8, 4, 2 and 2
    assert unread["start"] == [*range(25, 32), *range(45, 48), 55, 63]


def test_slot_position_is_part_of_the_memory() -> None:
    start, end = build(slot_position="start"), build(slot_position="end")
    ids = tokens(1, CHUNK)
    with pytest.raises(ValueError, match=r"settings: expected .*slots at the end of their strides.*got "):
        end.check_memory(start.compress(ids))
    with pytest.raises(ValueError, match="settings"):
        start.check_memory(end.compress(ids))
    end.check_memory(end.compress(ids))


def evidence_by_hand(classes: list[int], question: list[int], runs: Sequence[tuple[int, int]]) -> Tensor:
    """``[runs, n, L]`` float64: the rarity of each of the question's runs where the text of a segment holds it."""
    segments = -(-len(classes) // SEGMENT)
    evidence = torch.zeros(len(runs), segments, len(question), dtype=torch.float64)
    for g, (length, margin) in enumerate(runs):
        texts = [classes[max(0, s * SEGMENT - margin) : (s + 1) * SEGMENT + margin] for s in range(segments)]
        for place in range(length - 1, len(question)):
            run = question[place - length + 1 : place + 1]
            held = [0 not in run and any(w[i : i + length] == run for i in range(len(w))) for w in texts]
            rarity = math.log(1 + (segments - sum(held) + 0.5) / (sum(held) + 0.5))
            evidence[g, :, place] = rarity * torch.tensor(held, dtype=torch.float64)
    return evidence


def test_the_default_runs_are_those_of_the_first_adapters() -> None:
    config = SharedLLMConfig(text_config=LlamaConfig())
    assert config.word_runs == RUNS == ((1, 16), (2, 16), (4, 16))


@pytest.mark.parametrize("runs", ALL_RUNS)
@pytest.mark.parametrize("length", [61, 64, 7, 1, 0])
def test_word_index_counts_as_a_search_by_hand(runs: Sequence[tuple[int, int]], length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(0, 7, (length,), generator=generator)
    question = torch.randint(0, 7, (9,), generator=generator)
    # a run that ends a segment's margin, one that begins it, and one that reaches over its begin
    question[4:8] = torch.tensor([1, 2, 3, 4])
    for start in (2 * SEGMENT + 14, SEGMENT - 1):
        classes[start : start + 4] = question[4:8][: max(0, length - start)]
    index = WordIndex.of(classes, SEGMENT, runs)
    evidence = index.evidence(question)
    assert evidence.shape == (len(runs), -(-length // SEGMENT), 9) and evidence.dtype == torch.float32
    expected = evidence_by_hand(classes.tolist(), question.tolist(), runs)
    torch.testing.assert_close(evidence.double(), expected, rtol=1e-6, atol=1e-6)
    # the margins cost nothing
    assert index.nbytes == 4 * length * len({run[0] for run in runs})


def windows_evidence(documents: list[Tensor], question: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """The evidence by codes of every segment's own window, token by token."""
    rows = []
    for length, margin in runs:
        held = []
        for document in documents:
            count = -(-document.numel() // SEGMENT)
            padded = F.pad(document, (margin, margin + count * SEGMENT - document.numel()))
            windows = [padded[s * SEGMENT : (s + 1) * SEGMENT + 2 * margin] for s in range(count)]
            held += [run_codes(window, length) for window in windows]
        found = torch.zeros(len(held), question.numel(), dtype=torch.bool)
        for place, code in enumerate(run_codes(question, length).tolist()):
            found[:, place] = torch.tensor([bool(code) and bool((codes == code).any()) for codes in held])
        holding = found.sum(0, dtype=torch.float32)
        rows.append(found * torch.log(1 + (len(held) - holding + 0.5) / (holding + 0.5)))
    return torch.stack(rows)


@pytest.mark.parametrize("runs", ALL_RUNS)
@pytest.mark.parametrize(
    ("tokens_", "classes", "asked"), [(0, 7, 5), (61, 7, 0), (61, 3, 40), (700, 40, 25), (5, 9, 9)]
)
def test_evidence_equals_that_of_windows_to_the_bit(
    tokens_: int, classes: int, asked: int, runs: Sequence[tuple[int, int]]
) -> None:
    generator = torch.Generator().manual_seed(tokens_ + asked)
    document, other = (torch.randint(0, classes, (n,), generator=generator) for n in (tokens_, 43))
    # also classes that the document does not have, and a run of it
    question = torch.randint(0, classes + 3, (asked,), generator=generator)
    question[: min(asked, tokens_) // 2] = document[: min(asked, tokens_) // 2]
    got = WordIndex.of(document, SEGMENT, runs).evidence(question)
    assert got.dtype == torch.float32 and got.equal(windows_evidence([document], question, runs))
    # two documents: rarities over both, no word from one in the margins of the other
    indexes = [WordIndex.of(text, SEGMENT, runs) for text in (other, document)]
    assert joint_evidence(indexes, question).equal(windows_evidence([other, document], question, runs))


@needs_cuda
@pytest.mark.parametrize("runs", ALL_RUNS)
def test_a_gpu_finds_the_same_words(runs: Sequence[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(7)
    documents = [torch.randint(0, 40, (length,), generator=generator) for length in (700, 0, 43)]
    question = torch.randint(0, 43, (25,), generator=generator)
    question[:12] = documents[0][90:102]
    got = joint_evidence([WordIndex.of(text.cuda(), SEGMENT, runs) for text in documents], question.cuda()).cpu()
    expected = joint_evidence([WordIndex.of(text, SEGMENT, runs) for text in documents], question)
    # the logarithm is rounded by each device
    assert (got > 0).equal(expected > 0) and expected.any()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


class Allocations(TorchDispatchMode):
    """The calls of operators, and the most bytes that one of their results lies in."""

    calls = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def test_evidence_of_a_long_document_takes_few_calls_and_little_memory() -> None:
    """A million tokens: neither a call for each token, nor segments times tokens of their windows or of a question."""
    segments, counted = 8192, []
    index = WordIndex.of(torch.randint(0, 30_000, (128 * segments,)), 128, FOUR)
    for length in (5, 96):
        with Allocations() as seen:
            index.evidence(torch.randint(0, 30_000, (length,)))
        counted.append(seen.calls)
        codes = 8 * (128 * segments + 2 * 64)
        assert seen.largest <= max(codes, 4 * len(FOUR) * segments * length)
    assert counted[0] == counted[1]


def scores_by_hand(model: Any, ids: Tensor, question: Tensor, memory: ContextMemory) -> Tensor:
    """The docstring's formula, slot by slot in float64, over raw keys that are computed without the memory's."""
    pick, config, lower = model.pick, model.config, model.compressor
    places, segments = slot_places(ids.numel(), config), -(-ids.numel() // SEGMENT)
    states = lower(input_ids=question[None], output_hidden_states=True, use_cache=False).hidden_states
    evidence = evidence_by_hand(pick.token_class[ids].tolist(), pick.token_class[question].tolist(), config.word_runs)
    total = torch.zeros(segments, dtype=torch.float64)
    for i, number in enumerate(pick.layers):
        layer = lower.layers[number]
        tables = model._rope_tables(4 * CHUNK, ids.device).of(layer)
        keys = unrotated(memory.keys[number], tables, places.position)
        h = attention_norm(layer)(states[number][0])
        queries = (h @ pick.queries[i].weight.T).view(question.numel(), keys.shape[1], -1, keys.shape[2])
        for t in range(question.numel()):
            mass = torch.zeros(segments, dtype=torch.float64)
            heads = [
                (keys[:, group] @ queries[t, group, head] / math.sqrt(keys.shape[2])).softmax(0)
                for group in range(keys.shape[1])
                for head in range(queries.shape[2])
            ]
            for head in heads:
                for slot, token in enumerate(places.token.tolist()):
                    mass[token // SEGMENT] += head[slot] / len(heads)
            weight = torch.sigmoid(h[t] @ pick.token_weight[i] + pick.token_bias[i])
            total += pick.beta[i] * weight * torch.log(mass * segments + 1)
            weight = torch.sigmoid(h[t] @ pick.word_weight[i] + pick.word_bias[i])
            total += (evidence[:, :, t] * (weight * pick.word_beta[i])[:, None]).sum(0)
    return total


@torch.no_grad()
@pytest.mark.parametrize("length", [2 * CHUNK + 3, 2 * CHUNK + 5, SEGMENT + 3, SEGMENT])
def test_a_passage_is_found_once(length: int) -> None:
    """A text's last segments have one passage where the last one is short; the better score is its own."""
    model, ids, question = build(), tokens(length), tokens(7, seed=3)
    ids[-3:] = question[:3]
    expected = scores_by_hand(model, ids, question, model.compress(ids[None]))
    (found,) = model.find_passages(question[None], ids[None], count=100)
    spans = [(p.start, p.end) for p in found]
    whole = SEGMENT + 2 * 4
    every = {max(0, min(s * SEGMENT - 4, length - whole)) for s in range(len(expected))}
    assert len(set(spans)) == len(spans) == len(every) and {start for start, _ in spans} == every
    assert [p.rank for p in found] == list(range(len(found)))
    for passage in found:
        same = [s for s in range(len(expected)) if max(0, min(s * SEGMENT - 4, length - whole)) == passage.start]
        assert passage.segment == max(same, key=lambda s: float(expected[s]))
    assert model.find_passages(question[None], ids[None], count=2) == [found[:2]]


@torch.no_grad()
@pytest.mark.parametrize("runs", ALL_RUNS)
def test_passages_are_those_of_the_formula(runs: Sequence[tuple[int, int]]) -> None:
    model = build(word_runs=runs)
    ids, question = tokens(2 * CHUNK + 21), tokens(7, seed=3)
    # words that the wide margin alone reaches from some segments
    ids[70:74], ids[-1] = question[:4], question[5]
    memory = model.compress(ids[None])
    expected = scores_by_hand(model, ids, question, memory)
    (found,) = model.find_passages(question[None], ids[None], memory=memory, count=100)
    assert [p.segment for p in found] == expected.argsort(descending=True).tolist()
    assert [p.rank for p in found] == list(range(len(expected)))
    torch.testing.assert_close(
        torch.tensor([p.score for p in found]), expected.sort(descending=True).values.float(), rtol=1e-4, atol=1e-4
    )
    for passage in found:
        assert 0 <= passage.start < passage.end <= ids.numel()
        assert passage.end - passage.start == SEGMENT + 2 * 4
        inside = (passage.segment * SEGMENT, min(ids.numel(), (passage.segment + 1) * SEGMENT))
        assert passage.start <= inside[0] and inside[1] <= passage.end
    assert model.find_passages(question[None], ids[None], count=3) == [found[:3]]
    # the last term counts
    model.pick.word_beta[:, -1] = 0
    (without,) = model.find_passages(question[None], ids[None], memory=memory, count=100)
    assert max(abs(p.score - found[[q.segment for q in found].index(p.segment)].score) for p in without) > 1e-2


def test_shared_words_are_found(model: Any) -> None:
    """Without trained queries (beta 0) the segment that holds the question's words comes first."""
    plain = build()
    with torch.no_grad():
        plain.pick.beta.zero_()
        plain.pick.word_beta.fill_(1.0)
    ids = tokens(20 * CHUNK)
    question = torch.tensor([91, 92, 93, 94])
    ids[777:781] = question
    (found,) = plain.find_passages(question[None], ids[None])
    # a segment's margins are searched with it
    assert abs(found[0].segment * SEGMENT + SEGMENT // 2 - 779) <= SEGMENT // 2 + RUNS[0].margin


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_equal_single_ones(model: Any, side: str) -> None:
    lengths, asked = [2 * CHUNK + 5, CHUNK, 9], [5, 3, 4]

    def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        longest = max(row.numel() for row in rows)
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
        for i, row in enumerate(rows):
            place = slice(longest - row.numel(), None) if side == "left" else slice(0, row.numel())
            ids[i, place], mask[i, place] = row, 1
        return ids, mask

    texts = [tokens(n, seed=n) for n in lengths]
    questions = [tokens(n, seed=50 + n) for n in asked]
    (context, context_mask), (question, question_mask) = padded(texts), padded(questions)
    found = model.find_passages(question, context, context_mask, question_mask, count=4)
    for row, text, single in zip(found, texts, questions, strict=True):
        (expected,) = model.find_passages(single[None], text[None], count=4)
        assert [p.segment for p in row] == [p.segment for p in expected]
        assert [(p.start, p.end) for p in row] == [(p.start, p.end) for p in expected]
        torch.testing.assert_close([p.score for p in row], [p.score for p in expected], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_one_memory_answers_many_questions_and_comes_back_from_a_file(model: Any, tmp_path: Path) -> None:
    ids, questions = tokens(1, 3 * CHUNK), tokens(4, 6, seed=9)
    memory = model.compress(ids)
    found = model.find_passages(questions, ids, memory=memory)
    memory.save(tmp_path / "memory")
    assert found == model.find_passages(questions, ids, memory=ContextMemory.load(tmp_path / "memory", model))
    for row, question in zip(found, questions, strict=True):
        assert model.find_passages(question[None], ids, memory=memory) == [row]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite", "phi3", "qwen2"])
def test_a_memory_of_another_text_is_refused(family: str) -> None:
    """Of the same length: its passages would be those of the other text."""
    fields = {**FIELDS, "injection_layers": 2, "pick_layers": [1]}
    model: Any = SharedLLMForCausalLM.from_base(build_base(family), **fields)
    ids, other, question = tokens(1, 3 * CHUNK), tokens(1, 3 * CHUNK, seed=1), tokens(1, 5, seed=2)
    memory = model.compress(ids)
    assert model.find_passages(question, ids, memory=memory) == model.find_passages(question, ids)
    rounded = memory.to(torch.bfloat16).to(torch.float32)
    assert model.find_passages(question, ids, memory=rounded)
    with pytest.raises(
        ValueError, match=r"expected the text that the memory was made of, got another: \d+ of 48 tokens"
    ):
        model.find_passages(question, other, memory=memory)


@torch.no_grad()
def test_the_default_dtype_changes_nothing(model: Any) -> None:
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 6, seed=9)
    expected = model.find_passages(question, ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert model.find_passages(question, ids) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_a_model_keeps_its_pick(model: Any, tmp_path: Path) -> None:
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 6, seed=9)
    model.save_pretrained(tmp_path)
    loaded: Any = SharedLLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.find_passages(question, ids) == model.find_passages(question, ids)
    assert loaded.config.pick_layers == [0, 2] and loaded.config.slot_position == "end"
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"pick_layers": [\n    0,\n    2\n  ]', '"pick_layers": null')
    )
    with pytest.raises(ValueError, match=r"pick\.beta"):
        SharedLLMForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_models_that_look_for_other_words_read_one_memory(model: Any, tmp_path: Path) -> None:
    """A memory has no words: of its file, in tiers and after appending, each model finds by its own."""
    four = build(word_runs=FOUR)
    ids, question = tokens(1, 5 * CHUNK + 9), tokens(1, 9, seed=4)
    ids[0, 100:104], ids[0, 270] = question[0, :4], question[0, 6]
    memory = model.compress(ids).with_sources([Source.of_ids(ids[0])])
    memory.save(tmp_path / "memory")
    expected = {}
    for own in (model, four):
        loaded = ContextMemory.load(tmp_path / "memory", own)
        (expected[own],) = own.find_passages(question, memory=loaded, count=41)
        scores = scores_by_hand(own, ids[0], question[0], loaded)[[p.segment for p in expected[own]]]
        got = torch.tensor([p.score for p in expected[own]]).double()
        torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-4)
    assert expected[four] != expected[model]
    tiers = MemoryTiers("cpu")
    short = model.compress(ids[:, : 3 * CHUNK + 5]).with_sources([Source.of_ids(ids[0, : 3 * CHUNK + 5])])
    both = (model.offload(memory, tiers), four.append(four.offload(short, tiers), ids[:, 3 * CHUNK + 5 :]))
    for tiered in both:
        for own in (model, four, model):
            (found,) = own.find_passages(question, memory=tiered, count=41)
            assert [p.segment for p in found] == [p.segment for p in expected[own]]
            torch.testing.assert_close([p.score for p in found], [p.score for p in expected[own]], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_words_of_another_number_are_refused(tmp_path: Path) -> None:
    four = build(word_runs=FOUR)
    four.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["word_runs"] == [[1, 16], [2, 16], [4, 16], [1, 64]]
    loaded: Any = SharedLLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.word_runs == FOUR
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 6, seed=9)
    assert loaded.find_passages(question, ids) == four.find_passages(question, ids)
    # as a checkpoint from before the field has it
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "word_runs"}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        SharedLLMForCausalLM.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "word_runs"}))
    three: Any = SharedLLMForCausalLM.from_pretrained(tmp_path)
    assert three.config.word_runs == RUNS
    assert three.find_passages(question, ids) == build().find_passages(question, ids)


def test_a_prompt_holds_the_passages_in_the_texts_order() -> None:
    parts = {"begin": "B", "passage": "[{rank}]", "question": "Q", "answer": "A"}
    model = build(passage_prompt=parts)
    ids, question = tokens(3 * CHUNK), tokens(5, seed=2)

    class Letters:
        def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool = False) -> Any:
            assert not add_special_tokens
            # whose text may look like a special token
            assert split_special_tokens == (text in ("xy", "z"))
            return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    (found,) = model.find_passages(question[None], ids[None], count=2)
    prompt = model.passage_prompt(Letters(), ids, found, "xy", "z")
    expected = [ord("B")]
    for passage in sorted(found, key=lambda p: p.start):
        expected += [ord(c) for c in f"[{passage.rank + 1}]"] + ids[passage.start : passage.end].tolist()
    assert prompt.tolist() == [[*expected, *(ord(c) for c in "QxyAz")]]
    with pytest.raises(ValueError, match=r"expected config\.passage_prompt, got None"):
        build().passage_prompt(Letters(), ids, found, "xy")


@torch.no_grad()
def test_empty_questions_and_contexts(model: Any) -> None:
    ids = tokens(1, CHUNK)
    none = torch.zeros(1, 3)
    (found,) = model.find_passages(tokens(1, 3), ids, question_attention_mask=none, count=2)
    assert [p.score for p in found] == [0.0, 0.0]
    assert model.find_passages(tokens(1, 3), ids, torch.zeros(1, CHUNK)) == [[]]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3])
def test_questions_shorter_than_a_run_find_their_words(model: Any, length: int) -> None:
    ids, question = tokens(1, 2 * CHUNK), tokens(1, length, seed=5)
    ids[0, 40 : 40 + length] = question[0]
    evidence = WordIndex.of(model.pick.token_class[ids[0]].long(), SEGMENT, RUNS).evidence(
        model.pick.token_class[question[0]].long()
    )
    assert evidence.shape == (3, 16, length) and bool((evidence[0, 5] > 0).all())
    assert bool(evidence[1, 5, -1] > 0) == (length > 1) and not evidence[2].any()
    assert len(model.find_passages(question, ids, count=3)[0]) == 3


def test_bad_input_is_refused(model: Any) -> None:
    ids, question = tokens(1, CHUNK), tokens(1, 4)
    memory = model.compress(ids)
    plain: Any = SharedLLMForCausalLM.from_base(build_base("llama"), injection_layers=1, chunk_size=CHUNK)
    with pytest.raises(ValueError, match=r"expected a model with a pick .* got one without"):
        plain.find_passages(question, ids)
    with pytest.raises(ValueError, match="count: expected an integer of at least 1, got 0"):
        model.find_passages(question, ids, count=0)
    with pytest.raises(ValueError, match=f"expected the {CHUNK} tokens of the memory's document 0, got {CHUNK - 1}"):
        model.find_passages(question, ids[:, 1:], memory=memory)
    with pytest.raises(ValueError, match="context_ids: expected 2 rows as in question_ids, or 1, got 3"):
        model.find_passages(question.expand(2, -1), ids.expand(3, -1))
    with pytest.raises(ValueError, match="memory: expected 3 batch rows as in question_ids, or 1, got 2"):
        model.find_passages(question.expand(3, -1), ids, memory=memory.expand(2))
    with pytest.raises(ValueError, match="another model or another setting"):
        model.find_passages(question, ids, memory=build(chunk_size=32).compress(ids))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pick_layers": [0, 3]}, r"pick_layers: expected rising layers from 0 to 2, got \[0, 3\]"),
        ({"pick_layers": [1, 0]}, "pick_layers: expected rising layers"),
        ({"pick_layers": []}, "pick_layers: expected rising layers"),
        ({"pick_layers": "all"}, "pick_layers: expected rising layers from 0 to 2, got 'all'"),
        ({"query_aware": True}, "pick_layers: expected query_aware=False with it, got True"),
        ({"slot_position": "middle"}, "slot_position: expected start or end, got 'middle'"),
        ({"segment_size": 0}, "segment_size: expected at least 1, got 0"),
        ({"segment_margin": -1}, "segment_margin: expected at least 0, got -1"),
        ({"word_runs": []}, r"word_runs: expected different pairs of a length from 1 to 8 and a margin .*got \[\]"),
        ({"word_runs": [[1, 16], [1, 16]]}, r"word_runs: .*got \[\[1, 16\], \[1, 16\]\]"),
        ({"word_runs": [[1, 16], (1, 16)]}, r"word_runs: .*got \[\[1, 16\], \(1, 16\)\]"),
        ({"word_runs": [[9, 16]]}, r"word_runs: .*got \[\[9, 16\]\]"),
        ({"word_runs": [[0, 16]]}, "word_runs: "),
        ({"word_runs": [[1, -1]]}, "word_runs: "),
        ({"word_runs": [[1, 16, 2]]}, "word_runs: "),
        ({"word_runs": [[1, 16.0]]}, "word_runs: "),
        ({"word_runs": [[True, 16]]}, "word_runs: "),
        ({"word_runs": [1, 2, 4]}, r"word_runs: .*got \[1, 2, 4\]"),
        ({"word_runs": 3}, r"word_runs: .*got 3"),
        ({"word_runs": None}, r"word_runs: .*got None"),
        ({"word_runs": "wide"}, r"word_runs: .*got 'wide'"),
        ({"passage_prompt": {"begin": ""}}, "passage_prompt: expected texts begin, passage, question, answer, got"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    text_config = LlamaConfig(num_hidden_layers=4)
    with pytest.raises(ValueError, match=message):
        SharedLLMConfig(text_config=text_config, **{**FIELDS, **fields})


def test_a_tied_compressor_has_a_pick_too() -> None:
    model: Any = SharedLLMForCausalLM.from_base(build_base("llama"), **{**FIELDS, "tie_compressor": False})
    tied: Any = SharedLLMForCausalLM.from_base(build_base("llama"), **{**FIELDS, "tie_compressor": True})
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 6, seed=9)
    expected = model.find_passages(question, ids)
    found = tied.find_passages(question, ids)
    assert [p.segment for p in found[0]] == [p.segment for p in expected[0]]
