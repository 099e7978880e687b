"""Ragged batches, padding, lengths, chunk order, micro-batches, step-by-step decoding."""

import weakref

import pytest
import torch
from torch import Tensor

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model import compressor, micro_batches
from sharedllm_ext.model.lower_model import activation_bytes

from ..support import needs_cuda
from . import builders


@pytest.fixture(scope="module", params=[True, False], ids=["query", "fixed"])
def model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return builders.model(query_aware=request.param)


def _pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(row.numel() for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - row.numel(), width) if side == "left" else slice(0, row.numel())
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_batch_equals_single(model, side: str) -> None:
    texts = [builders.ids(n) for n in (20, 7, 13, 1)]
    contexts = [builders.ids(n) for n in (100, 0, 33, 64)]
    ids, mask = _pad(texts, "left")
    context, context_mask = _pad(contexts, side)
    output = model(ids, attention_mask=mask, context_ids=context, context_attention_mask=context_mask)
    generated = model.generate(
        ids,
        attention_mask=mask,
        context_ids=context,
        context_attention_mask=context_mask,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    for i, (text, own) in enumerate(zip(texts, contexts, strict=True)):
        single = model(text[None], context_ids=own[None])
        torch.testing.assert_close(output.logits[i, -text.numel() :], single.logits[0], atol=2e-5, rtol=1e-5)
        begin, end = output.memory.cu_slots[i : i + 2]
        for layer in range(2):
            torch.testing.assert_close(
                output.memory.keys[layer][begin:end], single.memory.keys[layer], atol=2e-5, rtol=1e-5
            )
        alone = model.generate(text[None], context_ids=own[None], max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(generated[i, -5:], alone[0, -5:])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 31, 32, 33, 63, 65, 95])
