"""Give memory back to the system that the process holds and does not need, on Linux. Elsewhere nothing happens.

Two kinds grow while ONNX Runtime loads a model. Pages of weight files stay in the process after their matrices were
packed: they are read again when they are needed. And the C library keeps freed memory for later.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SMAPS = Path("/proc/self/smaps")


class Region(NamedTuple):
    """Pages of a file in the process's memory."""

    start: int
    """Address, in bytes."""
    length: int
    """Bytes."""


def trim_heap() -> None:
    """Let the C library give freed memory back, if it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def drop_file_pages(path: Path) -> None:
    """Drop the pages of a file that a library has mapped. They are read from the file again when they are needed.

    Regions that the process has written to are left alone, since a file does not have what was written.
    """
    try:
        smaps = SMAPS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    for region in unchanged_regions(smaps, path.resolve()):
        madvise(ctypes.c_void_p(region.start), ctypes.c_size_t(region.length), mmap.MADV_DONTNEED)


def unchanged_regions(smaps: str, path: Path) -> Iterator[Region]:
    """Regions of this file in the text of ``smaps`` that hold no page of their own, such as a written one."""
    region = None
    for line in smaps.splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            first, _, end = head.partition("-")
            place = rest.split(maxsplit=4)
            is_of_file = len(place) == 5 and place[4] == str(path)
            region = Region(int(first, 16), int(end, 16) - int(first, 16)) if is_of_file else None
        elif head == "Anonymous:" and region and int(rest.split()[0]) == 0:
            yield region
