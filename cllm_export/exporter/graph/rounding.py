"""Rounds the rows of a matrix to 8 bits, one scale per row. A row is an output channel, as in checkpoints.

Each row is rounded independently, so a weight can be streamed a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

INT8_MAX = 127
"""Largest magnitude of an 8-bit integer. The range is symmetric and does not use -128."""

MAX_PAIR = 128
"""Largest sum of the magnitudes of two paired integers. x86 processors without VNNI multiply unsigned by signed bytes
and add two such products in 16 bits. A larger sum saturates silently: 255 * 128 fits, 255 * 129 does not."""
PAIRED = 4
"""Kernels take this many consecutive input channels at a time, and may pair any two of them."""
BELOW_PAIR = 1 - 2.0**-12
"""Share of ``MAX_PAIR`` that two magnitudes are scaled to, so that a division error rounds neither of them up."""


Part = Literal["codes", "scales", "offsets"]
"""What a rounded weight is stored as. Each part is an array of its own."""


class Rounded(NamedTuple):
    """Some rows in their stored form."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    """The value of code 0; None if that is 0 everywhere."""


RowShapes = dict[Part, tuple[int, ...]]


class Rounding(Protocol):
    """Rounds rows [r, in] to codes, scales and, if it has them, offsets."""

    @property
    def code_dtype(self) -> torch.dtype: ...

    def row_shapes(self, width: int) -> RowShapes:
        """The stored parts, and the shape of each for one row of this width."""
        ...

    def __call__(self, rows: Tensor) -> Rounded:
        """Round fp32 rows. May change ``rows`` in place."""
        ...


class _SignedChannels:
    """The stored form of signed 8-bit integers with one scale per row."""

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8

    def row_shapes(self, width: int) -> RowShapes:
        return {"codes": (width,), "scales": ()}


@dataclass(frozen=True, kw_only=True)
class ChannelRounding(_SignedChannels):
    """Signed 8-bit integers, rounded to nearest. Each row has one scale, which maps its largest magnitude to 127.

    A row of zeros has scale 1, since TensorRT takes only positive scales.
    """

    def __call__(self, rows: Tensor) -> Rounded:
        scales = positive(rows.abs().amax(dim=1).div_(INT8_MAX))
        return Rounded(_signed_codes(rows, scales), scales)


@dataclass(frozen=True, kw_only=True)
class PairRounding(_SignedChannels):
    """Signed 8-bit integers, one scale per row, for which no processor's kernel saturates, whatever the activations.

    The scale is that of ``ChannelRounding``, or larger if two magnitudes that a kernel adds would exceed ``MAX_PAIR``.
    For normally distributed rows it grows by half, since two of the largest magnitudes seldom meet. Halving the range
    would also prevent saturation, but doubles the scale.
    """

    scale_factor: float = 1.0
    """A constant factor of the product that is folded into the scales, so that it needs no node of its own."""

    def __call__(self, rows: Tensor) -> Rounded:
        magnitudes = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % PAIRED))
        pairs = magnitudes.view(rows.shape[0], -1, PAIRED).topk(2, dim=-1).values.sum(dim=-1).amax(dim=1)
        scales = torch.maximum(magnitudes.amax(dim=1) / INT8_MAX, pairs / (MAX_PAIR * BELOW_PAIR))
        scales = positive(scales)
        return Rounded(_signed_codes(rows, scales), scales * self.scale_factor)


@dataclass(frozen=True, kw_only=True)
class Float8Rounding:
    """8-bit floats (E4M3). Each row has one scale, which maps its largest magnitude to the format's largest number."""

    largest: float

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def row_shapes(self, width: int) -> RowShapes:
        return {"codes": (width,), "scales": ()}

    def __call__(self, rows: Tensor) -> Rounded:
        scales = positive(rows.abs().amax(dim=1).div_(self.largest))
        codes = rows.div_(scales[:, None]).clamp_(-self.largest, self.largest)
        return Rounded(codes.to(torch.float8_e4m3fn), scales)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledRounding:
    """Multiplies the columns of rows by the factors that the activation was divided by, then applies ``inner``."""

    inner: Rounding
    factors: Tensor
    """[in], one factor per column."""

    @property
    def code_dtype(self) -> torch.dtype:
        return self.inner.code_dtype

    def row_shapes(self, width: int) -> RowShapes:
        return self.inner.row_shapes(width)

    def __call__(self, rows: Tensor) -> Rounded:
        return self.inner(rows.mul_(self.factors))


def _signed_codes(rows: Tensor, scales: Tensor) -> Tensor:
    return rows.div_(scales[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def positive(scales: Tensor) -> Tensor:
    """The scales, with 1 in place of 0."""
    return torch.where(scales > 0, scales, 1.0)
