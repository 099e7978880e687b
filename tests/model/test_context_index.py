"""Indexes: any question's memory from one compressed context, equal to what compress gives, and their files."""

import copy
import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from sharedllm_ext import ContextIndex, ContextMemory, SharedLLMForCausalLM
from sharedllm_ext.model import compressor, tree
from sharedllm_ext.model.context_index import INDEX

from . import builders


@pytest.fixture
def model() -> SharedLLMForCausalLM:
    torch.manual_seed(0)
    return builders.model()


@pytest.fixture
def index(model: SharedLLMForCausalLM) -> ContextIndex:
    """Two documents, the second one shorter."""
    return model.index(*_ragged([75, 50]))


def _ragged(lengths: list[int], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Random documents of these lengths and their mask."""
    width = max(lengths)
    mask = torch.stack([torch.arange(width) < length for length in lengths])
    return builders.ids(len(lengths), width), (mask.flip(1) if left else mask).long()


def _check_same(got: ContextMemory, expected: ContextMemory, *, bitwise: bool = False) -> None:
    """Two memories are equal: fields, and tensors up to rounding."""
    for name in ("cu_slots", "num_chunks", "num_tokens", "memory_index", "signature"):
        assert getattr(got, name) == getattr(expected, name), name
    assert got.tails is not None and expected.tails is not None and len(got.tails) == len(expected.tails)
    for tail, other in zip(got.tails, expected.tails, strict=True):
        assert tail is not None and other is not None and tail.slots == other.slots
        assert tail.token_ids.dtype == other.token_ids.dtype and torch.equal(tail.token_ids, other.token_ids)
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if bitwise else {}
    for one, other in zip((*got.keys, *got.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def _retained(model: SharedLLMForCausalLM, context: Tensor, questions: list[Tensor]) -> set[str]:
    """The different choices of nodes among questions, as text."""
    return {str([nodes for nodes, _ in model.retrieve(context, query_ids=question)]) for question in questions}


# -- the same as compress ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot_position", ["start", "end"])
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_every_family(family: str, slot_position: str) -> None:
    torch.manual_seed(0)
    model = builders.model(family, slot_position=slot_position)
    lengths = [167, 32, 0, 5]
    context, mask = _ragged(lengths)
    index = model.index(context, mask)
    questions = [builders.ids(4, 7) for _ in range(6)]
    for question in questions:
        _check_same(model.memory_for(index, question), model.compress(context, mask, query_ids=question))
    # several choices were made
    assert len(_retained(model, context, questions)) == 6
    _check_same(model.memory_for(index), model.compress(context, mask))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_every_depth(depth: int, layers: int) -> None:
    torch.manual_seed(0)
    model = builders.model(tree_depth=depth, injection_layers=layers)
    context, mask = _ragged([150, 64, 3], left=True)
    index = model.index(context, mask)
    for question in [builders.ids(3, 5) for _ in range(4)]:
        _check_same(model.memory_for(index, question), model.compress(context, mask, query_ids=question))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = builders.model(dtype=dtype)
    context, question = builders.ids(2, 200), builders.ids(2, 6)
    index = model.index(context)
    assert index.dtype == index.vectors.dtype == dtype
    _check_same(model.memory_for(index, question), model.compress(context, query_ids=question))


def test_random_trees_documents_and_questions() -> None:
    generator = random.Random(0)
    for seed in range(40):
        torch.manual_seed(seed)
        depth = generator.randrange(1, 5)
        model = builders.model(
            tree_depth=depth,
            chunk_size=generator.randrange(max(8, 2**depth), 48),
            slots_per_node=generator.randrange(1, 9),
            injection_layers=generator.randrange(1, 4),
            slot_position=generator.choice(["start", "end"]),
            micro_batch_tokens=generator.choice([None, 40, 100]),
            tie_compressor=generator.random() < 0.7,
        )
        rows = generator.randrange(1, 4)
        context, mask = _ragged([generator.randrange(0, 100) for _ in range(rows)], left=generator.random() < 0.5)
        index = model.index(context, mask)
        for _ in range(2):
            width = generator.randrange(1, 9)
            question, asked = _ragged([generator.randrange(0, width + 1) for _ in range(rows - 1)] + [width])
            got = model.memory_for(index, question, asked)
            _check_same(got, model.compress(context, mask, query_ids=question, query_attention_mask=asked))


def test_micro_batches_change_nothing(model: SharedLLMForCausalLM) -> None:
    context, mask = _ragged([150, 70, 0, 33])
    whole, told = model.index(context, mask), []
    model.config.micro_batch_tokens = 40
    parts = model.index(context, mask, progress=told.append)
    assert told == [32, 64, 96, 128, 150, 182, 220, 253] and parts.num_tokens == whole.num_tokens
    for one, other in zip(
        (*parts.keys, *parts.values, parts.vectors), (*whole.keys, *whole.values, whole.vectors), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_nothing_is_compressed_for_a_question(model: SharedLLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    context, question = builders.ids(1, 200), builders.ids(1, 6)
    index, want = model.index(context), model.compress(context, query_ids=question)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compressed")

    monkeypatch.setattr(compressor, "compress_layer", refuse)
    monkeypatch.setattr(tree, "last_token_vectors", refuse)
    with pytest.raises(AssertionError, match="compressed"):
        model.compress(context, query_ids=question)
    for layer in model.model.layers[1:]:
        layer.register_forward_hook(refuse)
    _check_same(model.memory_for(index, question), want)
    timings = model.last_timings
    assert (timings["context_tokens"], timings["chunks"], timings["slots"]) == (200, 7, want.num_slots)
    assert timings["retrieve"] > 0 and timings["compress"] > 0


def test_many_questions_of_one_document(model: SharedLLMForCausalLM) -> None:
    context, questions = builders.ids(1, 300), builders.ids(3, 6)
    mask = torch.ones_like(questions)
    mask[1] = 0
    index = model.index(context)
    got = model.memory_for(index, questions, mask)
    _check_same(got, model.compress(context.expand(3, -1), query_ids=questions, query_attention_mask=mask))
    assert got.batch_size == got.num_documents == 3
    # no question at all is one memory, which any batch may read
    assert model.memory_for(index).batch_size == 1
    nobody = model.memory_for(index, questions, torch.zeros_like(mask))
    _check_same(nobody, model.compress(context.expand(3, -1), query_ids=questions, query_attention_mask=mask * 0))


@torch.no_grad()
def test_a_question_by_its_embeddings(model: SharedLLMForCausalLM) -> None:
    context, question = builders.ids(2, 200), builders.ids(2, 6)
    index, embeds = model.index(context), model.get_input_embeddings()(question)
    _check_same(model.memory_for(index, query_embeds=embeds), model.compress(context, query_embeds=embeds))


def test_answers(model: SharedLLMForCausalLM) -> None:
    context, question = builders.ids(2, 200), builders.ids(2, 6)
    memory = model.memory_for(model.index(context), question)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = model.generate(question, context_ids=context, **options)
    assert torch.equal(model.generate(question, memory=memory, **options), want)
    with torch.no_grad():
        torch.testing.assert_close(model(question, memory=memory).logits, model(question, context_ids=context).logits)


def test_empty_contexts(model: SharedLLMForCausalLM) -> None:
    for context, question in ((builders.ids(2, 0), builders.ids(2, 3)), (builders.ids(0, 40), builders.ids(0, 3))):
        index = model.index(context)
        assert index.num_slots == 0 and index.vectors.shape == (0, 64)
        _check_same(model.memory_for(index, question), model.compress(context, query_ids=question))
        _check_same(model.memory_for(index), model.compress(context))


@pytest.mark.parametrize("whole_layers", [False, True])
def test_weights_kept_on_the_cpu(model: SharedLLMForCausalLM, whole_layers: bool) -> None:
    context, question = builders.ids(2, 130), builders.ids(2, 6)
    index, want = model.index(context), model.compress(context, query_ids=question)
    classes = ["InjectedLlamaDecoderLayer"] if whole_layers else None
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=classes)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    for one in (index, offloaded.index(context)):
        got = offloaded.memory_for(one, question)
        got.signature = want.signature
        _check_same(got, want)


def test_a_memory_of_an_index_goes_on(model: SharedLLMForCausalLM) -> None:
    context, more, question = builders.ids(1, 75), builders.ids(1, 60), builders.ids(1, 6)
    memory = model.memory_for(model.index(context), question)
    longer = model.append(memory, more, query_ids=question)
    _check_same(longer, model.compress(torch.cat((context, more), 1), query_ids=question))


def test_training_mode_does_not_matter_for_questions(model: SharedLLMForCausalLM, index: ContextIndex) -> None:
    question = builders.ids(2, 6)
    want = model.memory_for(index, question)
    got = model.train().memory_for(index, question)
    _check_same(got, want, bitwise=True)
    assert not got.keys[0].requires_grad
    model(question, memory=got).logits.sum().backward()


# -- as an object -----------------------------------------------------------------------------------------------------


def test_an_index_in_numbers(model: SharedLLMForCausalLM) -> None:
    context = builders.ids(2, 96)
    index, memory = model.index(context), model.compress(context)
    # 14 nodes of a chunk instead of 4
    assert index.num_slots * 4 == memory.num_slots * 14
    assert index.vectors.shape == (6 * 6, 64)
    assert index.nbytes == memory.nbytes * 14 // 4 + index.vectors.nbytes
    assert index.describe() == {
        "documents": 2,
        "tokens": 192,
        "chunks": 6,
        "nodes": 84,
        "slots": 336,
        "layers": 2,
        "vector_bytes": 9216,
        "bytes": index.nbytes,
        "dtype": "float32",
        "device": "cpu",
    }
    assert (index.num_documents, index.num_chunks, index.device) == (2, [3, 3], torch.device("cpu"))


def test_in_another_dtype(model: SharedLLMForCausalLM, index: ContextIndex) -> None:
    half = index.to(torch.bfloat16)
    assert {tensor.dtype for tensor in (*half.keys, *half.values, half.vectors)} == {torch.bfloat16}
    assert model.memory_for(half, builders.ids(2, 4)).dtype == torch.bfloat16
    assert index.dtype == torch.float32


def _other(model: SharedLLMForCausalLM) -> SharedLLMForCausalLM:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.add_(0.1)
    return other


CASES: dict[str, tuple[Callable[[SharedLLMForCausalLM, ContextIndex], Any], type[Exception], str]] = {
    "training": (
        lambda m, i: m.train().index(builders.ids(1, 40)),
        ValueError,
        r"index: expected evaluation mode \(model.eval\(\)\), got training mode",
    ),
    "not query-aware": (
        lambda m, i: _set(m, query_aware=False).index(builders.ids(1, 40)),
        ValueError,
        "index: expected a model with config.query_aware, got one without",
    ),
    "more leaves than tokens": (
        lambda m, i: _set(m, tree_depth=6).index(builders.ids(1, 40)),
        ValueError,
        "index: expected a tree_depth of 1 to 5 by the chunk_size of 32, got 6",
    ),
    "a memory": (
        lambda m, i: m.memory_for(m.compress(builders.ids(1, 40)), builders.ids(1, 4)),
        TypeError,
        "index: expected a ContextIndex, got ContextMemory",
    ),
    "an index as memory": (
        lambda m, i: m.generate(builders.ids(2, 4), memory=i),
        TypeError,
        "memory: expected a ContextMemory, got ContextIndex",
    ),
    "another model": (
        lambda m, i: _other(m).memory_for(i, builders.ids(2, 4)),
        ValueError,
        r"index: made by another model or another setting of this one; weights: expected \w+, got \w+",
    ),
    "another tree": (
        lambda m, i: _set(m, slots_per_node=8).memory_for(i, builders.ids(2, 4)),
        ValueError,
        "index: made by another model .*; slots_per_node: expected 8, got 4",
    ),
    "another place of slots": (
        lambda m, i: _set(m, slot_position="end").memory_for(i, builders.ids(2, 4)),
        ValueError,
        "index: made by another model .*; settings: ",
    ),
    "rows": (
        lambda m, i: m.memory_for(i, builders.ids(3, 4)),
        ValueError,
        r"query_ids: expected 2 rows, one for each document of the index .or an index of one document., got 3",
    ),
    "no rows": (
        lambda m, i: m.memory_for(m.index(builders.ids(1, 40)), builders.ids(0, 4)),
        ValueError,
        "query_ids: expected 1 row, .* got 0",
    ),
    "mask": (
        lambda m, i: m.memory_for(i, builders.ids(2, 4), torch.ones(2, 5)),
        ValueError,
        r"query_attention_mask: expected the shape of query_ids \(2, 4\), got \(2, 5\)",
    ),
    "mask alone": (
        lambda m, i: m.memory_for(i, None, torch.ones(2, 5)),
        ValueError,
        "query_attention_mask: expected query_ids with it, got none",
    ),
    "two questions": (
        lambda m, i: m.memory_for(i, builders.ids(2, 4), query_embeds=torch.zeros(2, 4, 64)),
        ValueError,
        "query_ids, query_embeds: expected at most one of them, got both",
    ),
    "a list": (lambda m, i: m.memory_for(i, [[1, 2]]), TypeError, "query_ids: expected a tensor, got list"),
    "out of vocabulary": (
        lambda m, i: m.memory_for(i, builders.ids(2, 4) + 128),
        ValueError,
        "query_ids: expected token ids from 0 to 127",
    ),
    "one dimension": (
        lambda m, i: m.memory_for(i, builders.ids(4)),
        ValueError,
        r"query_ids: expected shape \[batch, tokens\], got \(4,\)",
    ),
    "context": (
        lambda m, i: m.index(builders.ids(1, 40).float()),
        ValueError,
        "context_ids: expected integer token ids",
    ),
    "context mask": (
        lambda m, i: m.index(builders.ids(1, 40), torch.ones(1, 39)),
        ValueError,
        "context_attention_mask: expected the shape of context_ids",
    ),
}


def _set(model: SharedLLMForCausalLM, **fields: Any) -> SharedLLMForCausalLM:
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused(model: SharedLLMForCausalLM, index: ContextIndex, name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call(model, index)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, index: ContextIndex) -> Path:
    index.save(tmp_path / "index.safetensors")
    return tmp_path / "index.safetensors"


def _same(one: ContextIndex, other: ContextIndex) -> bool:
    """Whether two indexes are equal in every field and every bit."""
    tensors = zip((*one.keys, *one.values, one.vectors), (*other.keys, *other.values, other.vectors), strict=True)
    fields = [(index.num_tokens, index.tail_ids, index.signature) for index in (one, other)]
    return fields[0] == fields[1] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(model: SharedLLMForCausalLM, index: ContextIndex, tmp_path: Path, dtype: torch.dtype) -> None:
    # vectors may have a dtype of their own
    saved = dataclasses.replace(index.to(dtype), vectors=index.vectors)
    saved.save(tmp_path / "index")
    loaded = ContextIndex.load(tmp_path / "index", model)
    assert _same(loaded, saved) and _same(ContextIndex.load(tmp_path / "index", verify=False), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    question = builders.ids(2, 5)
    _check_same(model.memory_for(loaded, question), model.memory_for(saved, question), bitwise=True)


def test_an_index_without_nodes_to_choose_from(tmp_path: Path) -> None:
    model = builders.model(tree_depth=1)
    index = model.index(builders.ids(1, 70))
    assert index.vectors.shape == (0, 64)
    index.save(tmp_path / "index")
    assert _same(ContextIndex.load(tmp_path / "index", model), index)


def test_files_of_other_kinds(model: SharedLLMForCausalLM, file: Path, tmp_path: Path) -> None:
    model.compress(builders.ids(1, 40)).save(tmp_path / "memory")
    with pytest.raises(ValueError, match="expected a sharedllm-context-index file, got a 'sharedllm-context-memory'"):
        ContextIndex.load(tmp_path / "memory")
    with pytest.raises(ValueError, match="expected a sharedllm-context-memory file, got a 'sharedllm-context-index'"):
        ContextMemory.load(file)
    with pytest.raises(FileNotFoundError, match=r"context index file: expected a file, got .*none', which does not"):
        ContextIndex.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"context index file: expected a regular file or a new name, got .*a folder"):
        ContextIndex.load(file).save(tmp_path)


def test_another_model_does_not_read_the_file(model: SharedLLMForCausalLM, file: Path) -> None:
    with pytest.raises(ValueError, match=r"index.safetensors: index: made by another model .*weights: expected"):
        ContextIndex.load(file, _other(model))


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _sealed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file whose header was changed by somebody who knows how to seal it."""
    head, rest = _parts(data)
    header = json.loads(head["__metadata__"]["header"])
    change(header)
    text = json.dumps(header)
    head["__metadata__"] = {"header": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    whole = json.dumps(head).encode()
    return len(whole).to_bytes(8, "little") + whole + rest


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda h: h.update(num_tokens=5), "expected num_tokens to be a list of integers of at least 0, got 5"),
    "a fraction": (lambda h: h.update(num_tokens=[75.0, 50]), r"num_tokens to be a list .*, got \[75.0, 50\]"),
    "a negative number": (lambda h: h.update(num_tokens=[-1, 50]), "num_tokens to be a list"),
    "other tokens": (lambda h: h.update(num_tokens=[107, 50]), r"expected keys.0 of shape \(\d+, 2, 16\), got"),
    "a document less": (lambda h: h.update(num_tokens=[75]), r"expected tail_ids of \[11\] token ids, got"),
    "more tokens than there is memory for": (
        lambda h: h.update(num_tokens=[2**61 + 11, 50]),
        r"expected keys.0 of shape \(\d{18,}, 2, 16\)",
    ),
    "a tail too long": (lambda h: h["tail_ids"][0].append(5), r"expected tail_ids of \[11, 18\] token ids, got"),
    "a tail of words": (lambda h: h["tail_ids"].__setitem__(1, ["a"] * 18), "expected tail_ids of"),
    "a tail of numbers that are no ids": (lambda h: h["tail_ids"][1].__setitem__(0, 2**31), "expected tail_ids of"),
    "no tails": (lambda h: h.update(tail_ids=None), r"expected tail_ids of \[11, 18\] token ids, got None"),
    "another tree": (lambda h: h["signature"].update(tree_depth=2), r"expected keys.0 of shape"),
    "other slots": (lambda h: h["signature"].update(slots_per_node=2), r"expected keys.0 of shape"),
    "another width": (lambda h: h["signature"].update(hidden_size=65), r"vectors of shape \(30, 65\), got \(30, 64\)"),
    "a deep tree": (
        lambda h: h["signature"].update(tree_depth=2**31 - 1),
        "expected a tree_depth of 1 to 5 by the chunk_size of 32, got 2147483647",
    ),
    "a deep tree of large chunks": (
        lambda h: (
            h["signature"].update(tree_depth=30, chunk_size=2**31 - 1),
            h.update(tail_ids=[[5] * count for count in h["num_tokens"]]),
        ),
        r"expected keys.0 of shape",
    ),
    "many layers": (
        lambda h: h["signature"].update(injection_layers=2**30, probe=None),
        "2147483649 tensors for 10737",
    ),
    "no signature": (lambda h: h.update(signature=[]), "expected a signature of"),
    "a signature's number": (lambda h: h["signature"].update(weights=3), "weights to be a text, got 3"),
    "a field too many": (lambda h: h.update(more=1), "fields of version 1"),
    "a checksum too few": (lambda h: h["checksums"].pop("vectors"), "a checksum for every tensor"),
    "another checksum": (lambda h: h["checksums"].update(vectors=7), "expected vectors with CRC-32 7, got"),
    "version": (lambda h: h.update(version=2), "expected sharedllm-context-index version 1, got 2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_contradict_themselves(file: Path, name: str) -> None:
    change, message = HOSTILE[name]
    file.write_bytes(_sealed(file.read_bytes(), change))
    with pytest.raises(ValueError, match=message) as caught:
        ContextIndex.load(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_no_damaged_file_reads_as_something_else(index: ContextIndex, file: Path) -> None:
    data, generator, refused = file.read_bytes(), random.Random(0), 0
    for number in range(300):
        changed = bytearray(data)
        if number % 3 == 0:
            del changed[generator.randrange(len(data)) :]
        else:
            # half of the changes hit the header
            end = len(data) if number % 3 == 1 else 8 + int.from_bytes(data[:8], "little")
            changed[generator.randrange(end)] ^= 1 << generator.randrange(8)
        file.write_bytes(bytes(changed))
        try:
            loaded = ContextIndex.load(file)
        except ValueError as error:
            assert str(file) in str(error) and "expected" in str(error) and len(str(error)) < 1000, error
            refused += 1
        else:
            assert _same(loaded, index), number
    assert refused > 280


def test_what_contradicts_itself_is_not_written(index: ContextIndex, tmp_path: Path) -> None:
    for change, message in (
        ({"num_tokens": [107, 50]}, "index: expected keys.0 of shape"),
        ({"num_tokens": [75, 51]}, "index: expected tail_ids of"),
        ({"keys": index.keys[:1]}, "index: expected 4 keys and values, got 3"),
        ({"vectors": index.vectors[1:]}, r"index: expected vectors of shape \(30, 64\) .* got \(29, 64\)"),
        ({"vectors": index.vectors.long()}, "index: expected vectors of shape .* got .* torch.int64"),
        ({"values": [value.half() for value in index.values]}, "index: expected values.0 .* got .* torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(index, **change).save(tmp_path / "index")
        assert list(tmp_path.iterdir()) == []


def test_the_file_format_does_not_change(file: Path) -> None:
    head, _ = _parts(file.read_bytes())
    header = json.loads(head["__metadata__"]["header"])
    assert (header["format"], header["version"]) == (INDEX.name, 1) == ("sharedllm-context-index", 1)
    assert set(header) == {"format", "version", "num_tokens", "tail_ids", "signature", "checksums"}
    assert set(head) == {"__metadata__", "keys.0", "keys.1", "values.0", "values.1", "vectors"}
