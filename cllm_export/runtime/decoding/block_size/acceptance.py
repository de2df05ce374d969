"""A(n): how many tokens a forward of block size n makes known, learned from requests of one kind.

A table over sizes, since none follows from another: a window's tail is refined while it waits, so a wide window does
better in its first rows than a narrow one. Two bounds hold nearly: a wider window is no worse, and its further rows
are no better than its first ones. Between and beyond the sizes that were tried they say what may be hoped for.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

WINDOW = 300.0
"""Observations of a size that count, so that a table follows what it is asked."""
HALF_LIFE = 3000.0
"""Observations of a kind after which what is known of a size that was not tried meanwhile counts half."""
PRIOR_WEIGHT = 12.0
"""Observations that the guess from other sizes counts as."""
GROWTH = 2 / 3
"""The power of n - 1 that draft tokens are guessed to grow with beyond the largest size that was tried."""
DOUBT = 1.5
"""Standard errors by which a mean may be too low."""
REFRESHED_EVERY = 16
"""Observations after which a table's estimates are made anew."""
SLOT_WEIGHT = 8.0
"""Draft tokens that the kind's own rate counts as, beside those of a request."""
TRUST, TRUSTED_REQUESTS = 0.35, 2.0
"""Share of its drafts that a tuned model is trusted to get right, and as many requests' worth of it."""
COUNTED_PER_REQUEST = 3.0
"""Observations of one request that count as independent: requests differ more than forwards of one do."""
MANY_POOR = 6
"""Requests in a row with less than half of the draft tokens expected, after which the table is halved: so many tell
that all sizes have become worse, which each by itself would learn slowly."""
SLOT_MEMORY = 0.93
"""What a request's forwards count at each later one."""


class DraftTable:
    """Draft tokens accepted in a forward, A(n) - 1, by block size.

    Args:
        sizes: the block sizes that may be used, ascending.
        trained: the size that a model was tuned for, if it was: it begins with trust in that one.
    """

    def __init__(self, sizes: Sequence[int], *, trained: int = 1) -> None:
        self._all_sizes = tuple(sizes)
        self._sizes = [size for size in sizes if size > 1]
        self._arms = {size: _Arm() for size in self._sizes}
        if trained in self._arms:
            self._arms[trained].trust((trained - 1) * TRUST)
        self._clock = 0.0
        self._latest: DraftRecord | None = None
        self._num_poor = 0
        self._means: dict[int, float] = {}
        self._bounds: dict[int, float] = {}
        self._estimates: tuple[list[float], list[float]] | None = None
        self._stale_at = 0.0

    def begin(self, record: DraftRecord) -> None:
        """A request of the kind begins; what the one before it came to may say that times have changed."""
        is_poor = self._latest is not None and self._latest.ratio < 0.5
        self._latest, self._num_poor = record, self._num_poor + 1 if is_poor else 0
        if self._num_poor >= MANY_POOR:
            self._num_poor = 0
            for arm in self._arms.values():
                arm.halve()
            self._means.clear()

    def pass_by(self) -> None:
        """A forward told nothing, but what is known gets older."""
        self._clock += 1
        if self._clock >= self._stale_at:
            self._means.clear()

    def observe(self, size: int, accepted: int, ratio: float, *, is_new: bool = True) -> None:
        """A request whose drafts do ``ratio`` times as well as the table says had ``accepted`` draft tokens right.

        ``is_new`` where it was not seen at this size just before.
        """
        arm = self._arms.get(size)
        if arm is None:
            return
        self._clock += 1
        arm.fade(self._clock)
        arm.add(accepted, ratio, is_new=is_new)
        if self._clock >= self._stale_at or arm.count < REFRESHED_EVERY / 2:
            self._means.clear()

    def estimates(self) -> tuple[list[float], list[float]]:
        """``mean`` and ``bound`` of every size, in order; not to be changed."""
        if not self._means or self._estimates is None:
            self._refresh()
            means = [self._means.get(size, 0.0) for size in self._all_sizes]
            self._estimates = means, [self._bounds.get(size, 0.0) for size in self._all_sizes]
        return self._estimates

    def mean(self, size: int) -> float:
        """Draft tokens that a forward is expected to accept; 0 at a size of 1."""
        self._refresh()
        return self._means.get(size, 0.0)

    def bound(self, size: int) -> float:
        """Draft tokens that it may well accept, for all that is known."""
        self._refresh()
        return self._bounds.get(size, 0.0)

    def _refresh(self) -> None:
        if self._means or not self._sizes:
            return
        self._estimates = None
        self._stale_at = self._clock + REFRESHED_EVERY
        for arm in self._arms.values():
            arm.fade(self._clock)
        tried = [size for size in self._sizes if self._arms[size].count >= 1]
        for size in self._sizes:
            self._means[size] = self._mean(size, tried)
        own = {size: self._means[size] + self._arms[size].error(size) for size in tried}
        for size in self._sizes:
            hopes = [hope * max(1.0, (size - 1) / (other - 1)) for other, hope in own.items()]
            self._bounds[size] = max(self._means[size], min([float(size - 1), *hopes]))

    def _mean(self, size: int, tried: Sequence[int]) -> float:
        arm, guess = self._arms[size], self._guess(size, [other for other in tried if other != size])
        if arm.count < 1:
            return guess
        return (arm.accepted + PRIOR_WEIGHT * guess) / (arm.expected + PRIOR_WEIGHT) if tried != [size] else arm.mean

    def _guess(self, size: int, tried: Sequence[int]) -> float:
        """From the sizes beside it: on the line between two, in proportion below all, by less than that above."""
        below = max((other for other in tried if other < size), default=None)
        above = min((other for other in tried if other > size), default=None)
        if below is None:
            return 0.0 if above is None else self._arms[above].mean * (size - 1) / (above - 1)
        low = self._arms[below].mean
        if above is None:
            return float(low * ((size - 1) / (below - 1)) ** GROWTH)
        return low + (max(self._arms[above].mean, low) - low) * (size - below) / (above - below)


