"""Packing: clean sequences and their noisy windows as one batch, so that one forward gives every loss.

A row of the batch is ``[clean tokens][window 0][window 1]...[padding]``. A window's guesses stand at their own
positions, see the clean tokens up to the window's first token, and the guesses before them in their own window;
windows do not see each other. A right guess therefore sees exactly what the clean token at its position sees. The
idea is that of Jacobi Forcing (arXiv 2512.14681).

Shapes: B samples, T tokens of the longest row, R rows whose logits are wanted, of them C clean and G guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cllm_export.training.samples import Sample
from cllm_export.training.windows import Window

CLEAN, PADDING = -1, -2


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A batch for one forward."""

    input_ids: Tensor
    """int64 [B, T]."""
    positions: Tensor
    """int64 [B, T]."""
    mask: Tensor
    """bool [B, 1, T, T], true where a row sees a column."""
    rows: Tensor
    """int64 [C + G]: the rows whose logits are wanted, flat over [B, T]: the clean ones, then the guesses."""
    targets: Tensor
    """int64 [C]: the token after each clean row."""
    clean_sample: Tensor
    """int64 [C]: sample of each clean row."""
    teacher: Tensor
    """int64 [G]: index into ``rows`` of the row that a guess should agree with."""
    weight: Tensor
    """float32 [G]: 1 where a guess counts, 0 where it sees nothing wrong, or is a teacher only."""
    windows: tuple[tuple[range, ...], ...]
    """For each sample and window, where its guesses lie among the G."""

    @property
    def num_clean(self) -> int:
        return int(self.targets.shape[0])

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        tensors = ((name, value) for name, value in vars(self).items() if isinstance(value, Tensor))
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors}
        return replace(self, **moved)


class _Row:
    """One row of the batch while it grows."""

    def __init__(self, sample: Sample) -> None:
        self.tokens = list(sample.tokens[:-1])
        self.positions = list(range(len(self.tokens)))
        self.segments = [CLEAN] * len(self.tokens)
        self.limits = list(self.positions)
        self._num_segments = 0

    def add(self, window: Window) -> int:
        """Append a window's guesses; their offset in the row."""
        offset, count = len(self.tokens), len(window.guesses)
        self.tokens += window.guesses
        self.positions += range(window.start + 1, window.start + 1 + count)
        self.segments += [self._num_segments] * count
        self.limits += [window.start] * count
        self._num_segments += 1
        return offset


@dataclass(frozen=True, kw_only=True)
class _Guesses:
    """A window placed in a row: offset of its first guess, what its guesses should agree with, and which count."""

    offset: int
    window: Window
    teacher: list[tuple[int, bool]]
    """For each guess: a position of the clean sequence (False), or an offset in the row (True)."""
    weight: list[float]


def pack(samples: Sequence[Sample], windows: Sequence[Sequence[Window]]) -> Packed:
    """Pack samples and their windows.

    A window with a ``previous`` state carries that state's guesses as well, which are what is trained: towards the
    logits of the window itself where it covers them, towards the clean ones before it (the local consistency loss).
    Otherwise the window's own guesses are trained towards the clean logits (the global one).
    """
    rows: list[_Row] = []
    placed: list[list[_Guesses]] = []
    for sample, own in zip(samples, windows, strict=True):
        row = _Row(sample)
        placed.append([guesses for window in own for guesses in _place(row, sample, window)])
        rows.append(row)
    return _to_tensors(samples, rows, placed)


def _place(row: _Row, sample: Sample, window: Window) -> list[_Guesses]:
    offset = row.add(window)
    count = len(window.guesses)
    clean = [(window.start + 1 + index, False) for index in range(count)]
    if window.previous is None:
        return [_Guesses(offset=offset, window=window, teacher=clean, weight=_weights(window, sample))]
    before = window.previous
    own = _Guesses(offset=offset, window=window, teacher=clean, weight=[0.0] * count)
    return [own, _previous_guesses(row, sample, before, window, offset)]


