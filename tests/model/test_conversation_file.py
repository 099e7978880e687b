"""A conversation in a file goes on exactly, and files say what they hold without their data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sharedllm_ext import ContextMemory, Conversation
from sharedllm_ext.model.file_description import describe_file, find_memory_file
from sharedllm_ext.model.sources import Source

from . import builders
from .test_append import assert_same
from .test_conversation import CHUNK, WINDOW, _model


def _grown(model: Any, memory: ContextMemory | None = None, tokens: int = 3 * WINDOW + 5, **own: Any) -> Conversation:
    conversation = Conversation(model, memory, **own)
    conversation.add(builders.ids(1, tokens))
    conversation.generate(max_new_tokens=7, do_sample=False)
    return conversation


@pytest.mark.parametrize("tokens", [9, 3 * WINDOW + 5])
@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_a_saved_conversation_goes_on_exactly(tmp_path: Path, tokens: int, given: bool) -> None:
    model, path = _model(), tmp_path / "talk.safetensors"
    text = builders.ids(1, CHUNK + 3)
    memory = model.compress(text).with_sources([Source.of_ids(text[0], "book")]) if given else None
    conversation = _grown(model, memory, tokens, keep_first=4, window=CHUNK + 20)
    conversation.save(path)
    again = Conversation.load(path, model)
    assert (again.window, again.keep_first, again.num_tokens) == (CHUNK + 20, 4, conversation.num_tokens)
    assert torch.equal(again.running_ids, conversation.running_ids) and again.running_ids.dtype == torch.int64
    assert (again.memory is None) == (conversation.memory is None)
    more = builders.ids(1, 2 * WINDOW)
    for one in (conversation, again):
        one.add(more)
    answers = [one.generate(max_new_tokens=2 * CHUNK, do_sample=False) for one in (conversation, again)]
    assert torch.equal(*answers)
    assert conversation.memory is not None and again.memory is not None
    assert_same(again.memory, conversation.memory)
    if given:
        assert again.memory.sources is not None and conversation.memory.sources is not None
        kept = [one.sources[0].token_ids for one in (again.memory, conversation.memory)]  # type: ignore[index, union-attr]
        assert again.memory.sources[0].name == "book" and torch.equal(*kept)  # type: ignore[union-attr, arg-type]


def test_a_file_of_another_kind_model_or_content_is_refused(tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "talk.safetensors"
    conversation = _grown(model)
    conversation.save(path)
    with pytest.raises(
        ValueError, match="expected a sharedllm-context-memory file, got a 'sharedllm-conversation' file"
    ):
        ContextMemory.load(path, model)
    assert conversation.memory is not None
    conversation.memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="expected a sharedllm-conversation file, got a 'sharedllm-context-memory'"):
        Conversation.load(tmp_path / "memory.safetensors", model)
    with pytest.raises(ValueError, match=r"talk\.safetensors: .*made by another model"):
        Conversation.load(path, _model("mistral"))
    data = bytearray(path.read_bytes())
    # the running text stands at the end
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"expected running_ids with CRC-32 .* the data were changed"):
        Conversation.load(path, model)
    with pytest.raises(ValueError, match=r"expected running_ids with CRC-32"):
        describe_file(path, verify=True)
    assert describe_file(path)["running_tokens"] == conversation.running_ids.shape[1]
    with pytest.raises(FileNotFoundError, match="conversation file: expected a file, got"):
        Conversation.load(tmp_path / "nothing", model)


def test_a_file_says_what_the_memory_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = _model(), tmp_path / "memory.safetensors"
    texts = [builders.ids(1, length) for length in (70, 5)]
    parts = [model.compress(text).with_sources([Source.of_ids(text[0], f"{text.shape[1]}", "me")]) for text in texts]
    memory = ContextMemory.concat(parts)
    for shards, count in ((None, 0), (1000, 2 * len(memory.keys))):
        memory.save(path, max_shard_size=shards)
        with monkeypatch.context() as patch:
            patch.setattr("sharedllm_ext.model.memory_file.MemoryFile._read_tensor", None)
            told = describe_file(path)
        assert json.loads(json.dumps(told)) == told
        said = memory.describe()
        del said["device"], said["reserved_bytes"]
        own = {name: told.pop(name) for name in ("format", "version", "file", "file_bytes", "shards")}
        assert told == said and said["documents"][1]["token_ids"] and not said["documents"][1]["places"]
        assert (own["format"], own["version"], len(own["shards"])) == ("sharedllm-context-memory", 3, count)
        assert own["file_bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
        assert find_memory_file(tmp_path) == str(path)
        describe_file(path, verify=True)
    (tmp_path / own["shards"][1]).unlink()
    with pytest.raises(ValueError, match=r"expected its shard '.*00002-of-.*' beside it, got none"):
        describe_file(path)


def test_a_folder_holds_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with one memory or conversation, got none in 0 \.safeten"):
        find_memory_file(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"got none in 1 \.safetensors files; .*weights\.safetensors: expected"):
        find_memory_file(tmp_path)
    model = _model()
    _grown(model).save(tmp_path / "b.safetensors")
    assert find_memory_file(tmp_path) == str(tmp_path / "b.safetensors")
    model.compress(builders.ids(1, 5)).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"got 2: a\.safetensors, b\.safetensors$"):
        find_memory_file(tmp_path)
