"""Progress of long tasks: how they report it, plain lines where there is no terminal, what an interruption leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

INTERVAL = 20.0
"""Seconds after which a line is written even if nothing is new, so that silence never lasts half a minute."""
STAGE_INTERVAL = 2.0
"""Seconds between two lines at least, however fast one stage follows the other."""


class Progress(Protocol):
    """The callback through which long tasks report progress."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        """``done`` of ``total`` items or bytes of a stage are done.

        Args:
            stage: name of the stage. A ``total`` of at most 1 is a single step.
            note: what else there is to say, such as the loss.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How long work speaks: about its progress, and in sentences."""

    progress: Progress = lambda *_: None
    say: Callable[[str], None] = lambda _: None


SILENT = Voice()


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. It ends work as Ctrl-C does."""


@contextmanager
def resumable(describe: Callable[[], str]) -> Iterator[None]:
    """Add to an interruption what was saved and how to go on.

    Args:
        describe: says so in words; called after the interruption.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(describe())
        raise


@dataclass(frozen=True)
class _Start:
    """Where the count of a stage began, for its rate."""

    seconds: float
    done: int


class ProgressLines:
    """A progress callback that writes plain lines: one for a new stage, and one whenever ``INTERVAL`` has passed.

    Args:
        write: takes a line without its end.
        stage: what the work does before its first report.
        clock: seconds from any start.
    """

    def __init__(self, write: Callable[[str], None], *, stage: str, clock: Callable[[], float] = monotonic) -> None:
        self._write, self._clock = write, clock
        self._lock = threading.Lock()
        self._started = self._last_line = clock()
        self._stage, self._done, self._total, self._note = stage, 0, 0, ""
        self._starts = {stage: _Start(self._started, 0)}
        self.is_hushed = False
        """Whether lines would stand in the middle of other text, and are kept back."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        with self._lock:
            now, is_new = self._clock(), stage != self._stage
            start = self._starts.get(stage)
            begins = start is None or done < start.done or (is_new and (total <= 1 or done == start.done))
            if begins:
                self._starts[stage] = _Start(now, done)
            self._stage, self._done, self._total, self._note = stage, done, total, note
            self._write_if_after(STAGE_INTERVAL if is_new else INTERVAL, now)

    def say(self, text: str) -> None:
        """Write a line about the work itself at once, with the time."""
        with self._lock:
            self._last_line = self._clock()
            self._write(f"[{duration(self._last_line - self._started)}] {text}")

    def beat(self) -> float:
        """Write a line if one is due, and return the seconds until the next one is."""
        with self._lock:
            now = self._clock()
            self._write_if_after(INTERVAL, now)
            return INTERVAL if self.is_hushed else self._last_line + INTERVAL - now

    def _write_if_after(self, interval: float, now: float) -> None:
        if now - self._last_line >= interval and not self.is_hushed:
            self._last_line = now
            self._write(self._line(now))

    def _line(self, now: float) -> str:
        start = self._starts[self._stage]
        passed = now - start.seconds
        parts = [self._stage if self._total > 1 else f"{self._stage}, {duration(passed)} so far"]
        if self._total > 1:
            parts[0] += f": {_count(self._done)} of {_count(self._total)} ({self._done / self._total:.0%})"
            new = self._done - start.done
            if new > 0 and passed > 0:
                parts += [_rate(new / passed), f"{duration((self._total - self._done) * passed / new)} to go"]
            else:
                parts.append(f"{duration(passed)} so far")
        return f"[{duration(now - self._started)}] {', '.join(parts)}{f'; {self._note}' if self._note else ''}"


@contextmanager
def heartbeat(lines: ProgressLines) -> Iterator[None]:
    """Let lines be written during the block while the work itself reports nothing, as in one long step."""
    ended = threading.Event()

    def beat() -> None:
        seconds = INTERVAL
        while not ended.wait(max(0.1, seconds)):
            try:
                seconds = lines.beat()
            except (OSError, ValueError):  # nobody reads the lines any longer
                return

    thread = threading.Thread(target=beat, name="cllm-export-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Seconds as m:ss, or as h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, noun: str) -> str:
    """A number of things, such as 1 token or 2 tokens."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _rate(per_second: float) -> str:
    return f"{_count(per_second)} a second" if per_second >= 1 else f"{1 / per_second:.1f} s each"


def _count(number: float) -> str:
    """A number of items as it is, a large one, as of bytes, in millions or billions."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"
