"""Lookahead decoding as policy (arXiv 2402.02057): one forward makes n-grams in a window and tries guesses.

No tensors, no engine: ``next_block`` says what to run at ``write_index``, ``commit`` takes the outputs. The rows of a
forward, and which of them see which, are those of ``layout.py``: column i of the window reads as a text of
its own, i tokens after the current one and then a token a level, and what the model goes on with makes it an n-gram.
N-grams that begin with the current token are what a forward guesses.

A guess that turns out right is fed again as the next head, rather than its KV moved: so a head has 1 to N tokens, and
there is one layout for each length. Level 0 is tried as well, as a Jacobi loop's block is: it costs no rows, and its KV
stands where it belongs. With a model tuned for Jacobi decoding it is often right.

Whatever stands in the window and in the guesses, the tokens are those of greedy decoding: a token is made known only
where the model's own prediction after right tokens equals it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cllm_export.runtime.decoding.drafts.sources import DraftRequest, Proposer
from cllm_export.runtime.decoding.jacobi import Block, Commit, Tried
from cllm_export.runtime.decoding.lookahead.layout import Layout, LookaheadShape, layout_of
from cllm_export.runtime.decoding.lookahead.pool import LookaheadPool


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
        proposer: what stands in the window before the model has filled it, and where it moves on. The paper's is random
            tokens of the prompt.
    """

    def __init__(self, *, prompt: Sequence[int], shape: LookaheadShape, proposer: Proposer) -> None:
        self.write_index = len(prompt) - 1
        self.shape = shape
        self._proposer = proposer
        self._pool = LookaheadPool()
        self._head = [prompt[-1]]
        self._levels = [proposer.propose(shape.window, ()) for _ in range(shape.num_levels)]
        self._guesses: list[list[int]] = []
        self._is_first = True
        for start in range(len(prompt) - shape.num_levels):
            self._pool.add(prompt[start : start + shape.ngram])

    @property
    def layout(self) -> Layout:
        """Of the block that ``next_block`` gives."""
        return layout_of(self.shape, len(self._head))

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        """Nothing: a draft model is refused before it gets here."""
        return None

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        """The block that the next forward runs, of at most ``size`` tokens: as many as its layout has rows.

        Nothing is ever ``forced``: requests that follow a grammar are refused before they get here.
        """
        shape = self.shape
        shape.require_fitting(size)
        found = self._pool.take(self._head[-1], shape.guesses)
        self._guesses = [list(ngram) for ngram in found]
        self._guesses += [self._proposer.propose(shape.num_levels, ()) for _ in range(shape.guesses - len(found))]
        tokens = [*self._head, *self._levels[0][1:]]
        for part in (*self._levels[1:], *self._guesses):
            tokens += part
        return Block(tokens, len(self._head))

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        """Take the predictions after every row of that block; what the graph counted says nothing of guesses."""
        layout, current = self.layout, self._head[-1]
        texts = [self._try_window(layout, next_ids)]
        texts += [self._try_guess(layout, index, next_ids) for index in range(self.shape.guesses)]
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
        self._proposer.accept(new)
        return Commit(new, len(new), tried)

    def _try_window(self, layout: Layout, next_ids: list[int]) -> _Text:
        rows = [layout.window_row(0, column) for column in range(1, self.shape.window)]
        return _Text.of(self._levels[0][1:], rows, layout, next_ids)

    def _try_guess(self, layout: Layout, guess: int, next_ids: list[int]) -> _Text:
        rows = [layout.guess_row(guess, index) for index in range(self.shape.num_levels)]
        return _Text.of(self._guesses[guess], rows, layout, next_ids)

    def _collect(self, layout: Layout, next_ids: list[int]) -> None:
        """Each column of the window, from its level 0 to what the model goes on with, is an n-gram for the pool."""
        self._levels[0][0] = self._head[-1]
        for column in range(self.shape.window):
            end = next_ids[layout.window_row(self.shape.num_levels - 1, column)]
            self._pool.add([*(level[column] for level in self._levels), end])

    def _move_window(self, layout: Layout, next_ids: list[int], columns: int) -> None:
        """The window goes on by one level, and by the columns that more than one new token are worth.

        A level moves down to where its tokens are one position further on, and the model's own make the last one.
        After the first forward the model's own make all of them, for what would move is no more than the proposer.
        """
        width = self.shape.window
        predicted = [
            [next_ids[layout.window_row(level, column)] for column in range(width)]
            for level in range(self.shape.num_levels)
        ]
        levels = predicted if self._is_first else [*self._levels[1:], predicted[-1]]
        kept = [level[columns:] for level in levels]
        self._levels = [[*level, *self._proposer.propose(width - len(level), ())] for level in kept]
        self._is_first = False


def _num_right(text: _Text) -> int:
    return text.num_right
