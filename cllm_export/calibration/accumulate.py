"""Statistics of one value of a graph, collected row by row, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.scales import HIGH_SHARE, FloatArray

GRAM_ROWS = 256
"""Rows multiplied at once. The [in, in] matrix is read and written once for this many rows."""


class Accumulator:
    """Range and mean of each channel of one value [rows, in]. Merging parts in the same order gives the same bits.

    Args:
        width: in.
        num_largest: number of largest magnitudes kept per channel. It must suffice for ``high`` of all rows.
    """

    def __init__(self, width: int, num_largest: int) -> None:
        self.num_rows = 0
        self._num_largest = num_largest
        self._largest: FloatArray = np.zeros((0, width), np.float32)
        self._sum_abs = np.zeros(width, np.float64)
        self._low = np.full(width, np.inf, np.float32)
        self._high = np.full(width, -np.inf, np.float32)

    def add(self, rows: FloatArray) -> None:
        """Add finite rows [m, in]."""
        magnitudes = np.abs(rows)
        self.num_rows += len(rows)
        self._sum_abs += magnitudes.sum(axis=0, dtype=np.float64)
        self._keep_largest(magnitudes)
        self._low = np.minimum(self._low, rows.min(axis=0))
        self._high = np.maximum(self._high, rows.max(axis=0))

    def merge(self, other: Accumulator) -> None:
        """Add the rows of another accumulator."""
        self.num_rows += other.num_rows
        self._sum_abs += other._sum_abs
        self._keep_largest(other._largest)
        self._low, self._high = np.minimum(self._low, other._low), np.maximum(self._high, other._high)

    @property
    def amax(self) -> FloatArray:
        """Largest magnitude of each channel."""
        largest: FloatArray = self._largest.max(axis=0)
        return largest

    @property
    def high(self) -> FloatArray:
        """Bound that each channel's magnitude keeps in ``HIGH_SHARE`` of the rows. With few rows it equals ``amax``."""
        above = num_above(self.num_rows)
        found: FloatArray = np.sort(self._largest, axis=0)[len(self._largest) - 1 - above]
        return found

    @property
    def mean_abs(self) -> FloatArray:
        """Mean magnitude of each channel."""
        return (self._sum_abs / self.num_rows).astype(np.float32)

    @property
    def is_constant(self) -> bool:
        """Whether every row was the same."""
        return bool((self._low == self._high).all())

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The whole state as arrays, for a file."""
        return {
            "num_rows": np.int64(self.num_rows),  # type: ignore[dict-item]
            "largest": self._largest,
            "sum_abs": self._sum_abs,
            "low": self._low,
            "high": self._high,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], num_largest: int) -> Accumulator:
        """Restore the state from the result of ``to_arrays``."""
        found = cls(arrays["sum_abs"].shape[0], num_largest)
        found.num_rows = int(arrays["num_rows"])
        found._largest, found._sum_abs = arrays["largest"], arrays["sum_abs"]
        found._low, found._high = arrays["low"], arrays["high"]
        return found

    def _keep_largest(self, magnitudes: FloatArray) -> None:
        candidates = np.concatenate([self._largest, magnitudes])
        surplus = len(candidates) - self._num_largest
        self._largest = np.partition(candidates, surplus, axis=0)[surplus:] if surplus > 0 else candidates


class GramAccumulator:
    """Sum of x x^T of one value, in float32, for rows x that are divided by their root mean square.

    So every row counts alike. In pre-trained models a few rows, such as that of a text's first token, are a hundred
    times as large as others. They would decide how GPTQ rounds. Sums of many rows add no relevant error either.
    """

    def __init__(self, width: int) -> None:
        self._gram = np.zeros((width, width), np.float32)
        self._waiting: list[FloatArray] = []
        self._num_waiting = 0

    def add(self, rows: FloatArray) -> None:
        """Add rows [m, in]."""
        self._waiting.append(np.array(rows))
        self._num_waiting += len(rows)
        if self._num_waiting >= GRAM_ROWS:
            self._flush()

    def result(self) -> FloatArray:
        """The sum so far, [in, in]."""
        self._flush()
        return self._gram

    def _flush(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting)
            rows /= np.maximum(np.sqrt(np.square(rows).mean(axis=1, keepdims=True)), np.finfo(np.float32).tiny)
            self._gram += rows.T @ rows
            self._waiting, self._num_waiting = [], 0


def num_above(num_rows: int) -> int:
    """How many of ``num_rows`` rows may exceed ``high``."""
    return int(num_rows * (1 - HIGH_SHARE))
