"""Adapters: what was trained of a model in one file, the base that it belongs to, damaged and foreign files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from sharedllm_ext import ContinuousBatch, SharedLLMForCausalLM
from sharedllm_ext.model.adapter import DOWN, FORMAT, UP, read_header, shipped_adapters, write_adapter

from .builders import base, ids

FIELDS: dict[str, Any] = {
    "injection_layers": 2,
    "chunk_size": 32,
    "slots_per_node": 4,
    "query_aware": False,
    "tie_compressor": False,
    "pick_layers": [1],
    "segment_size": 4,
    "slot_position": "end",
}


def build_base(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return base("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint on disk."""
    path = tmp_path_factory.mktemp("base") / "tiny-llama"
    build_base().save_pretrained(path)
    return path


def trained(folder: Path, **fields: Any) -> Any:
    """A model of which the injected blocks, the pick and one layer's attention have been trained."""
    torch.manual_seed(1)
    model: Any = SharedLLMForCausalLM.from_base(folder, **FIELDS, **fields)
    with torch.no_grad():
        for block in model.injected_blocks:
            block.o_proj.weight.normal_(std=0.1)
        for parameter in model.pick.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.pick.token_class.copy_(torch.arange(model.pick.token_class.numel()))
        model.model.layers[3].self_attn.o_proj.weight.add_(0.01)
    return model


def test_an_adapter_gives_the_model_back(folder: Path, tmp_path: Path) -> None:
    model, path = trained(folder), tmp_path / "adapter.safetensors"
    model.save_adapter(path, folder, about="two steps")
    header = read_header(path)
    assert header["base"] == "tiny-llama" and header["about"] == "two steps"
    assert header["config"] == FIELDS
    held = set(load_file(path))
    assert held == {
        *(f"model.layers.{i}.injection.o_proj.weight" for i in (0, 1)),
        *(f"pick.{name}" for name in model.pick.state_dict()),
        "model.layers.3.self_attn.o_proj.weight",
    }
    loaded = SharedLLMForCausalLM.from_adapter(path, folder)
    assert not loaded.training
    state, expected = loaded.state_dict(), model.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    context, running = ids(1, 96), ids(1, 5)
    assert torch.equal(
        loaded(input_ids=running, context_ids=context).logits, model(input_ids=running, context_ids=context).logits
    )
    # a loaded base serves as well, and stays as it is
    again = build_base()
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    model.save_adapter(tmp_path / "again", again, name="tiny-llama", about="two steps")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_an_adapter_says_which_tokens_end_an_answer(folder: Path, tmp_path: Path) -> None:
    """Beside the base's own, for ``generate``, batches and saved checkpoints; ids that no token has are refused."""
    path = tmp_path / "adapter.safetensors"
    plain = trained(folder)
    own = plain.generation_config.eos_token_id
    text = ids(1, 9)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    written = plain.generate(text, eos_token_id=None, **settings)[0, 9:].tolist()
    end = written[4]
    first = written.index(end)
    trained(folder, answer_end_ids=[end, own]).save_adapter(path, folder)
    assert read_header(path)["config"] == {**FIELDS, "answer_end_ids": [end, own]}
    model: Any = SharedLLMForCausalLM.from_adapter(path, folder)
    assert model.generation_config.eos_token_id == [own, end]
    assert model.generate(text, **settings)[0, 9:].tolist() == written[: first + 1]
    model.save_pretrained(tmp_path / "saved")
    saved = SharedLLMForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.generation_config.eos_token_id == [own, end] and saved.config.answer_end_ids == [end, own]
    batch = ContinuousBatch(saved, rows=1, tokens=30)
    assert batch.answer([text[0]], None, max_new_tokens=12) == [written[: first + 1]]
    for wrong in ([], [end, end], [-1], [10**6], [1.5], 3, ["a"]):
        with pytest.raises(ValueError, match=r"answer_end_ids: expected different token ids below \d+, got "):
            SharedLLMForCausalLM.from_base(folder, answer_end_ids=wrong)


def test_an_adapter_says_which_words_it_looks_for(folder: Path, tmp_path: Path) -> None:
    path, runs = tmp_path / "adapter.safetensors", ((1, 16), (2, 16), (4, 16), (1, 64))
    model = trained(folder, word_runs=[list(run) for run in runs])
    assert model.config.word_runs == runs and model.pick.word_beta.shape == (1, 4)
    model.save_adapter(path, folder)
    assert read_header(path)["config"] == {**FIELDS, "word_runs": [list(run) for run in runs]}
    loaded: Any = SharedLLMForCausalLM.from_adapter(path, folder)
    assert loaded.config.word_runs == runs
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    question, context = ids(1, 6), ids(1, 96)
    assert loaded.find_passages(question, context) == model.find_passages(question, context)
    # without the field, as an adapter of three terms has it, and with fewer runs
    tensors, header = load_file(path), read_header(path)
    for other in ({}, {"word_runs": [[1, 16], [1, 64], [3, 5]]}):
        config = {name: value for name, value in header["config"].items() if name != "word_runs"} | other
        save_file(tensors, path, metadata={FORMAT: json.dumps({**header, "config": config})})
        with pytest.raises(
            ValueError,
            match=r"adapter\.safetensors: expected 'pick.word_beta' to fit \(1, 3\), a column for each of word_runs "
            r"\(\(1, 16\), .*\)\), got \(1, 4\)",
        ):
            SharedLLMForCausalLM.from_adapter(path, folder)
    save_file(tensors, path, metadata={FORMAT: json.dumps({**header, "config": {**FIELDS, "word_runs": [[0, 16]]}})})
    with pytest.raises(ValueError, match=r"word_runs: expected different pairs .*got \[\[0, 16\]\]"):
        SharedLLMForCausalLM.from_adapter(path, folder)


