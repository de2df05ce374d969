"""Reads the header of a GGUF file: its metadata, and where its tensors are. No word of the file is trusted.

``GGUFReader`` of the package ``gguf`` makes several arrays for each token, which is a gigabyte for a large vocabulary.
It also takes a cut file as it is. So the header is read here, and the package gives the sizes of the types.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cllm_export.errors import CheckpointError, UnsupportedError
from cllm_export.exporter.checkpoint.files import GGUF_MAGIC
from cllm_export.extras import needs_extra

VERSIONS = (2, 3)
"""Versions in use. Version 1 counted in 32 bits."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value -> its ``struct`` format."""
_STRING, _ARRAY = 8, 9
_LEAST_FIELD, _LEAST_TENSOR = 13, 32
"""Bytes of the shortest metadata field, and of the shortest entry of a tensor."""
_MOST_DIMENSIONS = 4
_AGAIN = "download it again"


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor of a GGUF file is."""

    name: str
    type_name: str
    """Name of the type in llama.cpp, such as ``Q4_K``."""
    shape: tuple[int, ...]
    """In the order of PyTorch: rows first. GGUF stores the reverse."""
    offset: int
    """Bytes from the start of the file."""
    row_bytes: int
    """Bytes of one row, which is the last dimension."""

    @property
    def length(self) -> int:
        """In bytes."""
        return self.row_bytes * math.prod(self.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    """Every field: a number, a text, or a list of them."""
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A field of the architecture, such as ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that every tensor lies in the file.

    Raises:
        MissingExtraError: the package ``gguf`` is not installed.
        CheckpointError: the file is missing, cut or damaged.
        UnsupportedError: the file is sound, but of another version, byte order or type of tensors.
    """
    if not path.is_file():
        kind = "is a directory: name the file in it" if path.is_dir() else "does not exist: check the path"
        raise CheckpointError(f"{path} is not a GGUF file; it {kind}")
    _require_start(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Cursor(path, data).file()


def _require_start(path: Path) -> None:
    """Check the magic number, the byte order and the version."""
    with path.open("rb") as file:
        start = file.read(24)
    if start[:4] != GGUF_MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file: it begins with {start[:4]!r} instead of {GGUF_MAGIC!r}; {_AGAIN}"
        )
    if len(start) < 24:
        raise CheckpointError(f"{path} is cut: it has {path.stat().st_size} bytes, too few for a header; {_AGAIN}")
    version = int.from_bytes(start[4:8], "little")
    if version in VERSIONS:
        return
    if int.from_bytes(start[4:8], "big") in VERSIONS:
        raise UnsupportedError(
            f"{path} has the other byte order, big-endian: take the little-endian file, or convert it with "
            "gguf-convert-endian of the package gguf"
        )
    raise UnsupportedError(
        f"{path} is GGUF of version {version}; versions {' and '.join(map(str, VERSIONS))} are read: convert the "
        "model again with a current llama.cpp"
    )


