"""How the rows of a matrix become integers and scales. A row is an output channel, as checkpoints store them.

Rows are rounded on their own, so that a weight can be streamed: no rounding here needs more of it than some rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

INT8_MAX = 127
"""Symmetric: -128 is left out."""

MAX_PAIR = 128
"""What the magnitudes of two neighbouring integers may come to. x86 processors without VNNI multiply an unsigned by a
signed byte and add two such products in 16 bits, where more saturates without a word: 255 * 128 fits, 255 * 129 does
not."""
PAIRED = 4
"""Input channels of which kernels pair any two: they take so many at a time, from the first on."""
BELOW_PAIR = 1 - 2.0**-12
"""Share of ``MAX_PAIR`` that two magnitudes are scaled to, that an error of the division rounds neither too far up."""


class Rounded(NamedTuple):
    """Some rows as they are stored."""

    codes: Tensor
    scales: Tensor


class Rounding(Protocol):
    """Makes rows [r, in] into codes and scales."""

    @property
    def code_dtype(self) -> torch.dtype: ...

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what a row of this width becomes: of its codes and of its scales."""
        ...

    def __call__(self, rows: Tensor) -> Rounded:
        """Round rows in fp32, which it may change."""
        ...


def restored(rounded: Rounded, width: int) -> Tensor:
    """The rows [r, in] of this width, in fp32, that codes and scales stand for: with a scale a row, or with a scale a
    group and two codes a byte."""
    codes, scales = rounded
    whole = unpacked(codes) if codes.dtype == torch.uint8 else codes
    return (whole.float() * scales[..., None]).flatten(1)[:, :width]


class _SignedChannels:
    """What is stored of 8 bits with a sign and one scale for each row."""

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (width,), ()


@dataclass(frozen=True, kw_only=True)
class ChannelRounding(_SignedChannels):
    """8 bits with a sign, round to nearest, one scale for each row: its largest magnitude is 127. A row of zeros has
    scale 1, since TensorRT takes positive scales alone."""

    def __call__(self, rows: Tensor) -> Rounded:
        scales = positive(rows.abs().amax(dim=1).div_(INT8_MAX))
        return Rounded(_signed_codes(rows, scales), scales)


@dataclass(frozen=True, kw_only=True)
class PairRounding(_SignedChannels):
    """8 bits with a sign, one scale for each row, that no processor's kernel saturates at, whatever the activations.

    The scale is that of ``ChannelRounding``, or larger where two magnitudes that a kernel adds would exceed
    ``MAX_PAIR``: by half in rows of a normal distribution, since two of the largest seldom meet. Halving the range,
    which rules out the same, doubles it.
    """

    scale_factor: float = 1.0
    """What scales are multiplied by: another factor of the product, which then needs no node of its own."""

    def __call__(self, rows: Tensor) -> Rounded:
        magnitudes = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % PAIRED))
        pairs = magnitudes.view(rows.shape[0], -1, PAIRED).topk(2, dim=-1).values.sum(dim=-1).amax(dim=1)
        scales = torch.maximum(magnitudes.amax(dim=1) / INT8_MAX, pairs / (MAX_PAIR * BELOW_PAIR))
        scales = positive(scales)
        return Rounded(_signed_codes(rows, scales), scales * self.scale_factor)


@dataclass(frozen=True, kw_only=True)
class Float8Rounding:
    """8-bit floats (E4M3), one scale for each row: its largest magnitude is the largest number of the format."""

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
    """Another rounding, of rows whose columns are multiplied first: by what the activation was divided by."""

    inner: Rounding
    factors: Tensor
    """[in]"""

    @property
    def code_dtype(self) -> torch.dtype:
        return self.inner.code_dtype

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.inner.row_shapes(width)

    def __call__(self, rows: Tensor) -> Rounded:
        return self.inner(rows.mul_(self.factors))


INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # PyTorch's own stubs lack it
"""Two values a byte along the last axis, where they are stored; PyTorch itself computes nothing in it."""

INT4_ZERO = 8
"""What stands for 0 where 4-bit integers are stored without a sign; they reach from -8 to 7."""

STEPS = (7.0, 7.5, 8.0, 8.5)
"""Steps from 0 to the largest magnitude of a group: of these, the one with the least squared error is taken."""


@dataclass(frozen=True, kw_only=True)
class GroupRounding:
    """4 bits, round to nearest, one scale for each group of a row. As ONNX Runtime's MatMulNBits takes them: codes
    [r, groups, group / 2], two in a byte, the first one low; scales [r, groups]. Zeros fill the last group."""

    group_size: int

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups = -(-width // self.group_size)
        return (groups, self.group_size // 2), (groups,)

    def __call__(self, rows: Tensor) -> Rounded:
        groups = in_groups(rows, self.group_size)
        scales = group_scales(groups)
        return Rounded(packed(int4_codes(groups, scales)), scales)


@dataclass(frozen=True, kw_only=True, eq=False)
class SignedGroups:
    """Another rounding of 4 bits in groups, stored with a sign, as ONNX's DequantizeLinear takes them: codes [r, in],
    from -8 to 7, a byte each until they are written, and scales [r, groups].

    A group of zeros has scale 1: TensorRT takes positive scales alone.
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
    """Scales with 1 where there is nothing to scale."""
    return torch.where(scales > 0, scales, 1.0)


def in_groups(rows: Tensor, group_size: int) -> Tensor:
    """Rows [r, in] as [r, groups, group], with zeros at the end."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group_size))
    return padded.view(rows.shape[0], -1, group_size)


def group_scales(groups: Tensor) -> Tensor:
    """The scale of each group [..., group] -> [...], 0 where it is zeros."""
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
    """Bytes [..., group / 2] as integers from -8 to 7 [..., group], in 8 bits."""
    halves = torch.stack([codes & 15, codes >> 4], dim=-1)
    return halves.flatten(-2).to(torch.int8) - INT4_ZERO