@torch.no_grad()
def test_any_length(model, length: int) -> None:
    context, query = builders.ids(1, length), builders.ids(1, 5)
    memory = model.compress(context, query_ids=query)
    [(nodes, _)] = model.retrieve(context, query_ids=query)
    assert nodes[..., 1].sum() == length
    assert memory.num_slots == nodes[..., 1].clamp(max=4).sum()
    assert memory.num_chunks == [-(-length // 32)]
    assert all(t.isfinite().all() for t in (*memory.keys, *memory.values))


@torch.no_grad()
def test_chunk_memory_does_not_depend_on_its_neighbours(model) -> None:
    context, text = builders.ids(1, 5 * 32), builders.ids(1, 6)
    memory = model.compress(context, query_ids=text)
    for chunk in range(5):
        alone = model.compress(context[:, chunk * 32 : (chunk + 1) * 32], query_ids=text)
        place = slice(chunk * 16, (chunk + 1) * 16)
        for layer in range(2):
            torch.testing.assert_close(memory.values[layer][place], alone.values[layer], atol=2e-5, rtol=1e-5)
            # the same keys but for the rotation by the chunk index
            norms, expected = memory.keys[layer][place].norm(dim=-1), alone.keys[layer].norm(dim=-1)
            torch.testing.assert_close(norms, expected, atol=2e-5, rtol=1e-5)
            if chunk:
                assert not torch.allclose(memory.keys[layer][place], alone.keys[layer], atol=1e-3)


@torch.no_grad()
def test_order_of_chunks_matters(model) -> None:
    context, text = builders.ids(1, 4 * 32), builders.ids(1, 6)
    reverse = context.view(4, 32).flip(0).reshape(1, -1)
    difference = model(text, context_ids=context).logits - model(text, context_ids=reverse).logits
    assert difference.abs().max() > 1e-3


@torch.no_grad()
def test_query_position_offset_matters(model) -> None:
    context, text = builders.ids(1, 4 * 32), builders.ids(1, 6)
    memory = model.compress(context, query_ids=text)
    before = model(text, memory=memory).logits
    model.config.query_position_offset = 0
    try:
        assert (model(text, memory=memory).logits - before).abs().max() > 1e-4
    finally:
        model.config.query_position_offset = 1


@pytest.mark.parametrize("tokens", [1, 32, 40, 64, 100_000])
@torch.no_grad()
def test_micro_batches_change_nothing(model, tokens: int) -> None:
    context, text = builders.ids(2, 170), builders.ids(2, 6)
    expected = model.compress(context, query_ids=text)
    model.config.micro_batch_tokens = tokens
    try:
        memory = model.compress(context, query_ids=text)
    finally:
        model.config.micro_batch_tokens = None
    assert memory.cu_slots == expected.cu_slots
    for one, other in zip((*memory.keys, *memory.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_progress_counts_the_tokens_compressed_so_far(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "micro_batch_tokens", 64)
    seen: list[int] = []
    model.compress(builders.ids(2, 170), query_ids=builders.ids(2, 6), progress=seen.append)
    assert len(seen) > 3 and seen == sorted(set(seen)) and seen[-1] == 340


@torch.no_grad()
def test_decoding_step_by_step_equals_full_forward(model) -> None:
    context, text = builders.ids(2, 100), builders.ids(2, 24)
    full = model(text, context_ids=context)
    past, steps = None, []
    for i in range(24):
        step = model(text[:, i : i + 1], memory=full.memory, past_key_values=past, use_cache=True)
        past = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full.logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_memory_serves_a_batch(model) -> None:
    memory = model.compress(builders.ids(1, 70), query_ids=builders.ids(1, 4))
    texts = builders.ids(3, 8)
    together = model(texts, memory=memory).logits
    for i in range(3):
        torch.testing.assert_close(together[i], model(texts[i : i + 1], memory=memory).logits[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_long_plain_input_is_split(model) -> None:
    long = builders.ids(2, 100)
    window = model.config.window
    split = model(long)
    explicit = model(long[:, -window:], context_ids=long[:, :-window])
    assert torch.equal(split.logits, explicit.logits)
    out = model.generate(long, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(out[:, :100], long)
    other = model.generate(
        long[:, -window:], context_ids=long[:, :-window], max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(out[:, 100:], other[:, window:])
    limited = model.generate(long, max_length=103, do_sample=False, eos_token_id=None)
    assert limited.shape == (2, 103)


@torch.no_grad()
def test_long_plain_input_with_padding(model) -> None:
    rows = [builders.ids(n) for n in (90, 10, 40)]
    ids, mask = _pad(rows, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(out[i, -4:], alone[0, -4:])


@torch.no_grad()
def test_the_query_picks_nodes() -> None:
    model = builders.model(query_aware=True)
    context = builders.ids(1, 32 * 8)
    picks = {tuple(model.retrieve(context, query_ids=builders.ids(1, 5))[0][0].flatten().tolist()) for _ in range(8)}
    assert len(picks) > 1
    fixed = model.retrieve(context)[0]
    assert fixed[1] is None
    assert fixed[0][0].tolist() == [[24, 4], [28, 4], [16, 8], [0, 16]]


def test_out_of_memory_halves_the_micro_batch(model, monkeypatch: pytest.MonkeyPatch) -> None:
    context, text = builders.ids(1, 200), builders.ids(1, 9)
    expected = model.compress(context, query_ids=text)
    sizes = []
    compress_chunks = micro_batches.compress_chunks

    def scarce(lower, ids, *args):
        sizes.append(ids.numel())
        if ids.numel() > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return compress_chunks(lower, ids, *args)

    monkeypatch.setattr(micro_batches, "compress_chunks", scarce)
    with torch.no_grad():
        memory = model.compress(context, query_ids=text)
    assert sizes == [200, 96, 32, 32, 32, 32, 32, 40]
    for got, want in zip((*memory.keys, *memory.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_out_of_memory_names_what_was_needed(model, monkeypatch: pytest.MonkeyPatch) -> None:
    context = builders.ids(1, 100)
    expected = model.compress(context)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    monkeypatch.setattr(model.config, "micro_batch_tokens", 64)
    with (
        monkeypatch.context() as patch,
        pytest.raises(torch.OutOfMemoryError, match="micro_batch_tokens below 64") as e,
    ):
        patch.setattr(micro_batches, "compress_chunks", full)
        model.compress(context)
    assert "expected about" in str(e.value) and "Tried to allocate 3 GiB" in str(e.value)
    # the model stays usable
    torch.testing.assert_close(model.compress(context).keys[0], expected.keys[0])


def test_activation_bytes_bound_the_widest_place(model) -> None:
    per_token = activation_bytes(model.lower_model)
    layer = model.lower_model.layers[0]
    assert per_token >= 4 * (2 * layer.self_attn.q_proj.in_features + 3 * layer.mlp.gate_proj.out_features)


@torch.no_grad()
def test_nothing_keeps_layer_0_alive_at_the_widest_place(monkeypatch) -> None:
    model = builders.model(injection_layers=3)
    normed, alive = [], []

    def project_embeddings(*arguments):
        embedded = plain_project(*arguments)
        normed.append(weakref.ref(embedded.normed))
        return embedded

    def finish(*arguments):
        alive.append(normed[-1]() is not None)
        return plain_finish(*arguments)

    plain_project, plain_finish = compressor.project_embeddings, compressor.finish
    monkeypatch.setattr(compressor, "project_embeddings", project_embeddings)
    model.compress(builders.ids(1, 70))
    monkeypatch.setattr(compressor, "finish", finish)
    model.compress(builders.ids(1, 70))
    assert alive == [False, False]


@needs_cuda
@torch.no_grad()
def test_memory_that_really_runs_out() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    tree = {**builders.TREE, "chunk_size": 256, "slots_per_node": 16}
    model = SharedLLMForCausalLM.from_base(builders.base(**sizes), **tree).to("cuda", torch.bfloat16)
    context, text = builders.ids(1, 65536).cuda(), builders.ids(1, 9).cuda()
    model.config.micro_batch_tokens = 65536
    model.compress(context[:, :1024], query_ids=text)  # allocates what the libraries keep
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = model.compress(context, query_ids=text)
    needed = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    # room for half of that
    room = torch.cuda.memory_reserved() + needed // 2
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"expected about .* micro_batch_tokens below 65536"):
            model.compress(context, query_ids=text)
        model.config.micro_batch_tokens = None
        memory = model.compress(context, query_ids=text)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for got, want in zip((*memory.keys, *memory.values), (*expected.keys, *expected.values), strict=True):
        assert ((got.double() - want.double()).norm() / want.double().norm()).item() < 0.02