class _Cursor:
    """A place in the header. Each read moves it on, and refuses what would lie behind the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 8

    def file(self) -> GgufFile:
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        self._require_room("tensors", num_tensors, _LEAST_TENSOR)
        self._require_room("metadata fields", num_fields, _LEAST_FIELD)
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._text("the name of a metadata field")
            if key in metadata:
                raise self._damaged(f"it has the metadata field {key!r} twice")
            metadata[key] = self._value(self._number("I"), key)
        entries = [self._entry() for _ in range(num_tensors)]
        tensors = self._place(entries, self._alignment(metadata))
        self._require_whole(metadata)
        return GgufFile(path=self._path, metadata=metadata, tensors=tensors)

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged: {fault}; {_AGAIN}")

    def _take(self, size: int) -> bytes:
        start, end = self._at, self._at + size
        if end > len(self._data):
            raise CheckpointError(
                f"{self._path} is cut: its header goes on behind its end, at byte {len(self._data)}; {_AGAIN}"
            )
        self._at = end
        return self._data[start:end]

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))
        return value

    def _text(self, what: str) -> str:
        try:
            return self._take(self._number("Q")).decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8") from None

    def _require_room(self, what: str, count: int, least: int) -> None:
        """Refuse a count for which the rest of the file is too short."""
        if count * least > len(self._data) - self._at:
            raise self._damaged(f"it claims {count} {what}, and it has {len(self._data)} bytes")

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY:
            raise self._damaged(f"its metadata field {key!r} has the unknown type {kind}")
        item, count = self._number("I"), self._number("Q")
        if item in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[item]}")
            self._require_room(f"values in {key!r}", count, size)
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(count * size)))
        if item != _STRING:
            raise self._damaged(f"its metadata field {key!r} is an array of the unknown type {item}")
        self._require_room(f"texts in {key!r}", count, 8)
        return [self._text(f"a text in {key}") for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type and offset in the data of the next tensor."""
        name, num_dimensions = self._text("the name of a tensor"), self._number("I")
        if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"its tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(num_dimensions)]))
        if not 0 < math.prod(shape) < 2**63:
            raise self._damaged(f"its tensor {name!r} has the shape {list(shape)}")
        return name, shape, self._number("I"), self._number("Q")

    def _alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise self._damaged(f"its alignment is {value!r}, and no power of two")
        return value

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._damaged(f"it has the tensor {name!r} twice")
            tensors[name] = self._tensor(name, shape, kind, start + offset)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for tensor, after in pairwise(ordered):
            if after.offset < tensor.offset + tensor.length:
                raise self._damaged(f"its tensors {tensor.name!r} and {after.name!r} overlap")
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        types = readable_types()
        if kind not in types:
            raise UnsupportedError(
                f"{self._path} has the tensor {name!r} of {_name_of_type(kind)}, which cannot be read; types that can "
                f"are {', '.join(readable.name for readable in types.values())}: take the model in one of them"
            )
        found = types[kind]
        if shape[-1] % found.block:
            raise self._damaged(
                f"its tensor {name!r} has rows of {shape[-1]} values, and {found.name} has blocks of {found.block}"
            )
        row_bytes = shape[-1] // found.block * found.block_bytes
        tensor = GgufTensor(name=name, type_name=found.name, shape=shape, offset=offset, row_bytes=row_bytes)
        if (end := offset + tensor.length) > len(self._data):
            raise CheckpointError(
                f"{self._path} is cut: its tensor {name!r} ends at byte {end}, and the file has {len(self._data)} "
                f"bytes; {_AGAIN}"
            )
        return tensor

    def _require_whole(self, metadata: dict[str, Any]) -> None:
        """Refuse a file without an architecture, a part of a split file, and what is no model."""
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise self._damaged("it has no general.architecture")
        if (parts := metadata.get("split.count", 0)) not in (0, 1):
            raise UnsupportedError(
                f"{self._path} is one of {parts} parts of a model: merge them with llama-gguf-split --merge"
            )
        if (kind := metadata.get("general.type", "model")) != "model":
            raise UnsupportedError(f"{self._path} is GGUF of type {kind!r}: take the file of the model itself")


@dataclass(frozen=True, kw_only=True)
class ReadableType:
    """A type of tensors that can be read."""

    name: str
    block: int
    """Values of a block."""
    block_bytes: int


@cache
def readable_types() -> dict[int, ReadableType]:
    """Number of each type that the package ``gguf`` dequantises -> the type.

    Raises:
        MissingExtraError: the package is not installed.
    """
    with needs_extra("gguf"):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    found = {}
    for kind, (block, block_bytes) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        found[int(kind)] = ReadableType(name=GGMLQuantizationType(kind).name, block=block, block_bytes=block_bytes)
    return found


def _name_of_type(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    known = {int(each): each.name for each in GGMLQuantizationType}
    return f"type {known[kind]}" if kind in known else f"the unknown type {kind}"
