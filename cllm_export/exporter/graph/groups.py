"""Rounds rows to integers in groups of input channels. Each group has a scale of its own.

Weights of 4 bits may have an offset too. Those of 8 bits do not need one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm_export.exporter.graph.grids import Grid, codes_on, offset_grid, symmetric_grid
from cllm_export.exporter.graph.rounding import INT8_MAX, Rounded, Rounding, RowShapes, positive

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # PyTorch's own stubs lack it
"""4-bit integers. They are stored as two values per byte along the last axis. PyTorch cannot compute with them."""

INT4_ZERO = 8
"""The code of 0 in unsigned 4-bit storage. The values range from -8 to 7."""

INT8_ZERO = 128
"""The code of 0 in unsigned 8-bit storage."""


def restored(rounded: Rounded, width: int) -> Tensor:
    """The fp32 rows [r, in] that codes, scales and offsets represent, for in = ``width``.

    Codes have either one scale per row, or one scale per group and two codes per byte.
    """
    codes, scales, offsets = rounded
    whole = unpacked(codes) if codes.dtype == torch.uint8 else codes
    values = whole.float() * scales[..., None]
    if offsets is not None:
        values += offsets[..., None]
    return values.flatten(1)[:, :width]


def num_groups(width: int, group_size: int) -> int:
    """The number of groups of a row; the last one may be smaller."""
    return -(-width // group_size)


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """The storage of 4-bit integers in groups of a row: the layout of ONNX Runtime's MatMulNBits.

    Codes are [r, groups, group / 2], two per byte, the first in the low half. Scales and offsets are [r, groups]. The
    last group is padded with codes of 0.
    """

    group_size: int
    symmetric: bool = False
    """Whether groups have no offset."""

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def row_shapes(self, width: int) -> RowShapes:
        groups = num_groups(width, self.group_size)
        shapes: RowShapes = {"codes": (groups, self.group_size // 2), "scales": (groups,)}
        return shapes if self.symmetric else shapes | {"offsets": (groups,)}

    def grid(self, groups: Tensor) -> Grid:
        """The grid of each group [..., group]."""
        return symmetric_grid(groups) if self.symmetric else offset_grid(groups)

    def stored(self, codes: Tensor, grid: Grid) -> Rounded:
        """Codes [r, groups, group] and their grid in the stored form."""
        return Rounded(packed(codes), grid.scales, None if self.symmetric else grid.offsets)


@dataclass(frozen=True, kw_only=True)
class GroupRounding(GroupLayout):
    """4-bit integers in groups, rounded to nearest."""

    def __call__(self, rows: Tensor) -> Rounded:
        count, width = rows.shape
        groups, whole = num_groups(width, self.group_size), width // self.group_size
        codes = torch.zeros(count, groups, self.group_size)
        grid = Grid(torch.zeros(count, groups), torch.zeros(count, groups))
        parts = rows[:, : whole * self.group_size], rows[:, whole * self.group_size :]
        sides = slice(0, whole), slice(whole, groups)
        for side, part in zip(sides, parts, strict=True):
            if part.shape[1]:
                values = part.reshape(count, side.stop - side.start, -1)
                grid.scales[:, side], grid.offsets[:, side] = found = self.grid(values)
                codes[:, side, : values.shape[2]] = codes_on(found, values)
        return self.stored(codes, grid)


@dataclass(frozen=True, kw_only=True, eq=False)
class SignedGroups:
    """Stores the result of a symmetric 4-bit group rounding with a sign, as ONNX's DequantizeLinear takes it.

    Codes are [r, in], from -8 to 7, one byte each until they are written. Scales are [r, groups]. A group of zeros has
    scale 1, since TensorRT takes only positive scales.
    """

    inner: Rounding

    @property
    def code_dtype(self) -> torch.dtype:
        return INT4

    def row_shapes(self, width: int) -> RowShapes:
        return {"codes": (width,), "scales": self.inner.row_shapes(width)["scales"]}

    def __call__(self, rows: Tensor) -> Rounded:
        width = rows.shape[1]
        codes, scales, offsets = self.inner(rows)
        assert offsets is None
        return Rounded(unpacked(codes).flatten(1)[:, :width], positive(scales))


@dataclass(frozen=True, kw_only=True)
class ByteGroupRounding:
    """8-bit integers in groups of a row, without an offset, in the layout of ONNX Runtime's MatMulNBits.

    Codes are [r, groups, group], unsigned, and 0 is ``INT8_ZERO``. Scales are [r, groups], and map a group's largest
    magnitude to 127, as those of GGUF's Q8_0 do. So a weight that was Q8_0 keeps its values.
    """

    group_size: int

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def row_shapes(self, width: int) -> RowShapes:
        groups = num_groups(width, self.group_size)
        return {"codes": (groups, self.group_size), "scales": (groups,)}

    def __call__(self, rows: Tensor) -> Rounded:
        groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % self.group_size))
        groups = groups.view(rows.shape[0], -1, self.group_size)
        scales = groups.abs().amax(dim=-1) / INT8_MAX
        codes = (groups / positive(scales)[..., None]).round_().clamp_(-INT8_MAX, INT8_MAX)
        return Rounded((codes + INT8_ZERO).to(torch.uint8), scales)


def packed(codes: Tensor) -> Tensor:
    """Integers from -8 to 7 [..., group] as bytes [..., group / 2]."""
    shifted = (codes + INT4_ZERO).to(torch.uint8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpacked(codes: Tensor) -> Tensor:
    """Bytes [..., group / 2] as 8-bit integers from -8 to 7 [..., group]."""
    halves = torch.stack([codes & 15, codes >> 4], dim=-1)
    return halves.flatten(-2).to(torch.int8) - INT4_ZERO
