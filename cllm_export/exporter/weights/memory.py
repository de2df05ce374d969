"""Predicts and measures the memory of a build.

Only anonymous memory counts: the system can drop pages of mapped files and of the file that is being written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cllm_export.errors import OptionError

TRACE_BYTES = 180_000_000
"""Memory for tracing, passes and lint, besides the imported libraries. Models of 16 to 32 layers measured 110 MB."""

LIBRARY_BYTES = 400_000_000
"""Assumed memory of the imported libraries where the system does not report it."""

MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 16 << 20
"""Smallest and largest size of a piece of the checkpoint. Pieces above 16 MiB were no faster."""

PIECE_COPIES = 10
"""Bytes held for each byte of a piece. They are the piece, its bits for the scan, and a copy in fp32 (two times as
large). An adapter's product and a copy in the engine's dtype are held as well."""

STAGE_BYTES = 256_000_000
"""Memory for staged weights. A weight that fits is assembled in memory and written from start to end. A weight that
does not fit is written piece by piece into the mapped file, which is slower."""

SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int | None:
    """Current anonymous memory of this process, in bytes; None where the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration, ValueError):
        return None


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a build divides its memory, in bytes."""

    piece: int
    """Size of one piece of the checkpoint."""
    stage: int
    """Memory for staged weights, see ``STAGE_BYTES``."""
    peak: int
    """Predicted peak of the whole build."""


BASE_MARGIN = 32 << 20
"""Bytes by which the memory of this process may differ in the next run, which is told what is enough."""


def plan_memory(max_memory: int | None, *, needed: int = 0, beside: int = 0) -> MemoryPlan:
    """Divide the part of ``max_memory`` that is not used yet: pieces get theirs first, staged weights the rest.

    ``needed`` is the memory of a later stage, which starts after pieces and staged weights are freed. ``beside`` is
    memory that is held at the same time as pieces and staged weights.

    Raises:
        OptionError: ``max_memory`` is too small for the smallest pieces; names the smallest value that works.
    """
    base = (anonymous_bytes() or LIBRARY_BYTES) + TRACE_BYTES + beside
    if max_memory is None:
        max_memory = base + max(PIECE_COPIES * MAX_PIECE_BYTES + STAGE_BYTES, needed)
    smallest = base + max(PIECE_COPIES * MIN_PIECE_BYTES, needed)
    if max_memory < smallest:
        needed = -(-(smallest + BASE_MARGIN) // 10_000_000) * 10
        raise OptionError(f"max_memory={max_memory / 1e6:.0f}MB is too small; the smallest that works is {needed}MB")
    piece = min(MAX_PIECE_BYTES, (max_memory - base) // PIECE_COPIES)
    stage = min(STAGE_BYTES, max_memory - base - PIECE_COPIES * piece)
    return MemoryPlan(piece=piece, stage=stage, peak=base + max(PIECE_COPIES * piece + stage, needed))


class PeakMemory:
    """The largest sample of anonymous memory, in bytes; 0 where the system does not report it."""

    def __init__(self) -> None:
        self.peak = 0

    def sample(self) -> None:
        self.peak = max(self.peak, anonymous_bytes() or 0)


@contextmanager
def watched_memory() -> Iterator[PeakMemory]:
    """Sample the anonymous memory of this process every 20 ms inside the context: the system records no peak of it."""
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
