"""The static KV cache: its buffers, and how much of it a forward reads."""

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
    """The bucket S that holds ``needed`` rows, and at most an eighth more from 128 rows on.

    Attention and the slices before it cost what S says, needed or not, so S should be little above it: on the demo
    model, 64 rows too many cost a one-token forward 8 %. Each bucket costs a binding, made once.
    """
    step = max(MIN_KV_LENGTH_STEP, 1 << max(0, needed.bit_length() - 4))
    return min(-(-needed // step) * step, cache_length)


def graph_kv_length(needed: int, cache_length: int) -> int:
    """The bucket S that holds ``needed`` rows where each bucket costs a recorded graph: they double from 256."""
    return min(max(SMALLEST_GRAPH_KV_LENGTH, 1 << (needed - 1).bit_length()), cache_length)


def allocate(
    geometry: Geometry, precision: Precision, num_slots: int, make: Callable[[tuple[int, ...], DType], T]
) -> dict[str, T]:
    """Buffers [B, K, C, D] by past name. ``make`` zeroes them: a NaN in a dead row would leak, 0 * NaN being NaN."""
    shape = (num_slots, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)
    return {past: make(shape, KV_DTYPE[precision]) for past, _ in cache_names(geometry.num_layers)}


def check_row_shape(rows: KvRows, count: int, *, geometry: Geometry, dtype: np.dtype[np.generic]) -> None:
    """Check rows that are to be put into a cache of this geometry and dtype.

    Raises:
        EngineError: they are not ``count`` rows of it.
    """
    expected = (2 * geometry.num_layers, geometry.num_kv_heads, count, geometry.head_dim)
    if rows.shape != expected or rows.dtype != dtype:
        raise EngineError(f"this engine takes rows {list(expected)} of {dtype}, got {list(rows.shape)} of {rows.dtype}")
