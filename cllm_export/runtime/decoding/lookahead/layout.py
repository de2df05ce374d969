"""The rows of a lookahead forward (arXiv 2402.02057): their number, their positions, and which rows each one sees.

For a window of W columns, n-grams of N tokens and G guesses, with the current token at position P:

    head      c rows        committed tokens whose KV is not stored yet; the last of them is the current token
    level 0   W - 1 rows    the window's columns 1 to W - 1 (column 0 is the current token), at P + column
    level l   W rows each   levels 1 to N - 2, at P + l + column
    guesses   G (N - 1)     each follows the current token, from P + 1 on

Window and guesses see the head, but not each other. A row of the window also sees level 0 up to its own column, and the
lower levels of its column. A row of a guess also sees the earlier rows of that guess. So each row is the end of its own
text.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError

MIN_NGRAM = 2


@dataclass(frozen=True, kw_only=True)
class LookaheadShape:
    """W, N and G of the paper. They set what one forward tries, and so its number of rows."""

    window: int = 8
    """W: columns of the window."""
    ngram: int = 3
    """N: tokens of an n-gram. The window has N - 1 levels, and a guess has N - 1 tokens."""
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
        """Refuse a shape whose longest forward has more rows than an engine takes.

        Raises:
            OptionError: the shape has too many rows.
        """
        if self.max_rows > max_block_size:
            raise OptionError(
                f"window {self.window}, ngram {self.ngram} and guesses {self.guesses} make forwards of up to "
                f"{self.max_rows} rows, and this model takes {max_block_size}: choose smaller ones"
            )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Positions and mask of a forward's rows, for one length of the head."""

    shape: LookaheadShape
    head: int
    offsets: NDArray[np.int64]
    """[n] position of each row, minus the write index."""
    mask: NDArray[np.bool_]
    """[n, n] true if row i sees row j."""

    def window_row(self, level: int, column: int) -> int:
        """The row of a token in the window. Level 0, column 0 is the current token."""
        return _window_row(self.shape, self.head, level, column)

    def guess_row(self, guess: int, index: int) -> int:
        """The row of a token in a guess."""
        return _guess_row(self.shape, self.head, guess, index)


@functools.cache
def layout_of(shape: LookaheadShape, head: int) -> Layout:
    """The layout for a head of ``head`` tokens. It is constant, so it is cached."""
    size = shape.num_rows(head)
    offsets = np.arange(size, dtype=np.int64)
    mask = np.zeros((size, size), np.bool_)
    for row in range(head + shape.window - 1):  # head and level 0 are one text
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
