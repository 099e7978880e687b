"""Losses and steps on every device: equal to the CPU's, resumed with dropout, fused updates, bfloat16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sharedllm_ext.training import Options, Report, Trained, Trainer, Weights, parse_parts
from sharedllm_ext.training.losses import count

from ..support import device as device

OPTIONS = Options(steps=4, warmup=1, report_seconds=0.0)


def trainer(build: Any, mix: Any, losses: Any, folder: Path, device: torch.device, **options: Any) -> Trainer:
    model = build(random=False).to(device)
    # PyTorch's own draws, as some bases have them in training
    model.config.text_config.attention_dropout = options.pop("dropout", 0.0)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = model.config.text_config.attention_dropout
    report, parts = options.pop("report", lambda one: None), options.pop("parts", "injected,upper:2,compressor")
    trained = Trained(model, parse_parts(parts), 1)
    folder.mkdir(exist_ok=True)
    return Trainer(trained, losses(model), mix(), dataclasses.replace(OPTIONS, **options), folder, report=report)


def test_losses_and_gradients_are_those_of_the_cpu(build: Any, mix: Any, losses: Any, device: torch.device) -> None:
    batch, results = mix().batch(1, 0), []
    for place in (torch.device("cpu"), device):
        model = build().to(place)
        trained = Trained(model, parse_parts("injected,upper,compressor"))
        objective = losses(model)
        sums = objective(batch)
        assert all(term.device.type == place.type for term in sums)
        sums.total(count(batch, objective.prompt, True), Weights()).backward()
        results.append([*(t.detach().cpu() for t in sums), *(p.grad.cpu() for p in trained.parameters.values())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_steps_on_a_device(
    build: Any, mix: Any, losses: Any, tmp_path: Path, device: torch.device, bfloat16: bool
) -> None:
    reports: list[Report] = []
    made = trainer(build, mix, losses, tmp_path, device, bfloat16=bfloat16, report=reports.append)
    assert all(group["fused"] == (device.type == "cuda") for group in made.optimizer.param_groups)
    before = [p.detach().clone() for p in made.parameters]
    made.run()
    assert [r.step for r in reports] == [1, 2, 3, 4] and made.skipped == 0
    assert all(p.device.type == device.type and p.dtype == torch.float32 for p in made.parameters)
    assert not any(torch.equal(p, b) for p, b in zip(made.parameters, before, strict=True))


def test_a_run_with_dropout_goes_on_as_it_would_have(
    build: Any, mix: Any, losses: Any, tmp_path: Path, device: torch.device
) -> None:
    whole = trainer(build, mix, losses, tmp_path / "whole", device, dropout=0.2)
    whole.run()
    first = trainer(build, mix, losses, tmp_path / "parts", device, dropout=0.2)

    def report(one: Report) -> None:
        if one.step == 1:
            first._note(15)

    first._report = report
    assert first.run() == 15 and first.step == 2
    # as in another process, whose generators stand elsewhere
    torch.manual_seed(12345)
    second = trainer(build, mix, losses, tmp_path / "parts", device, dropout=0.2)
    second.resume()
    assert second.step == 2
    second.run()
    got, expected = ({name: p.detach().cpu() for name, p in one.trained.parameters.items()} for one in (second, whole))
    if device.type == "cpu":
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    else:
        # sums there have no fixed order
        for name, tensor in got.items():
            assert torch.isclose(tensor, expected[name], rtol=1e-2, atol=1e-4).float().mean() > 0.99, name
    plain = trainer(build, mix, losses, tmp_path / "plain", device)
    plain.run()
    assert any(not torch.equal(p.cpu(), expected[name]) for name, p in plain.trained.parameters.items())