def test_low_rank_updates_are_merged(folder: Path, tmp_path: Path) -> None:
    plain: Any = SharedLLMForCausalLM.from_base(folder, **FIELDS)
    name = "compressor.layers.0.mlp.gate_proj.weight"
    weight = plain.get_parameter(name).detach().clone()
    up, down = torch.randn(weight.shape[0], 3), torch.randn(3, weight.shape[1])
    path = tmp_path / "adapter"
    write_adapter(path, plain, {name + UP: up, name + DOWN: down}, base="tiny-llama", scale=2.0)
    loaded: Any = SharedLLMForCausalLM.from_adapter(path, folder)
    torch.testing.assert_close(loaded.get_parameter(name), weight + 2.0 * up @ down)
    others = {n: p for n, p in loaded.state_dict().items() if n != name}
    assert all(torch.equal(p, plain.state_dict()[n]) for n, p in others.items())
    sixteen: Any = SharedLLMForCausalLM.from_adapter(path, folder, dtype=torch.bfloat16)
    expected = (weight.bfloat16().float() + 2.0 * up @ down).bfloat16()
    assert torch.equal(sixteen.get_parameter(name), expected)


def test_the_base_is_known_in_every_dtype(folder: Path, tmp_path: Path) -> None:
    """The digest is of what the tensors are in bfloat16."""
    trained(folder).save_adapter(tmp_path / "adapter", folder)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = SharedLLMForCausalLM.from_adapter(tmp_path / "adapter", folder, dtype=dtype)
        assert model.dtype == dtype


def test_another_base_is_refused_with_the_difference(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    trained(folder).save_adapter(path, folder)
    one = build_base()
    with torch.no_grad():
        one.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(
        ValueError,
        match=r"expected the base tiny-llama, got one of which 1 of \d+ tensors differ, the first is "
        r"model\.layers\.2\.mlp\.up_proj\.weight",
    ):
        SharedLLMForCausalLM.from_adapter(path, one)
    with pytest.raises(ValueError, match="expected the base tiny-llama of 39 tensors, got one of 48"):
        SharedLLMForCausalLM.from_adapter(path, base("llama", num_hidden_layers=5))
    with pytest.raises(ValueError, match="save_adapter: expected the model's own base, got one with other tensors"):
        trained(folder).save_adapter(tmp_path / "other", base("llama", num_hidden_layers=5))


def test_damaged_and_foreign_files_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    trained(folder).save_adapter(path, folder)
    whole = path.read_bytes()
    tensors, header = load(whole), read_header(path)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SharedLLMForCausalLM.from_adapter(path, folder)

    def write(changed: dict[str, Any] | None = None, **metadata: Any) -> None:
        save_file(changed or tensors, path, metadata={FORMAT: json.dumps({**header, **metadata})})

    path.write_bytes(whole[: len(whole) // 2])
    refused("expected an adapter .safetensors., got a damaged or foreign file")
    path.write_bytes(b"no adapter")
    refused("got a damaged or foreign file")
    save_file(tensors, path)
    refused("got a safetensors file without that header")
    write(version=2)
    refused("expected an adapter of version 1 with its fields, got 2")
    write(digests=7)
    refused("expected digests, config, scale and base")
    write(config={"injection_layers": 99})
    refused("injection_layers: expected at least 1 and at most 4")
    write(config={"unheard_of": 1})
    refused("fields: expected fields of SharedLLMConfig .* got unheard_of")
    name = "model.layers.3.self_attn.o_proj.weight"
    write({**tensors, "model.layers.9.self_attn.o_proj.weight": torch.zeros(2, 2)})
    refused("expected parameters of the model, got 'model.layers.9.self_attn.o_proj.weight', which it lacks")
    write({**tensors, name: torch.zeros(2, 2)})
    refused(rf"expected '{name}' to fit \(64, 64\), got \(2, 2\)")
    write({**{n: t for n, t in tensors.items() if n != name}, name + UP: torch.zeros(64, 3)})
    refused(rf"expected '{name}:up' to fit \(64, 64\), got \(64, 3\)")
    write({**tensors, name: torch.full((64, 64), torch.nan)})
    refused(rf"expected finite weights, got infinities or NaN in {name}")
    with pytest.raises(FileNotFoundError, match=r"expected a file or one of those that are shipped \(.*\), got 'gone'"):
        SharedLLMForCausalLM.from_adapter("gone", folder)


def test_the_shipped_adapter_names_its_base_and_is_small(folder: Path) -> None:
    shipped = shipped_adapters()
    assert list(shipped) == ["smollm2-135m-instruct"]
    path = shipped["smollm2-135m-instruct"]
    assert path.stat().st_size <= 16 * 2**20
    header = read_header(path)
    assert header["base"].startswith("SmolLM2-135M-Instruct")
    assert header["config"]["injection_layers"] == 8 and header["config"]["slot_position"] == "end"
    with pytest.raises(ValueError, match=r"injection_layers: expected at least 1 and at most 4 .*got 8"):
        SharedLLMForCausalLM.from_adapter("smollm2-135m-instruct", folder)
