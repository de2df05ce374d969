"""What is put into ``weights.bin``. Pieces are bytes in memory here, as ``stream_files`` gives them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cllm_export.errors import OutputError
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.checkpoint.stream import Piece
from cllm_export.exporter.graph.groups import GroupRounding, SignedGroups
from cllm_export.exporter.graph.model import WeightSource
from cllm_export.exporter.graph.rotation import ColumnRotation, Rotation, RowRotation
from cllm_export.exporter.graph.trace import TORCH_DTYPE
from cllm_export.exporter.weights.weights import Layout, Part, Place, WeightsFile, require_space

OFFSET = 1.0
"""Of the norms of Gemma, whose weights are stored as their distance from 1."""
ROTATED = 1e-5
"""Two roundings to fp32 of numbers up to 20."""


def test_an_offset_is_added_to_what_is_written_and_not_to_the_piece_which_is_hashed_meanwhile(tmp_path: Path):
    stored = np.array([0.5, -0.25, 2.0], np.float32)
    room = bytearray(stored.tobytes())
    info = TensorInfo(file=tmp_path / "model.safetensors", dtype="F32", shape=(3,), offset=0, length=12)
    source = WeightSource(tensors=("norm",), offset=OFFSET)
    layout = Layout(
        written={"norm": Place(offset=0, shape=(3,), dtype=TORCH_DTYPE["fp32"])},
        linked={},
        parts={"norm": [Part("norm", 0, source)]},
    )
    weights = WeightsFile(tmp_path / "weights.bin", layout, 1 << 10)
    with weights.filled():
        weights.put(Piece("norm", info, 0, 3, memoryview(room)))
        weights.sha256()
    assert np.array_equal(np.fromfile(tmp_path / "weights.bin", np.float32), stored + OFFSET)
    assert bytes(room) == stored.tobytes()


@pytest.mark.parametrize("ends", [(0, 6), (0, 1, 6), (0, 3, 4, 6)])
def test_four_bits_share_a_byte_with_their_neighbour_wherever_pieces_end(tmp_path: Path, ends: tuple[int, ...]):
    stored = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    rounding = SignedGroups(inner=GroupRounding(group_size=32, symmetric=True))
    info = TensorInfo(file=tmp_path / "model.safetensors", dtype="F32", shape=(6, 32), offset=0, length=stored.nbytes)
    codes = WeightSource(tensors=("weight",), transposed=True, rounding=rounding, holds="codes")
    layout = Layout(
        written={"codes": Place(offset=0, shape=(32, 6), dtype=rounding.code_dtype)},
        linked={},
        parts={"weight": [Part("codes", 0, codes)]},
    )
    assert layout.size == 32 * 6 // 2
    weights = WeightsFile(tmp_path / "weights.bin", layout, 1 << 10)
    with weights.filled():
        for start, stop in pairwise(ends):
            rows = memoryview(bytearray(stored[start:stop].tobytes()))
            weights.put(Piece("weight", info, start, stop, rows))
        weights.sha256()
    written = np.fromfile(tmp_path / "weights.bin", np.uint8)
    values = np.stack([written & 15, written >> 4], axis=-1).reshape(32, 6).astype(np.int8)
    values[values > 7] -= 16
    assert np.array_equal(values.T, rounding(torch.from_numpy(stored.copy())).codes.numpy())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_file_system_of_the_kernel_is_not_called_a_full_disk():
    with pytest.raises(OutputError, match="cannot write /proc/x: /proc is on a file system of the kernel"):
        require_space(Path("/proc"), 1, Path("/proc/x"))


@pytest.mark.parametrize("ends", [(0, 6), (0, 1, 5, 6), (0, 3, 6)])
@pytest.mark.parametrize("transposed", [False, True], ids=["as-stored", "transposed"])
def test_rows_are_rotated_as_a_whole_and_after_any_change_wherever_pieces_end(
    tmp_path: Path, ends: tuple[int, ...], transposed: bool
):
    """The tensor is the second of two in its weight, and the first stays as it is."""
    stored = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    turn = RowRotation(rotation=Rotation(3), start=4, stop=10)
    columns = ColumnRotation(rotation=Rotation(8))
    source = WeightSource(tensors=("first", "second"), transposed=transposed, rows=turn, columns=columns)
    layout = Layout(
        written={"weight": Place(offset=0, shape=(8, 10) if transposed else (10, 8), dtype=TORCH_DTYPE["fp32"])},
        linked={},
        parts={"first": [Part("weight", 0, source)], "second": [Part("weight", 4, source)]},
    )
    weights = WeightsFile(tmp_path / "weights.bin", layout, 1 << 10, lambda piece, rows: rows * (1 + len(piece.name)))
    with weights.filled():
        for name, shape, parts in (("first", (4, 8), (0, 4)), ("second", (6, 8), ends)):
            info = TensorInfo(file=tmp_path / "x", dtype="F32", shape=shape, offset=0, length=4 * shape[0] * 8)
            for start, stop in pairwise(parts):
                rows = bytearray(stored[start:stop].tobytes())
                weights.put(Piece(name, info, start, stop, memoryview(rows)))
                assert bytes(rows) == stored[start:stop].tobytes(), "another thread hashes the piece"
        weights.sha256()
    written = np.fromfile(tmp_path / "weights.bin", np.float32)
    found = written.reshape(8, 10).T if transposed else written.reshape(10, 8)
    right, left = Rotation(8).matrix().numpy(), np.kron(np.eye(2), Rotation(3).matrix().numpy())
    np.testing.assert_allclose(found[:4], 6 * stored[:4] @ right, atol=ROTATED)
    np.testing.assert_allclose(found[4:], left.T @ (7 * stored) @ right, atol=ROTATED)
