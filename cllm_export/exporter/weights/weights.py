"""Plans where each weight of a graph is stored, and writes the weights in one pass over the checkpoint.

A weight stays in the checkpoint's file if the engine can take it as stored; otherwise it goes to ``weights.bin``.
Every offset is known before a byte is written, so tensors are read in the order in which they are stored. Each piece
is checked, cast and put at its offset. A weight that does not fit in memory is written through a map of the output
file, which needs no anonymous memory.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.linked_weights import LinkedWeight
from cllm_export.bundle.manifest import WEIGHTS_NAME
from cllm_export.errors import CheckpointError, GraphError, OutputError
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.checkpoint.stream import FiniteScan, Piece, rows_of
from cllm_export.exporter.graph.groups import INT4
from cllm_export.exporter.graph.model import IR_DTYPE, DecoderGraph, WeightSource
from cllm_export.exporter.graph.rounding import Rounded
from cllm_export.exporter.graph.trace import TORCH_DTYPE
from cllm_export.exporter.weights.memory import MIN_PIECE_BYTES

ALIGNMENT = 4096
"""Alignment of a weight in bytes: one page, so that engines can map it."""

STORED_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
ENGINE_DTYPE: dict[Precision, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Precision -> the safetensors name of the dtype of the engine's weights."""

