"""Context memories as objects and files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sharedllm_ext import ContextMemory

from . import builders


@pytest.fixture
def model():
    return builders.model()


@torch.no_grad()
def test_save_and_load(tmp_path: Path, model) -> None:
    context, text = builders.ids(2, 75), builders.ids(2, 6)
    memory = model.compress(context, query_ids=text)
    memory.save(tmp_path / "memory.safetensors")
    loaded = ContextMemory.load(tmp_path / "memory.safetensors", model)
    assert loaded.signature == memory.signature
    assert loaded.num_tokens == [75, 75]
    assert loaded.nbytes == memory.nbytes > 0
    assert torch.equal(model(text, memory=loaded).logits, model(text, memory=memory).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]


def test_expand_and_select_copy_nothing(model) -> None:
    memory = model.compress(builders.ids(3, 40))
    expanded = memory.expand(2)
    assert expanded.memory_index == [0, 0, 1, 1, 2, 2]
    assert expanded.keys[0] is memory.keys[0]
    assert memory.select([2, 0]).memory_index == [2, 0]
    with pytest.raises(IndexError, match="expected batch rows 0 to 2, got 3"):
        memory.select([3])


@torch.no_grad()
def test_selected_rows_read_their_own_document(model) -> None:
    memory, texts = model.compress(builders.ids(3, 40)), builders.ids(2, 5)
    picked = model(texts, memory=memory.select([2, 0])).logits
    torch.testing.assert_close(picked[0], model(texts[:1], memory=memory.select([2])).logits[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(picked[1], model(texts[1:], memory=memory.select([0])).logits[0], atol=2e-5, rtol=1e-5)


def test_memory_of_another_model_is_refused(tmp_path: Path, model) -> None:
    memory = model.compress(builders.ids(1, 40))
    memory.save(tmp_path / "memory")
    other = builders.model()
    for refuse in (
        lambda: other(builders.ids(1, 4), memory=memory),
        lambda: other.generate(builders.ids(1, 4), memory=memory, max_new_tokens=1),
        lambda: ContextMemory.load(tmp_path / "memory", other),
    ):
        with pytest.raises(ValueError, match=r"made by another model.*weights: expected \w+, got \w+"):
            refuse()


def test_memory_of_another_tree_is_refused(model) -> None:
    memory = model.compress(builders.ids(1, 40))
    model.config.slots_per_node = 8
    with pytest.raises(ValueError, match="slots_per_node: expected 8, got 4"):
        model(builders.ids(1, 4), memory=memory)


def test_training_step_makes_old_memories_foreign(model) -> None:
    memory = model.compress(builders.ids(1, 40))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="made by another model"):
        model(builders.ids(1, 4), memory=memory)


def test_bad_files(tmp_path: Path, model) -> None:
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        ContextMemory.load(tmp_path / "none")
    model.compress(builders.ids(1, 40)).save(tmp_path / "memory")
    data = (tmp_path / "memory").read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        expected = "truncated or foreign" if size else "expected a sharedllm-context-memory file, got an empty one"
        with pytest.raises(ValueError, match=expected):
            ContextMemory.load(tmp_path / "cut")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="safetensors file without that header"):
        ContextMemory.load(tmp_path / "other")


def test_empty_documents(model) -> None:
    memory = model.compress(builders.ids(2, 0))
    assert memory.num_slots == 0
    assert memory.cu_slots == [0, 0, 0]
    text = builders.ids(2, 5)
    with torch.no_grad():
        assert torch.equal(model(text, memory=memory).logits, model(text).logits)


def test_timings(model) -> None:
    assert model.last_timings == {}
    model.compress(builders.ids(2, 70), query_ids=builders.ids(2, 4))
    timings = model.last_timings
    assert timings["context_tokens"] == 140
    assert timings["chunks"] == 6
    assert timings["slots"] > 0
    assert timings["retrieve"] > 0 and timings["compress"] > 0
