"""The n-grams that lookahead decoding has met, by their first token: where its guesses come from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from cllm_export.checks import require_at_least

POOL_SIZE = 4096
"""N-grams that a pool holds, at most: what a window of eight columns makes in 512 forwards."""


class LookaheadPool:
    """N-grams of one request by their first token, at most ``size``: the one least recently added or taken goes."""

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
        """What follows ``first``, the most recent n-grams first, at most ``count`` of them."""
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
