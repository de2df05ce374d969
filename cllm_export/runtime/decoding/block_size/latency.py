"""T(n): what a forward of block size n takes against one of another, learned from the forwards themselves.

Numbers alone: seconds come in, no clock is read and no forward is made for it. What counts is the ratio of one size to
another, because a machine that others share is now fast and now slow: a size's time is therefore taken against the
level that the forwards just before it had, never against a time taken minutes ago.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from math import sqrt
from statistics import median

NUM_SAMPLES = 45
"""Samples of a size that its median is taken over, the last ones."""
NUM_KNOWN = 8
"""Samples that a time measured beforehand counts as."""
DOUBT = 2.5
"""Quarters of the samples' spread, over the root of their number, by which a median may be too high."""
NUM_COMPARED = 5
"""Forwards after a change of size whose times tell the two sizes' ratio; the first of them warms up and tells none."""
LEVEL_WEIGHT, MAX_SURPRISE = 0.06, 1.25
"""How fast the level follows, and by what factor one forward may surprise it: one that the system interrupted took ten
times as long and means nothing."""
ASSUMED_GROWTH = 0.1
"""T(n) / T(1) - 1 for each further token, where nothing is known: any guess does until a size has been tried."""


class ForwardTimes:
    """T(n) relative to itself at other sizes, for one engine, batch size and kind of forward.

    Args:
        known: seconds (or any unit) of a forward by block size, measured beforehand; may be empty.
    """

    def __init__(self, known: Mapping[int, float] | None = None) -> None:
        self._samples: dict[int, deque[float]] = {
            size: deque([seconds] * (NUM_KNOWN), NUM_SAMPLES) for size, seconds in (known or {}).items()
        }
        self._level: float | None = None
        """Seconds that a forward takes now for each unit of ``relative``."""
        self._size = 0
        self._num_since = 0
        self._relative: dict[int, float] = {}
        self._bounds: dict[int, float] = {}
        self._estimates: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}

    def observe(self, size: int, seconds: float) -> None:
        """A forward of block size ``size`` took this long; a time of 0 is none."""
        if seconds <= 0:
            return
        if self._level is None:
            self._size, self._level = size, seconds / self.relative(size)
            self._add(size, seconds / self._level)
            return
        if size != self._size:
            self._size, self._num_since = size, 0
        self._num_since += 1
        if 1 < self._num_since <= NUM_COMPARED:
            self._add(size, seconds / self._level)
        if size in self._samples and self._num_since > 1:
            surprise = seconds / (self._level * self.relative(size))
            self._level *= min(max(surprise, 1 / MAX_SURPRISE), MAX_SURPRISE) ** LEVEL_WEIGHT

    def estimates(self, sizes: tuple[int, ...]) -> tuple[list[float], list[float]]:
        """``relative`` and ``bound`` of each size; not to be changed."""
        found = self._estimates.get(sizes)
        if found is None:
            found = self._estimates[sizes] = (
                [self.relative(size) for size in sizes],
                [self.bound(size) for size in sizes],
            )
        return found

    def relative(self, size: int) -> float:
        """T(size) in a unit that all sizes share; a size that was never tried lies between those that were."""
        found = self._relative.get(size)
        if found is None:
            found = self._relative[size] = self._estimate(size)
        return found

    def bound(self, size: int) -> float:
        """What ``relative`` may be at the least: no smaller size takes longer, no row of a larger one costs more."""
        found = self._bounds.get(size)
        if found is None:
            found = self._bounds[size] = self._least(size)
        return found

    def _least(self, size: int) -> float:
        if size in self._samples:
            samples = sorted(self._samples[size])
            middle = self.relative(size)
            return middle - DOUBT * (middle - samples[len(samples) // 4]) / sqrt(len(samples))
        below = max((other for other in self._samples if other < size), default=None)
        above = min((other for other in self._samples if other > size), default=None)
        least = 0.0 if below is None else self.relative(below)
        proportional = least if above is None else self.relative(above) * size / above
        return max(least, proportional) or self.relative(size)

    def _add(self, size: int, sample: float) -> None:
        self._samples.setdefault(size, deque(maxlen=NUM_SAMPLES)).append(sample)
        self._relative.clear()
        self._bounds.clear()
        self._estimates.clear()

    def _estimate(self, size: int) -> float:
        if size in self._samples:
            return median(self._samples[size])
        sizes = sorted(self._samples)
        if not sizes:
            return 1 + ASSUMED_GROWTH * (size - 1)
        index = bisect_left(sizes, size)
        if not 0 < index < len(sizes):
            nearest = sizes[min(index, len(sizes) - 1)]
            return self.relative(nearest) * (1 + ASSUMED_GROWTH * (size - 1)) / (1 + ASSUMED_GROWTH * (nearest - 1))
        below, above = sizes[index - 1], sizes[index]
        low, high = self.relative(below), max(self.relative(below), self.relative(above))
        return low + (high - low) * (size - below) / (above - below)
