"""Dequantises tensors of a GGUF file, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cllm_export.exporter.gguf.header import GgufFile, GgufTensor

PIECE_BYTES = 1 << 24
"""Bytes of dequantised values that are in memory at once; the package ``gguf`` needs about two such pieces more."""

Values = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]


def read_tensor(file: GgufFile, tensor: GgufTensor) -> Values:
    """The values of a small tensor, in its shape."""
    return np.concatenate(list(read_rows(file, tensor))).reshape(tensor.shape)


def read_rows(
    file: GgufFile, tensor: GgufTensor, order: Rows | None = None, *, piece_bytes: int = PIECE_BYTES
) -> Iterator[Values]:
    """The values of a tensor, a few rows at a time. Each piece has the shape (rows, row).

    Args:
        order: the stored row that each row is; by default they are in the stored order.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind, count = GGMLQuantizationType[tensor.type_name], math.prod(tensor.shape[:-1])
    stored = np.memmap(file.path, np.uint8, "r", tensor.offset, (count, tensor.row_bytes))
    step = max(1, piece_bytes // (4 * tensor.shape[-1]))
    for start in range(0, count, step):
        rows = slice(start, start + step) if order is None else order[start : start + step]
        piece: Values = dequantize(np.array(stored[rows]), kind)
        yield piece


def unpermuted(num_rows: int, num_heads: int) -> Rows:
    """The order that undoes llama.cpp's order of the rows of q or k, in which the halves of a head alternate.

    Returns:
        the stored row of each row, of shape (num_rows,).
    """
    half = num_rows // num_heads // 2
    return np.arange(num_rows).reshape(num_heads, half, 2).swapaxes(1, 2).reshape(-1)
