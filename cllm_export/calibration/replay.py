"""Run a recorded decode again, forward by forward, on any engine of the same model and tokenizer.

A forward at write index w sees the cache rows of the text before w. The recorded blocks wrote these rows; wrong rows
were overwritten later. Every block therefore runs at its true position, over the KV that this engine computes for the
recorded text, whatever this engine predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cllm_export.calibration.recording import Recording, State
from cllm_export.runtime.engines.base import Engine, as_batch, prefill


class Replayed(NamedTuple):
    """One forward of a replay."""

    state: State
    next_ids: list[int]
    """The engine's prediction after each token of the block."""


def replay_states(engine: Engine, recording: Recording, pad: int) -> Iterator[Replayed]:
    """Run every recorded block, in order. The engine's values of a forward are valid until the next block is run."""
    prefill(engine, recording.prompt[:-1], pad)
    for state in recording.states:
        yield Replayed(state, _run(engine, state))


def replay_text(engine: Engine, recording: Recording, size: int, pad: int) -> Iterator[Replayed]:
    """Run the text itself, ``size`` tokens per forward. All tokens are right: teacher-forced fixed points.

    For an engine with fixed shapes the last block is padded. The padding rows are at or past the end of the text.
    """
    text = recording.text
    for start in range(0, len(text) - 1, size):
        block = text[start : start + size]
        committed = len(block)
        if engine.fixed_shapes:
            block += (pad,) * (size - committed)
        state = State(start, committed, block)
        yield Replayed(state, _run(engine, state))


def _run(engine: Engine, state: State) -> list[int]:
    return list(engine.forward(as_batch(engine, state.tokens, state.num_committed, state.write_index)).next_ids[0])
