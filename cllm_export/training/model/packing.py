"""Packing: puts clean sequences and their noisy windows into one batch, so that one forward gives every loss.

A row of the batch is ``[clean tokens][window 0][window 1]...[padding]``. Each guess has the position id of the token it
guesses. It attends to the clean tokens up to the window's first token, and to the earlier guesses of its window.
Windows do not attend to each other. If all guesses up to some place are right, each therefore has the same context as
the clean token at its position. The idea is from Jacobi Forcing (arXiv 2512.14681).

Shapes: B samples, T tokens of the longest row, C clean rows and G guesses whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cllm_export.training.data.samples import Sample
from cllm_export.training.data.windows import Window

CLEAN, PADDING = -1, -2


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A batch for one forward."""

    input_ids: Tensor
    """int64 [B, T]."""
    positions: Tensor
    """int64 [B, T]."""
    mask: Tensor
    """bool [B, 1, T, T], true where a row attends to a column."""
    rows: Tensor
    """int64 [C + G]: the rows whose logits are needed, as flat indices into [B, T]. Clean rows first, then guesses."""
    targets: Tensor
    """int64 [C]: the token after each clean row."""
    owners: Tensor
    """int64 [C + G]: index of the sample of each of ``rows``."""
    teacher: Tensor
    """int64 [G]: for each guess, the index into ``rows`` of its teacher."""
    weight: Tensor
    """float32 [G]: weight of each guess in the loss; 0 before the first wrong guess, or if it is only a teacher."""
    windows: tuple[tuple[range, ...], ...]
    """For each sample and window, the range of its guesses among the G."""

    @property
    def num_clean(self) -> int:
        return int(self.targets.shape[0])

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        tensors = ((name, value) for name, value in vars(self).items() if isinstance(value, Tensor))
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors}
        return replace(self, **moved)


class _Row:
    """One row of the batch under construction."""

    def __init__(self, sample: Sample) -> None:
        self.tokens = list(sample.tokens[:-1])
        self.positions = list(range(len(self.tokens)))
        self.segments = [CLEAN] * len(self.tokens)
        self.limits = list(self.positions)
        self._num_segments = 0

    def add(self, window: Window) -> int:
        """Append a window's guesses, and return their offset in the row."""
        offset, count = len(self.tokens), len(window.guesses)
        self.tokens += window.guesses
        self.positions += range(window.start + 1, window.start + 1 + count)
        self.segments += [self._num_segments] * count
        self.limits += [window.start] * count
        self._num_segments += 1
        return offset


@dataclass(frozen=True, kw_only=True)
class _Guesses:
    """A window placed in a row: the offset of its first guess, and the teacher and weight of each guess."""

    offset: int
    window: Window
    teacher: list[tuple[int, bool]]
    """For each guess: a position of the clean sequence (False), or an offset in the row (True)."""
    weight: list[float]
    is_previous: bool = False
    """Whether it is the state before a window. The pool does not need its predictions."""


def pack(
    samples: Sequence[Sample],
    windows: Sequence[Sequence[Window]],
    *,
    local: bool = False,
    distance_weight: float = 1.0,
) -> Packed:
    """Pack samples and their windows.

    Args:
        local: train with the local consistency loss. It trains the state before each window. The teacher is the
            window's logits at positions that the window covers, and the clean logits before them. A window without a
            previous state trains nothing. If false, each window is trained towards the clean logits (global loss).
        distance_weight: a guess d places after the first wrong one has weight ``distance_weight ** d``. Decoding
            reaches far guesses only after the near ones are right.
    """
    rows: list[_Row] = []
    placed: list[list[_Guesses]] = []
    for sample, own in zip(samples, windows, strict=True):
        row = _Row(sample)
        placed.append([guesses for window in own for guesses in _place(row, sample, window, local, distance_weight)])
        rows.append(row)
    return _to_tensors(samples, rows, placed)


def _place(row: _Row, sample: Sample, window: Window, local: bool, distance_weight: float) -> list[_Guesses]:
    offset = row.add(window)
    count = len(window.guesses)
    clean = [(window.start + 1 + index, False) for index in range(count)]
    weight = [0.0] * count if local else _weights(window, sample, distance_weight)
    own = _Guesses(offset=offset, window=window, teacher=clean, weight=weight)
    if not local or window.previous is None:
        return [own]
    weights = _weights(window.previous, sample, distance_weight)
    return [own, _previous_guesses(row, window.previous, weights, window, offset)]


