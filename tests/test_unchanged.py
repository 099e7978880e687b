"""What others hold on to stays as commit f7f1915 had it: names, schemas, parameters, files.

``tests/data/f7f1915`` was written by that commit: a small model with random weights, a memory of it, and what both
gave. A change here breaks programs or files of others; new names are welcome, and are added below.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sharedllm_ext
from sharedllm_ext import ContextMemory, SharedLLMForCausalLM, ops, reference

from .model import builders

FOLDER = Path(__file__).parent / "data" / "f7f1915"
NAMES: dict[str, Any] = json.loads((FOLDER / "names.json").read_text())
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
#: Public names that came later.
NEW: dict[str, set[str]] = {
    "public": {
        "ContextIndex",
        "ContinuousBatch",
        "Conversation",
        "MemoryTiers",
        "TieredMemory",
        "decoding_obstacle",
    },
    "ops": {"decode_linear_fp8"},
    "reference": {"decode_linear_fp8"},
}


@pytest.mark.parametrize(("key", "module"), [("public", sharedllm_ext), ("ops", ops), ("reference", reference)])
def test_public_names(key: str, module: Any) -> None:
    assert set(module.__all__) == set(NAMES[key]) | NEW[key]
    assert all(hasattr(module, name) for name in module.__all__)


def test_operator_schemas() -> None:
    found = {str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("sharedllm")}
    assert set(NAMES["schemas"]) <= found, set(NAMES["schemas"]) - found


@pytest.mark.parametrize("tie_compressor", [True, False])
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_parameter_names(family: str, tie_compressor: bool) -> None:
    key = f"{family} {'tied' if tie_compressor else 'untied'}"
    state = builders.model(family, tie_compressor=tie_compressor).state_dict()
    lines = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(state.items()))
    found = hashlib.sha256(lines.encode()).hexdigest()[:16]
    if key not in NAMES["state_dicts"]:
        # a family is pinned when a release has it
        pytest.skip(f'{family} came later; to pin it: "{key}": "{found}" in state_dicts of {FOLDER.name}/names.json')
    assert found == NAMES["state_dicts"][key], lines


def _same(got: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_old_checkpoint_and_memory_give_the_same_values() -> None:
    model = SharedLLMForCausalLM.from_pretrained(FOLDER / "checkpoint")
    state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert state == EXPECTED["state_dict"]
    memory = ContextMemory.load(FOLDER / "memory.safetensors", model)
    text = torch.tensor(EXPECTED["text"])
    _same(model(text, memory=memory).logits[0, -1], EXPECTED["last_logits"])
    answer = model.generate(text, memory=memory, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert answer.tolist() == EXPECTED["answer"]
    made = model.compress(torch.tensor(EXPECTED["context"]), query_ids=text)
    for own in (memory, made):
        _same(torch.stack([key.double().sum() for key in own.keys]), EXPECTED["key_sums"])
        _same(torch.stack([value.double().sum() for value in own.values]), EXPECTED["value_sums"])
    for name in ("cu_slots", "num_chunks", "num_tokens", "memory_index"):
        assert getattr(made, name) == getattr(memory, name)
    assert made.signature.keys() == memory.signature.keys()
    assert made.signature["weights"] == memory.signature["weights"]


def test_a_new_memory_file_has_the_same_form(tmp_path: Path) -> None:
    memory = ContextMemory.load(FOLDER / "memory.safetensors")
    memory.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (FOLDER / "memory.safetensors").read_bytes()
