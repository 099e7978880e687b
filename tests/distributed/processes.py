"""Starts several processes on the CPU that work together, by fork: torch is imported once for all of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: exit code, the negative signal, or ``None`` where it had to be killed.
        result: what it has returned.
        error: what it has raised, with its kind.
        known: seconds from the start to the result or error.
        seconds: to the process's end.
        stderr: of the process.
    """

    code: int | None
    result: Any
    error: str
    known: float
    seconds: float
    stderr: str


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def start(
    size: int, work: Callable[[], Any], *, seconds: float, watch: Callable[[list[int]], None] | None = None
) -> list[Ended]:
    """Run ``work`` in ``size`` processes with the environment that torchrun gives.

    Args:
        size: how many.
        work: what each does; its result must be JSON.
        seconds: after these, processes that still run are killed: their code is ``None``.
        watch: called again and again with the process ids.
    """
    port, parent = free_port(), os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # no context manager: the processes would leave it, too
    folder, begin = Path(tempfile.mkdtemp()), time.monotonic()
    try:
        pids = [_fork(rank, size, port, folder, work, begin) for rank in range(size)]
        codes: dict[int, int] = {}
        ends: dict[int, float] = {}
        while len(codes) < size and time.monotonic() - begin < seconds:
            for rank, pid in enumerate(pids):
                if rank in codes:
                    continue
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank], ends[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - begin
            if watch is not None:
                watch(pids)
            time.sleep(0.02)
        for rank, pid in enumerate(pids):
            if rank not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [_ended(rank, folder, codes.get(rank), ends.get(rank, seconds)) for rank in range(size)]
    finally:
        if os.getpid() == parent:
            shutil.rmtree(folder)


def _fork(rank: int, size: int, port: int, folder: Path, work: Callable[[], Any], begin: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    found: dict[str, Any] = {"result": None, "error": ""}
    try:
        found["result"] = work()
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    (folder / f"{rank}.json").write_text(json.dumps({**found, "known": time.monotonic() - begin}))
    if found["error"]:
        sys.exit(1)
    # as a program ends: what aborts at exit must be seen
    sys.exit(0)


def _ended(rank: int, folder: Path, code: int | None, seconds: float) -> Ended:
    path = folder / f"{rank}.json"
    found = json.loads(path.read_text()) if path.exists() else {"result": None, "error": "", "known": seconds}
    return Ended(code, seconds=seconds, stderr=(folder / f"{rank}.err").read_text(), **found)
