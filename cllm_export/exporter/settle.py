"""Settles the options of a build for one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cllm_export.bundle.contract import FixedShapes, Geometry, Precision
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.checkpoint.read import Checkpoint, default_max_length
from cllm_export.exporter.graph.trace import geometry_of
from cllm_export.exporter.options import BuildOptions, require_lengths
from cllm_export.exporter.weights.weights import ENGINE_DTYPE, is_linkable

DEFAULT_BLOCK_SIZE = 16

MIN_MAX_BLOCK_SIZE = 64
"""The cache of every bundle with symbolic shapes has room for decode forwards of up to this many tokens."""


def require_linkable(options: BuildOptions, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse to link weights if every weight would have to change.

    Raises:
        OptionError: no tensor has the engine's dtype, or the weights are to be quantised.
    """
    if options.quantize is not None:
        raise OptionError(
            f"no weight can be linked at scheme='{options.quantize.scheme}', which stores them rounded: "
            "leave weights='link' out"
        )
    if not any(is_linkable(info, options.precision) for info in tensors.values()):
        raise OptionError(
            f"no weight can be linked at precision='{options.precision}', which takes "
            f"{ENGINE_DTYPE[options.precision]}: the checkpoint holds "
            f"{', '.join(sorted({info.dtype for info in tensors.values()}))}; use weights='copy', or the precision "
            "that it has"
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options for one checkpoint, with every default filled in."""

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
    require_lengths(options, max_length=max_length, limit=limit, trained_block=block_size)
    max_block_size = block_size if options.fixed_shapes else max(block_size, MIN_MAX_BLOCK_SIZE)
    geometry = geometry_of(checkpoint.config, max_length=max_length, max_block_size=max_block_size)
    fixed = (
        FixedShapes(batch_size=options.batch_size, block_size=block_size, kv_length=geometry.cache_length)
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
