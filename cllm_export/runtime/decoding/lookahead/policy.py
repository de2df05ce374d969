"""Lookahead decoding as policy (arXiv 2402.02057): one forward makes n-grams in a window and tries guesses.

The policy uses no tensors and no engine: ``next_block`` gives the block to run at ``write_index``, and ``commit`` takes
the outputs. ``layout.py`` defines the rows of a forward and which rows see each other. Column i of the window is its
own text: it starts i tokens after the current one, and has one token per level. With the model's next token it becomes
an n-gram. A forward guesses the n-grams that begin with the current token.

If a guess is right, its tokens are fed again as the next head; their KV is not moved. So a head has 1 to N tokens, and
each length has its layout. Level 0 is tried as well, like the block of a Jacobi loop. This costs no rows, and the KV of
level 0 is already in the right place. With a model tuned for Jacobi decoding, level 0 is often right.

For any window and any guesses, the tokens are those of greedy decoding. A draft token is accepted only if it equals the
model's own prediction after right tokens.
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
        proposer: fills the first window, new columns of later windows, and guesses that the pool lacks. The paper uses
            random tokens of the prompt.
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
        """The layout of the block that ``next_block`` gives."""
        return layout_of(self.shape, len(self._head))

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        """Always None: a lookahead request with a draft model is refused before."""
        return None

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        """The block that the next forward runs. It has one token per row of its layout, at most ``size``.

        ``forced`` is always empty: a lookahead request with a grammar is refused before.
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
        """Take the predictions after every row of that block.

        The graph's ``num_accepted`` is not used, because it ignores the guesses.
        """
        layout, current = self.layout, self._head[-1]
        texts = [self._try_window(layout, next_ids)]
        texts += [self._try_guess(layout, index, next_ids) for index in range(self.shape.guesses)]
        best = max(texts, key=_num_right)
        new = best.next_ids[: best.num_right + 1]
        self._collect(layout, next_ids)
        self._move_window(layout, next_ids, len(new) - 1)
        tried = Tried(self.write_index + layout.head - 1, [current, *best.tokens], best.next_ids)
        self.write_index += layout.head
        if best is texts[0]:  # the KV of level 0 is already in the right place, so its tokens are not fed again
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
        """Add one n-gram per column to the pool: the column's tokens from level 0 on, then the model's next token."""
        self._levels[0][0] = self._head[-1]
        for column in range(self.shape.window):
            end = next_ids[layout.window_row(self.shape.num_levels - 1, column)]
            self._pool.add([*(level[column] for level in self._levels), end])

    def _move_window(self, layout: Layout, next_ids: list[int], columns: int) -> None:
        """Move the window by one level, and by ``columns``: one for each new token after the first.

        Each level replaces the level below it, and the predictions of the last level become the new last level. After
        the first forward, predictions replace all levels, because those hold only guesses of the proposer.
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
