"""Batch rows that read several documents: as one document of all their chunks, without copying keys or values.

``python -m tests.model.test_rows_of_documents 300`` runs that many random sequences.
"""

import json
import pickle
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharedllm_ext import ContextMemory, Conversation, decoding_obstacle
from sharedllm_ext.distributed.sharded_memory import merge_parts
from sharedllm_ext.model import joins
from sharedllm_ext.model.decoding import support
from sharedllm_ext.model.file_description import describe_file
from sharedllm_ext.model.joins import join
from sharedllm_ext.model.pick import rotated
from sharedllm_ext.reference import model as reference

from . import builders
from .recorded import Recorded, use_recordings
from .test_append import assert_same
from .test_memory_parts import compressed

CHUNK: int = builders.TREE["chunk_size"]
#: Documents: the last chunk of most is partial, one has less than a chunk, one has no tokens.
LENGTHS = (2 * CHUNK, 70, 40, 0, 5, CHUNK)
ROWS: list[Any] = [[0, 3], 1, [1, 2, 4], [4, 2, 1], [5, 0], [3, 1]]
STEPS: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}


def built(family: str = "llama", **fields: Any) -> Any:
    torch.manual_seed(5)
    # chunks alone: what is put together equals what was compressed at once in every bit
    return builders.model(family, query_aware=False, micro_batch_tokens=1, **fields)


@pytest.fixture(scope="module")
def model() -> Any:
    return built()


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    torch.manual_seed(6)
    return [builders.ids(length) for length in LENGTHS]


def kept(model: Any, texts: Sequence[Tensor]) -> ContextMemory:
    return ContextMemory.concat([model.compress(text[None].to(model.device)) for text in texts])


@torch.no_grad()
def in_one(model: Any, texts: Sequence[Tensor], rows: Sequence[Any]) -> ContextMemory:
    """What each row reads as a document of its own, put together by copies of slots."""
    made = []
    for row in rows:
        parts: list[ContextMemory] = []
        for document in [row] if isinstance(row, int) else row:
            first = sum(part.num_chunks[0] for part in parts)
            parts.append(model._compress_part(texts[document][None].to(model.device), first_chunks=[first]))
        made.append(
            ContextMemory(
                keys=[torch.cat(keys) for keys in zip(*(part.keys for part in parts), strict=True)],
                values=[torch.cat(values) for values in zip(*(part.values for part in parts), strict=True)],
                cu_slots=[0, sum(part.num_slots for part in parts)],
                num_chunks=[sum(part.num_chunks[0] for part in parts)],
                num_tokens=[sum(part.num_tokens[0] for part in parts)],
                memory_index=[0],
                signature=parts[0].signature,
            )
        )
    return ContextMemory.concat(made)


def padded(rows: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """Running texts with padding on the left of some."""
    text, mask = builders.ids(rows, 11), torch.ones(rows, 11, dtype=torch.int64)
    for row in range(0, rows, 2):
        mask[row, : 2 + row % 5] = 0
    return {"input_ids": text.to(device), "attention_mask": mask.to(device)}


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", builders.FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_one_document(family: str, texts: list[Tensor], device: torch.device) -> None:
    model = built(family).to(device)
    memory, want = kept(model, texts).with_rows(ROWS), in_one(model, texts, ROWS)
    assert memory.batch_size == len(ROWS) and memory.num_documents == len(texts)
    inputs = padded(len(ROWS), device)
    used = inputs["attention_mask"].bool()
    got, expected = (model(**inputs, memory=one).logits[used] for one in (memory, want))
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)
    # it matters what is read
    others = model(**inputs, memory=memory.with_rows([5] * len(ROWS))).logits[used]
    assert (others - expected).abs().max() > 1e-2


@pytest.mark.parametrize("row", [(0, 1), (1, 0), (2, 4, 1), (3, 1), (5, 0, 1, 2, 4)])
@torch.no_grad()
def test_float64_oracle(row: tuple[int, ...], texts: list[Tensor]) -> None:
    """One softmax over all slots, written out, in a document whose chunks are counted through."""
    model = built(dtype=torch.float64)
    text = builders.ids(1, 9)
    expected = reference.logits(model, text[0], reference.compress_all(model, [texts[document] for document in row]))
    got = model(text, memory=kept(model, texts).with_rows([row])).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if len(row) == 2 and 3 not in row:
        turned = model(text, memory=kept(model, texts).with_rows([row[::-1]])).logits[0]
        assert (turned - expected).abs().max() > 1e-3


