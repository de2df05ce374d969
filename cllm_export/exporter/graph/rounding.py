"""Rounds the rows of a matrix to integers and scales. A row is an output channel, as in checkpoints.

Each row is rounded independently, so a weight can be streamed a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class Rounded(NamedTuple):
    """Some rows in their stored form."""

    codes: Tensor
    scales: Tensor


class Rounding(Protocol):
    """Rounds rows [r, in] to codes and scales."""

    @property
    def code_dtype(self) -> torch.dtype: ...

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the codes and of the scales of one row of this width."""
        ...

    def __call__(self, rows: Tensor) -> Rounded:
        """Round fp32 rows. May change ``rows`` in place."""
        ...


def restored(rounded: Rounded, width: int) -> Tensor:
    """The fp32 rows [r, in] that codes and scales represent, for in = ``width``.

    Codes have either one scale per row, or one scale per group and two codes per byte.
    """
    codes, scales = rounded
    whole = unpacked(codes) if codes.dtype == torch.uint8 else codes
    return (whole.float() * scales[..., None]).flatten(1)[:, :width]


class _SignedChannels:
    """The stored form of signed 8-bit integers with one scale per row."""

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (width,), ()


@dataclass(frozen=True, kw_only=True)
class ChannelRounding(_SignedChannels):
    """Signed 8-bit integers, rounded to nearest. Each row has one scale, which maps its largest magnitude to 127.

    A row of zeros has scale 1, since TensorRT takes only positive scales.
    """

    scale_factor: float = 1.0
    """A constant factor of the product that is folded into the scales, so that it needs no node of its own."""

    def __call__(self, rows: Tensor) -> Rounded:
        scales = positive(rows.abs().amax(dim=1).div_(INT8_MAX))
        return Rounded(_signed_codes(rows, scales), scales * self.scale_factor)


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

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (width,), ()

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

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.inner.row_shapes(width)

    def __call__(self, rows: Tensor) -> Rounded:
        return self.inner(rows.mul_(self.factors))


INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # PyTorch's own stubs lack it
"""4-bit integers. They are stored as two values per byte along the last axis. PyTorch cannot compute with them."""

INT4_ZERO = 8
"""The code of 0 in unsigned 4-bit storage. The values range from -8 to 7."""

STEPS = (7.0, 7.5, 8.0, 8.5)
"""Candidate numbers of steps from 0 to a group's largest magnitude. The one with the least squared error is used."""


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """The storage of 4-bit integers with one scale per group of a row: the layout of ONNX Runtime's MatMulNBits.

    Codes are [r, groups, group / 2], two per byte, the first in the low half. Scales are [r, groups]. The last group is
    padded with zeros.
    """

    group_size: int

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups = -(-width // self.group_size)
        return (groups, self.group_size // 2), (groups,)


@dataclass(frozen=True, kw_only=True)
class GroupRounding(GroupLayout):
    """4-bit integers in groups, rounded to nearest."""

    def __call__(self, rows: Tensor) -> Rounded:
        groups = in_groups(rows, self.group_size)
        scales = group_scales(groups)
        return Rounded(packed(int4_codes(groups, scales)), scales)


@dataclass(frozen=True, kw_only=True, eq=False)
class SignedGroups:
    """Stores the result of another 4-bit group rounding with a sign, as ONNX's DequantizeLinear takes it.

    Codes are [r, in], from -8 to 7, one byte each until they are written. Scales are [r, groups]. A group of zeros has
    scale 1, since TensorRT takes only positive scales.
    """

    inner: Rounding

    @property
    def code_dtype(self) -> torch.dtype:
        return INT4

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (width,), self.inner.row_shapes(width)[1]

    def __call__(self, rows: Tensor) -> Rounded:
        width = rows.shape[1]
        codes, scales = self.inner(rows)
        return Rounded(unpacked(codes).flatten(1)[:, :width], positive(scales))


def _signed_codes(rows: Tensor, scales: Tensor) -> Tensor:
    return rows.div_(scales[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def positive(scales: Tensor) -> Tensor:
    """The scales, with 1 in place of 0."""
    return torch.where(scales > 0, scales, 1.0)


def in_groups(rows: Tensor, group_size: int) -> Tensor:
    """Rows [r, in] as [r, groups, group], padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group_size))
    return padded.view(rows.shape[0], -1, group_size)


def group_scales(groups: Tensor) -> Tensor:
    """The scale of each group, [..., group] -> [...]; 0 for a group of zeros."""
    largest = groups.abs().amax(dim=-1)
    best, least = largest / STEPS[0], torch.full_like(largest, torch.inf)
    for steps in STEPS:
        scales = largest / steps
        error = (int4_codes(groups, scales) * scales[..., None] - groups).square_().sum(dim=-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def int4_codes(groups: Tensor, scales: Tensor) -> Tensor:
    """Integers from -8 to 7, as floats."""
    return torch.round(groups / positive(scales)[..., None]).clamp_(-8, 7)


def packed(codes: Tensor) -> Tensor:
    """Integers from -8 to 7 [..., group] as bytes [..., group / 2]."""
    shifted = (codes + INT4_ZERO).to(torch.uint8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpacked(codes: Tensor) -> Tensor:
    """Bytes [..., group / 2] as 8-bit integers from -8 to 7 [..., group]."""
    halves = torch.stack([codes & 15, codes >> 4], dim=-1)
    return halves.flatten(-2).to(torch.int8) - INT4_ZERO
