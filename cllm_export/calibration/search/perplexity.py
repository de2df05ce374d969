"""Perplexity on clean text: the usual measure of quantisers, in addition to the measures of convergence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cllm_export.calibration.recording import Recording
from cllm_export.calibration.replay import as_batch
from cllm_export.runtime.engines.base import Engine

CHUNK = 32


def perplexity(engine: Engine, recordings: Sequence[Recording], pad: int) -> float:
    """exp of the mean negative log-probability of every new token, teacher-forced.

    The prompt is read but not counted, because a model that was tuned only on answers does not predict prompts.
    """
    total, count = 0.0, 0
    for recording in recordings:
        for logits, tokens in _predicting_rows(engine, recording, pad):
            total -= float(_log_probabilities(logits, tokens).sum())
            count += len(tokens)
    return math.exp(total / count)


def _predicting_rows(
    engine: Engine, recording: Recording, pad: int
) -> Iterator[tuple[NDArray[np.float32], Sequence[int]]]:
    """Logits [m, V] of rows that predict new tokens, and these tokens."""
    text, first = recording.text, len(recording.prompt) - 1
    fixed = engine.fixed_shapes
    size = fixed.block_size if fixed else min(CHUNK, engine.geometry.max_block_size)
    for start in range(0, len(text) - 1, size):
        block = text[start : start + size]
        padding = (pad,) * (size - len(block)) if fixed else ()
        forward = engine.forward(as_batch(engine, (*block, *padding), len(block), start), with_logits=True)
        assert forward.logits is not None
        skipped = max(0, first - start)
        following = text[start + skipped + 1 : start + len(block) + 1]
        if following:
            yield forward.logits[0][skipped : skipped + len(following)], following


def _log_probabilities(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(wide - largest).sum(axis=-1)) + largest[:, 0]
    chosen: NDArray[np.float64] = wide[np.arange(len(tokens)), list(tokens)] - normaliser
    return chosen
