"""Statistics of rows that come a few at a time are those of all of them, and merge to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.scales import InputStatistics
from cllm_export.calibration.accumulate import Accumulator, GramAccumulator, num_above
from cllm_export.calibration.outliers import outliers
from tests.fakes import properties

WIDTH = 5


def rows_of(count, seed):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def accumulate(rows, sizes, num_largest):
    accumulator, start = Accumulator(WIDTH, num_largest), 0
    for size in sizes:
        if len(part := rows[start : start + size]):
            accumulator.add(part)
        start += size
    if start < len(rows):
        accumulator.add(rows[start:])
    return accumulator


@properties
@given(count=st.integers(1, 3000), sizes=st.lists(st.integers(1, 900), max_size=5), seed=st.integers(0, 5))
def test_ranges_and_means_do_not_depend_on_how_rows_come(count, sizes, seed):
    rows = rows_of(count, seed)
    found = accumulate(rows, sizes, num_above(count) + 1)
    magnitudes = np.abs(rows)
    assert found.num_rows == count
    assert np.array_equal(found.amax, magnitudes.max(axis=0))
    assert np.array_equal(found.high, np.sort(magnitudes, axis=0)[count - 1 - num_above(count)])
    np.testing.assert_allclose(found.mean_abs, magnitudes.mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert (magnitudes > found.high).sum(axis=0).max() <= num_above(count)


def test_parts_that_went_through_a_file_merge_to_the_same_bits(tmp_path):
    whole, rows = Accumulator(WIDTH, 4), rows_of(2000, 1)
    for start in (0, 700, 1500):
        part = accumulate(rows[start : start + 700], [64], 4)
        np.savez(tmp_path / "part.npz", **part.to_arrays())
        with np.load(tmp_path / "part.npz") as file:
            whole.merge(Accumulator.from_arrays(file, 4))
    straight = Accumulator(WIDTH, 4)
    for start in (0, 700, 1500):
        straight.merge(accumulate(rows[start : start + 700], [64], 4))
    for kind in ("amax", "high", "mean_abs"):
        assert getattr(whole, kind).tobytes() == getattr(straight, kind).tobytes()


def test_rows_that_are_all_the_same_are_constant():
    accumulator = Accumulator(WIDTH, 2)
    accumulator.add(np.ones((3, WIDTH), np.float32))
    assert accumulator.is_constant
    accumulator.add(np.asarray([[1, 1, 1, 1, -1]], np.float32))
    assert not accumulator.is_constant


def test_the_gram_matrix_is_the_sum_of_outer_products():
    """Of rows that are divided by their root mean square."""
    rows, gram = rows_of(1000, 2), GramAccumulator(WIDTH)
    for start in range(0, 1000, 7):
        gram.add(rows[start : start + 7])
    wide = rows.astype(np.float64)
    wide /= np.sqrt(np.square(wide).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(gram.result(), wide.T @ wide, atol=1e-3)  # 1000 terms of 1, summed in fp32


def test_a_row_that_is_a_thousand_times_as_large_counts_as_any_other():
    """A row of zeros counts as nothing."""
    rows, plain, uneven = rows_of(64, 3), GramAccumulator(WIDTH), GramAccumulator(WIDTH)
    plain.add(rows)
    uneven.add(np.concatenate([rows * np.where(np.arange(64) == 5, 1000, 1)[:, None], np.zeros((1, WIDTH))]))
    np.testing.assert_allclose(uneven.result(), plain.result(), atol=1e-3)


def statistics(amax):
    amax = np.asarray(amax, np.float32)
    return InputStatistics(tensors=("layer",), num_rows=9, amax=amax, high=amax / 4, mean_abs=amax / 8)


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        ([1, 1, 1, 30], {"channel": 3, "ratio": 30, "high_share": 0.25, "overflows_fp16": False, "dead_channels": 0}),
        ([70000, 60000, 50000], {"overflows_fp16": True}),
        ([1, 0, 1], {"dead_channels": 1}),
    ],
)
def test_outlying_overflowing_and_dead_channels_are_reported(amax, expected):
    (found,) = outliers([statistics(amax), statistics([1, 2, 3])])
    assert found.items() >= expected.items()
