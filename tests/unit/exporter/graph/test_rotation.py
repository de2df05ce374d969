"""Rotations are orthogonal, the same everywhere, and change a layer in a way that its rotated input takes back."""

from __future__ import annotations

import hashlib

import pytest

torch = pytest.importorskip("torch")

from cllm_export.exporter.graph.rotation import ColumnRotation, Rotation, RowRotation  # noqa: E402 - after the skip

WIDTHS = (1, 2, 3, 7, 16, 63, 64, 96, 576, 896, 1536, 2560)
ORTHOGONAL = 1e-11
"""Cosines are rounded to 40 binary places, 1e-12."""
FP32 = 1e-5
"""Relative to numbers of about 1: some roundings to fp32, of 6e-8 each, in a sum."""


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_is_orthogonal(width: int):
    matrix = Rotation(width).matrix()
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < ORTHOGONAL


@pytest.mark.parametrize("width", WIDTHS)
def test_a_channel_is_spread_over_all(width: int):
    """No channel keeps more than twice its share of the power of another."""
    assert Rotation(width).matrix().abs().max() ** 2 < 2.001 / width


def test_a_rotation_is_the_same_on_every_machine():
    """Every entry is a product of three stored numbers, which no order of a sum can change."""
    found = hashlib.sha256(Rotation(576).matrix().numpy().tobytes()).hexdigest()
    assert found == "7b132557de8161caa8e55cf2c7b443bd0ae002e6f8a65b8f1facfc33fabcba4f"


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_multiplied_by_the_matrix_block_by_block_and_back(width: int):
    rotation, rows = Rotation(width), torch.randn(2, 5, 3 * width, generator=torch.Generator().manual_seed(0))
    turned = rotation(rows)
    expected = (rows.double().view(2, 5, 3, width) @ rotation.matrix()).view(rows.shape)
    assert torch.allclose(turned.double(), expected, atol=FP32)
    assert torch.allclose(rotation.inverse(turned), rows, atol=FP32)


def test_many_rows_are_rotated_as_few_are():
    """There are more values than one chunk holds."""
    rotation, rows = Rotation(96), torch.randn(9000, 96, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rotation(rows)[8000:], rotation(rows[8000:]), atol=FP32)


def test_a_layer_that_takes_over_a_scale_and_a_rotation_gives_the_same_from_a_rotated_input():
    generator = torch.Generator().manual_seed(2)
    rows, weight, scale = (torch.randn(*shape, generator=generator) for shape in ((4, 24), (10, 24), (24,)))
    rotation = Rotation(24)
    changed = ColumnRotation(rotation=rotation, scale=scale.double())(weight)
    stored = weight.double()
    ColumnRotation(rotation=rotation, scale=scale.double())(stored)
    assert torch.equal(stored, weight.double()), "another thread hashes the stored rows"
    assert torch.allclose(rotation(rows) @ changed.T, (rows * scale) @ weight.T, atol=10 * FP32)


@pytest.mark.parametrize("first", [0, 2])
def test_a_layer_with_rotated_rows_gives_a_rotated_output_and_leaves_other_rows(first: int):
    """The rows are given from the second on in one case, as of a tensor that is stacked below another."""
    generator = torch.Generator().manual_seed(3)
    rows, weight = torch.randn(4, 8, generator=generator), torch.randn(15, 8, generator=generator)
    turn = RowRotation(rotation=Rotation(6), start=2, stop=14)
    changed = weight.clone()
    turn.apply(changed[first:], first)
    plain, found = rows @ weight.T, rows @ changed.T
    assert torch.allclose(found[:, 2:14], turn.rotation(plain[:, 2:14]), atol=FP32)
    assert torch.equal(changed[:2], weight[:2]) and torch.equal(changed[14:], weight[14:])
    turn.apply(changed, 0, inverse=True)
    assert torch.allclose(changed, weight, atol=FP32)


def test_a_bias_is_rotated_as_the_output_that_it_is_added_to():
    bias = torch.randn(12, generator=torch.Generator().manual_seed(4))
    turn, changed = RowRotation(rotation=Rotation(4), start=0, stop=12), bias.clone()
    turn.apply(changed, 0)
    assert torch.allclose(changed, turn.rotation(bias), atol=FP32)


def test_only_tensors_that_hold_rotated_rows_are_gathered():
    turn = RowRotation(rotation=Rotation(4), start=8, stop=12)
    assert [turn.overlaps(first, 4) for first in (0, 4, 8, 12)] == [False, False, True, False]
