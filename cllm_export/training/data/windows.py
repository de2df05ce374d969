"""Windows: blocks of guesses somewhere in a sample, and how one forward moves them. Policy only: lists, no tensors.

A window at ``start`` stands for the block whose first token, at that position, is committed. Its guesses stand for the
positions after it, as far as the sample has rows: what lies beyond the end of the answer can change nothing before it.
The moves are those of ``runtime/decoding/jacobi.py``, with the sample's own tokens in the place of the model's
verified ones: along its own fixed point the two are the same, along a given answer the window is led back to it.
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
    """Tokens at ``start + 1`` and on, at most ``block_size - 1``."""
    previous: Window | None = None
    """The state this one came from, where a loss compares the two."""

    def num_right(self, sample: Sample) -> int:
        """Leading guesses that are the sample's own tokens."""
        tokens = sample.tokens[self.start + 1 :]
        for index, guess in enumerate(self.guesses):
            if guess != tokens[index]:
                return index
        return len(self.guesses)


def fresh_window(sample: Sample, start: int, block_size: int, proposer: Proposer) -> Window | None:
    """A window of a new draft for the sample's prompt; None where the sample has no row to guess there."""
    count = min(block_size - 1, sample.num_rows - 1 - start)
    if count < 1:
        return None
    proposer.accept(sample.tokens[sample.num_prompt : start + 1])
    guesses = proposer.propose(block_size - 1, ())[:count]
    return Window(block_size=block_size, start=start, guesses=tuple(guesses))


def recorded_window(sample: Sample, start: int, block: Sequence[int]) -> Window | None:
    """The window of a recorded state; None where nothing is left to guess or every guess is right."""
    count = min(len(block) - 1, sample.num_rows - 1 - start)
    window = Window(block_size=len(block), start=start, guesses=tuple(block[1 : 1 + max(0, count)]))
    return window if count > 0 and window.num_right(sample) < count else None


def advance(
    window: Window, predictions: Sequence[int], sample: Sample, loop: Loop, proposer: Proposer
) -> Window | None:
    """The window after a forward; None once it has reached the end of the sample.

    Args:
        predictions: the model's token after each guess, as many as there are guesses.
        proposer: a new one for the sample's prompt.
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
