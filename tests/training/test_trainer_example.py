"""examples/trainer/train.py as its page starts it, at small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sharedllm_ext import SharedLLMForCausalLM

from ..support import environment_of_package
from .conftest import text_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "trainer" / "train.py"
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_example_trains(launcher: str, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    command = [*LAUNCHERS[launcher], str(SCRIPT), str(base), str(text_file(tmp_path)), str(tmp_path / "run")]
    # layers, chunk, running text, steps
    command += ["2", "32", "64", "3"]
    done = subprocess.run(command, env=environment_of_package(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model: Any = SharedLLMForCausalLM.from_adapter(tmp_path / "run" / "adapter.safetensors", base)
    plain: Any = SharedLLMForCausalLM.from_base(base, injection_layers=2, chunk_size=32, window=64)
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert {"model.layers.0.injection.o_proj.weight", "model.layers.2.self_attn.q_proj.weight"} <= changed
    assert all(".injection." in name or "layers.2.self_attn." in name for name in changed)


def test_the_example_is_short() -> None:
    code = [line for line in SCRIPT.read_text().splitlines() if line.strip()]
    assert len(code) <= 30
