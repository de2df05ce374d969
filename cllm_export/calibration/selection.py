"""Select the rows to observe: a seeded draw without replacement from the live rows of block states and of clean text.

Rows are numbered through all recordings, in order. A draw is therefore two sorted lists of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.calibration.recording import Recording
from cllm_export.errors import CalibrationError

MIN_ROWS = 256
"""Fewer rows say too little about a channel's range."""

Int64Array = NDArray[np.int64]


class RowCounts(NamedTuple):
    """Numbers of rows that can be observed."""

    states: int
    clean: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Numbers of the rows to observe, ascending."""

    states: Int64Array
    clean: Int64Array

    @property
    def num_rows(self) -> int:
        return len(self.states) + len(self.clean)


def count_rows(recording: Recording) -> RowCounts:
    """Count the live rows of a recording's states and of its text. The text's last token predicts no token of it."""
    live = sum(stage is not None for state in recording.states for stage in recording.stages(state))
    return RowCounts(live, len(recording.text) - 1)


def select_rows(counts: Iterable[RowCounts], *, num_rows: int, mix: float, seed: int) -> Selection:
    """Draw ``num_rows`` rows, a share ``mix`` of them from block states. Draw fewer if the recordings have fewer.

    Raises:
        CalibrationError: the recordings have fewer than ``MIN_ROWS`` rows at this mix.
    """
    counts = list(counts)
    available = RowCounts(sum(each.states for each in counts), sum(each.clean for each in counts))
    limits: list[float] = [num_rows]
    limits += [available.states / mix] if mix > 0 else []
    limits += [available.clean / (1 - mix)] if mix < 1 else []
    total = int(min(limits))  # a mix near 0 can make a limit infinite
    if total < MIN_ROWS:
        raise CalibrationError(
            f"too few prompts: at mix {mix:g} they give {total} rows ({available.states} of block states, "
            f"{available.clean} of clean text), at least {MIN_ROWS} are needed; give more or longer prompts, or more "
            "new tokens"
        )
    num_states = round(mix * total)
    random = np.random.default_rng(seed)
    return Selection(
        states=_draw(random, available.states, num_states), clean=_draw(random, available.clean, total - num_states)
    )


def rows_between(numbers: Int64Array, start: int, stop: int) -> set[int]:
    """The drawn rows from ``start`` to ``stop``, numbered from ``start``."""
    first, last = np.searchsorted(numbers, (start, stop))
    return {int(number) - start for number in numbers[first:last]}


def _draw(random: np.random.Generator, available: int, wanted: int) -> Int64Array:
    if not wanted:
        return np.zeros(0, np.int64)
    return np.sort(random.choice(available, size=min(wanted, available), replace=False).astype(np.int64))
