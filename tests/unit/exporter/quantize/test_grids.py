"""Grids with an offset: weights that come from 4-bit files keep their values, and others get a small error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from cllm_export.exporter.graph.grids import codes_on, offset_grid, values_of  # noqa: E402 - after the skip
from cllm_export.exporter.graph.groups import INT8_ZERO, ByteGroupRounding, GroupRounding, restored  # noqa: E402
from tests.fakes import properties  # noqa: E402

WIDTH = 256
"""Of a block of Q4_K, which holds eight groups of 32."""


def random_rows(rows: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator) / 4


def from_file(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows as a GGUF file of this type holds them, by the reference implementation."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    stored = quants.quantize(rows.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[kind]).reshape(rows.shape).copy())


def from_q4_k(rows: int, seed: int) -> torch.Tensor:
    """Rows of a Q4_K file with random contents. ``gguf`` reads this type, and does not write it."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, 144), dtype=np.uint8)
    blocks[:, :4] = generator.uniform(1e-4, 2e-3, (rows, 2)).astype(np.float16).view(np.uint8)
    return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q4_K).reshape(rows, WIDTH).copy())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@properties
@given(seed=st.integers(0, 1000))
def test_a_weight_from_a_four_bit_file_keeps_every_value(kind: str, seed: int):
    """In the last bit too."""
    weight = from_file(kind, random_rows(3, seed))
    assert torch.equal(restored(GroupRounding(group_size=32)(weight.clone()), WIDTH), weight)


@properties
@given(seed=st.integers(0, 1000))
def test_a_weight_from_q4_k_keeps_every_value(seed: int):
    weight = from_q4_k(3, seed)
    assert torch.equal(restored(GroupRounding(group_size=32)(weight.clone()), WIDTH), weight)


@properties
@given(seed=st.integers(0, 1000))
def test_a_weight_from_an_eight_bit_file_keeps_every_value(seed: int):
    weight = from_file("Q8_0", random_rows(3, seed))
    codes, scales, _ = ByteGroupRounding(group_size=32)(weight.clone())
    assert torch.equal(((codes.float() - INT8_ZERO) * scales[..., None]).flatten(1), weight)


@properties
@given(
    lowest=st.integers(0, 15),
    highest=st.integers(0, 15),
    step=st.integers(1, 2047),
    minimum=st.integers(-2047, 2047),
    width=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_a_group_keeps_its_grid_whichever_of_its_codes_it_uses(
    lowest: int, highest: int, step: int, minimum: int, width: int, seed: int
):
    """Steps and minimums have eleven bits, as fp16 has them."""
    lowest, highest = sorted((lowest, highest))
    codes = torch.randint(lowest, highest + 1, (2, width), generator=torch.Generator().manual_seed(seed))
    weight = codes.float() * (step * 2.0**-14) + minimum * 2.0**-11
    assert torch.equal(restored(GroupRounding(group_size=32)(weight.clone()), width), weight)


def test_a_group_between_two_grids_is_not_taken_for_one():
    """One value beside the grid: all codes of the others would be right, and that value wrong."""
    weight = (torch.arange(32) % 16).float()[None] / 64
    weight[0, 3] += 1 / 256
    apart = (restored(GroupRounding(group_size=32)(weight.clone()), 32) - weight).abs()
    assert 0 < apart.max() < 1 / 256


def test_an_offset_takes_a_quarter_of_the_squared_error_and_a_fit_a_tenth_more():
    """The best symmetric grid and the range of the values as the grid, for weights that lie on none."""
    weight = random_rows(64, 0) + 0.05
    errors = {}
    for symmetric in (True, False):
        rounded = GroupRounding(group_size=32, symmetric=symmetric)(weight.clone())
        errors[symmetric] = float((restored(rounded, WIDTH) - weight).square().sum())
    in_file = float((from_file("Q4_1", weight) - weight).square().sum())
    assert errors[False] < 0.75 * errors[True]
    assert errors[False] < 0.9 * in_file


@properties
@given(seed=st.integers(0, 1000), split=st.integers(1, 7))
def test_groups_do_not_affect_each_other(seed: int, split: int):
    """Some of them lie on a grid, so that both ways are taken."""
    groups = random_rows(8, seed, 32)
    groups[::3] = (groups[::3] * 64).round().clamp(-8, 7) / 64
    whole = offset_grid(groups)
    first, second = offset_grid(groups[:split]), offset_grid(groups[split:])
    assert torch.equal(whole.scales, torch.cat([first.scales, second.scales]))
    assert torch.equal(whole.offsets, torch.cat([first.offsets, second.offsets]))


def test_a_group_of_one_value_keeps_it():
    groups = torch.tensor([[0.0], [0.3], [-7.25]]).expand(3, 32).contiguous()
    grid = offset_grid(groups)
    assert torch.equal(values_of(grid, codes_on(grid, groups)), groups)
