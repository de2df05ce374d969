"""Count how often an engine predicts other tokens than the unquantised one on the same block states, by stage.

A flip on clean text changes the output. A flip on a block state changes no output token, because the engine accepts
only its own greedy tokens. It costs forwards if it turns a right guess into a wrong one. No measure over clean text can
see this loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cllm_export.calibration.recording import STAGES, Recording
from cllm_export.calibration.replay import replay_states
from cllm_export.runtime.engines.base import Engine

ALL = "all"
Predictions = list[list[list[int]]]
"""The predicted token after each row, by recording and state."""


@dataclass(kw_only=True)
class FlipCount:
    """Flips in the rows of one stage."""

    rows: int = 0
    flipped: int = 0
    """Rows whose prediction differs from the unquantised engine's."""
    lost: int = 0
    """Flipped rows whose prediction was the token of the final text and no longer is."""
    gained: int = 0
    """Flipped rows whose prediction was not the token of the final text and now is."""

    @property
    def rate(self) -> float:
        """Flipped rows / rows."""
        return self.flipped / self.rows if self.rows else 0.0

    @property
    def loss(self) -> float:
        """(lost - gained) / rows."""
        return (self.lost - self.gained) / self.rows if self.rows else 0.0

    def add(self, before: int, after: int, right: int) -> None:
        """Count a row, given both predictions and the right token of the final text."""
        self.rows += 1
        self.flipped += before != after
        self.lost += before == right != after
        self.gained += before != right == after

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready."""
        counts = {"rows": self.rows, "flipped": self.flipped, "lost": self.lost, "gained": self.gained}
        return counts | {"rate": round(self.rate, 6), "loss": round(self.loss, 6)}


@dataclass(kw_only=True)
class Flips:
    """Flips of all rows and of each stage."""

    stages: dict[str, FlipCount] = field(default_factory=lambda: {name: FlipCount() for name in (ALL, *STAGES)})

    @property
    def all(self) -> FlipCount:
        return self.stages[ALL]

    def to_dict(self) -> dict[str, dict[str, float | int]]:
        """JSON-ready."""
        return {name: count.to_dict() for name, count in self.stages.items()}


def predict(
    engine: Engine, recordings: Sequence[Recording], pad: int, progress: Callable[[int], None] | None = None
) -> Predictions:
    """An engine's predictions on every recorded state, each at its own position over the engine's own KV."""
    predictions = []
    for index, recording in enumerate(recordings):
        predictions.append([replayed.next_ids for replayed in replay_states(engine, recording, pad)])
        if progress:
            progress(index + 1)
    return predictions


def count_flips(recordings: Iterable[Recording], before: Predictions, after: Predictions) -> Flips:
    """Compare the predictions of two engines over the same states, without dead rows."""
    flips = Flips()
    for recording, ours, theirs in zip(recordings, before, after, strict=True):
        text = recording.text
        for state, first, second in zip(recording.states, ours, theirs, strict=True):
            for row, stage in enumerate(recording.stages(state)):
                if stage is not None:
                    right = text[state.write_index + row + 1]
                    for name in (ALL, stage):
                        flips.stages[name].add(first[row], second[row], right)
    return flips
