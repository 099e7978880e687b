"""Processes that are killed, stopped, slow or in error: how all the others end; test_failures.py starts it.

Prints one JSON object: for each case the ends of all processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sharedllm_ext.distributed import Ranks, compress, join
from tests.model import builders

from .processes import start

#: Seconds that a process waits for the others.
TIMEOUT = 6.0
#: The process that fails where it is not the first one.
LOST = 1

torch.set_num_threads(1)


def _waits(ranks: Ranks) -> str:
    """What the other processes do meanwhile: messages of all kinds, the first of which they wait in."""
    ranks.gather(torch.arange(4), "attention")
    ranks.agree("end of the test")
    return "done"


def _signals(lost: int, number: int) -> Callable[[Ranks], Any]:
    def case(ranks: Ranks) -> str:
        if ranks.rank == lost:
            os.kill(os.getpid(), number)
        return _waits(ranks)

    return case


def slow(ranks: Ranks) -> str:
    if ranks.rank == LOST:
        time.sleep(TIMEOUT / 3)
    return _waits(ranks)


def raises(ranks: Ranks) -> str:
    if ranks.rank == LOST:
        raise OSError("the disk of this node is gone")
    return _waits(ranks)


def raises_in_step(ranks: Ranks) -> str:
    def work() -> None:
        if ranks.rank == LOST:
            raise OSError("the disk of this node is gone")

    ranks.run("reading", work)
    return "done"


def bad_input(ranks: Ranks) -> str:
    """A process whose model cannot compress: the others have done their part."""
    model = builders.model()
    if ranks.rank == LOST:
        model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    compress(model, builders.ids(1, 200), ranks=ranks)
    return "done"


def killed_in_generate(ranks: Ranks) -> str:
    model = builders.model()
    memory = compress(model, builders.ids(1, 200), ranks=ranks, gather="none")
    text = builders.ids(1, 5)

    def end(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ranks.rank == LOST and ids.shape[1] == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores

    model.generate(text, memory=memory, max_new_tokens=9, eos_token_id=None, do_sample=False, logits_processor=[end])
    return "done"


CASES: dict[str, tuple[int, Callable[[Ranks], Any]]] = {
    "killed": (3, _signals(LOST, signal.SIGKILL)),
    "first killed": (3, _signals(0, signal.SIGKILL)),
    "stopped": (3, _signals(LOST, signal.SIGSTOP)),
    "first stopped": (2, _signals(0, signal.SIGSTOP)),
    "slow": (2, slow),
    "raises": (3, raises),
    "raises in a step": (3, raises_in_step),
    "bad input": (2, bad_input),
    "killed in generate": (2, killed_in_generate),
}


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _continues(pids: list[int]) -> None:
    """Let a stopped process go on when all the others have ended."""
    stopped = [pid for pid in pids if _is_stopped(pid)]
    if stopped and not any(Path(f"/proc/{pid}").exists() for pid in pids if pid not in stopped):
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def main() -> None:
    found = {}
    for name in sys.argv[1:] or CASES:
        size, case = CASES[name]

        def work(case: Callable[[Ranks], Any] = case) -> Any:
            torch.manual_seed(0)
            with join("cpu", timeout=TIMEOUT) as ranks:
                ranks.agree("start")
                return case(ranks)

        found[name] = [one._asdict() for one in start(size, work, seconds=60, watch=_continues)]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
