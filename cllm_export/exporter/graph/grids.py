"""The grids of groups of 4-bit integers: a group's values are scale * code + offset, for codes from -8 to 7.

A symmetric grid has offset 0. Otherwise the offset is the value of code 0, a float, as GGUF's Q4_1 and Q4_K have one
(there it is called minimum, and it is the value of the lowest code). A group that lies on a grid keeps it to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cllm_export.exporter.graph.rounding import positive

LOWEST, HIGHEST = -8, 7
"""The range of codes."""
SPAN = HIGHEST - LOWEST
"""Number of steps from the lowest value of a grid to its highest."""

STEPS = (7.0, 7.5, 8.0, 8.5)
"""Candidate numbers of steps from 0 to a group's largest magnitude. The one with the least squared error is used."""

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Candidate widths of a grid with an offset, as shares of the range of a group's values. Values beyond it are clipped,
and the others get smaller steps."""


class Grid(NamedTuple):
    """The grids of some groups [...]."""

    scales: Tensor
    offsets: Tensor


def codes_on(grid: Grid, groups: Tensor) -> Tensor:
    """The codes of the values next to those of the groups [..., group], as floats."""
    scales = positive(grid.scales)[..., None]
    return groups.sub(grid.offsets[..., None]).div_(scales).round_().clamp_(LOWEST, HIGHEST)


def values_of(grid: Grid, codes: Tensor) -> Tensor:
    """The values [..., group] of codes."""
    return codes * grid.scales[..., None] + grid.offsets[..., None]


def symmetric_grid(groups: Tensor) -> Grid:
    """The grid of each group [..., group] without an offset. A group of zeros has scale 0."""
    largest = groups.abs().amax(dim=-1)
    zeros = torch.zeros_like(largest)
    best, least = largest / STEPS[0], torch.full_like(largest, torch.inf)
    for steps in STEPS:
        grid = Grid(largest / steps, zeros)
        error = (codes_on(grid, groups) * grid.scales[..., None] - groups).square_().sum(dim=-1)
        best = torch.where(error < least, grid.scales, best)
        least = torch.minimum(error, least)
    return Grid(best, zeros)


def offset_grid(groups: Tensor) -> Grid:
    """The grid of each group [..., group]: that on which all its values lie, else one of small squared error."""
    grid = _fitted_grid(groups)
    possible = _has_equals(groups[..., : SPAN + 2])  # of 17 values on a grid of 16, two are equal
    possible[possible.clone()] = _num_distinct(groups[possible]) <= SPAN + 1
    if possible.any():
        found = _exact_grid(groups[possible], Grid(grid.scales[possible], grid.offsets[possible]))
        grid.scales[possible], grid.offsets[possible] = found
    return grid


def _has_equals(values: Tensor) -> Tensor:
    """Whether two of the values [..., v] are equal, or so few that they all fit on a grid."""
    if values.shape[-1] <= SPAN + 1:
        return torch.ones(values.shape[:-1], dtype=torch.bool)
    return _num_distinct(values) < values.shape[-1]


def _num_distinct(values: Tensor) -> Tensor:
    ordered = values.sort(dim=-1).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(dim=-1)


def _exact_grid(groups: Tensor, other: Grid) -> Grid:
    """The grid from which each group [g, group] is restored to the bit, or the other one if there is none.

    The lowest value has the lowest code. If the highest is ``steps`` above it, the distance gives the scale. In GGUF's
    formats scales and minimums have so few bits that fp32 holds every value of a grid exactly.
    """
    scales, offsets = other.scales.clone(), other.offsets.clone()
    left = torch.ones_like(scales, dtype=torch.bool)
    low, high = groups.amin(dim=-1).double(), groups.amax(dim=-1).double()
    for steps in range(SPAN, 0, -1):
        scale = ((high - low) / steps).float()
        grid = Grid(scale, (low - LOWEST * scale.double()).float())
        equal = left & (values_of(grid, codes_on(grid, groups)) == groups).all(dim=-1)
        scales, offsets = torch.where(equal, grid.scales, scales), torch.where(equal, grid.offsets, offsets)
        left &= ~equal
    return Grid(scales, offsets)


def _fitted_grid(groups: Tensor) -> Grid:
    """The candidate of least squared error. Each takes codes on a grid of some width, then the best grid for them."""
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    width, middle = high - low, (high + low) / 2
    best, least = Grid(width / SPAN, middle), torch.full_like(width, torch.inf)
    for share in SHARES:
        scales = width * (share / SPAN)
        codes = codes_on(Grid(scales, middle - scales * ((HIGHEST + LOWEST) / 2)), groups)
        grid = _least_squares(groups, codes)
        error = values_of(grid, codes).sub_(groups).square_().sum(dim=-1)
        closer = error < least
        best = Grid(torch.where(closer, grid.scales, best.scales), torch.where(closer, grid.offsets, best.offsets))
        least = torch.minimum(error, least)
    return best


def _least_squares(groups: Tensor, codes: Tensor) -> Grid:
    """The scale and offset of least squared error for given codes: a straight line through points (code, value)."""
    mean_code, mean = codes.mean(dim=-1), groups.mean(dim=-1)
    apart = codes - mean_code[..., None]
    scales = (apart * (groups - mean[..., None])).sum(dim=-1) / positive(apart.square().sum(dim=-1))
    return Grid(scales, mean - scales * mean_code)
