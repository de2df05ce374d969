"""A prompt's KV rows in one file, for another process: written in one step, refused unless they are this bundle's.

The file is a safetensors file of two tensors, ``tokens`` [T] and ``rows`` [2L, K, T, D], which any reader of that
format opens; nothing is ever unpickled. Both sides are a page of numpy here, since a reader must check all that such a
header says in any case: the package would save little of it. What keeps rows at run time is ``prefix_cache.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.storage import output_error, sync_directory
from cllm_export.errors import OutputError, SnapshotError
from cllm_export.runtime.engines.base import KvRows

FORMAT, VERSION = "cllm-export prefix", 1
"""The version is raised whenever a file of the one before would be read wrongly."""

MAX_HEADER_BYTES = 1 << 16
"""A header of ours takes some hundred bytes."""

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "uint16": "U16", "int64": "I64"}
"""numpy's names and those of safetensors."""


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
    """What a snapshot must be of, to be of any use to a model."""

    fingerprint: str
    vocab_size: int
    max_tokens: int
    rows: KvRows
    """No rows at all, [2L, K, 0, D]: shape and dtype are what counts."""


def check_target(path: str | Path) -> None:
    """Refuse, before any work, a file that must not be replaced.

    Raises:
        OutputError: it exists and is no snapshot.
    """
    if not os.path.lexists(path):
        return
    try:
        with _open(Path(path)) as file:
            _read_header(file, Path(path))
    except SnapshotError:
        raise OutputError(f"{path} exists and is no snapshot of a prompt; it will not be replaced") from None


def write_snapshot(path: str | Path, snapshot: Snapshot) -> None:
    """Write a file in one step; an older snapshot there is replaced.

    Raises:
        OutputError: it exists and is no snapshot, or cannot be written.
    """
    check_target(path)
    target = Path(os.path.realpath(path))
    tokens = np.array(snapshot.tokens, np.int64)
    data = [_bytes_of(tokens), _bytes_of(snapshot.rows)]
    header = _header(snapshot.fingerprint, _sha256(*data), _places(len(tokens), snapshot.rows))
    scratch = target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")
    try:
        with scratch.open("xb") as file:
            file.writelines([len(header).to_bytes(8, "little"), header, *data])
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        raise output_error(error, target) from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def read_snapshot(path: str | Path, expected: Expected) -> Snapshot:
    """Read a file, after a check that it is whole and what is expected; nothing is read that its size does not hold.

    Raises:
        SnapshotError: missing, no snapshot, of another version or bundle, too long, of other tokens or rows than the
            model has, or damaged.
    """
    path = Path(path)
    with _open(path) as file:
        header = _read_header(file, path)
        _check_origin(header["__metadata__"], expected, path)
        num_tokens = _check_tensors(header, expected, path)
        _check_size(file, header, path)
        data = file.read()
    _check_sum(data, header["__metadata__"], path)
    tokens = np.frombuffer(data, "<i8", num_tokens)
    if int(tokens.min()) < 0 or int(tokens.max()) >= expected.vocab_size:
        outside = next(int(token) for token in tokens if not 0 <= token < expected.vocab_size)
        raise SnapshotError(f"{path} holds token {outside}; the model's are 0 to {expected.vocab_size - 1}")
    shape = _rows_shape(num_tokens, expected.rows)
    rows = np.frombuffer(data, expected.rows.dtype.newbyteorder("<"), offset=tokens.nbytes).reshape(shape)
    return Snapshot(
        fingerprint=expected.fingerprint,
        tokens=tuple(tokens.tolist()),
        rows=rows.astype(expected.rows.dtype, copy=False),
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        if not path.is_file():
            raise SnapshotError(f"{path} is no snapshot of a prompt: there is no such file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from None


def _read_header(file: IO[bytes], path: Path) -> dict[str, Any]:
    """The header of a snapshot of any version."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length)) if 2 <= length <= MAX_HEADER_BYTES else None
    except (ValueError, RecursionError):
        header = None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SnapshotError(f"{path} is no snapshot of a prompt: save_prefix writes them")
    return header


def _check_origin(metadata: dict[str, Any], expected: Expected, path: Path) -> None:
    if (version := metadata.get("version")) != str(VERSION):
        raise SnapshotError(
            f"{path} is a snapshot of version {version}, this cllm-export reads {VERSION}: save the prompt anew"
        )
    if (fingerprint := metadata.get("bundle_fingerprint")) != expected.fingerprint:
        raise SnapshotError(
            f"{path} was made with the bundle {str(fingerprint)[:12]}, this one is {expected.fingerprint[:12]}: "
            "save the prompt anew with this bundle"
        )


def _check_tensors(header: dict[str, Any], expected: Expected, path: Path) -> int:
    """Compare the header's tensors with what the model needs; the number of tokens."""
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        [num_tokens] = tensors["tokens"]["shape"]
    except (KeyError, TypeError, ValueError):
        num_tokens = None
    if type(num_tokens) is not int or num_tokens < 1:
        raise SnapshotError(f"{path} is damaged: its header gives no number of tokens; save the prompt anew")
    if num_tokens > expected.max_tokens:
        raise SnapshotError(f"{path} holds {num_tokens} tokens, this model takes {expected.max_tokens} at most")
    if tensors != (needed := _places(num_tokens, expected.rows)):
        raise SnapshotError(f"{path} holds other rows than this engine has: {tensors} instead of {needed}")
    return num_tokens


def _check_size(file: IO[bytes], header: dict[str, Any], path: Path) -> None:
    found = os.fstat(file.fileno()).st_size - file.tell()
    needed = header["rows"]["data_offsets"][1]
    if found != needed:
        raise SnapshotError(f"{path} is damaged: it has {found} bytes of data instead of {needed}; copy it again")


def _check_sum(data: bytes, metadata: dict[str, Any], path: Path) -> None:
    if (found := _sha256(data)) != (stated := metadata.get("sha256")):
        raise SnapshotError(
            f"{path} is damaged: the sha256 of its data is {found}, its header says {stated}; copy it again, or save "
            "the prompt anew"
        )


def _header(fingerprint: str, sha256: str, places: dict[str, Any]) -> bytes:
    metadata = {"format": FORMAT, "version": str(VERSION), "bundle_fingerprint": fingerprint, "sha256": sha256}
    header = json.dumps({"__metadata__": metadata, **places}).encode()
    return header + b" " * (-len(header) % 8)  # data is aligned, as the format asks for


def _places(num_tokens: int, rows: KvRows) -> dict[str, Any]:
    """The header's entries for this many tokens and rows like these."""
    shape = _rows_shape(num_tokens, rows)
    after = 8 * num_tokens
    end = after + int(np.prod(shape)) * rows.dtype.itemsize
    return {
        "tokens": {"dtype": "I64", "shape": [num_tokens], "data_offsets": [0, after]},
        "rows": {"dtype": DTYPE_NAMES[rows.dtype.name], "shape": shape, "data_offsets": [after, end]},
    }


def _rows_shape(num_tokens: int, rows: KvRows) -> list[int]:
    tensors, heads, _, dim = rows.shape
    return [tensors, heads, num_tokens, dim]


def _bytes_of(array: NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
