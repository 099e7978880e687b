"""The golden numbers, on the path a user takes: published checkpoint, context_ids, generate-like decoding."""

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ops

from .. import golden

TOLERANCE = 2e-4

pytestmark = pytest.mark.skipif(not golden.names(), reason=f"no golden files in {golden.FOLDER}")


@pytest.fixture(params=golden.names() or ["none"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _load(name: str, device: torch.device):
    sizes, tensors = golden.load(name)
    return sizes, {key: value.to(device) for key, value in tensors.items()}, golden.build(sizes, tensors).to(device)


def _chunk_keys(keys: Tensor, sizes: dict, chunk: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Keys of one chunk with the chunk index turned back: the golden files rotate by the position in the node only."""
    slots = (sizes["tree_depth"] + 1) * sizes["slots_per_node"]
    part = keys[chunk * slots : (chunk + 1) * slots]
    cos, sin = tables[0][chunk], tables[1][chunk]
    low, high = part.chunk(2, -1)
    return torch.cat((low * cos + high * sin, high * cos - low * sin), -1).transpose(0, 1)


def test_memory(name: str, device: torch.device) -> None:
    sizes, tensors, model = _load(name, device)
    chunks = tensors["context_ids"].shape[1]
    memory = model.compress(tensors["context_ids"].flatten(1), query_ids=tensors["input_ids"])
    tables = model._rope_tables(64, torch.device(tensors["context_ids"].device)).of(model.model.layers[0])
    slots = (sizes["tree_depth"] + 1) * sizes["slots_per_node"]
    assert memory.num_slots == chunks * slots
    for layer in range(sizes["injection_layers"]):
        for chunk in range(chunks):
            keys = _chunk_keys(memory.keys[layer], sizes, chunk, tables)
            values = memory.values[layer][chunk * slots : (chunk + 1) * slots].transpose(0, 1)
            torch.testing.assert_close(keys, tensors[f"memory.{layer}.key"][chunk], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(values, tensors[f"memory.{layer}.value"][chunk], atol=TOLERANCE, rtol=0)


def test_logits(name: str, device: torch.device) -> None:
    _, tensors, model = _load(name, device)
    with torch.no_grad():
        logits = model(tensors["input_ids"], context_ids=tensors["context_ids"].flatten(1)).logits[0]
    torch.testing.assert_close(logits, tensors["logits"], atol=TOLERANCE, rtol=0)


def test_decode_logits(name: str, device: torch.device) -> None:
    _, tensors, model = _load(name, device)
    with torch.no_grad():
        first = model(tensors["input_ids"], context_ids=tensors["context_ids"].flatten(1), use_cache=True)
        past, steps = first.past_key_values, []
        for token in tensors["decode_input_ids"]:
            step = model(token.view(1, 1), memory=first.memory, past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), tensors["decode_logits"], atol=TOLERANCE, rtol=0)


def test_greedy_tokens(name: str, device: torch.device) -> None:
    _, tensors, model = _load(name, device)
    steps = tensors["decode_input_ids"].numel()
    out = model.generate(
        tensors["input_ids"],
        context_ids=tensors["context_ids"].flatten(1),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
    )
    assert out[0, -steps:].tolist() == tensors["decode_input_ids"].tolist()


def test_chosen_children(name: str, device: torch.device) -> None:
    """The golden similarities lead the operators to the golden choices, and the model's own nodes follow them."""
    sizes, tensors, model = _load(name, device)
    if not sizes["query_aware"]:
        assert "chosen" not in tensors
        return
    chunks, chunk_size = tensors["chosen"].shape[0], sizes["chunk_size"]
    spans = torch.stack((torch.arange(chunks) * chunk_size, torch.full((chunks,), chunk_size)), -1).to(device)
    retained = []
    for level in range(sizes["tree_depth"] - 1):
        children = ops.context_tree_split(spans)
        spans, other = ops.context_tree_select(children, tensors["chosen"][:, level].contiguous())
        retained.insert(0, other)
    leaves = ops.context_tree_split(spans)
    expected = torch.stack((leaves[:, 0], leaves[:, 1], *retained), 1)
    [(nodes, similarity)] = model.retrieve(tensors["context_ids"].flatten(1), query_ids=tensors["input_ids"])
    assert torch.equal(nodes, expected)
    torch.testing.assert_close(similarity, tensors["similarity"], atol=TOLERANCE, rtol=0)
