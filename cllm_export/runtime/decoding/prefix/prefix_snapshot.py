"""A prompt's KV rows in one file, for another process. It is written in one step, and accepted only for its own bundle.

The file is a safetensors file of two tensors, ``tokens`` [T] and ``rows`` [2L, K, T, D]. Nothing is ever unpickled.
Rows of bfloat16 are stored as their bits, in uint16, because numpy has no such type. At run time, ``prefix_cache.py``
keeps the rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cllm_export.bundle.safetensors_header import read_metadata
from cllm_export.bundle.storage import write_bytes
from cllm_export.errors import OutputError, SnapshotError
from cllm_export.runtime.engines.base import KvRows

FORMAT, VERSION = "cllm-export prefix", 1
"""The version increases whenever this code would misread files of the version before."""

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "uint16": "U16", "int64": "I64"}
"""The safetensors name of each numpy dtype."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Tokens, the KV rows [2L, K, T, D] of each of them, and the fingerprint of the bundle that computed them."""

    fingerprint: str
    tokens: tuple[int, ...]
    rows: KvRows

    def __post_init__(self) -> None:
        if not self.tokens or self.rows.ndim != 4 or self.rows.shape[2] != len(self.tokens):
            raise SnapshotError(f"{len(self.tokens)} tokens cannot have rows of shape {list(self.rows.shape)}")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The properties that a snapshot must have to fit a model."""

    fingerprint: str
    vocab_size: int
    max_tokens: int
    rows: KvRows
    """An empty array [2L, K, 0, D], which gives the shape and the dtype."""


def check_target(path: str | Path) -> None:
    """Refuse, before any work, a file that must not be replaced.

    Raises:
        OutputError: the file exists and is no snapshot.
    """
    if not os.path.lexists(path):
        return
    try:
        check_snapshot(Path(path))
    except SnapshotError:
        raise OutputError(f"{path} exists and is no snapshot of a prompt; it will not be replaced") from None


def write_snapshot(path: str | Path, snapshot: Snapshot) -> None:
    """Write a snapshot file in one step. It replaces an older snapshot.

    Raises:
        OutputError: the file exists and is no snapshot, or it cannot be written.
    """
    check_target(path)
    tensors = {"tokens": np.array(snapshot.tokens, np.int64), "rows": np.ascontiguousarray(snapshot.rows)}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "bundle_fingerprint": snapshot.fingerprint,
        "sha256": _sha256(tensors),
    }
    write_bytes(Path(path), save(tensors, metadata))


def read_snapshot(path: str | Path, expected: Expected) -> Snapshot:
    """Read a snapshot file, after checks that it is complete and fits the model. No read goes beyond the file's size.

    Raises:
        SnapshotError: the file is missing, no snapshot, of another version or bundle, too long, or damaged; or its
            tokens or rows do not fit the model.
    """
    path = Path(path)
    check_snapshot(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            _check_origin(metadata, expected, path)
            _check_tensors(file, expected, path)
            tensors = {name: file.get_tensor(name) for name in ("tokens", "rows")}
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"{path} is damaged: {error}; copy it again, or save the prompt anew") from None
    _check_sum(tensors, metadata, path)
    tokens = tensors["tokens"]
    if int(tokens.min()) < 0 or int(tokens.max()) >= expected.vocab_size:
        outside = next(int(token) for token in tokens if not 0 <= token < expected.vocab_size)
        raise SnapshotError(f"{path} holds token {outside}; the model's are 0 to {expected.vocab_size - 1}")
    return Snapshot(fingerprint=expected.fingerprint, tokens=tuple(tokens.tolist()), rows=tensors["rows"])


def check_snapshot(path: Path) -> None:
    """Refuse a file whose header does not name the snapshot format. Any version passes, even with damaged data.

    Raises:
        SnapshotError: there is no such file, or it is no snapshot.
    """
    if not path.is_file():
        raise SnapshotError(f"{path} is no snapshot of a prompt: there is no such file")
    try:
        metadata = read_metadata(path)
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        metadata = {}
    if metadata.get("format") != FORMAT:
        raise SnapshotError(f"{path} is no snapshot of a prompt: save_prefix writes them")


def _check_origin(metadata: Mapping[str, str], expected: Expected, path: Path) -> None:
    if (version := metadata.get("version")) != str(VERSION):
        raise SnapshotError(
            f"{path} is a snapshot of version {version}, this cllm-export reads {VERSION}: save the prompt anew"
        )
    if (fingerprint := metadata.get("bundle_fingerprint")) != expected.fingerprint:
        raise SnapshotError(
            f"{path} was made with the bundle {str(fingerprint)[:12]}, this one is {expected.fingerprint[:12]}: "
            "save the prompt anew with this bundle"
        )


def _check_tensors(file: Any, expected: Expected, path: Path) -> None:
    """Refuse an opened file whose tensors do not fit the model."""
    views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    found = {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
    num_tokens = found["tokens"][1][0] if "tokens" in found and len(found["tokens"][1]) == 1 else 0
    if num_tokens < 1:
        raise SnapshotError(f"{path} is damaged: its header gives no number of tokens; save the prompt anew")
    if num_tokens > expected.max_tokens:
        raise SnapshotError(f"{path} holds {num_tokens} tokens, this model takes {expected.max_tokens} at most")
    count, heads, _, dim = expected.rows.shape
    needed = {
        "tokens": ("I64", [num_tokens]),
        "rows": (DTYPE_NAMES[expected.rows.dtype.name], [count, heads, num_tokens, dim]),
    }
    if found != needed:
        raise SnapshotError(f"{path} holds other rows than this engine has: {found} instead of {needed}")


def _check_sum(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str], path: Path) -> None:
    if (found := _sha256(tensors)) != (stated := metadata.get("sha256")):
        raise SnapshotError(
            f"{path} is damaged: the sha256 of its data is {found}, its header says {stated}; copy it again, or save "
            "the prompt anew"
        )


def _sha256(tensors: Mapping[str, NDArray[Any]]) -> str:
    """The SHA-256, in hex, of the little-endian bytes of ``tokens``, then of ``rows``."""
    digest = hashlib.sha256()
    for name in ("tokens", "rows"):
        digest.update(tensors[name].astype(tensors[name].dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()
