"""``--dtype auto``: the dtype that the CPU is fast at."""

from pathlib import Path

import pytest
import torch

from sharedllm_ext import SharedLLMForCausalLM, cpu
from sharedllm_ext.cli._common import load_model
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.cpu import Instructions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def narrow(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow")
    SharedLLMForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("products", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_takes_what_the_cpu_is_fast_at(
    narrow: str, monkeypatch: pytest.MonkeyPatch, products: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cpu, "instructions", lambda: Instructions("avx2", "AVX2", products))
    model = load_model(narrow, "auto", CPU, progress=Progress(False))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert load_model(narrow, "bfloat16", CPU, progress=Progress(False)).dtype == torch.bfloat16


def test_too_little_memory_for_float32_is_said(
    narrow: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "instructions", lambda: Instructions("avx2", "AVX2", False))
    monkeypatch.setattr(cpu, "available_memory", lambda: 1000)
    assert load_model(narrow, "auto", CPU, progress=Progress(False)).dtype == torch.bfloat16
    error = capsys.readouterr().err
    assert "computing in bfloat16" in error and error.count("\n") == 1