class _Arm:
    """What is known of one size: decayed sums of draft tokens accepted and of what the requests' ratios say."""

    __slots__ = ("_requests", "_seen_at", "accepted", "count", "expected", "squares")

    def __init__(self) -> None:
        self.count = self.expected = self.accepted = self.squares = self._requests = self._seen_at = 0.0

    def trust(self, mean: float) -> None:
        """Begin as if some requests had been seen."""
        self._requests = TRUSTED_REQUESTS
        self.count = self.expected = TRUSTED_REQUESTS * COUNTED_PER_REQUEST
        self.accepted, self.squares = self.count * mean, self.count * mean * mean

    @property
    def mean(self) -> float:
        return self.accepted / self.expected if self.expected else 0.0

    def add(self, accepted: int, ratio: float, *, is_new: bool) -> None:
        self.count += 1
        self._requests += is_new
        self.expected += ratio
        self.accepted += accepted
        self.squares += accepted * accepted
        if self.count > WINDOW:
            self._scale(WINDOW / self.count)

    def halve(self) -> None:
        """Half of it was no longer true."""
        self.accepted /= 2
        self.squares /= 4

    def fade(self, clock: float) -> None:
        if clock > self._seen_at + 1:
            self._scale(0.5 ** ((clock - self._seen_at) / HALF_LIFE))
        self._seen_at = clock

    def error(self, size: int) -> float:
        """By how much the mean may be too low; a size of few observations may have had bad luck in all of them."""
        unlucky = ((size - 1) / 2) ** 2
        count = min(self.count, COUNTED_PER_REQUEST * self._requests + 1)
        variance = max(0.0, self.squares - self.accepted * self.accepted / self.count) / self.count
        return DOUBT * sqrt((variance * count + unlucky) / (count + 1) / count)

    def _scale(self, factor: float) -> None:
        self.count *= factor
        self._requests *= factor
        self.expected *= factor
        self.accepted *= factor
        self.squares *= factor


class DraftRecord:
    """How one request's drafts do against what its kind's do.

    Args:
        kind: of its drafts; None for a request that takes none.
        with_logits: whether its forwards fetch logits, which takes longer the more rows there are.
    """

    __slots__ = ("_accepted", "_expected", "_seen_at", "_size", "kind", "with_logits")

    def __init__(self, kind: str | None, *, with_logits: bool = False) -> None:
        self.kind = kind
        self.with_logits = with_logits
        self._accepted = self._expected = 0.0
        self._size = self._seen_at = 0

    @property
    def ratio(self) -> float:
        """Draft tokens accepted / those that the table expects, near 1 while little is known of the request."""
        return (SLOT_WEIGHT + self._accepted) / (SLOT_WEIGHT + self._expected)

    def observe(self, size: int, accepted: int, table: DraftTable) -> None:
        """A forward of this size accepted so many draft tokens. What a window has just grown by has not settled."""
        if not self._size:
            table.begin(self)
        has_grown, is_first = self._size < size, not self._size
        self._size = size
        if size == 1 or (has_grown and not is_first):
            table.pass_by()
            return
        table.observe(size, accepted, self.ratio, is_new=self._seen_at != size)
        self._seen_at = size
        if is_first:  # drafts that nobody has refined yet say little of those to come
            return
        self._accepted = self._accepted * SLOT_MEMORY + accepted
        self._expected = self._expected * SLOT_MEMORY + table.mean(size)
