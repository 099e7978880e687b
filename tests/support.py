"""What tests and benchmarks share: devices and the marks of what cannot run here, fresh memory filled with NaN."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

import sharedllm_ext

NO_CUDA = "torch sees no CUDA device"
#: Mark of a test that needs a CUDA device.
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
#: Parameters of a test that runs on every device.
DEVICES = ("cpu", pytest.param("cuda", marks=needs_cuda))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the operators run on."""
    return torch.device(request.param)


def environment_of_package(**more: str) -> dict[str, str]:
    """Environment of a program that imports the package that these tests import, from whatever folder it is started.

    The checkout's own folder is another package than the installed one, and has no libraries unless it was built.
    """
    package = str(Path(sharedllm_ext.__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


def environment_of_tests() -> dict[str, str]:
    """The same, of a program that imports ``tests``, too."""
    environment = environment_of_package()
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).resolve().parents[1])
    return environment


def end_of_rank() -> NoReturn:
    """The end of a program of several processes: all results are out, and no thread outlives its interpreter.

    Python's own ending can abort such a program after its last result ("terminate called without an active
    exception"): threads of a destroyed process group live on where PyTorch itself keeps the group, and one
    that frees the last exchange's tensors needs Python for it.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN (integers: the largest value), so that leftovers never pass for results."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # PyTorch fills memory in this mode only; a warning of an operator that has no deterministic form changes nothing
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def scale_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its keyword ``scale`` as the last positional argument, as in the operator's schema."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments[:-1], scale=arguments[-1])

    return call
