"""Roundings, without a graph: how far codes and scales are from the rows they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from cllm_export.exporter.graph.groups import (  # noqa: E402 - after the skip
    INT8_ZERO,
    ByteGroupRounding,
    GroupRounding,
    SignedGroups,
    restored,
)
from cllm_export.exporter.graph.rounding import (  # noqa: E402
    MAX_PAIR,
    PAIRED,
    ChannelRounding,
    Float8Rounding,
    PairRounding,
    Rounding,
    ScaledRounding,
)
from tests.fakes import properties  # noqa: E402

FEW_ROUNDINGS = 1 + 1e-5
"""Of fp32, in a division, a product and a subtraction."""


def random_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator) * 10


@properties
@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 1000))
def test_a_value_is_at_most_half_a_step_of_its_row_away(rows: int, width: int, seed: int):
    values = random_rows(rows, width, seed)
    for rounding in (ChannelRounding(), PairRounding()):
        codes, scales, _ = rounding(values.clone())
        assert ((codes.float() * scales[:, None] - values).abs() <= scales[:, None] / 2 * FEW_ROUNDINGS).all()
        if isinstance(rounding, ChannelRounding):
            assert codes.int().abs().amax(dim=1).eq(127).all(), "a row does not use its range"


@properties
@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 1000), spread=st.sampled_from([0, 1, 8]))
def test_two_products_of_a_kernel_fit_sixteen_bits_and_no_more_is_given_up_for_it(
    rows: int, width: int, seed: int, spread: int
):
    values = random_rows(rows, width, seed)
    values = values.sign() * values.abs() ** spread  # all alike, as they are, or a few large ones
    codes = PairRounding()(values.clone()).codes.int().abs()
    groups = torch.nn.functional.pad(codes, (0, -width % PAIRED)).view(rows, -1, PAIRED)
    pairs = groups.topk(2, dim=-1).values.sum(dim=-1).amax(dim=1)
    assert (255 * pairs <= 2**15 - 1).all()
    used = (pairs >= MAX_PAIR - 1) | (codes.amax(dim=1) == 127)
    assert used.all(), "a row uses neither range"


@properties
@given(split=st.integers(0, 8), seed=st.integers(0, 1000))
def test_rows_are_rounded_on_their_own(split: int, seed: int):
    values = random_rows(8, 24, seed)
    for rounding in (ChannelRounding(), PairRounding()):
        whole = rounding(values.clone())
        parts = [rounding(part.clone()) for part in (values[:split], values[split:]) if len(part)]
        assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
        assert torch.equal(whole.scales, torch.cat([part.scales for part in parts]))


@pytest.mark.parametrize(
    "rounding",
    [
        ChannelRounding(),
        PairRounding(),
        Float8Rounding(largest=448.0),
        SignedGroups(inner=GroupRounding(group_size=32, symmetric=True)),
    ],
)
def test_a_row_of_zeros_has_zero_codes_and_a_positive_scale(rounding: Rounding):
    codes, scales, _ = rounding(torch.cat([torch.zeros(1, 32), torch.ones(1, 32)]))
    assert (scales > 0).all()
    assert codes[0].float().eq(0).all() and codes[1].float().ne(0).all()


@properties
@given(rows=st.integers(1, 5), width=st.integers(1, 90), seed=st.integers(0, 1000))
def test_signed_groups_hold_the_numbers_of_the_rounding_inside(rows: int, width: int, seed: int):
    inner, values = GroupRounding(group_size=32, symmetric=True), random_rows(rows, width, seed)
    rounded, signed = inner(values.clone()), SignedGroups(inner=inner)(values.clone())
    groups = torch.nn.functional.pad(signed.codes.float(), (0, -width % 32)).view(rows, -1, 32)
    assert torch.equal((groups * rounded.scales[..., None]).flatten(1)[:, :width], restored(rounded, width))
    assert torch.equal(signed.scales, rounded.scales)
    assert {"codes": signed.codes.shape[1:], "scales": signed.scales.shape[1:]} == SignedGroups(inner=inner).row_shapes(
        width
    )


def test_scales_carry_the_other_factor_of_a_product():
    values = random_rows(3, 5, 0)
    plain, scaled = PairRounding()(values.clone()), PairRounding(scale_factor=0.5)(values.clone())
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.scales / 2, scaled.scales)


@properties
@given(rows=st.integers(1, 5), width=st.integers(1, 90), seed=st.integers(0, 1000))
def test_symmetric_four_bit_values_are_a_step_away_at_most(rows: int, width: int, seed: int):
    values = random_rows(rows, width, seed)
    rounded = GroupRounding(group_size=32, symmetric=True)(values.clone())
    largest = in_groups(values).abs().amax(dim=-1)
    # the coarsest step is a seventh of the group's largest; the finest leaves 1.5 of 8.5 steps of it to be clipped
    far = 1.5 / 8.5 * largest * FEW_ROUNDINGS
    assert (in_groups(restored(rounded, width) - values).abs() <= far[..., None]).all()
    whole = restored(rounded, rounded.codes.shape[1] * 32)
    assert whole[:, width:].eq(0).all()


def test_eight_bit_values_in_groups_are_half_a_step_away_at_most():
    values = random_rows(5, 70, 0)
    codes, scales, offsets = ByteGroupRounding(group_size=32)(values.clone())
    assert {"codes": codes.shape[1:], "scales": scales.shape[1:]} == ByteGroupRounding(group_size=32).row_shapes(70)
    whole = (codes.float() - INT8_ZERO) * scales[..., None]
    assert offsets is None
    assert ((whole - in_groups(values)).abs() <= scales[..., None] / 2 * FEW_ROUNDINGS).all()


def in_groups(rows: torch.Tensor) -> torch.Tensor:
    """Rows [r, in] as [r, groups, 32], padded with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32)).view(rows.shape[0], -1, 32)


def test_eight_bit_floats_keep_three_bits_behind_the_first():
    values = random_rows(4, 40, 0)
    codes, scales, _ = Float8Rounding(largest=448.0)(values.clone())
    whole = codes.float() * scales[:, None]
    coarse = values.abs() >= values.abs().amax(dim=1, keepdim=True) * 2**-14  # smaller ones have fewer bits
    assert ((whole - values).abs()[coarse] <= values.abs()[coarse] / 16 * FEW_ROUNDINGS).all()


def test_columns_are_scaled_before_they_are_rounded():
    values, factors = random_rows(3, 6, 0), torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0, 1.0])
    scaled = ScaledRounding(inner=ChannelRounding(), factors=factors)(values.clone())
    plain = ChannelRounding()(values * factors)
    assert torch.equal(scaled.codes, plain.codes) and torch.equal(scaled.scales, plain.scales)
    assert scaled.codes.dtype == torch.int8
