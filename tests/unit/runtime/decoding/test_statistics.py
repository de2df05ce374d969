"""The measures, on forwards written by hand. The greedy tokens from position 5 on are 11, 12, 13, ..."""

from __future__ import annotations

import json

import pytest

from cllm_export.runtime.decoding.statistics import ForwardRecord, Statistics, summarize

PROMPT_LAST = 9
SLIDING = [
    ForwardRecord(4, [PROMPT_LAST, 0, 0, 0], [11, 20, 13, 14], 1, [11]),
    ForwardRecord(5, [11, 20, 13, 14], [12, 13, 14, 15], 1, [12]),  # 13 and 14 are right behind the wrong 20
    ForwardRecord(6, [12, 13, 14, 15], [13, 14, 15, 16], 4, [13, 14, 15, 16]),
]
BLOCK = [
    ForwardRecord(4, [PROMPT_LAST, 0, 12, 13], [11, 12, 13, 14], 1, [11]),  # 12 and 13 behind the wrong 0
    ForwardRecord(4, [PROMPT_LAST, 11, 12, 13], [11, 12, 13, 14], 4, [12, 13, 14]),
    ForwardRecord(8, [14, 0, 0, 0], [15, 30, 30, 30], 1, [15]),
]


def statistics_of(records, **seconds) -> Statistics:
    defaults = {"prefill_seconds": 0.0, "decode_seconds": 0.0, "engine_seconds": 0.0}
    return summarize(records, prompt_tokens=5, **defaults | seconds)


def cut(records, kept):
    """The records of a request that ended ``kept`` tokens into its last forward."""
    last = records[-1]
    beyond = len(last.new) - kept - 1  # the bonus is no row of the block
    return [*records[:-1], last._replace(new=last.new[:kept], num_accepted=last.num_accepted - beyond)]


def test_tokens_per_forward_counts_every_forward_and_every_new_token():
    statistics = statistics_of(SLIDING)
    assert (statistics.new_tokens, statistics.forwards, statistics.tokens_per_forward) == (6, 3, 2.0)
    assert statistics_of(BLOCK).tokens_per_forward == 5 / 3


def test_the_histogram_counts_forwards_by_the_draft_tokens_they_found_right():
    assert statistics_of(SLIDING).acceptance_histogram == {0: 2, 3: 1}
    assert statistics_of(BLOCK).acceptance_histogram == {0: 2, 3: 1}


def test_fast_forwarded_counts_tokens_beyond_one_a_forward():
    assert statistics_of(SLIDING).fast_forwarded == 3
    assert statistics_of(BLOCK).fast_forwarded == 2


@pytest.mark.parametrize("records", [SLIDING, BLOCK], ids=["sliding", "block"])
def test_stationary_counts_tokens_that_were_right_behind_a_wrong_one_and_stayed(records):
    assert statistics_of(records).stationary == 2


def test_a_token_that_changed_before_it_was_accepted_is_not_stationary():
    before = SLIDING[1]._replace(block=[11, 20, 30, 14])
    assert statistics_of([SLIDING[0], before, SLIDING[2]]).stationary == 1


def test_a_stationary_token_is_counted_once_however_long_it_stood():
    records = [
        ForwardRecord(4, [PROMPT_LAST, 0, 0, 13, 14], [11, 30, 13, 14, 15], 1, [11]),
        ForwardRecord(4, [PROMPT_LAST, 11, 30, 13, 14], [11, 12, 13, 14, 15], 2, [12]),
        ForwardRecord(4, [PROMPT_LAST, 11, 12, 13, 14], [11, 12, 13, 14, 15], 5, [13, 14, 15]),
    ]
    assert statistics_of(records).stationary == 2


def test_the_first_wrong_token_is_not_stationary_when_it_is_put_right():
    records = [
        ForwardRecord(4, [PROMPT_LAST, 0, 0], [11, 12, 13], 1, [11]),
        ForwardRecord(5, [11, 12, 13], [12, 13, 14], 3, [12, 13, 14]),
    ]
    assert statistics_of(records).stationary == 0


def test_no_token_behind_the_cut_is_counted():
    statistics = statistics_of(cut(SLIDING, 1))
    assert statistics.new_tokens == 3
    assert statistics.fast_forwarded == 0
    assert statistics.stationary == 1


def test_the_histogram_counts_no_draft_token_behind_the_cut():
    statistics = statistics_of(cut(SLIDING, 1))
    assert statistics.acceptance_histogram == {0: 2, 1: 1}


def test_a_request_without_forwards_has_measures_too():
    statistics = statistics_of([])
    assert (statistics.new_tokens, statistics.forwards, statistics.stationary) == (0, 0, 0)
    assert (statistics.tokens_per_forward, statistics.tokens_per_second, statistics.overhead) == (0, 0, 1)


def test_tokens_per_second_leaves_the_prefill_out():
    statistics = statistics_of(SLIDING, prefill_seconds=100.0, decode_seconds=2.0, engine_seconds=1.6)
    assert statistics.tokens_per_second == 3
    assert statistics.overhead == 1.25


def test_the_measures_go_through_json():
    measures = statistics_of(SLIDING, decode_seconds=2.0).to_dict()
    assert json.loads(json.dumps(measures)) == measures
    assert measures["acceptance_histogram"] == {"0": 2, "3": 1}
    assert measures["tokens_per_forward"] == 2.0
