"""Orthogonal matrices that spread a few large channels over all channels, and how they change a weight.

x R has the length of x, but no channel that is far above the others: 8 bits a row then lose less. The matrix is a
Kronecker product, R = S (D x H). S has random signs. H is the Hadamard matrix of the largest power of two that divides
the width. D is the orthonormal cosine transform of the odd rest. Applying it takes few operations for each value, and
its numbers are the same on every machine.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

COSINE_BITS = 40
"""Cosines are rounded to this many binary places, since the last bits of ``math.cos`` differ between systems. The
matrix is then orthogonal within 1e-11, and fp32 resolves 6e-8."""

CHUNK_VALUES = 1 << 18
"""Number of values that are rotated at once, in fp64."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R [width, width]. Equal widths give equal matrices."""

    width: int

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows x [..., k width] -> each block of ``width`` columns times R. Computed in fp64, returned in fp32."""
        return self._in_chunks(rows, inverse=False)

    def inverse(self, rows: Tensor) -> Tensor:
        """The rows [..., k width] that ``__call__`` turns into these."""
        return self._in_chunks(rows, inverse=True)

    def matrix(self) -> Tensor:
        """R [width, width], fp64."""
        return _rotated(torch.eye(self.width, dtype=torch.float64), inverse=False)

    def _in_chunks(self, rows: Tensor, *, inverse: bool) -> Tensor:
        blocks = rows.reshape(-1, self.width)
        result = torch.empty(blocks.shape, dtype=torch.float32)
        step = max(1, CHUNK_VALUES // self.width)
        for start in range(0, len(blocks), step):
            chunk = blocks[start : start + step].double()
            result[start : start + step] = _rotated(chunk, inverse=inverse)
        return result.view(rows.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnRotation:
    """Changes a weight for an input that is rotated: W -> W diag(scale) R, block by block of R's width."""

    rotation: Rotation
    scale: Tensor | None = None
    """[in], fp64: the weight of the norm before the layer, which the layer takes over."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Some rows [r, in] of the weight, changed, in fp32."""
        return self.rotation(rows if self.scale is None else rows.double() * self.scale)  # not in place: fp64 is stored


@dataclass(frozen=True, kw_only=True)
class RowRotation:
    """Rotates the output of a layer: blocks of rows of its weight are multiplied by R^T from the left."""

    rotation: Rotation
    start: int
    stop: int
    """The rows that are rotated, of the stacked weight [out, in] or of the bias [out]."""

    def overlaps(self, first: int, rows: int) -> bool:
        """Whether any of the rows from ``first`` on is rotated."""
        return first < self.stop and self.start < first + rows

    def apply(self, weight: Tensor, first: int, *, inverse: bool = False) -> None:
        """Change the fp32 rows from ``first`` on in place. They must contain the rotated rows as a whole."""
        change = self.rotation.inverse if inverse else self.rotation
        columns = weight[self.start - first : self.stop - first].view(self.stop - self.start, -1)
        step = max(1, CHUNK_VALUES // len(columns))
        for at in range(0, columns.shape[1], step):
            part = columns[:, at : at + step]
            part.copy_(change(part.t().contiguous()).t())


def _rotated(rows: Tensor, *, inverse: bool) -> Tensor:
    """fp64 rows [r, width] times R, or times its transpose."""
    signs, left, right = _factors(rows.shape[1])
    if inverse:
        left, right = left.t(), right.t()
    else:
        rows = rows * signs
    blocks = (rows.reshape(-1, len(right)) @ right).view(-1, len(left), len(right))
    turned = (left.t() @ blocks).view(rows.shape)
    return turned * signs if inverse else turned


@functools.cache
def _factors(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The signs [width], and the two factors of the Kronecker product, which have about equal sizes."""
    power = width & -width
    generator = random.Random(width)  # noqa: S311 - a constant of the format, not a secret
    signs = torch.tensor([1.0 if generator.random() < 0.5 else -1.0 for _ in range(width)], dtype=torch.float64)
    size = 1
    while size < power and size * size < width:
        size *= 2
    left = torch.kron(_cosines(width // power), _hadamard(power // size))
    return signs, left, _hadamard(size) / math.sqrt(power)


def _hadamard(size: int) -> Tensor:
    """The Hadamard matrix of a power of two: entries 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of an odd size."""

    def row(index: int) -> Iterator[float]:
        factor = math.sqrt((2 if index else 1) / size)
        for column in range(size):
            exact = factor * math.cos(math.pi * (2 * column + 1) * index / (2 * size))
            yield round(exact * 2**COSINE_BITS) / 2**COSINE_BITS

    return torch.tensor([list(row(index)) for index in range(size)], dtype=torch.float64)
