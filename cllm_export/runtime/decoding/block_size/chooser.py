"""Which n the next forward has: the one that makes most tokens a second of the whole batch, n = 1 included.

Policy over numbers alone: no clock, no engine, no random numbers, so the same observations give the same choices.

Two bounds say what drafts are worth at each n: what is proven chooses n, what may be hoped for says which other sizes
are worth a trial. Where nothing was seen, drafts prove nothing, and n is 1. A trial is paid for, at its worst, from a
small part of all time. What was seen is forgotten by and by, so the bounds part again: a size that lost is tried again,
rarely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from cllm_export.runtime.decoding.block_size.latency import SPELL, ForwardTimes

BLOCK_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Sizes worth a try; a model's own is one more."""
MEMORY = 300
"""Forwards after which what was seen of a kind of drafts counts 1 / e: those of many requests, for requests differ."""
TRIAL = SPELL // 2
"""Forwards of a trial. The first one fills the window, and the others tell what drafts are worth."""
TRIAL_SHARE, PAYING_TRIAL_SHARE = 0.005, 0.01
"""Part of all time that trials may cost, which is what a model loses whose drafts never pay. The larger part is for a
model that was tuned for several tokens, and while drafts pay: there, trials win more."""
FIRST_CREDIT = 0.8
"""What the first trials may cost, in forwards of n = 1. Within 64 tokens it is 1.3 %. Unspent credit grows no larger,
unless a trial that would be of use costs more: so no history makes the next tokens dear."""


class SizePolicy(Protocol):
    """Says n, forward by forward, and hears what came of it."""

    def choose(self, records: Sequence[DraftRecord]) -> int:
        """n of the next forward for the slots that decode in it, at least one."""
        ...

    def observe(self, size: int, seconds: float, accepted: Sequence[tuple[DraftRecord, int]]) -> None:
        """A forward of size n took this long, and made so many tokens known in each slot that decoded in it."""
        ...


class PinnedSize:
    """One n for every forward."""

    def __init__(self, size: int) -> None:
        self._size = size

    def choose(self, records: Sequence[DraftRecord]) -> int:
        return self._size

    def observe(self, size: int, seconds: float, accepted: Sequence[tuple[DraftRecord, int]]) -> None:
        """Nothing to learn."""


