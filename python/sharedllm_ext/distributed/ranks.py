"""Processes that work together: joining, exchanging small things, ending alike when one of them fails."""

import contextlib
import datetime
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..counted import counted

_T = TypeVar("_T")
#: Seconds that a process waits for the others at most, unless told otherwise.
TIMEOUT = 600.0
#: Seconds after a failure in which the processes that are left say that they are there; twice as many if none answers.
GRACE = 3.0
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL = 0.05
# characters of another process's error
_LONGEST = 2000


class RankError(RuntimeError):
    """Another process has failed, or does not answer.

    Attributes:
        ranks: which ones have failed or do not answer, as far as it is known.
        silent: which of them do not answer; the others have said why they end.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks, self.silent = ranks, silent


def is_started_by_torchrun() -> bool:
    """Whether the environment names several processes, as torchrun does."""
    return all(os.environ.get(name) for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


class Ranks:
    """The processes of one run, each with its rank; :func:`join` makes it.

    As a context manager it leaves the group at the end: all processes together, or at once after an error, which the
    others then get, too.

    Attributes:
        rank, size: this process's number, from 0 on, and how many there are.
        device: where this process computes.
        timeout: seconds that it waits for the others at most.
    """

    def __init__(self, device: torch.device, timeout: float, store: Any, *, owns: bool) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.timeout = device, timeout
        #: Whether a ``generate`` runs, whose inputs have been compared.
        self.generating = False
        self._store, self._owns, self._closed = store, owns, False
        # whether all know of a failure already, and whether something may still wait for a process that is gone
        self._told, self._broken = False, False
        # small things travel on the CPU, whatever carries the tensors: no wait for a device, and errors with names
        self._control: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    # -- leaving ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    def close(self) -> None:
        """Leave the group, when all processes have come so far.

        Raises:
            RankError: another process has failed or does not answer.
        """
        if self._closed:
            return
        try:
            self.agree("end")
        finally:
            self._leave()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process goes no further, and leave the group; connections that they wait for end."""
        if self._closed:
            return
        if not isinstance(error, RankError) and not self._told:
            told = f"{self.rank} {_text(error)}"
            _in_time(lambda: self._store.compare_set("failure", "", told))
        self._leave()

    def _leave(self) -> None:
        self._closed = True
        if self._owns:
            # ending this process ends what a device still waits for
            if self._broken and self.device.type == "cuda":
                return
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self._control)

    # -- failing alike ------------------------------------------------------------------------------------------------

    def run(self, step: str, work: Callable[[], _T]) -> _T:
        """This process's part of a step, without communication: where it fails in one process, it fails in all.

        Args:
            step: its name, for messages.
            work: does it.

        Returns:
            What ``work`` has returned here.

        Raises:
            Exception: what ``work`` has raised here.
            RankError: it has failed in another process, or one does not answer.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        self.agree(step, failure)
        return result

    def agree(self, step: str, failure: Exception | None = None) -> None:
        """Wait for all processes, and end the step in all of them where it has failed in one.

        Args:
            step: its name, for messages.
            failure: what this process has met.

        Raises:
            Exception: ``failure``.
            RankError: another process has failed, or one does not answer.
        """
        with self._watched(step):
            # the plain collectives would not end where a process is late by more than one of their own waits
            dist.monitored_barrier(self._control, datetime.timedelta(seconds=self.timeout), wait_all_ranks=True)
        texts = self.exchange(b"" if failure is None else f"0{_text(failure)}".encode(), step)
        failed = tuple(rank for rank, text in enumerate(texts) if text)
        if not failed:
            return
        self._told = True
        if failure is not None:
            raise failure
        first = texts[failed[0]].decode(errors="replace")[1:]
        raise RankError(f"process {failed[0]} of {self.size}: {first}", failed)

    @contextlib.contextmanager
    def _watched(self, step: str) -> Iterator[None]:
        """Turn what ``torch.distributed`` raises into a :class:`RankError`."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankError):
                raise
            self._broken = True
            raise self._explain(step, error) from error

    def _explain(self, step: str, error: RuntimeError) -> RankError:
        """Who has failed: a process that has said so, or those that are silent while the others say they are there."""
        # the store is held by the first process, or by torchrun itself
        told, silent = _in_time(self._ask_around) or ("", (0,))
        if told:
            rank, _, text = told.partition(" ")
            return RankError(f"process {rank} of {self.size}: {text}", (int(rank),))
        lost = "no message" if "timed out" in str(error).lower() else "a connection that has ended"
        who = f"none of process {', '.join(map(str, silent))}" if silent else lost
        return RankError(
            f"{step}: expected an answer of all {counted(self.size, 'process')} within {self.timeout:g} s, got {who}",
            silent,
            silent,
        )

    def _ask_around(self) -> tuple[str, tuple[int, ...]]:
        """What a process has told of its failure, and which ones have not said that they are there."""
        self._store.set(f"there/{self.rank}", "1")
        end = time.monotonic() + GRACE
        others = [rank for rank in range(self.size) if rank != self.rank]
        while True:
            if self._store.check(["failure"]):
                return self._store.get("failure").decode(errors="replace"), ()
            silent = tuple(rank for rank in others if not self._store.check([f"there/{rank}"]))
            if not silent or time.monotonic() > end:
                return "", silent
            time.sleep(_POLL)

    # -- exchanging ---------------------------------------------------------------------------------------------------

    def exchange(self, data: bytes, step: str = "exchange") -> list[bytes]:
        """What every process has given, in the order of their ranks, in all processes."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._watched(step):
            dist.all_gather(lengths, torch.tensor([len(data)]), self._control)
            counts = [int(length) for length in lengths]
            most = max(counts)
            if not most:
                return [b""] * self.size
            own = torch.zeros(most, dtype=torch.uint8)
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[:0]
            parts = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, own, self._control)
        return [part[:count].numpy().tobytes() for part, count in zip(parts, counts, strict=True)]

    def share(self, data: bytes | None, step: str = "share") -> bytes:
        """What the first process has given, in all processes; the others' own is not looked at."""
        own = data if data is not None and self.rank == 0 else b""
        size = torch.tensor([len(own)])
        with self._watched(step):
            dist.broadcast(size, 0, self._control)
            sent = torch.zeros(int(size), dtype=torch.uint8)
            if own:
                sent.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
            if sent.numel():
                dist.broadcast(sent, 0, self._control)
        return sent.numpy().tobytes()

    def expect_same(self, step: str, values: dict[str, Any]) -> None:
        """Refuse values that differ between processes.

        Args:
            step: its name, for messages.
            values: tensors and others by name; others by their text.

        Raises:
            ValueError: names the first that differs, in all processes.
        """
        digests = self.exchange(b"".join(_digest(value) for value in values.values()), step)
        for index, name in enumerate(values):
            own = [digest[16 * index : 16 * index + 16] for digest in digests]
            other = next((rank for rank, digest in enumerate(own) if digest != own[0]), None)
            if other is not None:
                raise ValueError(
                    f"{step}: expected the same {name} in all processes, got another in process {other} than in "
                    "process 0"
                )

    def gather(self, tensor: Tensor, step: str) -> list[Tensor]:
        """Tensors of equal shape and dtype of all processes, in the order of their ranks, in all processes."""
        own = _as_bytes(tensor.contiguous())
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._watched(step):
            dist.all_gather(parts, own)
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def broadcast(self, tensor: Tensor, source: int, step: str) -> None:
        """Overwrite a contiguous tensor by that of process ``source``."""
        if tensor.numel():
            with self._watched(step):
                dist.broadcast(_as_bytes(tensor), source)

    def send(self, tensor: Tensor, target: int, step: str) -> None:
        """Send a tensor to one process, which calls :meth:`receive`."""
        if tensor.numel():
            with self._watched(step):
                dist.send(_as_bytes(tensor.contiguous()), target)

    def receive(self, tensor: Tensor, source: int, step: str) -> None:
        """Overwrite a contiguous tensor by what process ``source`` sends."""
        if tensor.numel():
            with self._watched(step):
                dist.recv(_as_bytes(tensor), source)