def _previous_guesses(row: _Row, sample: Sample, before: Window, window: Window, offset: int) -> _Guesses:
    covered = range(window.start + 1, window.start + 1 + len(window.guesses))
    positions = range(before.start + 1, before.start + 1 + len(before.guesses))
    teacher = [(offset + at - covered.start, True) if at in covered else (at, False) for at in positions]
    weights = zip(_weights(before, sample), positions, strict=True)
    weight = [value if at < covered.stop else 0.0 for value, at in weights]
    return _Guesses(offset=row.add(before), window=before, teacher=teacher, weight=weight)


def _weights(window: Window, sample: Sample) -> list[float]:
    """Guesses before the first wrong one see what their teacher sees: nothing is to be learned from them."""
    right = window.num_right(sample)
    return [0.0 if index < right else 1.0 for index in range(len(window.guesses))]


def _to_tensors(samples: Sequence[Sample], rows: Sequence[_Row], placed: Sequence[Sequence[_Guesses]]) -> Packed:
    width = max(len(row.tokens) for row in rows)
    segments = _padded([row.segments for row in rows], width, PADDING)
    positions = _padded([row.positions for row in rows], width, 0)
    limits = _padded([row.limits for row in rows], width, -1)
    clean_rows, targets, clean_sample, where = _clean_rows(samples, width)
    guess_rows: list[int] = []
    teacher: list[tuple[int, bool]] = []
    weight: list[float] = []
    ranges: list[tuple[range, ...]] = []
    for index, guesses in enumerate(placed):
        ranges.append(_append_guesses(index * width, guesses, guess_rows, teacher, weight, where[index]))
    row_index = {row: len(clean_rows) + number for number, row in enumerate(guess_rows)}
    return Packed(
        input_ids=_padded([row.tokens for row in rows], width, 0),
        positions=positions,
        mask=_mask(segments, positions, limits),
        rows=torch.tensor(clean_rows + guess_rows),
        targets=torch.tensor(targets),
        clean_sample=torch.tensor(clean_sample),
        teacher=torch.tensor([row_index[at] if in_row else at for at, in_row in teacher], dtype=torch.int64),
        weight=torch.tensor(weight),
        windows=tuple(ranges),
    )


def _clean_rows(samples: Sequence[Sample], width: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Flat rows that predict the answer, their targets and samples; per sample, index minus position of its rows."""
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    where: list[int] = []
    for index, sample in enumerate(samples):
        where.append(len(rows) - sample.first_start)
        rows += range(index * width + sample.first_start, index * width + sample.num_rows)
        targets += sample.tokens[sample.num_prompt :]
        owners += [index] * (sample.num_rows - sample.first_start)
    return rows, targets, owners, where


def _append_guesses(
    base: int,
    guesses: Sequence[_Guesses],
    rows: list[int],
    teacher: list[tuple[int, bool]],
    weight: list[float],
    where: int,
) -> tuple[range, ...]:
    """Append one sample's guesses. Ranges are those of windows proper, not of the states before them."""
    own: list[range] = []
    is_previous = False
    for entry in guesses:
        first = len(rows)
        rows += range(base + entry.offset, base + entry.offset + len(entry.window.guesses))
        teacher += [(base + at, True) if in_row else (where + at, False) for at, in_row in entry.teacher]
        weight += entry.weight
        if not is_previous:
            own.append(range(first, len(rows)))
        is_previous = not is_previous and entry.window.previous is not None
    return tuple(own)


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows])


def _mask(segments: Tensor, positions: Tensor, limits: Tensor) -> Tensor:
    """What each row sees, [B, 1, T, T]; padding sees padding, so that no row is empty (a softmax of nothing is NaN)."""
    to_clean = (segments == CLEAN)[:, None, :] & (positions[:, None, :] <= limits[:, :, None])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments != CLEAN)[:, None, :]
    return (to_clean | (same & (positions[:, None, :] <= positions[:, :, None])))[:, None]
