"""A pool of n-grams that requests share: which token came after the last few ones, in texts and in rejected drafts.

It learns from accepted text and from predictions beyond it, as do Lookahead decoding (arXiv 2402.02057) and the
rejection recycling of Jacobi Forcing (2512.14681). Unlike them, it guesses token by token, because one window needs
one guess. The pool is bounded and drops the least recently used keys. It is not thread-safe: only the thread that runs
the forwards may use it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from cllm_export.checks import require_at_least

DEFAULT_MAX_ENTRIES = 1 << 16
"""A full pool takes about 18 MB."""
DEFAULT_MAX_KEY = 3


class _Next(NamedTuple):
    """The token that followed a key, and whether it came from a text or was only predicted."""

    token: int
    is_text: bool


class NgramPool:
    """Maps the last 1 to ``max_key`` tokens to the one that came next.

    Args:
        max_entries: the most keys that it holds.
        max_key: tokens of the longest key.

    Raises:
        OptionError: a bound is below 1.
    """

    def __init__(self, *, max_entries: int = DEFAULT_MAX_ENTRIES, max_key: int = DEFAULT_MAX_KEY) -> None:
        require_at_least("max_entries", max_entries, 1)
        require_at_least("max_key", max_key, 1)
        self.max_key = max_key
        self._max_entries = max_entries
        self._next: OrderedDict[tuple[int, ...], _Next] = OrderedDict()

    def __len__(self) -> int:
        return len(self._next)

    def clear(self) -> None:
        """Forget everything."""
        self._next.clear()

    def learn(self, tokens: Sequence[int], first: int) -> None:
        """Learn ``tokens[first:]`` as text that followed the tokens before it."""
        for at in range(first, len(tokens)):
            self._put(tokens[max(0, at - self.max_key) : at], tokens[at], is_text=True)

    def learn_rejected(self, end: Sequence[int], draft: Sequence[int], predictions: Sequence[int]) -> None:
        """Learn the predictions of a forward after each token of a wrong ``draft``.

        ``end`` holds the last tokens of the text. The draft began in the place of the last one.
        """
        before = [*end[:-1], *draft]
        for index, token in enumerate(predictions):
            at = len(end) + index
            self._put(before[max(0, at - self.max_key) : at], token, is_text=False)

    def go_on(self, end: Sequence[int], count: int) -> list[int]:
        """Up to ``count`` tokens to follow ``end``. The longest known key gives each of them."""
        tokens = list(end[-self.max_key :])
        first = len(tokens)
        while len(tokens) < first + count:
            found = self._look_up(tokens)
            if found is None:
                break
            tokens.append(found)
        return tokens[first:]

    def _look_up(self, tokens: Sequence[int]) -> int | None:
        for length in range(min(self.max_key, len(tokens)), 0, -1):
            key = tuple(tokens[-length:])
            if found := self._next.get(key):
                self._next.move_to_end(key)
                return found.token
        return None

    def _put(self, before: Sequence[int], token: int, *, is_text: bool) -> None:
        for length in range(1, len(before) + 1):
            key = tuple(before[-length:])
            known = self._next.get(key)
            if known is None or is_text or not known.is_text:  # a prediction never replaces text
                self._next[key] = _Next(token, is_text)
            self._next.move_to_end(key)
        while len(self._next) > self._max_entries:
            self._next.popitem(last=False)
