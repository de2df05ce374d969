"""Observe the inputs of a bundle's linear layers in the selected rows of recorded decodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.scales import FloatArray
from cllm_export.calibration.accumulate import Accumulator
from cllm_export.calibration.linear_inputs import LinearInput
from cllm_export.calibration.recording import Recording
from cllm_export.calibration.replay import Replayed, replay_states, replay_text
from cllm_export.calibration.selection import Selection, count_rows, rows_between
from cllm_export.errors import CalibrationError, DamagedRunError
from cllm_export.runtime.engines.base import Engine

CLEAN = "clean"


class ObservedEngine(Engine, Protocol):
    """An engine that returns values of its graph."""

    def values(self) -> Mapping[str, FloatArray]:
        """Values of slot 0 in the last forward by name, [n, channels] each."""
        ...


class Seen(NamedTuple):
    """The observed rows of one forward."""

    recording: str
    """Id of the prompt."""
    kinds: list[str]
    """For each row, ``clean`` or the stage of convergence."""
    values: dict[str, FloatArray]
    """Name of the value -> its rows [m, channels]."""


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """Numbers of the first rows of some recordings, counted through all recordings."""

    states: int = 0
    clean: int = 0


@dataclass(kw_only=True)
class Statistics:
    """Statistics by input, and the number of rows of each kind."""

    inputs: dict[str, Accumulator]
    kinds: Counter[str] = field(default_factory=Counter)

    @classmethod
    def empty(cls, inputs: Sequence[LinearInput], num_largest: int) -> Statistics:
        return cls(inputs={entry.name: Accumulator(entry.width, num_largest) for entry in inputs})

    def merge(self, other: Statistics) -> None:
        for name, accumulator in self.inputs.items():
            accumulator.merge(other.inputs[name])
        self.kinds.update(other.kinds)

    def write(self, path: Path) -> None:
        arrays = {
            f"{key}/{name}": array
            for name, accumulator in self.inputs.items()
            for key, array in accumulator.to_arrays().items()
        }
        kinds = {f"kind/{kind}": np.int64(count) for kind, count in self.kinds.items()}
        with path.open("wb") as file:
            np.savez(file, **arrays, **kinds)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path, inputs: Sequence[LinearInput], num_largest: int) -> Statistics:
        """Read a file that ``write`` wrote.

        Raises:
            DamagedRunError: the file is damaged.
        """
        keys = ("num_rows", "largest", "sum_abs", "low", "high")
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                found = {
                    entry.name: Accumulator.from_arrays({key: file[f"{key}/{entry.name}"] for key in keys}, num_largest)
                    for entry in inputs
                }
                kinds = Counter({key[5:]: int(file[key]) for key in file.files if key.startswith("kind/")})
        except Exception as error:  # zipfile, zlib and numpy each raise their own types
            raise DamagedRunError(f"{path} is damaged: {error}; remove it and run the command again") from None
        return cls(inputs=found, kinds=kinds)


def observe(
    engine: ObservedEngine,
    recordings: Iterable[Recording],
    selection: Selection,
    offsets: Offsets,
    *,
    chunk: int,
    pad: int,
) -> Iterator[Seen]:
    """The selected rows of recordings, forward by forward. Forwards without selected rows also run, for their KV.

    Args:
        offsets: numbers of the first rows of the first recording.
        chunk: tokens of clean text per forward.

    Raises:
        CalibrationError: a value is NaN or infinite; the message names the value and the prompt.
    """
    state_row, clean_row = offsets.states, offsets.clean
    for recording in recordings:
        counts = count_rows(recording)
        states = rows_between(selection.states, state_row, state_row + counts.states)
        clean = rows_between(selection.clean, clean_row, clean_row + counts.clean)
        state_row, clean_row = state_row + counts.states, clean_row + counts.clean
        if states:
            yield from _see(engine, recording, replay_states(engine, recording, pad), states, _stages_of(recording))
        if clean:
            forwards = replay_text(engine, recording, chunk, pad)
            yield from _see(engine, recording, forwards, clean, _clean_rows(recording))


def add_all(seen: Iterable[Seen], inputs: Sequence[LinearInput], statistics: Statistics) -> None:
    """Add all observed rows to the statistics."""
    for rows in seen:
        statistics.kinds.update(rows.kinds)
        for entry in inputs:
            statistics.inputs[entry.name].add(rows.values[entry.rows[0]])


Kinds = Callable[[Replayed], Sequence[str | None]]


def _stages_of(recording: Recording) -> Kinds:
    return lambda replayed: recording.stages(replayed.state)


def _clean_rows(recording: Recording) -> Kinds:
    """Every row of a forward over the text, except those at or past its last token."""
    last = len(recording.text) - 1
    return lambda replayed: [
        CLEAN if replayed.state.write_index + row < last else None for row in range(len(replayed.state.tokens))
    ]


def _see(
    engine: ObservedEngine, recording: Recording, forwards: Iterable[Replayed], wanted: set[int], kinds_of: Kinds
) -> Iterator[Seen]:
    number = 0
    for replayed in forwards:
        rows, kinds = [], []
        for row, kind in enumerate(kinds_of(replayed)):
            if kind is None:
                continue
            if number in wanted:
                rows.append(row)
                kinds.append(kind)
            number += 1
        if rows:
            values = {name: value[rows] for name, value in engine.values().items()}
            _require_finite(values, recording)
            yield Seen(recording.id, kinds, values)


def _require_finite(values: Mapping[str, NDArray[np.float32]], recording: Recording) -> None:
    for name, rows in values.items():
        if not np.isfinite(rows).all():
            what = "NaN" if np.isnan(rows).any() else "infinite"
            raise CalibrationError(
                f"the value {name} is {what} in prompt {recording.id}: the model overflows, or its weights are "
                "damaged; calibrate an fp32 bundle, and check it with cllm-export verify"
            )
