"""The n-grams that lookahead decoding has met, by their first token. Its guesses come from here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from cllm_export.checks import require_at_least

POOL_SIZE = 4096
"""The most n-grams that a pool holds. A window of eight columns makes as many in 512 forwards."""


class LookaheadPool:
    """At most ``size`` n-grams of one request, by their first token. The least recently added or taken is dropped."""

    def __init__(self, size: int = POOL_SIZE) -> None:
        require_at_least("size", size, 1)
        self._size = size
        self._order: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._by_first: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def add(self, ngram: Sequence[int]) -> None:
        """Add an n-gram, or make it the most recent one."""
        entry = tuple(ngram)
        if entry not in self._order and len(self._order) == self._size:
            self._drop_oldest()
        self._touch(entry)

    def take(self, first: int, count: int) -> list[tuple[int, ...]]:
        """The tokens after ``first`` in at most ``count`` n-grams that begin with it, the most recent first."""
        found = list(reversed(self._by_first.get(first, ())))[:count]
        for entry in reversed(found):
            self._touch(entry)
        return [entry[1:] for entry in found]

    def _touch(self, entry: tuple[int, ...]) -> None:
        for order in (self._order, self._by_first.setdefault(entry[0], OrderedDict())):
            order[entry] = None
            order.move_to_end(entry)

    def _drop_oldest(self) -> None:
        oldest, _ = self._order.popitem(last=False)
        entries = self._by_first[oldest[0]]
        del entries[oldest]
        if not entries:
            del self._by_first[oldest[0]]
