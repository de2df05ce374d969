"""Answers that are no samples: collapsed, cut short, or empty."""

from __future__ import annotations

import pytest

from cllm_export.training.data.cleaning import EMPTY_ANSWER, REPETITION, TRUNCATED, why_dropped

EOS = (1, 9)
FINE = [5, 6, 7, 1]


@pytest.mark.parametrize(
    ("new_ids", "finish", "reason"),
    [
        (FINE, "eos", None),
        ([5, 6], "length", TRUNCATED),
        ([5, *[7] * 9, 1], "eos", None),
        ([5, *[7] * 10, 1], "eos", REPETITION),
        ([*[7, 8] * 20, 1], "eos", None),
        ([7] * 30, "length", REPETITION),
        ([1], "eos", EMPTY_ANSWER),
        ([9], "eos", EMPTY_ANSWER),
        ([], "length", EMPTY_ANSWER),
    ],
)
def test_an_answer_is_dropped_for_what_went_wrong_with_it(new_ids, finish, reason):
    assert why_dropped(new_ids, finish, eos_token_ids=EOS) == reason


def test_a_model_without_an_end_of_sequence_never_ends():
    assert why_dropped([5, 6, 7], "length", eos_token_ids=()) == TRUNCATED