def join(device: torch.device | str | None = None, timeout: float = TIMEOUT) -> Ranks:
    """Join the processes that torchrun has started, or those of a process group that there is already.

    Tensors travel by NCCL between CUDA devices and by gloo between CPUs.

    Args:
        device: ``cpu``, or ``cuda`` for the device of this process's ``LOCAL_RANK``; default: cuda where there is one.
        timeout: seconds that a process waits for the others at most.

    Raises:
        ValueError: this process was not started by torchrun, or there is no such device.
        RuntimeError: the processes do not find each other in time.
    """
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    if place.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index
        if local >= torch.cuda.device_count():
            raise ValueError(f"device: expected at least {local + 1} CUDA devices, got {torch.cuda.device_count()}")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if dist.is_initialized():
        return Ranks(place, timeout, _Memory(), owns=False)
    missing = [name for name in _ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise ValueError(f"join: expected processes started by torchrun, got none of its {', '.join(missing)}")
    limit = datetime.timedelta(seconds=timeout)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=limit)))
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=dist.PrefixStore("sharedllm", store),
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=place if place.type == "cuda" else None,
    )
    return Ranks(place, timeout, dist.PrefixStore("sharedllm_told", store), owns=True)


class _Memory:
    """In place of a store, where the process group is another's: nothing is told, nobody is known to be silent."""

    def set(self, key: str, value: str) -> None:
        """Nothing."""

    def compare_set(self, key: str, expected: str, value: str) -> None:
        """Nothing."""

    def check(self, keys: list[str]) -> bool:
        """Whether a process is there: as far as is known all of them, and none has told of a failure."""
        return not any(key == "failure" for key in keys)

    def get(self, key: str) -> bytes:
        """Nothing."""
        return b""


def _in_time(ask: Callable[[], _T]) -> _T | None:
    """What a question to the store gives; ``None`` if there is no answer soon, as from a stopped process."""
    found: list[_T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(ask())

    # a thread, since the store's own timeout does not count while its holder is stopped
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * GRACE)
    return found[0] if found else None


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_LONGEST]


def _digest(value: Any) -> bytes:
    """16 bytes of a tensor's shape, dtype and values, or of another value's text."""
    if isinstance(value, Tensor):
        stored = value.detach().cpu().contiguous()
        text = repr((tuple(stored.shape), stored.dtype)).encode() + _as_bytes(stored).numpy().tobytes()
    else:
        text = repr(value).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as ``[bytes]`` uint8: gloo does not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8)
