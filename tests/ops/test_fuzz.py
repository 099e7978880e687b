"""A part of ``tests/fuzz_operators.py``: every operator through ``torch.ops``, right and wrong calls."""

import pytest

from tests import fuzz_operators


@pytest.mark.parametrize("name", fuzz_operators.BUILDERS)
def test_calls(name: str) -> None:
    for seed in range(40):
        try:
            fuzz_operators.one_call(name, seed)
        except Exception as error:
            raise AssertionError(f"--operator {name} --seed {seed} --calls 1: {error}") from error


def test_every_operator_is_called() -> None:
    from sharedllm_ext._library import registered

    assert registered("CPU") <= set(fuzz_operators.BUILDERS)
