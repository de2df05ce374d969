"""Read and write safetensors headers, for needs that the library's interface does not cover.

The ``safetensors`` library validates a header: tensors lie inside the file, end to end and without overlap, and each
has the number of bytes that its dtype and shape need. The library gives no offsets, which mapped and streamed weights
need. It silently takes the last of two tensors of one name. Therefore this module parses the JSON again. It also writes
headers for files whose tensors are streamed, because the library's writer holds all tensors in memory and writes
metadata in a random order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from safetensors import SafetensorError, safe_open

MAX_HEADER_BYTES = 100_000_000
"""The library's limit: a longer header is invalid."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a value by safetensors dtype, for the dtypes that weights can have."""

_METADATA = "__metadata__"
_ALIGNMENT = 8


class TensorPlace(NamedTuple):
    """The place of a tensor in its file."""

    offset: int
    """Bytes from the start of the file."""
    length: int
    """In bytes."""
    dtype: str
    """In safetensors spelling: ``BF16``, ``F32``, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """The parsed header of a safetensors file."""

    metadata: dict[str, str]
    places: dict[str, TensorPlace]
    num_bytes: int
    """Bytes before the data, including the eight bytes of the header's length."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file, after the library has validated it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file, is truncated, repeats a name, or has a shape that no tensor can have.
    """
    with path.open("rb") as file:
        try:
            with safe_open(path, framework="np"):
                raw, num_bytes = _read_json(file)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
    places = {name: _place(entry, num_bytes) for name, entry in raw.items() if name != _METADATA}
    return Header(metadata=raw.get(_METADATA) or {}, places=places, num_bytes=num_bytes)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a header, even if the tensors are damaged. It identifies the file's format.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has no safetensors header.
    """
    with path.open("rb") as file:
        metadata = _read_json(file)[0].get(_METADATA, {})
    return metadata if isinstance(metadata, dict) else {}


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file whose tensors follow in the order of ``tensors``. Equal arguments give equal bytes.

    Args:
        tensors: name -> safetensors dtype and shape.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_json(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The header's JSON object, unprocessed, and the number of bytes before the data."""
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header would take {length} bytes")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, refusing repeated names: each reader may choose a different one of two equal names."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header names {name!r} twice")
        found[name] = value
    return found


def _place(entry: dict[str, Any], start: int) -> TensorPlace:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if math.prod(max(length, 1) for length in shape) >= 2**63:  # 0 bytes pass as valid if another dimension is 0
        raise ValueError(f"its header gives a tensor the shape {list(shape)}")
    return TensorPlace(start + first, last - first, entry["dtype"], shape)
