"""Lookahead decoding as policy (arXiv 2402.02057): one forward makes n-grams in a window and tries guesses.

No tensors but each layout's constant offsets and mask, no engine: ``next_block`` says what to run at ``write_index``,
``commit`` takes the outputs. The rows of a forward, for a window of W columns, n-grams of N tokens and G guesses:

    head      c rows        committed tokens whose KV is not stored yet; the last of them is the current token, at P
    level 0   W - 1 rows    the window's columns 1 to W - 1 (column 0 is the current token), at P + column
    level l   W rows each   levels 1 to N - 2, at P + l + column
    guesses   G (N - 1)     each follows the current token, from P + 1 on

A row of the window sees level 0 up to its own column and the lower levels of its column, so that column i reads as a
text of its own: i tokens after the current one, then N - 1 - i levels deep. What it goes on with completes an n-gram.
A guess sees the head and itself. A guess that turns out right is fed again as the next head, rather than its KV moved:
so a head has 1 to N tokens, and there is one layout for each length. Level 0 is tried as well, as a Jacobi loop's block
is: it costs no rows, and its KV stands where it belongs. With a model tuned for Jacobi decoding it is often right.

Whatever stands in the window and in the guesses, the tokens are those of greedy decoding: a token is made known only
where the model's own prediction after right tokens equals it.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.contract import require_at_least
from cllm_export.errors import OptionError
from cllm_export.runtime.draft import Fill
from cllm_export.runtime.jacobi import Block, Commit, Tried

MIN_NGRAM = 2
POOL_SIZE = 4096
"""N-grams that a pool holds, at most: more than a request of a thousand tokens makes with a window of four columns."""


@dataclass(frozen=True, kw_only=True)
class LookaheadShape:
    """W, N and G of the paper: what one forward tries, and so how many rows it has."""

    window: int = 8
    """W: columns."""
    ngram: int = 3
    """N: tokens of an n-gram; the window has N - 1 levels, a guess N - 1 tokens."""
    guesses: int = 4
    """G: n-grams that one forward tries."""

    def __post_init__(self) -> None:
        require_at_least("window", self.window, 1)
        require_at_least("ngram", self.ngram, MIN_NGRAM)
        require_at_least("guesses", self.guesses, 1)

    @property
    def num_levels(self) -> int:
        return self.ngram - 1

    @property
    def max_rows(self) -> int:
        """Rows of a forward with the longest head."""
        return self.num_rows(self.ngram)

    def num_rows(self, head: int) -> int:
        """Rows of a forward with a head of this length."""
        return head + self.num_levels * self.window - 1 + self.guesses * self.num_levels

    def require_fitting(self, max_block_size: int) -> None:
        """Refuse a shape whose forwards are larger than an engine takes.

        Raises:
            OptionError: they are.
        """
        if self.max_rows > max_block_size:
            raise OptionError(
                f"window {self.window}, ngram {self.ngram} and guesses {self.guesses} make forwards of up to "
                f"{self.max_rows} rows, and this model takes {max_block_size}: choose smaller ones"
            )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The rows of a forward with a head of one length: where each sits, and what each sees."""

    shape: LookaheadShape
    head: int
    offsets: NDArray[np.int64]
    """[n] position of each row, from the write index on."""
    mask: NDArray[np.bool_]
    """[n, n] row i sees row j."""

    def window_row(self, level: int, column: int) -> int:
        """The row of a token of the window; that of level 0, column 0 is the current token's."""
        return _window_row(self.shape, self.head, level, column)

    def guess_row(self, guess: int, index: int) -> int:
        """The row of a token of a guess."""
        return _guess_row(self.shape, self.head, guess, index)


@functools.cache
def layout_of(shape: LookaheadShape, head: int) -> Layout:
    """The layout for a head of ``head`` tokens: constant, so it is made once."""
    size = shape.num_rows(head)
    offsets = np.arange(size, dtype=np.int64)
    mask = np.zeros((size, size), np.bool_)
    for row in range(head + shape.window - 1):  # head and level 0 read as one text
        mask[row, : row + 1] = True
    for level in range(1, shape.num_levels):
        for column in range(shape.window):
            row = _window_row(shape, head, level, column)
            offsets[row] = head - 1 + level + column
            mask[row, : head + column] = True
            mask[row, [_window_row(shape, head, below, column) for below in range(1, level + 1)]] = True
    for guess in range(shape.guesses):
        first = _guess_row(shape, head, guess, 0)
        for index in range(shape.num_levels):
            offsets[first + index] = head + index
            mask[first + index, :head] = True
            mask[first + index, first : first + index + 1] = True
    offsets.flags.writeable = mask.flags.writeable = False
    return Layout(shape=shape, head=head, offsets=offsets, mask=mask)


def _window_row(shape: LookaheadShape, head: int, level: int, column: int) -> int:
    return head - 1 + level * shape.window + column


def _guess_row(shape: LookaheadShape, head: int, guess: int, index: int) -> int:
    return head - 1 + shape.num_levels * shape.window + guess * shape.num_levels + index


