"""Reads a checkpoint once, in pieces, for its checksums, for the scan for NaN and infinity, and for the caller.

Files are read rather than memory-mapped. If a file shrinks while it is read, the result is an error that names the
file, not a signal. No page of the file stays in this process either. One thread hashes each piece while another scans
and uses it; both release Python's lock for that work.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.errors import CheckpointError
from cllm_export.exporter.checkpoint.files import TensorInfo

UNSIGNED: dict[str, Any] = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
EXPONENT = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""Safetensors dtype -> the exponent bits. All of them are set only in infinity and NaN."""

DAMAGED = "is damaged or the training diverged: restore an earlier checkpoint"


class Piece(NamedTuple):
    """Some rows (of the first axis) of one tensor, as stored. Valid only until the call that receives it returns."""

    name: str
    info: TensorInfo
    start: int
    stop: int
    data: memoryview


Use = Callable[[Piece], None]


def stream_files(
    files: Sequence[Path],
    tensors: Mapping[str, TensorInfo],
    *,
    piece_bytes: int,
    scanned: Collection[str],
    use: Use | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> dict[Path, str]:
    """Read files from start to end and return the sha256 of each.

    Only the tensors in ``scanned`` are scanned; each of their pieces is also passed to ``use``. A caller that no longer
    needs the checksums sets ``stop`` to end the read early.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or a file changed while it was read.
    """
    total = sum(path.stat().st_size for path in files)
    scan, sums, done = FiniteScan(DAMAGED), {}, 0

    def handle(piece: Piece) -> None:
        if piece.name in scanned:
            scan.add(piece.name, piece.info.dtype, piece.data, last=piece.stop == rows_of(piece.info))
            if use:
                use(piece)

    with ThreadPoolExecutor(1, thread_name_prefix="scan") as pool:
        for path in files:
            held = {name: info for name, info in tensors.items() if info.file == path}
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for piece in _pieces(file, path, held, piece_bytes):
                    if stop is not None and stop.is_set():
                        return {}
                    waiting = pool.submit(handle, piece) if piece.name else None
                    digest.update(piece.data)
                    if waiting:
                        waiting.result()
                    done += len(piece.data)
                    if progress:
                        progress(done, total)
            sums[path] = digest.hexdigest()
    return sums


def stream_tensors(tensors: Mapping[str, TensorInfo], names: Sequence[str], *, piece_bytes: int, use: Use) -> None:
    """Pass each piece of the named tensors to ``use``, and read nothing else."""
    for name in names:
        info = tensors[name]
        with info.file.open("rb") as file:
            file.seek(info.offset)
            for piece in _tensor_pieces(file, name, info, bytearray(_buffer_size(info, piece_bytes)), piece_bytes):
                use(piece)


class FiniteScan:
    """Counts NaN and infinite values of each tensor by their bits. At the end of a tensor, refuses it if it has any."""

    def __init__(self, meaning: str) -> None:
        self._meaning = meaning
        self._bad: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._scratch: dict[str, NDArray[np.unsignedinteger]] = {}

    def add(self, name: str, dtype: str, data: memoryview, *, last: bool) -> None:
        """Scan some values of a tensor; ``last`` marks its final ones."""
        bits = np.frombuffer(data, UNSIGNED[dtype])
        exponent = UNSIGNED[dtype](EXPONENT[dtype])
        scratch = self._room(dtype, bits.size)
        np.bitwise_and(bits, exponent, out=scratch)
        self._seen[name] = self._seen.get(name, 0) + bits.size
        if bits.size and scratch.max() == exponent:
            self._bad[name] = self._bad.get(name, 0) + int((scratch == exponent).sum())
        if last and (bad := self._bad.get(name)):
            raise CheckpointError(
                f"tensor {name} has {bad} of {self._seen[name]} values NaN or infinite: it {self._meaning}"
            )

    def _room(self, dtype: str, size: int) -> NDArray[np.unsignedinteger]:
        if dtype not in self._scratch or self._scratch[dtype].size < size:
            self._scratch = {dtype: np.empty(size, UNSIGNED[dtype])}
        return self._scratch[dtype][:size]


def rows_of(info: TensorInfo) -> int:
    """The length of the first axis; 1 for a tensor without axes."""
    return info.shape[0] if info.shape else 1


def _pieces(file: BufferedReader, path: Path, held: Mapping[str, TensorInfo], piece_bytes: int) -> Iterator[Piece]:
    """Every byte of a file: tensors in pieces of whole rows, and the bytes between them in pieces without a name."""
    room = bytearray(max([piece_bytes, *(_buffer_size(info, piece_bytes) for info in held.values())]))
    for name, info in sorted(held.items(), key=lambda item: (item[1].offset, item[1].length)):
        yield from _gap(file, path, info.offset - file.tell(), room)
        yield from _tensor_pieces(file, name, info, room, piece_bytes)
    yield from _gap(file, path, path.stat().st_size - file.tell(), room)


def _gap(file: BufferedReader, path: Path, size: int, room: bytearray) -> Iterator[Piece]:
    if size < 0:
        raise CheckpointError(f"{path} changed while it was read: run the command again")
    info = TensorInfo(file=path, dtype="U8", shape=(size,), offset=file.tell(), length=size)
    while size:
        data = memoryview(room)[: min(size, len(room))]
        _read(file, path, data)
        size -= len(data)
        yield Piece("", info, 0, 0, data)


def _tensor_pieces(
    file: BufferedReader, name: str, info: TensorInfo, room: bytearray, piece_bytes: int
) -> Iterator[Piece]:
    rows = rows_of(info)
    if not info.length:
        return
    row_bytes = info.length // rows
    step = max(1, piece_bytes // row_bytes)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        data = memoryview(room)[: (stop - start) * row_bytes]
        _read(file, info.file, data)
        yield Piece(name, info, start, stop, data)


def _buffer_size(info: TensorInfo, piece_bytes: int) -> int:
    row_bytes = info.length // max(1, rows_of(info))
    return max(1, piece_bytes // max(1, row_bytes)) * row_bytes


def _read(file: BufferedReader, path: Path, data: memoryview) -> None:
    try:
        count = file.readinto(data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if count != len(data):
        raise CheckpointError(f"{path} was cut short while it was read; download it again")
