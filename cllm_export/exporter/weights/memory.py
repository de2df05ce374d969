"""What a build needs of memory: a prediction, and what it really took.

Anonymous memory is what counts: pages of mapped files are the system's to drop, and so are those of the file that is
written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cllm_export.errors import OptionError

TRACE_BYTES = 180_000_000
"""What tracing, passes and lint add to the imported libraries: 110 MB were measured on models of 16 to 32 layers."""

LIBRARY_BYTES = 400_000_000
"""What the imported libraries take where the system does not say."""

MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 16 << 20
"""Bytes of a checkpoint in work at once. More than 16 MiB were no faster."""

PIECE_COPIES = 10
"""Bytes held for each byte of a piece: itself, its bits for the scan, itself in fp32 (two times as large), with an
adapter's product beside it, and in the engine's dtype."""

STAGE_BYTES = 256_000_000
"""For weights in the making: a matrix is transposed in memory and written from start to end where it fits. One that
does not fit is put into the file's own pages a piece at a time, which is slower."""

SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process now; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration, ValueError):
        return None


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a build spends its memory, in bytes."""

    piece: int
    """Of the checkpoint in work at once."""
    stage: int
    """For weights in the making."""
    peak: int
    """What the whole build comes to."""


def plan_memory(max_memory: int | None, *, needed: int = 0, beside: int = 0) -> MemoryPlan:
    """Spend what the bound leaves, from what is taken already: on pieces first, then on weights in the making.

    ``needed`` is what a later stage takes, when pieces and weights are gone; ``beside`` is what is held beside them.

    Raises:
        OptionError: the smallest pieces do not fit ``max_memory``; says what would.
    """
    base = (anonymous_bytes() or LIBRARY_BYTES) + TRACE_BYTES + beside
    if max_memory is None:
        max_memory = base + max(PIECE_COPIES * MAX_PIECE_BYTES + STAGE_BYTES, needed)
    smallest = base + max(PIECE_COPIES * MIN_PIECE_BYTES, needed)
    if max_memory < smallest:
        needed = -(-smallest // 10_000_000) * 10
        raise OptionError(f"max_memory={max_memory / 1e6:.0f}MB is too small; the smallest that works is {needed}MB")
    piece = min(MAX_PIECE_BYTES, (max_memory - base) // PIECE_COPIES)
    stage = min(STAGE_BYTES, max_memory - base - PIECE_COPIES * piece)
    return MemoryPlan(piece=piece, stage=stage, peak=base + max(PIECE_COPIES * piece + stage, needed))


class PeakMemory:
    """The most anonymous memory that was seen; 0 where the system does not say."""

    def __init__(self) -> None:
        self.peak = 0

    def sample(self) -> None:
        self.peak = max(self.peak, anonymous_bytes() or 0)


@contextmanager
def watched_memory() -> Iterator[PeakMemory]:
    """Sample this process's anonymous memory every 20 ms meanwhile. The system keeps no peak of it."""
    memory, done = PeakMemory(), threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            memory.sample()

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.sample()
