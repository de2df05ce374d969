"""The rows of a lookahead forward (arXiv 2402.02057): how many there are, where each sits, and what it sees.

For a window of W columns, n-grams of N tokens and G guesses, with the current token at position P:

    head      c rows        committed tokens whose KV is not stored yet; the last of them is the current token
    level 0   W - 1 rows    the window's columns 1 to W - 1 (column 0 is the current token), at P + column
    level l   W rows each   levels 1 to N - 2, at P + l + column
    guesses   G (N - 1)     each follows the current token, from P + 1 on

A row of the window sees level 0 up to its own column and the lower levels of its column; a guess sees itself; both see
the head, and neither the other. So every row reads as the end of a text of its own.
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
