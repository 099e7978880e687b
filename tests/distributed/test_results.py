"""A context compressed and read by two and by four processes: what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..model import builders

ROOT = Path(__file__).parents[2]
Results = dict[str, list[Any]]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By case, what each process has found."""
    folder = tmp_path_factory.mktemp("memories")
    command = [sys.executable, "-m", "tests.distributed.results_program", str(request.param), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: Results = json.loads(done.stdout)
    return found


def test_products_of_equal_shape_give_equal_bits(results: Results) -> None:
    for difference, left, rises in results["exact"]:
        assert difference == 0 and left == 0 and rises


@pytest.mark.parametrize("family", ["llama", *builders.CONTINUOUS])
def test_the_gathered_memory_is_that_of_one_process(results: Results, family: str) -> None:
    assert all(difference < 1e-5 for difference in results[f"gathered {family}"])


def test_gathered_in_the_first_process(results: Results) -> None:
    first, *others = results["gathered first"]
    assert first < 1e-5 and others == [None] * len(others)


def test_gathered_in_bfloat16(results: Results) -> None:
    assert all(difference < 0.05 for difference in results["gathered bfloat16"])


def test_processes_without_a_chunk(results: Results) -> None:
    assert sorted(slots for _, slots, _ in results["few chunks"])[:-1] == [0] * (len(results["few chunks"]) - 1)
    assert all(memory < 1e-6 and logits < 1e-5 for memory, _, logits in results["few chunks"])


@pytest.mark.parametrize("family", ["llama", *builders.CONTINUOUS])
def test_logits_over_a_sharded_memory(results: Results, family: str) -> None:
    for sharded, whole in results[f"logits {family}"]:
        assert 0 < sharded <= max(2 * whole, 1e-5)


def test_logits_in_bfloat16(results: Results) -> None:
    for sharded, whole in results["logits bfloat16"]:
        assert 0 < sharded <= 2 * whole


@pytest.mark.parametrize("mode", ["greedy", "greedy beside steps", "sample", "beams", "several sequences"])
def test_generated_tokens_are_those_of_one_process(results: Results, mode: str) -> None:
    for same, different in results[mode]:
        assert same and different > 3


def test_rows_that_read_several_documents(results: Results) -> None:
    assert all(error < 1e-4 and same for error, same in results["rows of several"])


def test_a_cache_keeps_the_sharded_memory(results: Results) -> None:
    assert all(results["follow-up"])


def test_the_first_process_decides_when_to_stop(results: Results) -> None:
    assert all(lengths == [1, 5] for lengths in results["clocks"])


def test_the_first_process_scores_decide(results: Results) -> None:
    assert all(results["other scores"])


def test_a_sharded_memory_is_saved_whole(results: Results) -> None:
    for difference, _ in results["saved"]:
        assert difference < 1e-5
    first, *others = (text for _, text in results["saved"])
    assert first.startswith("FileNotFoundError: ")
    assert all(text.startswith("RankError: process 0 of ") and text.endswith(first[19:]) for text in others)


REFUSED = {
    "gather": "ValueError: gather: expected all, first, none, got 'some'",
    "to": "ValueError: to: expected a process from 0 to ",
    "context_ids": "ValueError: compress: expected the same context_ids in all processes, got another in process 1",
    "vocabulary": "ValueError: context_ids: expected token ids from 0 to 127, got 255",
    "query": "ValueError: query_ids: expected 1 row, one for each row of context_ids, got 2",
    "model": "ValueError: compress: expected the same model in all processes, got another in process 1; weights: ",
    "input_ids of forward": "ValueError: forward: expected the same input_ids in all processes, got another in process",
    "input_ids of generate": "ValueError: generate: expected the same input_ids in all processes, got another in proc",
    "gradients": "ValueError: memory: expected all slots in this process, got those of one of ",
    "append": "ValueError: memory: expected all slots in this process, got those of one of ",
    "max_time": "ValueError: max_time: expected None with a memory in ",
    "assistant_model": "ValueError: assistant_model: expected None with a memory in ",
    "positional": "ValueError: generate: expected keywords after generation_config with a memory in ",
    "passages": "memory: expected all slots in this process, got those of one of ",
    "obstacle": "memory: expected all slots in this process, got those of one of ",
}


def test_a_tensor_parallel_plan_is_refused_by_name(results: Results) -> None:
    for found in results["tensor parallel"]:
        if found is not None:
            error, context, memory = found
            assert error < 1e-4
            refused = "expected whole parameters, got ones shared out by a tensor parallel plan (tp_plan)"
            assert context.startswith(f"ValueError: compress: {refused}")
            assert memory.startswith(f"ValueError: memory: {refused}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_all(results: Results, name: str) -> None:
    texts = [found[name] for found in results["refusals"]]
    assert all(text.startswith(REFUSED[name]) for text in texts), texts
