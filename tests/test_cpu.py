"""The CPU's instructions, and the dtype that follows from them."""

from pathlib import Path

import pytest
import torch

from sharedllm_ext import _C, cpu


@pytest.fixture
def bfloat16_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with bfloat16 instructions, nothing held back."""
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx512_bf16")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_checkpoints_keep_what_the_cpu_is_fast_at(bfloat16_cpu: None) -> None:
    assert cpu.instructions().bfloat16_products
    assert cpu.preferred_dtype(torch.bfloat16) == torch.bfloat16
    assert cpu.preferred_dtype(torch.float16) == torch.float32
    assert cpu.preferred_dtype(torch.float32) == torch.float32
    assert cpu.preferred_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("capability", ["generic", "avx2", "avx512"])
def test_bfloat16_without_instructions_becomes_float32(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu_capability", lambda: capability)
    assert cpu.instructions().kernels == capability
    assert cpu.preferred_dtype(torch.bfloat16) == torch.float32


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [
        ("AVX2", torch.float32),
        ("avx512_core", torch.float32),
        ("AVX512_CORE_BF16", torch.bfloat16),
        ("ALL", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_onednn_may_be_held_back(
    bfloat16_cpu: None, monkeypatch: pytest.MonkeyPatch, name: str, setting: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv(name, setting)
    assert cpu.preferred_dtype(torch.bfloat16) == dtype


def test_available_memory(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24684644 kB\nMemAvailable:   16518144 kB\n", encoding="ascii")
    assert cpu.available_memory(file) == 16518144 * 1024
    assert cpu.available_memory(tmp_path / "none") is None
