"""The scales file: statistics of the inputs of each linear layer, recorded during calibration.

``calibrate`` writes it and ``build --scales`` reads it. It is one safetensors file of float32. For each input of a
linear layer, *in* channels wide, it holds:

    amax/NAME       [in]      largest |x| of each channel: static int8 with smoothing (arXiv 2211.10438), fp8
    high/NAME       [in]      bound that |x| of each channel keeps in ``HIGH_SHARE`` of the rows: a robust amax
    mean_abs/NAME   [in]      mean |x| of each channel: AWQ (arXiv 2306.00978)
    gram/NAME       [in, in]  sum of x x^T over rows of root mean square 1, only if requested: GPTQ (arXiv 2210.17323)

Layers that read the same value (the three projections of an attention; gate and up) share one input. Its NAME is the
first of their tensors. A layer is looked up by the checkpoint name of its weight, which exporter and bundle both know.
The header records how the file was made, and a checksum over the file. This module neither collects statistics nor
quantises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cllm_export.bundle.manifest import Loop, ProposerName
from cllm_export.bundle.safetensors_header import Header, make_header, read_header
from cllm_export.bundle.storage import output_error, whole_file
from cllm_export.checks import from_fields, require_at_least
from cllm_export.errors import OutputError, ScalesError

SCALES_VERSION = 2
HIGH_SHARE = 0.999
"""Share of the rows whose magnitude is at most ``high``."""
AGAIN = "calibrate again with: cllm-export calibrate"
GIVE = "give a file that cllm-export calibrate wrote"

FloatArray = NDArray[np.float32]
VECTORS = ("amax", "high", "mean_abs")
_METADATA, _CHECKSUM, _NO_SUM = "scales", "sha256", "0" * 64
_BLOCK = 1 << 22
"""Bytes hashed at a time."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How scales were made, and from which model."""

    checkpoint_fingerprint: str
    """As in the bundle's manifest. A quantised build compares it with its own checkpoint's fingerprint."""
    bundle_fingerprint: str
    prompts_sha256: str
    num_prompts: int
    loop: Loop
    proposer: ProposerName
    block_size: int
    seed: int
    mix: float
    """Requested share of the rows that come from block states. The other rows come from clean text."""
    rows: dict[str, int]
    """Number of observed rows: ``clean``, and block-state rows by stage of convergence."""
    tool_versions: dict[str, str]

    def __post_init__(self) -> None:
        require_at_least("num_prompts", self.num_prompts, 1)
        require_at_least("block_size", self.block_size, 1)
        if not 0 <= self.mix <= 1 or any(type(count) is not int or count < 0 for count in self.rows.values()):
            raise ValueError(f"mix or rows are out of range: {self.mix}, {self.rows}")

    @property
    def num_rows(self) -> int:
        return sum(self.rows.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """Statistics of one input of linear layers."""

    tensors: tuple[str, ...]
    """Checkpoint tensors of the weights that read this input."""
    num_rows: int
    amax: FloatArray
    high: FloatArray
    mean_abs: FloatArray

    def __post_init__(self) -> None:
        require_at_least("num_rows", self.num_rows, 1)
        shapes = {getattr(self, kind).shape for kind in VECTORS}
        if not self.tensors or len(shapes) != 1 or len(self.amax.shape) != 1:
            raise ValueError(f"statistics of {self.tensors} have the shapes {shapes}")

    @property
    def name(self) -> str:
        return self.tensors[0]

    @property
    def width(self) -> int:
        return int(self.amax.shape[0])


Gram = Callable[[], FloatArray]
"""Returns the Gram matrix [in, in] of an input. It is called when the matrix is about to be written."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """An opened scales file. Vectors are in memory; Gram matrices are read on request."""

    path: Path
    provenance: Provenance
    inputs: tuple[InputStatistics, ...]
    grams: dict[str, int] = field(repr=False)
    """Name of an input -> offset of its Gram matrix in the file, in bytes."""

    @cached_property
    def _by_tensor(self) -> dict[str, InputStatistics]:
        return {tensor: entry for entry in self.inputs for tensor in entry.tensors}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every checkpoint tensor whose layer was observed."""
        return tuple(self._by_tensor)

    def of(self, tensor: str) -> InputStatistics:
        """Statistics of the input of the layer whose weight is this checkpoint tensor.

        Raises:
            ScalesError: the layer was not observed.
        """
        entry = self._by_tensor.get(tensor)
        if entry is None:
            raise ScalesError(f"{self.path} has no statistics of {tensor}; {AGAIN}")
        return entry

    def gram(self, tensor: str) -> FloatArray:
        """Sum of x x^T [in, in] over the rows x of this layer's input, each divided by its root mean square.

        It is a read-only memory map of the file.

        Raises:
            ScalesError: the file holds no Gram matrices.
        """
        entry = self.of(tensor)
        if entry.name not in self.grams:
            raise ScalesError(f"{self.path} has no Gram matrix of {tensor}; calibrate again with gram=True")
        shape = (entry.width, entry.width)
        return np.memmap(self.path, np.float32, "r", offset=self.grams[entry.name], shape=shape)

    def require_checkpoint(self, fingerprint: str) -> None:
        """Refuse scales of another checkpoint.

        Raises:
            ScalesError: the scales are of another checkpoint.
        """
        own = self.provenance.checkpoint_fingerprint
        if own != fingerprint:
            raise ScalesError(
                f"{self.path} was calibrated with another checkpoint (fingerprint {own[:12]}, this one has "
                f"{fingerprint[:12]}); {AGAIN} on a bundle of this checkpoint"
            )

    def require_tensors(self, widths: Mapping[str, int]) -> None:
        """Refuse scales that lack a layer or have a layer of another width.

        Args:
            widths: checkpoint tensor of each layer to quantise -> its number of input channels.

        Raises:
            ScalesError: a layer is missing or has another width; the message names the first one.
        """
        for tensor, width in widths.items():
            if self.of(tensor).width != width:
                raise ScalesError(
                    f"{self.path} has {self.of(tensor).width} channels for {tensor}, which has {width}; {AGAIN}"
                )


def write_scales(
    path: Path,
    provenance: Provenance,
    inputs: Sequence[InputStatistics],
    grams: Mapping[str, Gram] | None = None,
    *,
    force: bool = False,
) -> None:
    """Write a scales file. The target appears whole or not at all.

    Args:
        grams: name of an input -> a function that returns its Gram matrix, called one at a time. It has every input or
            none.

    Raises:
        OutputError: the target exists and ``force`` is not set, or it cannot be written.
        ScalesError: a value is not finite.
    """
    if path.exists() and not force:
        raise OutputError(f"{path} exists; replace it with force=True or choose another output", fields=("output",))
    try:
        with whole_file(path) as scratch, scratch.open("xb") as file:
            _write(file, provenance, inputs, grams or {})
    except OSError as error:
        raise output_error(error, path) from error


def check_scales(path: Path) -> None:
    """Check what the header of a scales file says. Its data are not read.

    Raises:
        ScalesError: the file is missing, no scales file, or of another version.
    """
    _read_description(path)


def _read_description(path: Path) -> tuple[Header, dict[str, Any]]:
    """The header of a scales file, and what it says about the file."""
    try:
        header = read_header(path)
    except OSError as error:
        raise ScalesError(f"{path} cannot be read: {error.strerror}; {GIVE}") from None
    except (ValueError, RecursionError) as error:
        raise ScalesError(f"{path} is no scales file, or is damaged: {error}; {GIVE}") from None
    if not {_METADATA, _CHECKSUM} <= set(header.metadata):
        raise ScalesError(f"{path} is no scales file: its header does not say how it was made; {GIVE}")
    try:
        raw: dict[str, Any] = json.loads(header.metadata[_METADATA])
        version = raw["version"]
        is_newer = version > SCALES_VERSION
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ScalesError(f"{path} is damaged: {error}; {AGAIN}") from None
    if version != SCALES_VERSION:
        advice = "upgrade cllm-export" if is_newer else AGAIN
        raise ScalesError(f"{path} has version {version}, this cllm-export reads {SCALES_VERSION}: {advice}")
    return header, raw


def open_scales(path: Path) -> Scales:
    """Open a scales file. Check its version and its checksum, and that every statistic is finite.

    Raises:
        ScalesError: the file is missing, damaged, or of another version.
    """
    header, raw = _read_description(path)
    try:
        _check_sum(path, header.num_bytes, header.metadata[_CHECKSUM])
        provenance = from_fields(Provenance, raw["provenance"])
        with safe_open(path, framework="np") as file:
            inputs = tuple(_read_input(file, entry) for entry in raw["inputs"])
    except OSError as error:
        raise ScalesError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ScalesError(f"{path} is no scales file, or is damaged: {error}; {AGAIN}") from None
    grams = {
        name.removeprefix("gram/"): place.offset for name, place in header.places.items() if name.startswith("gram/")
    }
    return Scales(path=path, provenance=provenance, inputs=inputs, grams=grams)


def _write(
    file: BinaryIO, provenance: Provenance, inputs: Sequence[InputStatistics], grams: Mapping[str, Gram]
) -> None:
    described = [{"tensors": entry.tensors, "num_rows": entry.num_rows} for entry in inputs]
    raw = {"version": SCALES_VERSION, "provenance": asdict(provenance), "inputs": described}
    tensors = {name: ("F32", shape) for name, shape in _shapes(inputs, with_grams=bool(grams))}
    header = make_header(tensors, {_METADATA: json.dumps(raw, sort_keys=True), _CHECKSUM: _NO_SUM})
    digest = hashlib.sha256()
    for data in (header, *_vectors(inputs)):
        file.write(data)
        digest.update(data)
    for entry in inputs if grams else ():
        data = _bytes(f"gram/{entry.name}", grams[entry.name](), (entry.width, entry.width))
        file.write(data)
        digest.update(data)
    # Search for the key and value together: the provenance may also contain zeros, but its own quotes are escaped.
    file.seek(header.index(f'"{_CHECKSUM}":"{_NO_SUM}"'.encode()) + len(f'"{_CHECKSUM}":"'))
    file.write(digest.hexdigest().encode())


def _shapes(inputs: Iterable[InputStatistics], *, with_grams: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    inputs = list(inputs)
    for entry in inputs:
        yield from ((f"{kind}/{entry.name}", (entry.width,)) for kind in VECTORS)
    if with_grams:
        yield from ((f"gram/{entry.name}", (entry.width, entry.width)) for entry in inputs)


def _vectors(inputs: Iterable[InputStatistics]) -> Iterator[bytes]:
    for entry in inputs:
        yield from (_bytes(f"{kind}/{entry.name}", getattr(entry, kind), (entry.width,)) for kind in VECTORS)


def _bytes(name: str, values: FloatArray, shape: tuple[int, ...]) -> bytes:
    assert values.shape == shape, f"{name} has the shape {values.shape}"
    if not np.isfinite(values).all():
        raise ScalesError(f"{name} is not finite: the model overflows on these prompts; no scales were written")
    return np.ascontiguousarray(values, "<f4").tobytes()


def _check_sum(path: Path, header_bytes: int, expected: str) -> None:
    """Check the sha256 of the file. It is computed with zeros in the place of the checksum itself."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(header_bytes).replace(expected.encode(), _NO_SUM.encode(), 1))
        while block := file.read(_BLOCK):
            digest.update(block)
    if len(expected) != len(_NO_SUM) or digest.hexdigest() != expected:
        raise ValueError(f"its sha256 is {digest.hexdigest()}, it says {expected!r}")


def _read_input(file: Any, raw: dict[str, Any]) -> InputStatistics:
    """The statistics of one input, from an opened safetensors file."""
    tensors = tuple(raw["tensors"])
    vectors = {kind: file.get_tensor(f"{kind}/{tensors[0]}") for kind in VECTORS}
    for vector in vectors.values():
        if vector.dtype != np.float32 or vector.ndim != 1:
            raise ValueError(f"a statistic is {vector.dtype} {list(vector.shape)}")
        if not (np.isfinite(vector).all() and (vector >= 0).all()):
            raise ValueError(f"the statistics of {tensors[0]} are not finite, or below 0")
    return InputStatistics(tensors=tensors, num_rows=raw["num_rows"], **vectors)
