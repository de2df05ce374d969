"""GPTQ (arXiv 2210.17323): rounds a weight channel by channel; later channels compensate the error of earlier ones.

Given the Gram matrix of the layer's input, the rows of a matrix are independent, so they are rounded while they are
streamed. The libraries that implement GPTQ (neural-compressor, nvidia-modelopt, optimum) are not used: they calibrate a
PyTorch model or a whole ONNX model in memory, on samples of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm_export.bundle.scales import Scales
from cllm_export.errors import QuantizationError
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.graph.grids import Grid, codes_on, values_of
from cllm_export.exporter.graph.groups import GroupLayout, num_groups
from cllm_export.exporter.graph.rounding import Rounded

DAMPING = 0.01
"""Share of the mean of the Gram matrix's diagonal that is added to the diagonal, as in the paper."""

MATRICES = 4
"""Number of matrices of the Gram matrix's size that are held while one is factored."""


def factor_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Anonymous memory that the factors need, in bytes, judged by the widest layer of a checkpoint."""
    widest = max((info.shape[1] for name, info in tensors.items() if ".layers." in name and len(info.shape) == 2))
    return MATRICES * torch.float32.itemsize * widest**2


class Factors:
    """Makes the factor that GPTQ needs of each layer's input. Keeps only the last one, because [in, in] is large."""

    def __init__(self, scales: Scales) -> None:
        self._scales = scales
        self._name: str | None = None
        self._factor: Tensor | None = None

    def of(self, tensor: str) -> Tensor:
        """Upper Cholesky factor [in, in] of the inverse of the damped Gram matrix of this checkpoint tensor's input.

        Raises:
            ScalesError: the scales have no Gram matrix of this input.
            QuantizationError: the matrix has no inverse, even damped.
        """
        name = self._scales.of(tensor).name
        if self._factor is None or name != self._name:
            self._factor = None  # frees the old one before the new one is made
            self._factor, self._name = self._make(tensor), name
        return self._factor

    def _make(self, tensor: str) -> Tensor:
        gram = torch.from_numpy(self._scales.gram(tensor).copy())
        diagonal = gram.diagonal()
        diagonal[diagonal == 0] = 1  # the channel was always 0, so its rounding has no effect
        diagonal += DAMPING * diagonal.mean()
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        except RuntimeError as error:  # the type that torch.linalg raises
            raise QuantizationError(
                f"the Gram matrix of the input of {tensor} has no inverse ({error}): calibrate with more prompts"
            ) from None
        return factor


@dataclass(frozen=True, kw_only=True, eq=False)
class GptqRounding(GroupLayout):
    """4-bit integers in groups. Each column compensates errors of those before it."""

    tensor: str
    """Name of a checkpoint tensor that reads the same input."""
    factors: Factors

    def __call__(self, rows: Tensor) -> Rounded:
        factor = self.factors.of(self.tensor)
        count, width = rows.shape
        groups = num_groups(width, self.group_size)
        codes = torch.zeros(count, groups, self.group_size)
        grid = Grid(torch.zeros(count, groups), torch.zeros(count, groups))
        for group, start in enumerate(range(0, width, self.group_size)):
            stop = min(start + self.group_size, width)
            found = self.grid(rows[:, start:stop])
            grid.scales[:, group], grid.offsets[:, group] = found
            chosen, errors = self._columns(rows[:, start:stop], found, factor[start:stop, start:stop])
            codes[:, group, : stop - start] = chosen
            rows[:, stop:] -= errors @ factor[start:stop, stop:]
        return self.stored(codes, grid)

    @staticmethod
    def _columns(rows: Tensor, grid: Grid, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of a group [r, columns], and each column's error divided by its diagonal entry of the factor."""
        codes, errors = torch.empty_like(rows), torch.empty_like(rows)
        for column in range(rows.shape[1]):
            values = rows[:, column, None]
            chosen = codes_on(grid, values)
            codes[:, column, None] = chosen
            errors[:, column] = (values - values_of(grid, chosen))[:, 0] / factor[column, column]
            rows[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
        return codes, errors
