"""T(n): what a forward of block size n takes against one of another, learned from the forwards themselves.

Numbers alone: seconds come in, no clock is read and no forward is made for it. A machine that others share is now fast
and now slow. So a size's time is taken against those of the forwards just before it, never against one taken minutes
ago.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Mapping

SPELL = 8
"""Forwards that a size is held, because a window that has grown needs some to settle. Their times are taken against
those of the size before."""
NUM_SAMPLES = 2 * SPELL
"""Forwards whose least time counts. It is of one that nobody interrupted, as on a busy machine half of them are; over
more forwards the machine itself becomes faster or slower."""


class ForwardTimes:
    """T(n) relative to itself at other sizes, for one engine, batch size and kind of forward.

    Args:
        known: seconds (or any unit) of a forward by block size, measured beforehand; may be empty.
    """

    def __init__(self, known: Mapping[int, float] | None = None) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._relative = dict(known or {1: 1.0})
        self._found: dict[int, float] = {}
        """What ``relative`` said since it last changed."""
        self._levels: deque[float] = deque(maxlen=NUM_SAMPLES)
        """Seconds of the last forwards for each unit of ``relative``."""
        self._size = self._num_since = 0
        self._level: float | None = None

    def observe(self, size: int, seconds: float) -> None:
        """A forward of block size ``size`` took this long; a time of 0 is none. Those before the first of size 1 tell
        nothing: its time is the one that others are taken against."""
        if seconds <= 0 or (size > 1 and not self._levels):
            return
        if size != self._size:
            self._size, self._num_since = size, 0
            self._level = min(self._levels, default=None)
        self._num_since += 1
        if self._num_since == 1:  # it warms up
            return
        if self._num_since <= SPELL and self._level is not None:
            samples = self._samples.setdefault(size, deque(maxlen=NUM_SAMPLES))
            samples.append(seconds / self._level)
            self._relative[size] = min(samples)
            self._found.clear()
        self._levels.append(seconds / self.relative(size))

    @property
    def largest(self) -> int:
        """The largest size that was timed, beforehand or since."""
        return max(self._relative)

    def relative(self, size: int) -> float:
        """T(size) in a unit that all sizes share: no more than that of a larger one. A size never seen lies on the line
        through those beside it; where only one was seen, each row takes as long as each of its. Forwards that ran here
        bound what was known beforehand, and not the reverse."""
        if size not in self._found:
            ran = size in self._samples
            own = self._relative[size] if size in self._relative else self._guess(size)
            larger = (t for other, t in self._relative.items() if other > size and (other in self._samples or not ran))
            smaller = (self.relative(other) for other in self._samples if other < size and not ran)
            self._found[size] = max([min([own, *larger]), *smaller])
        return self._found[size]

    def _guess(self, size: int) -> float:
        known = sorted(self._relative)
        if len(known) < 2 or size < known[0]:
            return self._relative[known[0]] * size / known[0]
        index = min(bisect(known, size), len(known) - 1)
        low, high = known[index - 1], known[index]
        slope = max(0.0, self._relative[high] - self._relative[low]) / (high - low)
        return self._relative[low] + slope * (size - low)

    def least(self, size: int) -> float:
        """What ``relative`` may well be: as if one forward had taken what was assumed at first, and one no time."""
        num_seen = len(self._samples.get(size, ()))
        return self.relative(size) * (num_seen + 1) / (num_seen + 2)
