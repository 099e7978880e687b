"""The commands of docs/recipes run as they stand, with a small random base on a CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.training.checkpoint import read_checkpoint

from ..cli.conftest import sentences
from ..support import environment_of_package

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "recipes" / "llama-3.1-8b.md"
COMMANDS = re.findall(r"```shell\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
#: In place of the page's own sizes.
SIZE = (
    "--injection-layers 2 --chunks 6 --running 32 --steps 2 --chunk-size 64 --slots-per-node 4 --segment-size 8 "
    "--segment-margin 4 --questions 2 --passages 4 --window 512 --device cpu"
)
TOOLS = f"""set -eu
sharedllm() {{ "{sys.executable}" -m sharedllm_ext "$@"; }}
torchrun() {{ "{sys.executable}" -m torch.distributed.run "$@"; }}
python() {{ "{sys.executable}" "$@"; }}
"""


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text").mkdir()
    for number in range(2):
        (folder / "text" / f"{number}.txt").write_text(sentences(120, seed=number), encoding="utf-8")
    row = {"context": "alpha Beta gamma_1 42 (eps)", "question": "delta?", "answer": "gamma_1"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder


def run(place: Path, base: Path, script: str) -> None:
    settings = {"BASE": str(base), "TEXT": "text", "QUESTIONS": "questions.jsonl", "GPUS": "2"}
    environment = environment_of_package(**settings, SIZE=SIZE, LENGTHS="700", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        ["bash", "-c", TOOLS + script], cwd=place, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


def test_the_recipe_runs(place: Path, base: Path) -> None:
    """In the page's order: train, go on, train in several processes, train pairs, use and measure."""
    begun, resumed, several, pairs, used = COMMANDS
    run(place, base, begun)
    checkpoint = place / "one" / "checkpoint.safetensors"
    assert read_checkpoint(checkpoint)[2]["step"] == 2
    run(place, base, resumed)
    run(place, base, several + pairs)
    assert read_checkpoint(place / "many" / "checkpoint.safetensors")[2]["settings"]["batches"] == 2
    assert any(name.endswith(".up") for name in read_checkpoint(place / "pairs" / "checkpoint.safetensors")[0])
    run(place, base, used)
    model: Any = SharedLLMForCausalLM.from_pretrained(place / "trained")
    assert model.pick is not None and model.injected_blocks[0].o_proj.weight.any()
