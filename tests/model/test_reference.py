"""The model against the float64 oracle, which shares none of its code."""

import pytest
import torch

from sharedllm_ext.reference import model as reference

from . import builders


@pytest.mark.parametrize("length", [1, 3, 31, 64, 97])
@pytest.mark.parametrize("query_aware", [True, False])
@pytest.mark.parametrize("family", builders.FAMILIES)
@torch.no_grad()
def test_float64_equals_oracle(family: str, query_aware: bool, length: int) -> None:
    model = builders.model(family, dtype=torch.float64, query_aware=query_aware, tie_compressor=length % 2 == 0)
    context, text = builders.ids(1, length), builders.ids(1, 11)
    expected = reference.compress(model, context[0], text[0])
    output = model(text, context_ids=context)
    # inside a window positions are counted from its start, and the tables of the rotations are float32
    tight = 1e-6 if family in ("mistral", "smollm3_window", "phi3", "gemma3_text") else 1e-9
    for layer in range(2):
        for kind in ("keys", "values"):
            tensor, wanted = getattr(output.memory, kind)[layer], torch.cat(getattr(expected, kind)[layer])
            torch.testing.assert_close(tensor, wanted, atol=tight, rtol=tight)
    # Transformers' norms compute in float32 whatever the dtype
    torch.testing.assert_close(output.logits[0], reference.logits(model, text[0], expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 4])
@torch.no_grad()
def test_float32_kernels_near_oracle(layers: int, depth: int) -> None:
    model = builders.model("llama", injection_layers=layers, tree_depth=depth, chunk_size=48)
    context, text = builders.ids(1, 130), builders.ids(1, 9)
    output = model(text, context_ids=context)
    oracle = model.double()
    expected = reference.compress(oracle, context[0], text[0])
    [(nodes, similarity)] = model.retrieve(context, query_ids=text)
    if depth > 1:
        picked = torch.tensor(expected.similarity, dtype=torch.float64)
        torch.testing.assert_close(similarity.double(), picked, atol=1e-4, rtol=1e-4)
    assert nodes.shape == (3, depth + 1, 2)
    for layer in range(layers):
        keys, values = torch.cat(expected.keys[layer]), torch.cat(expected.values[layer])
        torch.testing.assert_close(output.memory.keys[layer].double(), keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.memory.values[layer].double(), values, atol=1e-4, rtol=1e-4)
    logits = reference.logits(oracle, text[0], expected)
    torch.testing.assert_close(output.logits[0].double(), logits, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_oracle_depends_on_the_memory() -> None:
    model = builders.model(dtype=torch.float64)
    text = builders.ids(1, 9)
    memory = reference.compress(model, builders.ids(64), text[0])
    with_memory, without = reference.logits(model, text[0], memory), reference.logits(model, text[0], None)
    assert (with_memory - without).abs().max() > 1e-2