class NGramPool:
    """N-grams by their first token, at most ``size`` of them: the one that was least recently added or taken goes."""

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


class _Text(NamedTuple):
    """A text that a forward tried after the current token."""

    tokens: list[int]
    next_ids: list[int]
    """The prediction after the current token and after each of ``tokens``."""
    num_right: int

    @classmethod
    def of(cls, tokens: list[int], rows: Sequence[int], layout: Layout, next_ids: list[int]) -> _Text:
        after = [next_ids[row] for row in (layout.head - 1, *rows)]
        num_right = next((index for index, token in enumerate(tokens) if token != after[index]), len(tokens))
        return cls(tokens, after, num_right)


class Lookahead:
    """The lookahead loop of one request.

    Args:
        prompt: token ids, at least one; the KV of all but the last is stored.
        shape: W, N and G.
        fill: what stands in the window before the model has filled it, and where it moves on. The paper's is random
            tokens of the prompt.
        pool: what it adds its n-grams to, those of the prompt first; by default one of its own.
    """

    def __init__(
        self, *, prompt: Sequence[int], shape: LookaheadShape, fill: Fill, pool: NGramPool | None = None
    ) -> None:
        self.write_index = len(prompt) - 1
        self._shape = shape
        self._fill = fill
        self._pool = NGramPool() if pool is None else pool
        self._head = [prompt[-1]]
        self._levels = [fill.guess(shape.window, ()) for _ in range(shape.num_levels)]
        self._guesses: list[list[int]] = []
        self._is_first = True
        for start in range(len(prompt) - shape.num_levels):
            self._pool.add(prompt[start : start + shape.ngram])

    @property
    def layout(self) -> Layout:
        """Of the block that ``next_block`` gives."""
        return layout_of(self._shape, len(self._head))

    def next_block(self, size: int) -> Block:
        """The block that the next forward runs, of at most ``size`` tokens: as many as its layout has rows."""
        shape = self._shape
        shape.require_fitting(size)
        found = self._pool.take(self._head[-1], shape.guesses)
        self._guesses = [list(ngram) for ngram in found]
        self._guesses += [self._fill.guess(shape.num_levels, ()) for _ in range(shape.guesses - len(found))]
        tokens = [*self._head, *self._levels[0][1:]]
        for part in (*self._levels[1:], *self._guesses):
            tokens += part
        return Block(tokens, len(self._head))

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        """Take the predictions after every row of that block; what the graph counted says nothing of guesses."""
        layout, current = self.layout, self._head[-1]
        texts = [self._try_window(layout, next_ids)]
        texts += [self._try_guess(layout, index, next_ids) for index in range(self._shape.guesses)]
        best = max(texts, key=_num_right)
        new = best.next_ids[: best.num_right + 1]
        self._collect(layout, next_ids)
        self._move_window(layout, next_ids, len(new) - 1)
        tried = Tried(self.write_index + layout.head - 1, [current, *best.tokens], best.next_ids)
        self.write_index += layout.head
        if best is texts[0]:  # the window's own rows stand where their KV belongs, and need not be fed again
            self.write_index += best.num_right
            self._head = new[-1:]
        else:
            self._head = list(new)
        self._fill.accept(new)
        return Commit(new, len(new), tried)

    def _try_window(self, layout: Layout, next_ids: list[int]) -> _Text:
        rows = [layout.window_row(0, column) for column in range(1, self._shape.window)]
        return _Text.of(self._levels[0][1:], rows, layout, next_ids)

    def _try_guess(self, layout: Layout, guess: int, next_ids: list[int]) -> _Text:
        rows = [layout.guess_row(guess, index) for index in range(self._shape.num_levels)]
        return _Text.of(self._guesses[guess], rows, layout, next_ids)

    def _collect(self, layout: Layout, next_ids: list[int]) -> None:
        """Each column of the window, from its level 0 to what the model goes on with, is an n-gram for the pool."""
        self._levels[0][0] = self._head[-1]
        for column in range(self._shape.window):
            end = next_ids[layout.window_row(self._shape.num_levels - 1, column)]
            self._pool.add([*(level[column] for level in self._levels), end])

    def _move_window(self, layout: Layout, next_ids: list[int], columns: int) -> None:
        """The window goes on by one level, and by the columns that more than one new token are worth.

        A level moves down to where its tokens are one position further on, and the model's own make the last one.
        After the first forward the model's own make all of them, for what would move is no more than the fill.
        """
        width = self._shape.window
        predicted = [
            [next_ids[layout.window_row(level, column)] for column in range(width)]
            for level in range(self._shape.num_levels)
        ]
        levels = predicted if self._is_first else [*self._levels[1:], predicted[-1]]
        kept = [level[columns:] for level in levels]
        self._levels = [[*level, *self._fill.guess(width - len(level), ())] for level in kept]
        self._is_first = False


def _num_right(text: _Text) -> int:
    return text.num_right
