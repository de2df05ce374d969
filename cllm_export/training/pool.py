"""The pool: the samples in training, and the Jacobi states of their windows. Every forward advances the states.

This gives on-policy trajectories without a collection stage: the argmax of the forward that trains a state is the next
state. A sample stays for a few visits, then a new one replaces it. The pool is deterministic by seed, and its whole
state is plain JSON. An interrupted tuning run therefore continues exactly where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cllm_export.bundle.manifest import Loop, ProposerName
from cllm_export.runtime.decoding.drafts.sources import Proposer, make_proposer
from cllm_export.training.data.samples import Sample
from cllm_export.training.data.windows import Window, advance, fresh_window, recorded_window


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """How the pool draws samples, and which windows it gives them."""

    num_windows: int
    """Windows of a sample in one forward, for the first of ``block_sizes``; 0 for purely autoregressive training. For
    other block sizes, the number of windows is chosen to give about as many guesses."""
    block_sizes: tuple[int, ...]
    """The pool draws the n of each new sample from these."""
    loop: Loop
    proposer: ProposerName
    size: int = 512
    """Samples in the pool. The samples of a batch have similar lengths, so a larger pool wastes less on padding."""
    visits: int = 4
    """Number of forwards for which a sample stays."""
    keep_previous: bool = False
    """Keep each window's state before the last forward, because the local loss compares the two."""


@dataclass(kw_only=True)
class Entry:
    """A sample in the pool."""

    index: int
    block_size: int
    visits: int
    windows: list[Window]


class Pool:
    """Draws batches from samples, and advances their windows by the model's predictions.

    Args:
        samples: all samples of the run. The pool draws only those of its own process (``rank`` of ``num_ranks``).
        pad_token_id: the token that the ``pad`` proposer proposes.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        options: PoolOptions,
        *,
        pad_token_id: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._samples = samples
        self._options = options
        self._pad = pad_token_id
        self._random = random.Random(f"{seed}:{rank}")  # noqa: S311 - an order, not a secret
        self._mine = range(rank, len(samples), num_ranks)
        assert self._mine, "every process has a sample"
        self._order: list[int] = []
        self._entries: list[Entry] = []
        self.epoch = -1

    def draw(self, batch_size: int) -> list[Entry]:
        """Samples of similar length, removed from the pool until ``update`` returns them.

        A batch is a range of the samples sorted by length. A range that would pass an end of the list is shifted
        inside, so the shortest and longest are drawn as often as the others. With few samples, a batch may hold one
        twice, in different states.
        """
        while len(self._entries) < max(self._options.size, batch_size):
            self._entries.append(self._new_entry())
        self._entries.sort(key=self._num_rows)
        last = len(self._entries) - batch_size
        first = min(max(0, self._random.randrange(1 - batch_size, len(self._entries))), last)
        drawn = self._entries[first : first + batch_size]
        del self._entries[first : first + batch_size]
        return drawn

    def _num_rows(self, entry: Entry) -> tuple[int, int]:
        """Rows of the entry in a batch, then its index to break ties in the order."""
        guesses = sum(len(window.guesses) for window in entry.windows)
        return self._samples[entry.index].num_rows + guesses, entry.index

    def sample(self, entry: Entry) -> Sample:
        return self._samples[entry.index]

    def update(self, entries: Sequence[Entry], predictions: Sequence[Sequence[Sequence[int]]]) -> None:
        """Advance the windows of drawn entries, and put those with visits left back into the pool.

        Args:
            predictions: for each entry and window, the model's token after each guess.
        """
        for entry, predicted in zip(entries, predictions, strict=True):
            entry.visits += 1
            if entry.visits < self._options.visits:
                self._move(entry, predicted)
                self._entries.append(entry)

    def state(self) -> dict[str, Any]:
        """Everything that ``restore`` needs, JSON-ready."""
        version, internal, gauss = self._random.getstate()
        return {
            "random": [version, list(internal), gauss],
            "order": self._order,
            "epoch": self.epoch,
            "entries": [asdict(entry) for entry in self._entries],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._order = list(state["order"])
        self.epoch = state["epoch"]
        self._entries = [
            Entry(**{**entry, "windows": [_window_from(raw) for raw in entry["windows"]]}) for entry in state["entries"]
        ]

    def _new_entry(self) -> Entry:
        if not self._order:
            self._order = self._random.sample(self._mine, len(self._mine))
            self.epoch += 1
        index = self._order.pop()
        entry = Entry(index=index, block_size=self._random.choice(self._options.block_sizes), visits=0, windows=[])
        sample = self._samples[index]
        if self._options.num_windows:
            entry.windows = self._recorded(sample) if sample.states else self._starting(entry, sample)
        return entry

    def _starting(self, entry: Entry, sample: Sample) -> list[Window]:
        """The first windows of a sample: one where decoding starts, the others anywhere in the answer."""
        windows = [fresh_window(sample, sample.first_start, entry.block_size, self._proposer(sample))]
        windows += [self._anywhere(entry, sample) for _ in range(self._count(entry.block_size) - 1)]
        return [window for window in windows if window]

    def _count(self, block_size: int) -> int:
        options = self._options
        return max(1, round(options.num_windows * (options.block_sizes[0] - 1) / (block_size - 1)))

    def _anywhere(self, entry: Entry, sample: Sample) -> Window | None:
        start = self._random.randrange(sample.first_start, max(sample.first_start + 1, sample.num_rows - 1))
        return fresh_window(sample, start, entry.block_size, self._proposer(sample))

    def _recorded(self, sample: Sample) -> list[Window]:
        """Random states of the recorded trajectory. With ``keep_previous``, each carries the state before it."""
        windows: list[Window] = []
        before: Window | None = None
        for start, block in sample.states:
            window = recorded_window(sample, start, block)
            if window:
                previous = before if self._options.keep_previous else None
                windows.append(replace(window, previous=previous))
            before = window
        if self._options.keep_previous:
            windows = [window for window in windows if window.previous]
        return self._random.sample(windows, min(len(windows), self._options.num_windows))

    def _move(self, entry: Entry, predicted: Sequence[Sequence[int]]) -> None:
        sample = self._samples[entry.index]
        if sample.states:
            entry.windows = self._recorded(sample)
            return
        moved: list[Window] = []
        for window, tokens in zip(entry.windows, predicted, strict=True):
            after = advance(window, tokens, sample, self._options.loop, self._proposer(sample))
            after = after or self._anywhere(entry, sample)
            if after:
                moved.append(after if self._options.keep_previous else replace(after, previous=None))
        entry.windows = moved

    def _proposer(self, sample: Sample) -> Proposer:
        seed = self._random.getrandbits(32) if self._options.proposer == "prompt" else 0
        return make_proposer(self._options.proposer, prompt=sample.prompt, pad_token_id=self._pad, seed=seed)


def _window_from(raw: dict[str, Any]) -> Window:
    previous = _window_from(raw["previous"]) if raw["previous"] else None
    return Window(block_size=raw["block_size"], start=raw["start"], guesses=tuple(raw["guesses"]), previous=previous)
