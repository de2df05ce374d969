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

UINT8_ZERO = 128
"""What stands for 0 where integers are stored without a sign."""


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


@dataclass(frozen=True, kw_only=True)
class ChannelRounding:
    """8 bits, round to nearest, one scale for each row: its largest magnitude is 127. A row of zeros has scale 0.

    Stored without a sign, 0 as 128: the kernels of x86 processors without VNNI add two products of a signed and an
    unsigned byte in 16 bits and saturate without a word, where both are unsigned they do not.
    """

    scale_factor: float = 1.0
    """What scales are multiplied by: another factor of the product, which then needs no node of its own."""

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def row_shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (width,), ()

    def __call__(self, rows: Tensor) -> Rounded:
        scales = rows.abs().amax(dim=1).div_(INT8_MAX)
        divisor = torch.where(scales > 0, scales, 1.0)
        codes = rows.div_(divisor[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).add_(UINT8_ZERO).to(torch.uint8)
        return Rounded(codes, scales * self.scale_factor)
