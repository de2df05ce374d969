"""Which n the next forward has: the one that makes most tokens a second of the whole batch, n = 1 included.

Policy over numbers alone: no clock, no engine, no random numbers, so the same observations give the same choices. A
size is held for some forwards, because a window that has grown needs some to settle. Sizes that may be better are
tried as long as that stays cheap: what trying costs is booked, in time lost against the best size known, and may not
exceed a small part of all time. So a model that gains nothing from drafts decodes as if they were not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from cllm_export.runtime.decoding.block_size.acceptance import DraftRecord, DraftTable
from cllm_export.runtime.decoding.block_size.latency import ForwardTimes

BLOCK_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes worth a try; a model's own is one more."""
SPELL, LONG_SPELL = 6, 24
"""Forwards that a size is held before the next choice, and as many where 1 is chosen again and again: there nothing is
learned of drafts that could change the choice, and a forward is short."""
TRIAL = 8
"""Forwards of a trial."""
TRIAL_SHARE = 0.006
"""Part of all time that trials may cost."""
FIRST_CREDIT = 6.0
"""Forwards of the first size that trials may cost to begin with."""
MAX_CREDIT = 60.0
"""Such forwards that can be saved up, at most."""
FAVOUR_OF_ONE = 1.02
"""By what factor drafts must be expected to pay: less than that is within the error of what is known."""
FAVOUR_OF_TRAINED = 1.04
"""And by what factor the size that a model was trained with: tuning made it the best one, and what a few forwards say
of two neighbouring sizes is off by as much."""
WORTH_A_CHANGE = 1.02
"""Expected gain below which a size is kept."""


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


class _Rates(NamedTuple):
    """Tokens in a unit of time, by size: as expected, and as may well be."""

    expected: dict[int, float]
    possible: dict[int, float]


class SizeChooser:
    """Learns T(n) and what drafts of each kind are worth, and chooses; one for an engine, over all its requests.

    Args:
        sizes: the block sizes that may be used; 1 is always one of them.
        first: what to begin with: the size a model was trained with, or 1.
        known_times: seconds (or any unit) of a forward by block size, measured beforehand; may be empty.
    """

    def __init__(self, sizes: Sequence[int], *, first: int = 1, known_times: Mapping[int, float] | None = None) -> None:
        self._sizes = tuple(sorted({1, first, *sizes}))
        self._first = self._size = first
        self._times_of = {with_logits: ForwardTimes(known_times) for with_logits in (False, True)}
        self._times = self._times_of[False]
        self._tables: dict[str, DraftTable] = {}
        self._records: tuple[DraftRecord, ...] = ()
        self._num_left, self._spell = 0, SPELL
        self._is_trial = False
        self._trial_cost = self._best_rate = 0.0
        self._credit: float | None = None

    def choose(self, records: Sequence[DraftRecord]) -> int:
        if self._num_left <= 0 or (not self._is_trial and tuple(records) != self._records):
            self._settle_trial()
            self._records = tuple(records)
            self._times = self._times_of[any(record.with_logits for record in records)]
            self._begin(records)
        self._num_left -= 1
        return self._size

    def observe(self, size: int, seconds: float, accepted: Sequence[tuple[DraftRecord, int]]) -> None:
        self._times.observe(size, seconds)
        num_tokens = 0
        for record, count in accepted:
            num_tokens += count
            if record.kind is not None:
                record.observe(size, count - 1, self._table(record.kind))
        cost = self._times.relative(size)
        if self._credit is None:
            self._credit = FIRST_CREDIT * cost
        self._credit = min(self._credit + TRIAL_SHARE * cost, MAX_CREDIT * self._times.relative(self._first))
        if self._is_trial and self._best_rate:
            self._trial_cost += cost - num_tokens / self._best_rate

    def _settle_trial(self) -> None:
        if self._is_trial and self._credit is not None:
            self._credit -= self._trial_cost
        self._is_trial, self._trial_cost = False, 0.0

    def _begin(self, records: Sequence[DraftRecord]) -> None:
        """A new spell: of the best size, or a trial of another."""
        rates = self._rates(records)
        expected = rates.expected
        value = {size: expected[size] * self._favour(size) for size in self._sizes}
        best = max(self._sizes, key=value.__getitem__)
        if value[best] <= value[self._size] * WORTH_A_CHANGE:
            best = self._size
        self._best_rate = expected[best]
        trial = self._pick_trial(rates, best)
        self._is_trial = trial is not None
        stays_at_one = trial is None and best == self._size == 1
        self._spell = min(2 * self._spell, LONG_SPELL) if stays_at_one else SPELL
        self._size, self._num_left = (best, self._spell) if trial is None else (trial, TRIAL)

    def _favour(self, size: int) -> float:
        if size == 1:
            return FAVOUR_OF_ONE
        return FAVOUR_OF_TRAINED if size == self._first else 1.0

    def _pick_trial(self, rates: _Rates, best: int) -> int | None:
        """The cheapest trial of a size that may be better than the best known, where there is credit for it."""
        if self._credit is None:
            return None
        enough, rate = rates.expected[best] * WORTH_A_CHANGE, rates.expected[best]
        hopeful = [size for size in self._sizes if size != best and rates.possible[size] > enough]
        costs = {
            size: TRIAL * self._times.relative(size) * max(0.0, 1 - rates.expected[size] / rate) for size in hopeful
        }
        affordable = [size for size in hopeful if costs[size] <= self._credit]
        return min(affordable, key=lambda size: costs[size], default=None)

    def _rates(self, records: Sequence[DraftRecord]) -> _Rates:
        """Requests that take no drafts make one token a forward at any size."""
        expected_share: dict[str, float] = {}
        possible_share: dict[str, float] = {}
        for record in records:
            if record.kind is not None:
                ratio = record.ratio
                expected_share[record.kind] = expected_share.get(record.kind, 0.0) + ratio
                possible_share[record.kind] = possible_share.get(record.kind, 0.0) + max(1.0, ratio)
        times, least_times = self._times.estimates(self._sizes)
        means, bounds = self._sums(expected_share, possible_share)
        plain = len(records)
        expected, possible = {}, {}
        for size, time, least_time, mean, bound in zip(self._sizes, times, least_times, means, bounds, strict=True):
            most = plain * size
            expected[size] = (plain + mean if plain + mean < most else most) / time
            possible[size] = (plain + bound if plain + bound < most else most) / least_time
        return _Rates(expected, possible)

    def _sums(
        self, expected_share: dict[str, float], possible_share: dict[str, float]
    ) -> tuple[list[float], list[float]]:
        """Draft tokens of all slots by size: as expected, and as may well be."""
        means, bounds = [0.0] * len(self._sizes), [0.0] * len(self._sizes)
        for kind, share in expected_share.items():
            more, most = self._table(kind).estimates()
            means = [mean + share * value for mean, value in zip(means, more, strict=True)]
            bounds = [bound + possible_share[kind] * value for bound, value in zip(bounds, most, strict=True)]
        return means, bounds

    def _table(self, kind: str) -> DraftTable:
        found = self._tables.get(kind)
        if found is None:
            found = self._tables[kind] = DraftTable(self._sizes, trained=self._first)
        return found
