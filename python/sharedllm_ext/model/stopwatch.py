"""Seconds spent in named parts of a computation that may run asynchronously."""

import time

import torch


class Stopwatch:
    """Adds the time since the previous lap to a name; on CUDA by events, read only on request."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]
        self.facts: dict[str, float] = {}

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """End a part."""
        self._marks.append((name, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by name, and the facts; waits for the device if it is not there yet."""
        seconds: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(after, torch.cuda.Event):
                after.synchronize()
                elapsed = before.elapsed_time(after) / 1000  # type: ignore[union-attr]
            else:
                elapsed = after - before  # type: ignore[operator]
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return {**seconds, **self.facts}