Change = Callable[[Piece, Tensor], Tensor]
"""Turns stored rows of a tensor into the rows to export; for example, merges an adapter."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one weight or constant is stored in ``weights.bin``."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored array. For 4-bit integers it counts bytes, each of which holds two values."""
        return (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == INT4 else self.shape

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.uint8 if self.dtype == INT4 else self.dtype

    @property
    def length(self) -> int:
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize


class Part(NamedTuple):
    """The part of a weight that one checkpoint tensor fills. ``first_row`` is its first row before any transpose."""

    weight: str
    first_row: int
    source: WeightSource


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The place of every weight, planned before anything is written."""

    written: dict[str, Place]
    linked: dict[str, LinkedWeight]
    parts: dict[str, list[Part]]
    """Checkpoint tensor -> its parts of written weights."""

    @cached_property
    def size(self) -> int:
        """Size of ``weights.bin`` in bytes."""
        return max((place.offset + place.length for place in self.written.values()), default=0)


def check_dtypes(tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors that are not floating point.

    Raises:
        CheckpointError: names the first tensor that is not.
    """
    for name, info in sorted(tensors.items()):
        if info.dtype not in STORED_DTYPE:
            raise CheckpointError(f"tensor {name} has dtype {info.dtype}; expected one of {', '.join(STORED_DTYPE)}")


def is_linkable(info: TensorInfo, precision: Precision) -> bool:
    """Whether an engine of this precision can take the tensor as stored."""
    aligned = info.length and info.offset % (info.length // max(1, math.prod(info.shape))) == 0
    return info.dtype == ENGINE_DTYPE[precision] and bool(aligned)


def plan_weights(
    graph: DecoderGraph, tensors: Mapping[str, TensorInfo], *, link: bool, changed: Iterable[str] = ()
) -> Layout:
    """Give every weight its place, in the order of the checkpoint, so that the checksum can follow the writes.

    Args:
        link: leave tensors that can be linked in the checkpoint.
        changed: tensors that an adapter changes.
    """
    written: dict[str, Place] = {}
    linked: dict[str, LinkedWeight] = {}
    parts: dict[str, list[Part]] = {}
    changed, offset = set(changed), 0

    def place(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nonlocal offset
        written[name] = Place(offset=offset, shape=shape, dtype=dtype)
        offset = -(-(offset + written[name].length) // ALIGNMENT) * ALIGNMENT

    for name, source in sorted(graph.weights.items(), key=lambda item: _stored_at(item[1], tensors)):
        infos = [tensors[tensor] for tensor in source.tensors]
        if link and _stays(source, infos[0], graph.precision) and not changed & set(source.tensors):
            info = infos[0]
            linked[source.tensors[0]] = LinkedWeight(
                file=info.file.name,
                offset=info.offset,
                length=info.length,
                dtype=info.dtype,
                shape=info.shape,
                stored_name=info.stored_name,
            )
            continue
        rows = 0
        for tensor, info in zip(source.tensors, infos, strict=True):
            parts.setdefault(tensor, []).append(Part(name, rows, source))
            rows += rows_of(info)
        shape = (rows, *_row_shape(source, infos[0]))
        place(name, shape[::-1] if source.transposed else shape, _dtype_of(source, graph.precision))
    for name, constant in sorted(graph.constants.items()):
        place(name, tuple(constant.shape), constant.dtype)
    return Layout(written=written, linked=linked, parts=parts)


def attach_weights(graph: DecoderGraph, layout: Layout) -> None:
    """Replace the graph's weight inputs by initializers that point into the weight files."""
    stored = set(graph.weights) | set(graph.constants)
    for value in [value for value in graph.graph.inputs if value.name in stored]:
        name = str(value.name)
        tensor = _external(name, layout)
        if value.shape is not None and tuple(value.shape.dims) != tuple(tensor.shape.dims):
            raise GraphError(f"weight {name} is stored as {tensor.shape}, the graph expects {value.shape}")
        graph.graph.inputs.remove(value)
        value.const_value = tensor
        value.shape, value.type = ir.Shape(tensor.shape.dims), ir.TensorType(tensor.dtype)
        graph.graph.register_initializer(value)


_LINK_ADVICE = "choose another output, or link the weights instead of copying them (weights='link')"


def require_space(directory: Path, needed: int, target: Path, *, can_link: bool = True) -> None:
    """Check that the disk has enough space. Only a bundle ``can_link`` its weights instead.

    Raises:
        OutputError: it does not; says how much is needed and how much is free. Or the directory is on no disk.
    """
    usage = shutil.disk_usage(directory)
    if not usage.total:
        raise OutputError(
            f"cannot write {target}: {directory} is on a file system of the kernel, which holds no files; "
            "choose another output",
            fields=("output",),
        )
    free = usage.free
    if needed > free:
        raise OutputError(
            f"the disk is full: {target} needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; "
            + (f"free space, {_LINK_ADVICE}" if can_link else "free space, or choose another output"),
            fields=("output",),
        )


class WeightsFile:
    """``weights.bin`` while it is filled. A separate thread computes the checksum.

    Tensors may come in any order, each with its pieces in a row, from its first to its last.
    """

    def __init__(self, path: Path, layout: Layout, stage_bytes: int, change: Change | None = None) -> None:
        self._layout = layout
        self._free = stage_bytes
        self._staged: dict[str, Tensor] = {}
        """Weights that are assembled in memory; the others are assembled in the mapped file."""
        self._change = change
        self._file = path.open("w+b", buffering=0)
        _allocate(self._file.fileno(), layout.size)
        self._map = mmap.mmap(self._file.fileno(), layout.size)
        self._gathered = torch.empty(0)
        """The tensor whose rows are being gathered, in fp32."""
        self._left = {name: math.prod(place.shape) for name, place in layout.written.items()}
        self._whole = {name: threading.Event() for name in layout.written}
        self._stopped = False
        self._overflow: dict[torch.dtype, FiniteScan] = {}
        self._sum: Future[str] | None = None

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Compute the checksum in parallel with the writes inside the context."""
        with ThreadPoolExecutor(1, thread_name_prefix="checksum") as pool:
            self._sum = pool.submit(self._checksum)
            try:
                yield
            except BaseException:
                self._stopped = True
                for event in self._whole.values():
                    event.set()
                raise
            finally:
                self._file.close()

    def sha256(self) -> str:
        """The checksum of the file. Waits until it is complete."""
        assert self._sum is not None
        return self._sum.result()

    def put_constant(self, name: str, value: Tensor) -> None:
        self._target(name).copy_(value)
        self._count(name, value.numel())

    def put(self, piece: Piece) -> None:
        """Cast or round some rows of a tensor and write them into every weight that uses them.

        Rows that are rotated among themselves are gathered first, until the tensor is whole.

        Raises:
            CheckpointError: a value does not fit the engine's dtype.
        """
        parts = self._layout.parts.get(piece.name, ())
        turned = next((part for part in parts if _turns_rows(part, piece.info)), None)
        if turned is None:
            self._put(piece, self._change)
        elif (whole := self._gather(piece)) is not None:
            assert turned.source.rows is not None
            turned.source.rows.apply(whole, turned.first_row)
            info = replace(piece.info, dtype="F32", length=whole.nbytes)
            step = max(1, MIN_PIECE_BYTES * len(whole) // whole.nbytes)
            for start in range(0, len(whole), step):
                stop = min(start + step, len(whole))
                self._put(Piece(piece.name, info, start, stop, _bytes_of(whole[start:stop])), None)
            self._gathered = torch.empty(0)

    def _gather(self, piece: Piece) -> Tensor | None:
        """Keep the changed rows of a piece in fp32. Returns the tensor once it is whole."""
        if piece.start == 0:
            self._gathered = torch.empty(piece.info.shape, dtype=torch.float32)
        rows = _stored_rows(piece)
        self._gathered[piece.start : piece.stop] = self._change(piece, rows) if self._change else rows
        return self._gathered if piece.stop == rows_of(piece.info) else None

    def _put(self, piece: Piece, change: Change | None) -> None:
        rounded: dict[int, Rounded] = {}
        for part in self._layout.parts.get(piece.name, ()):
            rows = self._rows(piece, part, change, rounded)
            target = self._target(part.weight)
            first = part.first_row + piece.start
            if self._layout.written[part.weight].dtype == INT4:
                put_pairs(target, rows.t(), first)
            elif part.source.transposed:
                turned = rows.t().contiguous()  # in blocks: three times as fast as copying to strided rows
                target[:, first : first + rows.shape[0]].copy_(turned)
            else:
                target[first : first + rows.shape[0]].copy_(rows)
            self._count(part.weight, rows.numel())

    def _rows(self, piece: Piece, part: Part, change: Change | None, rounded: dict[int, Rounded]) -> Tensor:
        """The rows of a piece in the form to store. Each rounding runs once for all its parts."""
        rounding = part.source.rounding
        if rounding is None:
            return self._cast(piece, part.source, change, self._layout.written[part.weight].dtype)
        if id(rounding) not in rounded:
            values = self._cast(piece, part.source, change, torch.float32)
            stored = piece.info.dtype == "F32" and values.data_ptr() == _stored_rows(piece).data_ptr()
            rounded[id(rounding)] = rounding(values.clone() if stored else values)  # another thread hashes the piece
        rows: Tensor = getattr(rounded[id(rounding)], part.source.holds)
        return rows

    def _cast(self, piece: Piece, source: WeightSource, change: Change | None, dtype: torch.dtype) -> Tensor:
        """The rows of a piece, cast to a dtype. Any change, offset or divisor is applied in fp32 before the cast."""
        rows = stored = _stored_rows(piece)
        if change:
            rows = change(piece, rows)
        if source.offset:
            rows = rows.float() + source.offset  # never in place: another thread hashes the piece now
        if source.divisor is not None:
            rows = rows.float() / source.divisor[piece.start : piece.stop]
        if source.columns is not None:
            rows = source.columns(rows)
        cast = rows.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(rows.dtype).max or rows.dtype != stored.dtype:
            self._require_fitting(piece, cast)
        return cast

    def _require_fitting(self, piece: Piece, cast: Tensor) -> None:
        if cast.dtype not in self._overflow:
            meaning = f"holds values that do not fit {cast.dtype}: build with precision='fp32'"
            self._overflow[cast.dtype] = FiniteScan(meaning)
        dtype = next(name for name, each in STORED_DTYPE.items() if each == cast.dtype)
        bits = _bytes_of(cast.contiguous())
        self._overflow[cast.dtype].add(piece.name, dtype, bits, last=piece.stop == rows_of(piece.info))

    def _target(self, name: str) -> Tensor:
        """The tensor that a weight is assembled in: in memory if there is room, else in the mapped file."""
        place = self._layout.written[name]
        if name in self._staged:
            return self._staged[name]
        if place.length <= self._free:
            self._free -= place.length
            self._staged[name] = torch.empty(place.stored_shape, dtype=place.stored_dtype)
            return self._staged[name]
        dtype, count = place.stored_dtype, math.prod(place.stored_shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=place.offset).view(place.stored_shape)

    def _count(self, name: str, values: int) -> None:
        self._left[name] -= values
        if self._left[name] <= 0:
            if (staged := self._staged.pop(name, None)) is not None:
                self._write(staged, self._layout.written[name])
            self._whole[name].set()

    def _write(self, staged: Tensor, place: Place) -> None:
        data = _bytes_of(staged)
        self._file.seek(place.offset)
        while len(data):
            data = data[self._file.write(data) :]
        self._free += place.length

    def _checksum(self) -> str:
        digest, at = hashlib.sha256(), 0
        with memoryview(self._map) as view:
            for name, place in self._layout.written.items():
                self._whole[name].wait()
                if self._stopped:
                    return ""
                end = place.offset + place.length
                digest.update(view[at:end])
                if hasattr(self._map, "madvise"):  # keep written pages only in the system's cache
                    self._map.madvise(mmap.MADV_DONTNEED, at - at % mmap.PAGESIZE, end - at + at % mmap.PAGESIZE)
                at = end
        return digest.hexdigest()


def gathered_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Anonymous memory for one tensor whose rows are gathered, in bytes, judged by the largest layer's in fp32."""
    return max((4 * math.prod(info.shape) for name, info in tensors.items() if ".layers." in name), default=0)


def _turns_rows(part: Part, info: TensorInfo) -> bool:
    """Whether the rows of a tensor are rotated among themselves in this part of a weight."""
    return part.source.rows is not None and part.source.rows.overlaps(part.first_row, rows_of(info))


def _stored_rows(piece: Piece) -> Tensor:
    shape = (piece.stop - piece.start, *piece.info.shape[1:])
    return torch.frombuffer(piece.data, dtype=STORED_DTYPE[piece.info.dtype]).view(shape)


def put_pairs(target: Tensor, columns: Tensor, first: int) -> None:
    """Put 4-bit integers [in, r] into bytes [in, out / 2] from column ``first`` on.

    A byte holds two columns, the even one in its low half. A piece may end in the middle of a byte, so each write keeps
    the other half of the byte.
    """
    for odd in (0, 1):
        skipped = (odd - first) % 2
        chosen = (columns[:, skipped::2] & 15).to(torch.uint8)
        start = (first + skipped) // 2
        others = 0xF0 >> 4 * odd
        target[:, start : start + chosen.shape[1]].bitwise_and_(others).bitwise_or_(chosen << 4 * odd)


def _bytes_of(tensor: Tensor) -> memoryview:
    values: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(values).cast("B")


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the file's bytes, so that a full disk raises an error here instead of a signal when a page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _stays(source: WeightSource, info: TensorInfo, precision: Precision) -> bool:
    changed = source.offset or source.columns is not None or source.rows is not None
    as_stored = len(source.tensors) == 1 and not source.transposed and not changed
    return as_stored and is_linkable(info, precision)


def _row_shape(source: WeightSource, info: TensorInfo) -> tuple[int, ...]:
    """The stored shape of one row of a tensor."""
    if source.rounding is None or source.holds == "values":
        return info.shape[1:]
    return source.rounding.row_shapes(info.shape[1])[source.holds]


def _dtype_of(source: WeightSource, precision: Precision) -> torch.dtype:
    if source.rounding is None or source.holds != "codes":
        return TORCH_DTYPE[precision]
    return source.rounding.code_dtype


def _stored_at(source: WeightSource, tensors: Mapping[str, TensorInfo]) -> tuple[str, int]:
    last = max((tensors[name] for name in source.tensors), key=lambda info: (str(info.file), info.offset))
    return str(last.file), last.offset


def _external(name: str, layout: Layout) -> ir.ExternalTensor:
    if linked := layout.linked.get(name):
        dtype, shape = IR_DTYPE[STORED_DTYPE[linked.dtype]], ir.Shape(linked.shape)
        return ir.ExternalTensor(linked.file, linked.offset, linked.length, dtype, shape=shape, name=name)
    place = layout.written[name]
    dtype, shape = IR_DTYPE[place.dtype], ir.Shape(place.shape)
    return ir.ExternalTensor(WEIGHTS_NAME, place.offset, place.length, dtype, shape=shape, name=name)
