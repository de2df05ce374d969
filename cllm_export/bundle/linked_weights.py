"""Weights that a bundle does not hold: places in a checkpoint's safetensors files, which a build records.

They are the one exception to the rule that no path leaves a bundle's directory, so each is checked before it is
mapped: an absolute path that ``build`` wrote, a regular ``.safetensors`` file of the recorded size, and a header that
gives the very same place, dtype and shape to a tensor of that name. Needs no torch and no safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cllm_export.errors import BundleError

WeightsMode = Literal["link", "copy"]
"""Weights stay in the checkpoint's files, or are copied into the bundle."""
WEIGHTS_MODES: tuple[WeightsMode, ...] = get_args(WeightsMode)

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library: a longer header is no header."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a value by its safetensors dtype, for what can hold weights."""


@dataclass(frozen=True, kw_only=True)
class LinkedFile:
    """A weight file of the checkpoint, which the bundle reads where it lies."""

    path: str
    """Absolute, as it was given to ``build``."""
    size: int
    sha256: str

    def __post_init__(self) -> None:
        path = self.path
        if not Path(path).is_absolute() or path != os.path.normpath(path) or not path.endswith(SUFFIX) or "\0" in path:
            raise ValueError(f"a linked file must be an absolute path to a {SUFFIX} file, got {path!r}")


@dataclass(frozen=True, kw_only=True)
class LinkedWeight:
    """One tensor of a linked file, and where it stands in it. The graph's initializer has the tensor's name."""

    file: str
    """Name in ``linked_files``: the file's own, and the location that the graph records."""
    offset: int
    """Bytes from the start of the file."""
    length: int
    dtype: str
    """As safetensors spells it: ``BF16``, ``F32``, ..."""
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, self.length, *self.shape)
        if any(type(number) is not int or number < 0 for number in numbers) or self.dtype not in ITEM_BYTES:
            raise ValueError(f"a linked weight has offset, length, dtype or shape out of range: {self}")
        if self.length != math.prod(self.shape) * ITEM_BYTES[self.dtype]:
            raise ValueError(f"a linked weight of {self.length} bytes is not {self.dtype} {list(self.shape)}")


def check_linked(files: Mapping[str, LinkedFile], weights: Mapping[str, LinkedWeight]) -> None:
    """Check that every linked file is there as it was, and holds every linked weight at its place.

    Raises:
        BundleError: one moved or changed; names it and says what to do.
    """
    for name, file in files.items():
        _check_file(file)
        held = {tensor: weight for tensor, weight in weights.items() if weight.file == name}
        _check_places(file, held)


def read_places(path: Path) -> dict[str, tuple[int, int, str, tuple[int, ...]]]:
    """Offset from the start of the file, length, dtype and shape of every tensor, from a safetensors header.

    Raises:
        ValueError: no safetensors header, a name that stands twice in it, a place outside the file, or a shape that no
            tensor can have.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header would take {length} of {size} bytes")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return {name: _place(entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice: which of two is meant would depend on the reader."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header names {name!r} twice")
        found[name] = value
    return found


def _place(entry: Any, start: int, size: int) -> tuple[int, int, str, tuple[int, ...]]:
    try:
        first, last = entry["data_offsets"]
        place = start + first, last - first, str(entry["dtype"]), tuple(entry["shape"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"an entry of its header is damaged: {error}") from None
    if not start <= place[0] <= start + last <= size:
        raise ValueError(f"its header gives a tensor the bytes {first} to {last} of {size - start}")
    if math.prod(max(extent, 1) for extent in place[3]) >= 2**63:  # sound by its bytes where another extent is 0
        raise ValueError(f"its header gives a tensor the shape {list(place[3])}")
    return place


def _check_file(file: LinkedFile) -> None:
    advice = "put the checkpoint back, or rebuild the bundle (with weights='copy' it needs no checkpoint)"
    path = Path(file.path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BundleError(
            f"{path}, which this bundle is linked to, cannot be read: {error.strerror}; {advice}"
        ) from None
    if not path.is_file():
        raise BundleError(f"{path}, which this bundle is linked to, is no regular file; {advice}")
    if size != file.size:
        raise BundleError(
            f"{path}, which this bundle is linked to, has {size} bytes instead of {file.size}: the checkpoint changed; "
            f"{advice}"
        )


def _check_places(file: LinkedFile, weights: Mapping[str, LinkedWeight]) -> None:
    try:
        places = read_places(Path(file.path))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file.path}, which this bundle is linked to, is damaged: {error}; rebuild it") from None
    for name, weight in weights.items():
        stated = (weight.offset, weight.length, weight.dtype, weight.shape)
        if places.get(name) != stated:
            raise BundleError(
                f"{file.path} holds {name} as {places.get(name)}, the bundle's manifest says {stated}: the checkpoint "
                "changed; put it back or rebuild the bundle"
            )
