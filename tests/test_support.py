"""What tests rely on: fresh memory is poisoned, and the rule of twice the error tells right from wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sharedllm_ext

from .support import environment_of_package, poisoned_memory
from .tolerance import too_far

LARGEST = {
    torch.int64: 2**63 - 1,
    torch.int32: 2**31 - 1,
    torch.int8: 127,
    torch.uint8: 255,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fresh_memory_is_nan(dtype: torch.dtype) -> None:
    # freed memory of this size and of plain numbers is what the next tensors get
    left = torch.ones(1000, dtype=dtype)
    del left
    fresh = [
        torch.empty(1000, dtype=dtype),
        torch.empty_like(torch.ones(1000, dtype=dtype)),
        torch.ones(1, dtype=dtype).new_empty(10, 100),
        torch.empty_strided((10, 100), (100, 1), dtype=dtype),
        torch.ones(1, dtype=dtype).resize_(1000)[1:],
    ]
    assert all(x.isnan().all() for x in fresh)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_fresh_integers_are_the_largest(dtype: torch.dtype) -> None:
    assert (torch.empty(1000, dtype=dtype) == LARGEST[dtype]).all()


@pytest.fixture(scope="module")
def of_the_module() -> torch.Tensor:
    return torch.empty(1000)


def test_fixtures_of_modules_are_poisoned(of_the_module: torch.Tensor) -> None:
    assert of_the_module.isnan().all()


def test_poison_ends_where_it_began() -> None:
    torch.use_deterministic_algorithms(False)
    with pytest.raises(ZeroDivisionError), poisoned_memory():
        assert torch.empty(3).isnan().all()
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


def result(error: float, worst: float = 0.0) -> torch.Tensor:
    """A thousand ones, all off by ``error``, and the last one by ``worst`` more."""
    values = torch.ones(1000, dtype=torch.float64) + error
    values[-1] += worst
    return values


@pytest.mark.parametrize(
    ("got", "same", "message"),
    [
        (result(1.9e-3), result(1e-3), None),
        (result(2.1e-3), result(1e-3), "x: rms error: expected at most 0.002, got 0.0021"),
        (result(1e-3, 2.9e-3), result(1e-3), None),
        (result(1e-3, 3.1e-3), result(1e-3), "x: worst error: expected at most 0.004, got 0.0041"),
        (result(4e-7), result(0), None),
        (result(6e-7), result(0), "x: rms error: expected at most 4.77e-07, got 6e-07"),
        (result(0, torch.nan), result(1e-3), "x: rms error: expected at most 0.002, got nan"),
        (result(0, torch.inf), result(1e-3), "x: expected 0 infinite elements at their places, got 1"),
        (result(0)[1:], result(1e-3), r"x: expected shape (1000,), got (999,)"),
    ],
)
def test_rule_of_twice_the_error(got: torch.Tensor, same: torch.Tensor, message: str | None) -> None:
    assert too_far("x", got, same, result(0)) == message


def test_rule_where_nothing_but_infinity_is_left() -> None:
    exact = torch.full((3,), -torch.inf, dtype=torch.float64)
    assert too_far("x", exact.float(), exact, exact) is None
    assert too_far("x", torch.zeros(3), exact, exact) is not None


def test_stricter_rules() -> None:
    got, same = result(1e-3, 1.5e-3), result(1e-3)
    assert too_far("x", got, same, result(0)) is None
    assert "worst error: expected at most 0.002" in (too_far("x", got, same, result(0), worst=2) or "")
    assert too_far("x", result(2e-7), result(0), result(0), roundings=1) is not None


def test_programs_of_the_tests_import_the_package_under_test(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sharedllm_ext; print(sharedllm_ext.__file__)"]
    done = subprocess.run(
        command, env=environment_of_package(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert Path(done.stdout.strip()).resolve() == Path(sharedllm_ext.__file__).resolve()


def test_no_test_names_the_folder_of_the_package() -> None:
    # the checkout's package has no libraries where the tests run against an installed one
    tests = Path(__file__).resolve().parent
    setting = [path.name for path in tests.rglob("*.py") if '"PYTHON' + 'PATH"' in path.read_text()]
    assert sorted(setting) == ["support.py", "test_info.py"]
