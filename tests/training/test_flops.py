"""Operations of a step against PyTorch's own count, and the peaks of devices."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from sharedllm_ext.training import Sizes, Trained, Weights, parse_parts
from sharedllm_ext.training.flops import StepFlops, peak_of
from sharedllm_ext.training.losses import count

SIZES = Sizes(contexts=1, chunks=6, questions=3, running=40, tail=256)


def counted(
    build: Any, mix: Any, losses: Any, parts: str, **fields: Any
) -> tuple[Any, dict[str, float], StepFlops, Any]:
    """What is expected, PyTorch's count by operator, the counter and the batch."""
    model = build(pick_layers=None, **fields)
    # attention by matmuls, which PyTorch counts on a CPU
    model.model.config._attn_implementation = "eager"
    Trained(model, parse_parts(parts))
    batch = mix(sizes=SIZES).batch(0, 0)._replace(gates=[True])
    objective = losses(model)
    flops = StepFlops(model, objective.prompt, objective.passages)
    with FlopCounterMode(display=False) as counter:
        objective(batch).total(count(batch, objective.prompt, False), Weights()).backward()
    found: dict[str, float] = {}
    for operator, value in counter.get_flop_counts()["Global"].items():
        found[str(operator)] = found.get(str(operator), 0) + value
    return flops.operations(batch), found, flops, batch


def matmuls(found: dict[str, float]) -> float:
    return found.get("aten.mm", 0) + found.get("aten.addmm", 0)


@pytest.mark.parametrize(
    ("parts", "tied"),
    [("injected,upper", True), ("injected", True), ("injected,upper,compressor", False), ("injected:2,upper:2", True)],
)
def test_weights_count_as_pytorch_counts(build: Any, mix: Any, losses: Any, parts: str, tied: bool) -> None:
    """The paper's set is the blocks and the self-attention of the layers above."""
    expected, found, flops, batch = counted(build, mix, losses, parts, tie_compressor=tied)
    surplus = 0.0
    if "compressor" in parts:
        # queries of one layer are computed at all positions and needed at the slots; forward and two gradients
        tokens = sum(len(example.context) for example in batch.examples)
        hidden = flops.config.text_config.hidden_size
        surplus = 2 * 3 * (tokens - flops._slots(tokens)) * flops.width * hidden
    assert expected.weights == pytest.approx(matmuls(found) - surplus, rel=0.01)


def test_attention_counts_causal_pairs(build: Any, mix: Any, losses: Any) -> None:
    """The decoder's own attention by matmuls over whole squares, of which the upper half is not counted."""
    expected, found, flops, batch = counted(build, mix, losses, "injected,upper", tie_compressor=True)
    (example,) = batch.examples
    turns = [example.questions[i] for i in example.turns]
    tail = sum(len(flops.prompt.turn(q.question, q.answer, first=n == 0)[0]) for n, q in enumerate(turns))
    lengths = [len(flops.prompt.begin) + tail, len(example.running)]
    # scores and sums, forward; both and their gradients backward, but not below the first block
    squares = sum(4 * flops.width * length**2 * (3 * flops.layers - 2) for length in lengths)
    assert found["aten.bmm"] == pytest.approx(squares, rel=0.02)
    causal = sum(4 * flops.width * length * (length + 1) / 2 * (3 * flops.layers - 2) for length in lengths)
    slots = 6 * 4 * 4
    injected = sum(4 * flops.width * length * slots * flops.lower * 2 for length in lengths)
    # one chunk of 64 tokens has nodes of 32, 16, 8 and 8; two layers: the lower one attends at the slots alone
    pairs = 6 * sum(n * n / 2 for n in (32, 16, 8, 8)) * slots / (6 * 64)
    assert expected.attention == pytest.approx(causal + injected + 4 * flops.width * pairs)


def test_peaks_are_found_by_whole_names() -> None:
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA H20": 148e12,
        "NVIDIA B200": 2250e12,
    }
    assert {name: peak_of(name) for name in names} == names
    assert [peak_of(name) for name in ("NVIDIA A10", "NVIDIA A10G", "NVIDIA H2000", "Tesla T4")] == [None] * 4
