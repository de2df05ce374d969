"""The static KV cache: its buffers, and how much of it a forward reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.contract import KV_DTYPE, Geometry, Precision, cache_names
from cllm_export.errors import EngineError
from cllm_export.runtime.engines.base import KvRows

MIN_EXTENT_STEP = 16


def kv_extent(needed: int, cache_length: int) -> int:
    """The bucket S that holds ``needed`` rows, and at most an eighth more from 128 rows on.

    Attention and the slices before it cost what S says, needed or not, so S should be little above it: on the demo
    model, 64 rows too many cost a one-token forward 8 %. Each bucket costs a binding, made once.
    """
    step = max(MIN_EXTENT_STEP, 1 << max(0, needed.bit_length() - 4))
    return min(-(-needed // step) * step, cache_length)


def allocate(geometry: Geometry, precision: Precision, num_slots: int) -> dict[str, NDArray[np.generic]]:
    """Zeroed buffers [B, K, C, D] by past name. Zeroed once: a NaN in a dead row would leak, 0 * NaN being NaN."""
    shape = (num_slots, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)
    dtype = np.dtype(KV_DTYPE[precision])
    return {past: np.zeros(shape, dtype) for past, _ in cache_names(geometry.num_layers)}


def check_row_shape(rows: KvRows, count: int, *, geometry: Geometry, dtype: np.dtype[np.generic]) -> None:
    """Check rows that are to be put into a cache of this geometry and dtype.

    Raises:
        EngineError: they are not ``count`` rows of it.
    """
    expected = (2 * geometry.num_layers, geometry.num_kv_heads, count, geometry.head_dim)
    if rows.shape != expected or rows.dtype != dtype:
        raise EngineError(f"this engine takes rows {list(expected)} of {dtype}, got {list(rows.shape)} of {rows.dtype}")
