"""Windows: blocks of guesses within a sample, and how one forward advances them. Policy only: lists, no tensors.

A window at ``start`` represents the block whose first token, at that position, is committed. Its guesses are for the
positions after it, up to the last row of the sample. Guesses past the end of the answer cannot affect earlier ones.

A window advances as in ``runtime/decoding/jacobi.py``, but the sample's tokens replace the tokens that the model
verified. On the model's own fixed point both are equal. On a given answer, this leads the window back to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cllm_export.bundle.manifest import Loop
from cllm_export.runtime.decoding.drafts.sources import Proposer
from cllm_export.training.data.samples import Sample


@dataclass(frozen=True, kw_only=True)
class Window:
    """One noisy state of a block."""

    block_size: int
    start: int
    """Position of the block's first token."""
    guesses: tuple[int, ...]
    """Tokens from position ``start + 1`` on, at most ``block_size - 1``."""
    previous: Window | None = None
    """The state before this one, if a loss compares the two."""

    def num_right(self, sample: Sample) -> int:
        """Number of leading guesses that equal the sample's tokens."""
        tokens = sample.tokens[self.start + 1 :]
        for index, guess in enumerate(self.guesses):
            if guess != tokens[index]:
                return index
        return len(self.guesses)


def fresh_window(sample: Sample, start: int, block_size: int, proposer: Proposer) -> Window | None:
    """A window with a new draft from the proposer; None if the sample has no row to guess after ``start``."""
    count = min(block_size - 1, sample.num_rows - 1 - start)
    if count < 1:
        return None
    proposer.accept(sample.tokens[sample.num_prompt : start + 1])
    guesses = proposer.propose(block_size - 1, ())[:count]
    return Window(block_size=block_size, start=start, guesses=tuple(guesses))


def recorded_window(sample: Sample, start: int, block: Sequence[int]) -> Window | None:
    """The window of a recorded state; None if nothing is left to guess or every guess is right."""
    count = min(len(block) - 1, sample.num_rows - 1 - start)
    window = Window(block_size=len(block), start=start, guesses=tuple(block[1 : 1 + max(0, count)]))
    return window if count > 0 and window.num_right(sample) < count else None


def advance(
    window: Window, predictions: Sequence[int], sample: Sample, loop: Loop, proposer: Proposer
) -> Window | None:
    """The window after a forward; None when it has reached the end of the sample.

    Args:
        predictions: the model's token after each guess, one for each guess.
        proposer: a new proposer for the sample's prompt.
    """
    move = _advance_block if loop == "block" else _advance_sliding
    return move(window, predictions, sample, proposer)


def _advance_sliding(window: Window, predictions: Sequence[int], sample: Sample, proposer: Proposer) -> Window | None:
    right = window.num_right(sample)
    start = window.start + right + 1
    count = min(window.block_size - 1, sample.num_rows - 1 - start)
    if count < 1:
        return None
    kept = list(predictions[right:])
    proposer.accept(sample.tokens[sample.num_prompt : start + 1])
    guesses = [*kept, *proposer.propose(window.block_size - 1 - len(kept), kept)][:count]
    return Window(block_size=window.block_size, start=start, guesses=tuple(guesses), previous=_orphan(window))


def _advance_block(window: Window, predictions: Sequence[int], sample: Sample, proposer: Proposer) -> Window | None:
    right = window.num_right(sample)
    if right == len(window.guesses):
        return fresh_window(sample, window.start + window.block_size, window.block_size, proposer)
    known = sample.tokens[window.start + 1 : window.start + right + 2]
    guesses = (*known, *predictions[right:])[: len(window.guesses)]
    return Window(block_size=window.block_size, start=window.start, guesses=tuple(guesses), previous=_orphan(window))


def _orphan(window: Window) -> Window:
    return Window(block_size=window.block_size, start=window.start, guesses=window.guesses)
