"""Linked weights: the build records their places in a checkpoint's safetensors files instead of copying them.

They are the one exception to the rule that no path leaves a bundle's directory. Each weight is therefore checked before
it is mapped. The path must be absolute, as ``build`` wrote it, and name a regular ``.safetensors`` file of the recorded
size. The file's header must give a tensor of that name the same place, dtype and shape. This module needs no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cllm_export.bundle.safetensors_header import ITEM_BYTES, read_header
from cllm_export.errors import BundleError

WeightsMode = Literal["link", "copy"]
"""``link``: weights stay in the checkpoint's files; ``copy``: they are copied into the bundle."""
WEIGHTS_MODES: tuple[WeightsMode, ...] = get_args(WeightsMode)

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class LinkedFile:
    """A weight file that the bundle reads from the checkpoint's directory."""

    path: str
    """Absolute path, as it was given to ``build``."""
    size: int
    sha256: str

    def __post_init__(self) -> None:
        path = self.path
        if not Path(path).is_absolute() or path != os.path.normpath(path) or not path.endswith(SUFFIX) or "\0" in path:
            raise ValueError(f"a linked file must be an absolute path to a {SUFFIX} file, got {path!r}")


@dataclass(frozen=True, kw_only=True)
class LinkedWeight:
    """One tensor of a linked file, and its place in the file. The graph's initializer has the tensor's name."""

    file: str
    """Key in ``linked_files``: the file's own name, which is also the location that the graph records."""
    offset: int
    """Bytes from the start of the file."""
    length: int
    dtype: str
    """In safetensors spelling: ``BF16``, ``F32``, ..."""
    shape: tuple[int, ...]
    stored_name: str | None = None
    """The tensor's name in the file, if it differs: some checkpoints lack the prefix ``model.``."""

    def __post_init__(self) -> None:
        numbers = (self.offset, self.length, *self.shape)
        if any(type(number) is not int or number < 0 for number in numbers) or self.dtype not in ITEM_BYTES:
            raise ValueError(f"a linked weight has offset, length, dtype or shape out of range: {self}")
        if not isinstance(self.stored_name, str | None):
            raise ValueError(f"a linked weight has the name {self.stored_name!r} in its file; expected text")
        if self.length != math.prod(self.shape) * ITEM_BYTES[self.dtype]:
            raise ValueError(f"a linked weight of {self.length} bytes is not {self.dtype} {list(self.shape)}")


def check_linked(files: Mapping[str, LinkedFile], weights: Mapping[str, LinkedWeight]) -> None:
    """Check that every linked file exists at its recorded size and holds every linked weight at its place.

    Raises:
        BundleError: a file or weight moved or changed; the message names it and says what to do.
    """
    for name, file in files.items():
        _check_file(file)
        held = {tensor: weight for tensor, weight in weights.items() if weight.file == name}
        _check_places(file, held)


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
        places = read_header(Path(file.path)).places
    except (OSError, ValueError) as error:
        raise BundleError(f"{file.path}, which this bundle is linked to, is damaged: {error}; rebuild it") from None
    for name, weight in weights.items():
        stated = (weight.offset, weight.length, weight.dtype, weight.shape)
        stored = weight.stored_name or name
        if places.get(stored) != stated:
            raise BundleError(
                f"{file.path} holds {stored} as {places.get(stored)}, the bundle's manifest says {stated}: the "
                "checkpoint changed; put it back or rebuild the bundle"
            )
