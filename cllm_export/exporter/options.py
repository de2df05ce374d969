"""What a build may be told, and what a checkpoint settles it to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cllm_export.bundle.contract import PRECISIONS, FixedShapes, Geometry, Precision
from cllm_export.bundle.linked_weights import WEIGHTS_MODES, WeightsMode
from cllm_export.bundle.manifest import (
    TrainedWith,
)
from cllm_export.bundle.quantization import ENGINE_TITLES
from cllm_export.checks import require_at_least, require_one_of
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.checkpoint.read import Checkpoint, default_max_length
from cllm_export.exporter.graph.trace import geometry_of
from cllm_export.exporter.quantize.options import QuantizeOptions
from cllm_export.exporter.weights.weights import (
    ENGINE_DTYPE,
    is_linkable,
)

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16

MIN_MAX_BLOCK_SIZE = 64
"""Decode forwards of up to this many tokens fit the cache of every bundle with symbolic shapes."""

MIN_MAX_LENGTH = 2


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What ``cllm-export build`` lets the user choose."""

    block_size: int | None = None
    """n; by default what the model was trained with, else 16."""
    max_length: int | None = None
    """Prompt plus new tokens; by default the model's own length, capped at 2048."""
    batch_size: int = 1
    precision: Precision = "fp32"
    """The dtype of what is computed and of the KV cache."""
    quantize: QuantizeOptions | None = None
    """How linear layers are quantised; by default they are not."""
    fixed_shapes: bool = False
    trained_with: TrainedWith | None = None
    """Overrides the ``cllm`` section of the checkpoint's config."""
    weights: WeightsMode = "copy"
    """``copy`` makes a bundle that stands alone. ``link`` leaves in the checkpoint the tensors that have the engine's
    dtype already: the bundle then needs the checkpoint where it is."""
    max_memory: int | None = None
    """Bytes of anonymous memory that the build must stay under."""
    base: Path | None = None
    """The checkpoint that an adapter is for; by default the one that it names."""
    num_layers: int | None = None
    """The first so many layers alone, for debugging."""
    lookahead: bool = False
    """Add the lookahead graph. A model that can have none gets its greedy graph alone, and the report says why."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_length", "batch_size", "num_layers", "max_memory"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_one_of("precision", self.precision, PRECISIONS)
        require_one_of("weights", self.weights, WEIGHTS_MODES)
        if self.quantize:
            self._require_compute(self.quantize)

    def _require_compute(self, quantize: QuantizeOptions) -> None:
        """Refuse a dtype that the quantised graph cannot compute in."""
        if self.precision in quantize.form.compute:
            return
        engines = " and ".join(ENGINE_TITLES[engine] for engine in quantize.form.engines)
        other = next((form for form in quantize.spec.forms if self.precision in form.compute), None)
        raise OptionError(
            f"{quantize.scheme} for {engines} computes in {' or '.join(quantize.form.compute)}, got {self.precision}: "
            f"leave compute out{f', or give engine {other.engines[0]}' if other else ''}",
            fields=("compute", "engine"),
        )


def require_linkable(options: BuildOptions, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse to link where every weight would have to be changed.

    Raises:
        OptionError: no tensor has the engine's dtype, or the weights are to be quantised.
    """
    if options.quantize is not None:
        raise OptionError(
            f"no weight can be linked at --precision {options.quantize.scheme}, which stores them rounded: "
            "leave --weights out"
        )
    if not any(is_linkable(info, options.precision) for info in tensors.values()):
        raise OptionError(
            f"no weight can be linked at --precision {options.precision}, which takes "
            f"{ENGINE_DTYPE[options.precision]}: the checkpoint holds "
            f"{', '.join(sorted({info.dtype for info in tensors.values()}))}; use --weights copy, or the precision "
            "that it has"
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options with every default settled for one checkpoint."""

    block_size: int
    max_length: int
    batch_size: int
    precision: Precision
    trained_with: TrainedWith | None
    geometry: Geometry
    fixed: FixedShapes | None


def settle(options: BuildOptions, checkpoint: Checkpoint) -> Settings:
    trained_with = options.trained_with or checkpoint.trained_with
    trained_block = trained_with.block_size if trained_with else DEFAULT_BLOCK_SIZE
    block_size = options.block_size or trained_block
    limit = int(checkpoint.config.max_position_embeddings)
    max_length = options.max_length or default_max_length(checkpoint.config)
    if max_length < MIN_MAX_LENGTH:
        raise OptionError(f"--max-length must be at least {MIN_MAX_LENGTH}, a prompt token and a new one")
    if max_length > limit:
        raise OptionError(f"--max-length {max_length} is beyond the model's own {limit} positions")
    if block_size > max_length:
        origin = "--block-size" if options.block_size else "the block size it was trained with,"
        raise OptionError(f"{origin} {block_size} is above the max length {max_length}; choose a smaller --block-size")
    max_block_size = block_size if options.fixed_shapes else max(block_size, MIN_MAX_BLOCK_SIZE)
    geometry = geometry_of(checkpoint.config, max_length=max_length, max_block_size=max_block_size)
    fixed = (
        FixedShapes(batch_size=options.batch_size, block_size=block_size, kv_extent=geometry.cache_length)
        if options.fixed_shapes
        else None
    )
    return Settings(
        block_size=block_size,
        max_length=max_length,
        batch_size=options.batch_size,
        precision=options.precision,
        trained_with=trained_with,
        geometry=geometry,
        fixed=fixed,
    )