@torch.no_grad()
def test_documents_of_full_chunks_are_a_text_that_was_compressed_as_a_whole(model: Any, texts: list[Tensor]) -> None:
    memory = kept(model, texts).with_rows([[0, 5, 1], [5, 0, 2]])
    inputs = padded(2)
    whole = compressed(model, [torch.cat([texts[i] for i in row]) for row in ([0, 5, 1], [5, 0, 2])])
    used = inputs["attention_mask"].bool()
    got, want = (model(**inputs, memory=one).logits[used] for one in (memory, whole))
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_the_choices_of_a_query(texts: list[Tensor]) -> None:
    """Nodes that a query has picked are read as they are."""
    torch.manual_seed(5)
    model = builders.model(query_aware=True)
    query, text = builders.ids(1, 5), builders.ids(1, 6)
    parts = [model.compress(texts[i][None], query_ids=query) for i in (0, 5)]
    whole = model.compress(torch.cat((texts[0], texts[5]))[None], query_ids=query)
    got = model(text, memory=ContextMemory.concat(parts).with_rows([[0, 1]])).logits
    torch.testing.assert_close(got, model(text, memory=whole).logits, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_long_running_texts_are_read_in_parts(model: Any, texts: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    memory, inputs = kept(model, texts).with_rows(ROWS), padded(len(ROWS))
    whole = model(**inputs, memory=memory).logits
    for most in (1, 4000):
        monkeypatch.setattr(joins, "MOST_ELEMENTS", most)
        torch.testing.assert_close(model(**inputs, memory=memory).logits, whole, atol=5e-5, rtol=1e-4)


class _Largest(TorchDispatchMode):
    """The most elements that an operator has made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in before:
                self.elements = max(self.elements, one.numel())
        return out


@torch.no_grad()
def test_nothing_is_copied(model: Any) -> None:
    slots = torch.randn(4, 12 * 6000, 2, 16).unbind(0)
    memory = ContextMemory(
        keys=list(slots[:2]),
        values=list(slots[2:]),
        cu_slots=list(range(0, 12 * 6000 + 1, 6000)),
        num_chunks=[375] * 12,
        num_tokens=[375 * CHUNK] * 12,
        memory_index=list(range(12)),
        signature=model.compress(builders.ids(1, 5)).signature,
    )
    rows = memory.with_rows([[0, 3, 7], 2, [11, 1], [0, 3, 7]])
    for one in (rows, rows.select([0, 2]), rows.expand(2)):
        assert all(a is b for a, b in zip((*one.keys, *one.values), (*memory.keys, *memory.values), strict=True))
        assert one.num_slots == memory.num_slots and one.nbytes == memory.nbytes
    text = builders.ids(4, 2)
    assert memory.select_documents([0, 3, 7]).keys[0].data_ptr() != memory.keys[0].data_ptr()
    with _Largest() as seen:
        model(text, memory=rows)
        model.generate(text, memory=rows, do_sample=False, **STEPS)
    # of one document's keys, of which each row reads up to three
    least = memory.keys[0].numel() // memory.num_documents
    assert 0 < seen.elements < least, (seen.elements, least)


def test_gradients_are_those_of_one_document(texts: list[Tensor]) -> None:
    model = built(dtype=torch.float64)
    memory = kept(model, texts)
    rows = [[1, 2], [2, 0, 4], [1], [3, 1]]
    text, weight = builders.ids(len(rows), 6), model.injected_blocks[0].q_proj.weight
    leaves = [t.detach().clone().requires_grad_() for t in (*memory.keys, *memory.values)]
    half = len(memory.keys)
    memory.keys, memory.values = leaves[:half], leaves[half:]
    found = model(text, memory=memory.with_rows(rows)).logits
    got = torch.autograd.grad(found.square().sum(), [weight, *leaves])
    tables = model._rope_tables(32, model.device)
    total = [torch.zeros_like(x) for x in got]
    for number, row in enumerate(rows):
        parts: list[list[Tensor]] = [[] for _ in leaves]
        chunks = 0
        for document in row:
            slots = slice(memory.cu_slots[document], memory.cu_slots[document + 1])
            for i, leaf in enumerate(leaves):
                cos, sin = (x[chunks].double() for x in tables.of(model.model.layers[i % half]))
                parts[i].append(rotated(leaf[slots], cos, sin) if i < half else leaf[slots])
            chunks += memory.num_chunks[document]
        whole = [torch.cat(part) for part in parts]
        one = ContextMemory(whole[:half], whole[half:], [0, whole[0].shape[0]], [chunks], [0], [0], memory.signature)
        logits = model(text[number : number + 1], memory=one).logits
        torch.testing.assert_close(found[number].detach(), logits[0].detach(), atol=1e-5, rtol=1e-5)
        for sums, grad in zip(total, torch.autograd.grad(logits.square().sum(), [weight, *leaves]), strict=True):
            sums += grad
    for one_got, want in zip(got, total, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(one_got, want, atol=1e-4 * float(want.abs().max()), rtol=1e-3)


def test_a_memory_in_training(texts: list[Tensor]) -> None:
    """Gradients of the compressor, through documents that are read by several rows."""
    model = built(tie_compressor=False, split_noise=0.0).train()
    context = torch.stack([texts[0], builders.ids(2 * CHUNK)])
    text, weight = builders.ids(2, 6), model.compressor.layers[0].self_attn.v_proj.weight
    got = model(text, memory=model.compress(context).with_rows([[0, 1], [1]])).logits
    whole = [torch.cat((context[0], context[1]))[None], context[1:]]
    want = torch.cat([model(text[i : i + 1], context_ids=one).logits for i, one in enumerate(whole)])
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    a, b = (torch.autograd.grad(x.square().sum(), weight)[0] for x in (got, want))
    assert b.abs().max() > 0
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_joining_parts(dtype: torch.dtype) -> None:
    """As processes join what they have read, and with parts without slots, of which some rows have nothing else."""
    out = torch.randn(5, 4, 3, 6, dtype=torch.float64)
    lse = 3 * torch.randn(5, 4, 3, dtype=torch.float64)
    lse[0, 1] = lse[1, :3] = lse[2] = -torch.inf
    out[lse == -torch.inf] = 0
    out = out.to(dtype).double()
    exact, total = join(out, lse)
    got, _ = join(out.to(dtype), lse.to(torch.float64 if dtype == torch.float64 else torch.float32))
    assert got.dtype == dtype and bool((exact[2] == 0).all()) and bool((total[2] == -torch.inf).all())
    torch.testing.assert_close(total, lse.logsumexp(1))
    torch.testing.assert_close(exact, (lse.softmax(1).nan_to_num(0).unsqueeze(-1) * out).sum(1))
    torch.testing.assert_close(got, exact.to(dtype))
    parts = merge_parts(
        out.to(dtype).unbind(1), lse.to(got.dtype if dtype == torch.float64 else torch.float32).unbind(1)
    )
    torch.testing.assert_close(got, parts)
    # another row's NaN stays there
    out[3] = torch.nan
    assert torch.equal(join(out, lse)[0][[0, 1, 2, 4]], exact[[0, 1, 2, 4]])


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["steps", "ahead", "graphs"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decoding steps, with steps that start ahead and short prompts in one, and as what stands for graphs."""
    monkeypatch.setattr(support, "RUN_ON_CPU", request.param != "steps")
    if request.param == "graphs":
        use_recordings(monkeypatch)
    return str(request.param)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "the model's own forward": {"do_sample": False, "disable_compile": True},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate(model: Any, texts: list[Tensor], way: str, mode: str) -> None:
    rows = ROWS[2:3] if mode == "prompt lookup" else ROWS
    memory, want = kept(model, texts).with_rows(rows), in_one(model, texts, rows)
    assert decoding_obstacle(model, rows=len(rows), memory=memory, do_sample=False) is None
    inputs = padded(len(rows))
    replays = Recorded.replays
    for _ in range(2):
        # graphs are recorded at the second time
        answers = []
        for one in (memory, want):
            torch.manual_seed(3)
            answers.append(model.generate(**inputs, memory=one, **MODES[mode], **STEPS))
        assert torch.equal(*answers)
    assert len(set(answers[0][:, 11:].flatten().tolist())) > 2
    if way == "graphs" and mode in ("greedy", "sample"):
        assert Recorded.replays > replays


@pytest.mark.parametrize("family", builders.DECODED)
def test_steps_of_every_family(family: str, texts: list[Tensor], device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = built(family, dtype=dtype).to(device)
    memory = kept(model, texts).with_rows(ROWS)
    inputs = padded(len(ROWS), device)
    settings = {**STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for _ in range(2):
        steps = model.generate(**inputs, memory=memory, **settings)
    own = model.generate(**inputs, memory=memory, disable_compile=True, **settings)
    # up to the first token that another rounding has chosen
    same = (steps.sequences == own.sequences)[:, inputs["input_ids"].shape[1] :].cumprod(1)
    assert same.float().mean() > (0.5 if device.type == "cuda" else 0.99)
    atol = 0.15 if device.type == "cuda" else 1e-4
    torch.testing.assert_close(steps.logits[0].float(), own.logits[0].float(), atol=atol, rtol=0.05)
    torch.testing.assert_close(
        steps.logits[1][same[:, 0].bool()].float(), own.logits[1][same[:, 0].bool()].float(), atol=atol, rtol=0.05
    )


def test_a_cache_goes_on_with_its_rows(model: Any, texts: list[Tensor]) -> None:
    memory = kept(model, texts)
    first, text = memory.with_rows([[1, 2]]), builders.ids(1, 5)
    answers = []
    for one in (first, in_one(model, texts, [[1, 2]])):
        out = model.generate(text, memory=one, do_sample=False, return_dict_in_generate=True, **STEPS)
        again = torch.cat((out.sequences, text), 1)
        answers.append(model.generate(again, past_key_values=out.past_key_values, do_sample=False, **STEPS))
    assert torch.equal(*answers)


def test_the_next_answer_reads_other_rows(model: Any, texts: list[Tensor], way: str) -> None:
    """What is kept of an answer over the same tensors is not used for other documents, or another order of them."""
    memory, text = kept(model, texts), builders.ids(1, 5)
    found = set()
    for row in ([1, 2], [2, 1], [4, 5], [1, 2]):
        want = model.generate(text, memory=in_one(model, texts, [row]), disable_compile=True, do_sample=False, **STEPS)
        for _ in range(2):
            got = model.generate(text, memory=memory.with_rows([row]), do_sample=False, **STEPS)
            assert torch.equal(got, want), row
        found.add(tuple(got[0].tolist()))
    assert len(found) > 1


def test_a_compiled_model(model: Any, texts: list[Tensor]) -> None:
    torch.compiler.reset()
    memory, text = kept(model, texts).with_rows([[0, 1], 2, [4, 5, 1]]), builders.ids(3, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(text, memory=memory).logits, model(text, memory=memory).logits)


# -- what is done with such a memory ----------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_go_with_select_expand_concat(model: Any, texts: list[Tensor]) -> None:
    memory = kept(model, texts).with_rows(ROWS)
    assert memory.memory_index == [(0, 3), 1, (1, 2, 4), (4, 2, 1), (5, 0), (3, 1)]
    assert memory.select([2, 1]).memory_index == [(1, 2, 4), 1]
    assert memory.expand(2).memory_index[:3] == [(0, 3), (0, 3), 1]
    both = ContextMemory.concat([memory.select([0, 1]), memory])
    assert both.memory_index[:4] == [(0, 3), 1, (6, 9), 7]
    inputs = padded(8)
    want = in_one(model, texts * 2, [[0, 3], 1, *ROWS])
    used = inputs["attention_mask"].bool()
    got, expected = (model(**inputs, memory=one).logits[used] for one in (both, want))
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)
    # documents get rows of their own again
    assert memory.select_documents([1, 2]).memory_index == [0, 1]
    # a list of one document is a row of one
    assert memory.with_rows([[2], (torch.tensor(1),)]).memory_index == [2, 1]
    assert (
        memory.to(torch.float64).memory_index == pickle.loads(pickle.dumps(memory)).memory_index == memory.memory_index
    )


@torch.no_grad()
def test_files(model: Any, texts: list[Tensor], tmp_path: Path) -> None:
    memory, inputs = kept(model, texts).with_rows(ROWS), padded(len(ROWS))
    want = model(**inputs, memory=memory).logits
    for size in (None, "20KB"):
        path = tmp_path / f"{size}.safetensors"
        memory.save(path, max_shard_size=size)
        for mmap in (False, True):
            loaded = ContextMemory.load(path, model, mmap=mmap)
            assert loaded.memory_index == memory.memory_index
            assert torch.equal(model(**inputs, memory=loaded).logits, want)
        told = describe_file(path)
        assert told["version"] == 4 and told["rows"] == len(ROWS)
        assert told["row_documents"] == [[0, 3], [1], [1, 2, 4], [4, 2, 1], [5, 0], [3, 1]]
        assert json.loads(json.dumps(told)) == told
    # without such rows the file is what it was
    memory.with_rows([1, 0]).save(tmp_path / "before.safetensors")
    assert describe_file(tmp_path / "before.safetensors")["version"] == 3


@torch.no_grad()
def test_the_document_that_goes_on_is_named(model: Any, texts: list[Tensor]) -> None:
    rows, more = [[0, 2], [2, 1]], builders.ids(1, 45)
    memory = kept(model, texts).with_rows(rows)
    for given in ({}, {"rows": [0]}):
        ids = more if given else more.expand(2, -1)
        with pytest.raises(
            ValueError,
            match=r"rows: expected batch rows that read one document each, got row 0, which reads documents \[0, 2\]; "
            r"documents=\[…\] names the one that goes on",
        ):
            model.append(memory, ids, **given)
    grown = model.append(memory, more, documents=[2])
    assert grown.memory_index == [(0, 2), (2, 1)]
    longer = [torch.cat((text, more[0])) if i == 2 else text for i, text in enumerate(texts)]
    text = builders.ids(2, 5)
    want = model(text, memory=in_one(model, longer, rows)).logits
    torch.testing.assert_close(model(text, memory=grown).logits, want, atol=5e-5, rtol=1e-4)
    # several at once, in any order, of which one has nothing new
    both = builders.ids(3, 7)
    grown = model.append(grown, both, torch.tensor([[1] * 7, [0] * 7, [1] * 3 + [0] * 4]), documents=[4, 1, 0])
    longer[4], longer[0] = torch.cat((longer[4], both[0])), torch.cat((longer[0], both[2, :3]))
    assert_same(grown.with_rows(range(6)), compressed(model, longer))
    for bad, message in (
        ({"documents": [1], "rows": [0]}, "rows, documents: expected at most one of them, got both"),
        ({"documents": [1, 2]}, "documents: expected 1, one for each row of context_ids, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.append(grown, more, **bad)
    with pytest.raises(ValueError, match=r"documents: expected different ones, got \[1, 1\]"):
        model.append(grown, more.expand(2, -1), documents=[1, 1])
    with pytest.raises(IndexError, match="documents: expected 0 to 5, got 6"):
        model.append(grown, more, documents=[6])


@torch.no_grad()
def test_a_conversation_about_several_documents(texts: list[Tensor], tmp_path: Path) -> None:
    """Its text goes on behind the documents: in the last one of its row."""
    model = built(window=64)
    memory = kept(model, texts)
    before = [t.clone() for t in (*memory.keys, *memory.values)]
    # document 3 has no tokens: the conversation's own
    held = Conversation(model, memory.with_rows([[0, 5, 3]]))
    plain = Conversation(model, model.compress(torch.cat((texts[0], texts[5]))[None]))
    for length in (20, 90, 3):
        new = builders.ids(1, length)
        for one in (held, plain):
            one.add(new)
        assert held.num_tokens == plain.num_tokens and torch.equal(held.running_ids, plain.running_ids)
        answers = [one.generate(max_new_tokens=9, do_sample=False, eos_token_id=None) for one in (held, plain)]
        assert torch.equal(*answers)
    assert held.memory is not None and held.memory.num_tokens[3] > 3 * CHUNK - 1
    assert [held.memory.num_tokens[i] for i in (0, 1, 2, 4, 5)] == [memory.num_tokens[i] for i in (0, 1, 2, 4, 5)]
    assert all(map(torch.equal, before, (*memory.keys, *memory.values)))
    held.save(tmp_path / "talk")
    assert describe_file(tmp_path / "talk")["version"] == 2
    again = Conversation.load(tmp_path / "talk", model)
    assert again.memory is not None and again.memory.memory_index == [(0, 5, 3)]
    new = builders.ids(1, 70)
    again.add(new)
    plain.add(new)
    answers = [one.generate(max_new_tokens=5, do_sample=False, eos_token_id=None) for one in (again, plain)]
    assert torch.equal(*answers)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "documents: expected at least one batch row, got none"),
    ([[0], []], ValueError, r"documents\[1\]: expected at least one document, got none"),
    ([[0, 1], [2, 4, 2]], ValueError, r"documents\[1\]: expected each document once, got document 2 twice"),
    ([[0, 6]], IndexError, r"documents\[0\]: expected documents 0 to 5, got 6"),
    ([1, -1], IndexError, r"documents\[1\]: expected documents 0 to 5, got -1"),
    (["01"], TypeError, r"documents\[0\]: expected a document, or a list of documents, got '01'"),
    ([[0, 1.5]], TypeError, r"documents\[0\]: expected a document, or a list of documents, got \[0, 1.5\]"),
    ([[0, [1]]], TypeError, r"documents\[0\]: expected a document, or a list of documents, got \[0, \[1\]\]"),
    ([None], TypeError, r"documents\[0\]: expected a document, or a list of documents, got None"),
]


@pytest.mark.parametrize(("rows", "kind", "message"), BAD, ids=str)
def test_bad_rows(model: Any, texts: list[Tensor], rows: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}$"):
        kept(model, texts).with_rows(rows)


def test_bad_uses(model: Any, texts: list[Tensor]) -> None:
    memory = kept(model, texts).with_rows(ROWS)
    with pytest.raises(TypeError, match=r"documents: expected a document for each row, got \[0, 1\]; with_rows gives"):
        memory.select_documents([[0, 1]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"one document each, got row 0, which reads documents \[0, 3\]"):
        memory.slot_ranges()
    with pytest.raises(ValueError, match="expected 2 batch rows as in input_ids, or 1, got 6"):
        model(builders.ids(2, 3), memory=memory)


# -- random sequences -------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_sequence(model: Any, seed: int, folder: Path) -> None:
    """What is done with a memory, against putting each row together anew after every step."""
    choose = random.Random(seed)
    torch.manual_seed(seed)

    def some() -> int:
        return choose.choice((0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, choose.randrange(3 * CHUNK)))

    def some_rows() -> list[Any]:
        rows: list[Any] = []
        for _ in range(choose.randrange(1, 5)):
            own = choose.sample(range(len(texts)), choose.randrange(1, min(4, len(texts)) + 1))
            rows.append(own[0] if len(own) == 1 and choose.random() < 0.5 else own)
        return rows

    texts = [builders.ids(some()) for _ in range(choose.randrange(1, 5))]
    memory = compressed(model, texts)
    rows: list[Any] = list(range(len(texts)))
    for _ in range(5):
        before = [t.clone() for t in (*memory.keys, *memory.values)]
        what = choose.choice(("rows", "rows", "append", "concat", "documents", "file", "batch"))
        if what == "append":
            named = choose.sample(range(len(texts)), choose.randrange(1, len(texts) + 1))
            more = [builders.ids(some()) for _ in named]
            longest = max(text.numel() for text in more)
            ids, mask = (torch.zeros((len(more), longest), dtype=torch.int64) for _ in range(2))
            for row, text in enumerate(more):
                ids[row, longest - text.numel() :], mask[row, longest - text.numel() :] = text, 1
            memory = model.append(memory, ids, mask, documents=named)
            for document, text in zip(named, more, strict=True):
                texts[document] = torch.cat((texts[document], text))
        elif what == "concat" and len(texts) < 7:
            other = [builders.ids(some()) for _ in range(2)]
            own = choose.choice(([[0, 1]], [[1, 0], 1], [0]))
            memory = ContextMemory.concat([memory, compressed(model, other).with_rows(own)])
            count = len(texts)
            rows += [row + count if isinstance(row, int) else [i + count for i in row] for row in own]
            texts += other
        elif what == "documents":
            chosen = choose.sample(range(len(texts)), choose.randrange(1, len(texts) + 1))
            memory, texts = memory.select_documents(chosen), [texts[i] for i in chosen]
            rows = list(range(len(texts)))
        elif what == "file":
            memory.save(folder / "memory", max_shard_size=choose.choice((None, 1, 20_000)))
            memory = ContextMemory.load(folder / "memory", model, mmap=choose.random() < 0.5)
        elif what == "batch":
            chosen = [choose.randrange(len(rows)) for _ in range(choose.randrange(1, 4))]
            memory, rows = memory.select(chosen).expand(2), [rows[i] for i in chosen for _ in range(2)]
        else:
            rows = some_rows()
            memory = memory.with_rows(rows)
            assert all(map(torch.equal, before, (*memory.keys, *memory.values)))
        assert [list(row) if isinstance(row, tuple) else [row] for row in memory.memory_index] == [
            [row] if isinstance(row, int) else row for row in rows
        ], (seed, what)
        assert_same(memory.with_rows(range(len(texts))), compressed(model, texts))
        inputs = padded(len(rows))
        used = inputs["attention_mask"].bool()
        got, want = (model(**inputs, memory=one).logits[used] for one in (memory, in_one(model, texts, rows)))
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(25))
def test_random_sequences_equal_rebuilding(model: Any, seed: int, tmp_path: Path) -> None:
    run_sequence(model, seed, tmp_path)


if __name__ == "__main__":
    _MODEL = built()
    with tempfile.TemporaryDirectory() as _folder:
        for _seed in range(int(sys.argv[1])):
            run_sequence(_MODEL, _seed, Path(_folder))