class SizeChooser:
    """Learns T(n) and what drafts of each kind are worth, and chooses; one for an engine, over all its requests.

    Args:
        sizes: the block sizes that may be used; 1 is always one of them.
        first: the size that a model was trained with, or 1. It is what to begin with; a spell at 1 and another of it
            follow, and tell what its forwards take against those at 1.
        known_times: seconds (or any unit) of a forward by block size, measured beforehand; may be empty.
    """

    def __init__(self, sizes: Sequence[int], *, first: int = 1, known_times: Mapping[int, float] | None = None) -> None:
        self._sizes = tuple(sorted({1, first, *sizes}))
        self._first = first
        self._size = 1
        self._times_of = {with_logits: ForwardTimes(known_times) for with_logits in (False, True)}
        start = (first, 1, first) if first > 1 else (1,)
        self._spells_of = {with_logits: list(start) for with_logits in self._times_of}
        """What to begin with, for each kind of forward."""
        self._times = self._times_of[False]
        self._tables: dict[str, DraftTable] = {}
        self._records: tuple[DraftRecord, ...] = ()
        self._num_left, self._is_trial, self._is_paid = 0, False, False
        self._credit = 0.0 if first > 1 else FIRST_CREDIT * self._times.relative(1)
        """Time that trials may cost, in the unit of ``ForwardTimes.relative``."""
        self._wanted = 0.0
        """Cost of the cheapest trial that would be of use and is not paid for yet: what credit is saved for."""
        self._best, self._best_rate = 1, 0.0

    def choose(self, records: Sequence[DraftRecord]) -> int:
        self._times = self._times_of[any(record.with_logits for record in records)]
        if not self._num_left or (tuple(records) != self._records and not self._is_trial):
            self._begin(records)
        self._num_left -= 1
        return self._size

    def observe(self, size: int, seconds: float, accepted: Sequence[tuple[DraftRecord, int]]) -> None:
        self._times.observe(size, seconds)
        time = self._times.relative(size)
        for record, count in accepted:
            if record.kind is not None:
                record.observe(size, count - 1, self._table(record.kind))
        share = PAYING_TRIAL_SHARE if max(self._first, self._best) > 1 else TRIAL_SHARE
        ceiling = max(FIRST_CREDIT * self._times.relative(1), self._wanted)
        self._credit = min(self._credit + share * time, ceiling)
        if self._is_paid:
            self._credit -= time - sum(count for _, count in accepted) / self._best_rate
            if self._credit < 0 and size <= self._times.largest:  # it costs more than was assumed
                self._num_left = 0

    def _begin(self, records: Sequence[DraftRecord]) -> None:
        """A new spell: of the best size, or a trial of the one to hope most of among those that the credit covers."""
        self._records, self._num_left = tuple(records), SPELL
        spells = self._spells_of[any(record.with_logits for record in records)]
        has_drafts = any(record.kind is not None for record in records)
        if spells and has_drafts:
            self._size, self._is_trial, self._is_paid = spells.pop(), True, False
            return
        proven, hoped = self._tokens(records)
        times = {size: self._times.relative(size) for size in self._sizes}
        best = max(self._sizes, key=lambda size: proven[size] / times[size])
        self._best, self._best_rate = best, (rate := proven[best] / times[best])
        hopes = {size: hoped[size] / self._times.least(size) for size in self._sizes if size != best and has_drafts}
        costs = {
            size: TRIAL * (expected - proven[size] / rate)
            for size, expected in self._trial_times().items()
            if hopes.get(size, 0.0) > rate
        }
        self._wanted = (max if best > 1 else min)(costs.values(), default=0.0)
        trials = [size for size, cost in costs.items() if cost <= self._credit]
        self._size = max(trials, key=hopes.__getitem__, default=best)
        self._is_trial = self._is_paid = bool(trials)
        self._num_left = TRIAL if trials else SPELL

    def _trial_times(self) -> dict[int, float]:
        """Sizes that may be tried, and what a forward of each is expected to take.

        At most one size is larger than all that were timed. What it takes is unknown. So it is tried for the time of
        the largest one, and the trial ends as soon as it costs too much.
        """
        largest = self._times.largest
        beyond = [size for size in self._sizes if size > largest][:1]
        times = {size: self._times.relative(size) for size in self._sizes if size <= largest}
        return times | dict.fromkeys(beyond, self._times.relative(largest))

    def _tokens(self, records: Sequence[DraftRecord]) -> tuple[dict[int, float], dict[int, float]]:
        """Tokens that a forward makes in all slots, by size: as proven, and as may be hoped for."""
        proven, hoped = dict.fromkeys(self._sizes, 0.0), dict.fromkeys(self._sizes, 0.0)
        for record in records:
            bounds = self._table(record.kind).bounds() if record.kind is not None else {}
            for size in self._sizes:
                low, high = bounds.get(size, (0.0, 0.0))
                proven[size] += min(size, 1 + record.ratio * low)
                hoped[size] += min(size, 1 + max(1.0, record.ratio) * high)
        return proven, hoped

    def _table(self, kind: str) -> DraftTable:
        if kind not in self._tables:
            self._tables[kind] = DraftTable(self._sizes, trained=self._first)
        return self._tables[kind]


