"""The static KV cache: its buffers, and the KV length that a forward reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from cllm_export.bundle.contract import KV_DTYPE, DType, Geometry, Precision, cache_names
from cllm_export.errors import EngineError
from cllm_export.runtime.engines.base import KvRows

MIN_KV_LENGTH_STEP = 16
SMALLEST_GRAPH_KV_LENGTH = 256

T = TypeVar("T")


def kv_length_bucket(needed: int, cache_length: int) -> int:
    """The smallest bucket S that holds ``needed`` rows. From 128 rows on, it is at most an eighth larger than needed.

    The cost of attention, and of the slices before it, grows with S. So S should be close to ``needed``: on the demo
    model, 64 unneeded rows make a one-token forward 8 % slower. Each bucket needs a binding, which is made once.
    """
    step = max(MIN_KV_LENGTH_STEP, 1 << max(0, needed.bit_length() - 4))
    return min(-(-needed // step) * step, cache_length)


def graph_kv_length(needed: int, cache_length: int) -> int:
    """The bucket S that holds ``needed`` rows if each bucket needs a recorded graph. Buckets double from 256."""
    return min(max(SMALLEST_GRAPH_KV_LENGTH, 1 << (needed - 1).bit_length()), cache_length)


def allocate(
    geometry: Geometry, precision: Precision, num_slots: int, make: Callable[[tuple[int, ...], DType], T]
) -> dict[str, T]:
    """Buffers [B, K, C, D] by past name. ``make`` must zero them: a NaN in a dead row would leak, as 0 * NaN is NaN."""
    shape = (num_slots, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)
    return {past: make(shape, KV_DTYPE[precision]) for past, _ in cache_names(geometry.num_layers)}


def check_row_shape(rows: KvRows, count: int, *, geometry: Geometry, dtype: np.dtype[np.generic]) -> None:
    """Check rows before they are written into a cache of this geometry and dtype.

    Raises:
        EngineError: they are not ``count`` rows of such a cache.
    """
    expected = (2 * geometry.num_layers, geometry.num_kv_heads, count, geometry.head_dim)
    if rows.shape != expected or rows.dtype != dtype:
        raise EngineError(f"this engine takes rows {list(expected)} of {dtype}, got {list(rows.shape)} of {rows.dtype}")
