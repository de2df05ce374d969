"""Memory that is given back: pages of a mapped file that nobody has written to, and no others."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from cllm_export.runtime.engines.resident_memory import SMAPS, Region, drop_file_pages, unchanged_regions

NUM_BYTES = 8 << 20

needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what is in memory")


def resident_bytes(path: Path) -> int:
    """Bytes of the file's pages that are in this process's memory."""
    total, is_of_file = 0, False
    for line in SMAPS.read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            is_of_file = line.endswith(str(path))
        elif is_of_file and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture
def mapped(tmp_path):
    """A file, and a private writable map of it, as ONNX Runtime makes one."""
    path = tmp_path / "weights of a model.bin"
    path.write_bytes(np.arange(NUM_BYTES, dtype=np.uint8).tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as held:
        yield path, held


@needs_smaps
def test_pages_of_a_mapped_file_leave_memory_and_are_read_again(mapped):
    path, held = mapped
    before = bytes(held)
    assert resident_bytes(path) == NUM_BYTES
    drop_file_pages(path)
    assert resident_bytes(path) == 0
    assert bytes(held) == before


@needs_smaps
def test_what_was_written_into_a_map_stays(mapped):
    path, held = mapped
    held[5] = 99
    drop_file_pages(path)
    assert held[5] == 99


@needs_smaps
def test_pages_of_other_files_stay(mapped, tmp_path):
    path, held = mapped
    assert bytes(held)
    drop_file_pages(tmp_path / "model.bin")
    assert resident_bytes(path) == NUM_BYTES


def test_a_region_counts_only_if_it_is_of_the_file_and_unchanged():
    smaps = """\
7f0000000000-7f0000002000 rw-p 00000000 fe:00 26 /a/weights of it.bin
Rss:                   8 kB
Anonymous:             0 kB
7f0000002000-7f0000003000 rw-p 00002000 fe:00 26 /a/weights of it.bin
Rss:                   4 kB
Anonymous:             4 kB
7f0000003000-7f0000004000 rw-p 00000000 00:00 0
Rss:                   4 kB
Anonymous:             0 kB
7f0000004000-7f0000005000 r--p 00000000 fe:00 27 /a/other.bin
Anonymous:             0 kB
"""
    assert list(unchanged_regions(smaps, Path("/a/weights of it.bin"))) == [Region(0x7F0000000000, 0x2000)]