class DraftTable:
    """Draft tokens accepted in a forward, A(n) - 1, by block size, for drafts of one kind.

    No size's value follows from another's, since drafts are refined while they wait. But a wider window is no worse,
    and its further rows are no better than its first ones: so each size that was seen bounds the others.

    Args:
        sizes: the block sizes that may be used.
        trained: the size that a model was tuned for; 1 for none. It begins as if one forward had got all right.
    """

    def __init__(self, sizes: Sequence[int], *, trained: int = 1) -> None:
        self._sizes = [size for size in sizes if size > 1]
        self._forwards = dict.fromkeys(self._sizes, 0.0)
        self._accepted = dict.fromkeys(self._sizes, 0.0)
        self._num_unfaded = 0
        if trained > 1:
            self._forwards[trained], self._accepted[trained] = 1.0, trained - 1.0

    def observe(self, size: int, accepted: int, ratio: float) -> None:
        """A request whose drafts do ``ratio`` times as well as the kind's had ``accepted`` draft tokens right."""
        self._num_unfaded += 1
        if size > 1:
            self._fade()
            self._forwards[size] += ratio
            self._accepted[size] += accepted

    def mean(self, size: int) -> float:
        """Draft tokens accepted in a forward of this size so far; 0 where there was none."""
        return self._accepted[size] / self._forwards[size] if self._forwards.get(size) else 0.0

    def bounds(self) -> dict[int, tuple[float, float]]:
        """What is proven and what may be hoped for, by size: as if one forward more had been seen, that got none or all
        right."""
        self._fade()
        counts = [self._forwards[size] + 1 for size in self._sizes]
        low = [self._accepted[size] / count for size, count in zip(self._sizes, counts, strict=True)]
        high = [value + (size - 1) / count for size, count, value in zip(self._sizes, counts, low, strict=True)]
        return dict(zip(self._sizes, zip(*self._reconciled(low, high), strict=True), strict=True))

    def _fade(self) -> None:
        factor, self._num_unfaded = (1 - 1 / MEMORY) ** self._num_unfaded, 0
        for size in self._sizes:
            self._forwards[size] *= factor
            self._accepted[size] *= factor

    def _reconciled(self, low: list[float], high: list[float]) -> tuple[list[float], list[float]]:
        """What narrower and wider windows say of each: never fewer tokens than of a narrower one, nor more a row."""
        rows = [size - 1 for size in self._sizes]
        narrower = accumulate((value / count for value, count in zip(high, rows, strict=True)), min)
        wider = [*accumulate(reversed(high), min)][::-1]
        most = [min(a * count, b) for a, b, count in zip(narrower, wider, rows, strict=True)]
        wider = [*accumulate((value / count for value, count in zip(low[::-1], rows[::-1], strict=True)), max)][::-1]
        least = [max(a, b * count) for a, b, count in zip(accumulate(low, max), wider, rows, strict=True)]
        return [min(pair) for pair in zip(least, most, strict=True)], most


class DraftRecord:
    """How one request's drafts do against what its kind's do.

    Args:
        kind: of its drafts; None for a request that takes none.
        with_logits: whether its forwards fetch logits, which takes longer the more rows there are.
    """

    __slots__ = ("_accepted", "_expected", "_size", "kind", "with_logits")

    def __init__(self, kind: str | None, *, with_logits: bool = False) -> None:
        self.kind = kind
        self.with_logits = with_logits
        self._accepted = self._expected = float(SPELL)
        self._size = 0

    @property
    def ratio(self) -> float:
        """Draft tokens accepted / those that the kind's table expects, near 1 while little is known of the request."""
        return self._accepted / self._expected

    def observe(self, size: int, accepted: int, table: DraftTable) -> None:
        """A forward of this size accepted so many draft tokens. What a window has just grown by has not settled."""
        has_grown = 0 < self._size < size
        self._size = size
        if has_grown:
            return
        table.observe(size, accepted, self.ratio)
        if size > 1:
            self._accepted += (SPELL - self._accepted) / (2 * SPELL) + accepted
            self._expected += (SPELL - self._expected) / (2 * SPELL) + table.mean(size)
