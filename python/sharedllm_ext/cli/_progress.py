"""Progress on stderr: a line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from sharedllm_ext.cli._output import emit, say

#: Seconds before the first line where stderr is no terminal; each pause until the next is twice as long.
FIRST_LINE = 3.0
LONGEST_PAUSE = 60.0
#: Seconds before the first line says that nothing is done yet, without rate and estimate.
NOTHING_LINE = 4.5
#: Seconds between two states of the line on a terminal, and between two looks elsewhere.
REDRAW = 0.25


class Progress:
    """Progress of one step after the other; silent with ``--json``."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled and sys.stderr is not None
        self.terminal = self.enabled and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._drawn = False

    @contextlib.contextmanager
    def bar(
        self, name: str, total: int | None, unit: str, *, lines_only: bool = False
    ) -> Iterator[Callable[[int], object]]:
        """Yield a function to call with how much more is done.

        ``total`` is ``None`` if unknown, ``unit`` empty if nothing is counted; ``lines_only`` leaves the terminal to
        others that draw there.
        """
        meter = _Meter(name, total, unit)
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(meter, over), daemon=True)
        watched = self.enabled and not (lines_only and self.terminal)
        if watched:
            thread.start()
        try:
            yield meter.add
        finally:
            over.set()
            if watched:
                thread.join()

    @contextlib.contextmanager
    def compression(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """A bar whose function takes the tokens done so far, as ``compress`` reports them."""
        with self.bar("compressing", tokens, "tokens") as update:
            told = 0

            def tell(done: int) -> None:
                nonlocal told
                update(done - told)
                told = done

            yield tell

    def write(self, text: str) -> None:
        """Print a result while a bar is shown."""
        with self._lock:
            self._clear()
            emit(text)

    def _watch(self, meter: _Meter, over: threading.Event) -> None:
        pause, next_line, said = FIRST_LINE, FIRST_LINE, False
        while not over.wait(min(REDRAW, FIRST_LINE)):
            if self.terminal:
                with self._lock:
                    self._draw(meter.line())
                continue
            elapsed = meter.elapsed
            if elapsed < (NOTHING_LINE if meter.waits and not said else next_line):
                continue
            with self._lock:
                say(meter.line())
            pause = min(2 * pause, LONGEST_PAUSE)
            said, next_line = True, elapsed + pause
        with self._lock:
            self._clear()
            if said:
                say(meter.summary())

    def _draw(self, line: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        self._drawn = True

    def _clear(self) -> None:
        if self._drawn:
            self._draw("")
        self._drawn = False


class _Meter:
    """What is done of a step."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.begin = time.perf_counter()

    def add(self, more: int) -> None:
        self.done += more

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.begin

    @property
    def waits(self) -> bool:
        """Whether there is nothing yet to base an estimate on."""
        return bool(self.unit) and not self.done

    def line(self) -> str:
        """The state in one line: done, rate and, where the total is known, the time that is left."""
        elapsed, done = self.elapsed, self.done
        if not self.unit:
            return f"{self.name}: {clock(elapsed)} so far"
        of = "" if self.total is None else f" of {amount(self.total)}"
        if not done:
            return f"{self.name}: nothing{of} {self.unit} after {clock(elapsed)} yet"
        rate = done / elapsed
        line = f"{self.name}: {amount(done)}{of} {self.unit}, {amount(rate)} {self.unit}/s"
        if self.total is None or done > self.total:
            return line
        return f"{line}, {100 * done // self.total}%, about {clock((self.total - done) / rate)} left"

    def summary(self) -> str:
        """The final state, if an earlier one was shown."""
        elapsed = self.elapsed
        return f"{self.name}: {f'{amount(self.done)} {self.unit} ' if self.unit else ''}in {clock(elapsed)}"


def amount(value: float) -> str:
    """A number for people, of at most four digits."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / min(size, 1e3) if name == 'k' else value / size:.3g}{name}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")


def clock(value: float) -> str:
    """Seconds for people: ``42 s``, ``3:05`` or ``2:03:05``."""
    minutes, left = divmod(round(value), 60)
    if not minutes:
        return f"{left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