def _previous_guesses(row: _Row, before: Window, weights: list[float], window: Window, offset: int) -> _Guesses:
    covered = range(window.start + 1, window.start + 1 + len(window.guesses))
    positions = range(before.start + 1, before.start + 1 + len(before.guesses))
    teacher = [(offset + at - covered.start, True) if at in covered else (at, False) for at in positions]
    weight = [value if at < covered.stop else 0.0 for value, at in zip(weights, positions, strict=True)]
    return _Guesses(offset=row.add(before), window=before, teacher=teacher, weight=weight, is_previous=True)


def _weights(window: Window, sample: Sample, distance_weight: float) -> list[float]:
    """Weights of a window's guesses. Those before the first wrong one have the same context as their teacher.

    There is nothing to learn from them, so their weight is 0.
    """
    right = window.num_right(sample)
    return [0.0 if index < right else distance_weight ** (index - right) for index in range(len(window.guesses))]


class _Batch:
    """Collects the rows whose logits are needed, with their samples, teachers and weights."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.clean_rows: list[int] = []
        self.targets: list[int] = []
        self.clean_owners: list[int] = []
        self._clean_index: list[int] = []
        """For each sample, the index of a clean row minus its position."""
        self.guess_rows: list[int] = []
        self.guess_owners: list[int] = []
        self._teachers: list[tuple[int, bool]] = []
        """For each guess: an index among the clean rows (False), or a flat row of another guess (True)."""
        self.weight: list[float] = []
        self.windows: list[tuple[range, ...]] = []

    def add(self, sample: Sample, placed: Sequence[_Guesses]) -> None:
        """Add the next sample, with all its guesses."""
        index = len(self.windows)
        self._clean_index.append(len(self.clean_rows) - sample.first_start)
        base = index * self._width
        self.clean_rows += range(base + sample.first_start, base + sample.num_rows)
        self.targets += sample.tokens[sample.num_prompt :]
        self.clean_owners += [index] * (sample.num_rows - sample.first_start)
        added = [self._add_guesses(index, guesses) for guesses in placed]
        own = zip(added, placed, strict=True)
        self.windows.append(tuple(where for where, guesses in own if not guesses.is_previous))

    def _add_guesses(self, index: int, guesses: _Guesses) -> range:
        """Add the guesses, and return their range among the G."""
        first, count = len(self.guess_rows), len(guesses.weight)
        start, clean = index * self._width, self._clean_index[index]
        self.guess_rows += range(start + guesses.offset, start + guesses.offset + count)
        self.guess_owners += [index] * count
        self._teachers += [(start + at, True) if in_row else (clean + at, False) for at, in_row in guesses.teacher]
        self.weight += guesses.weight
        return range(first, first + count)

    def teacher(self) -> list[int]:
        """For each guess, the index of its teacher among all rows, clean rows first."""
        index = {row: len(self.clean_rows) + number for number, row in enumerate(self.guess_rows)}
        return [index[at] if in_row else at for at, in_row in self._teachers]


def _to_tensors(samples: Sequence[Sample], rows: Sequence[_Row], placed: Sequence[Sequence[_Guesses]]) -> Packed:
    width = max(len(row.tokens) for row in rows)
    segments = _padded([row.segments for row in rows], width, PADDING)
    positions = _padded([row.positions for row in rows], width, 0)
    limits = _padded([row.limits for row in rows], width, -1)
    batch = _Batch(width)
    for sample, guesses in zip(samples, placed, strict=True):
        batch.add(sample, guesses)
    return Packed(
        input_ids=_padded([row.tokens for row in rows], width, 0),
        positions=positions,
        mask=_mask(segments, positions, limits),
        rows=torch.tensor(batch.clean_rows + batch.guess_rows),
        targets=torch.tensor(batch.targets),
        owners=torch.tensor(batch.clean_owners + batch.guess_owners),
        teacher=torch.tensor(batch.teacher(), dtype=torch.int64),
        weight=torch.tensor(batch.weight, dtype=torch.float32),
        windows=tuple(batch.windows),
    )


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows])


def _mask(segments: Tensor, positions: Tensor, limits: Tensor) -> Tensor:
    """The attention mask [B, 1, T, T]. Padding attends to padding: the softmax of an empty row would be NaN."""
    to_clean = (segments == CLEAN)[:, None, :] & (positions[:, None, :] <= limits[:, :, None])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments != CLEAN)[:, None, :]
    return (to_clean | (same & (positions[:, None, :] <= positions[:, :, None])))[:, None]
