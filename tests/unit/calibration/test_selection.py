"""Which rows are observed: as many as asked for, in the ratio asked for, the same ones for the same seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.calibration.selection import MIN_ROWS, RowCounts, rows_between, select_rows
from cllm_export.errors import CalibrationError
from tests.fakes import properties

PLENTY = [RowCounts(1000, 700)] * 5


@properties
@given(mix=st.floats(0, 1), num_rows=st.integers(MIN_ROWS, 4000), seed=st.integers(0, 9))
def test_the_mix_is_the_share_of_block_states(mix, num_rows, seed):
    chosen = select_rows(PLENTY, num_rows=num_rows, mix=mix, seed=seed)
    assert abs(len(chosen.states) - mix * chosen.num_rows) <= 1
    assert chosen.num_rows <= num_rows
    assert chosen.num_rows == num_rows or len(chosen.states) >= 4999 or len(chosen.clean) >= 3499
    for numbers, available in ((chosen.states, 5000), (chosen.clean, 3500)):
        assert len(set(numbers.tolist())) == len(numbers)
        assert sorted(numbers.tolist()) == numbers.tolist()
        assert not len(numbers) or 0 <= numbers[0] <= numbers[-1] < available


def test_a_seed_draws_the_same_rows_and_another_draws_others():
    first, again, other = (select_rows(PLENTY, num_rows=500, mix=0.5, seed=seed) for seed in (1, 1, 2))
    assert first.states.tolist() == again.states.tolist() and first.clean.tolist() == again.clean.tolist()
    assert first.states.tolist() != other.states.tolist()


def test_too_few_rows_are_refused_with_what_there_is():
    with pytest.raises(CalibrationError, match=r"too few prompts: at mix 0\.5 they give 40 rows \(20 of block states"):
        select_rows([RowCounts(20, 900)], num_rows=1000, mix=0.5, seed=0)


def test_a_recording_gets_its_rows_counted_from_its_own_first():
    chosen = select_rows(PLENTY, num_rows=400, mix=1, seed=0)
    parts = [rows_between(chosen.states, start, start + 1000) for start in range(0, 5000, 1000)]
    assert sum(map(len, parts)) == 400
    assert [start * 1000 + row for start, part in enumerate(parts) for row in sorted(part)] == chosen.states.tolist()
