"""The n-gram pool: what it learns, what it prefers, and that it stays as small as it was told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool
from cllm_export.runtime.decoding.drafts.sources import PoolProposer
from tests.fakes import properties


def pool_of(*texts, **options):
    pool = NgramPool(**options)
    for text in texts:
        pool.learn(text, 1)
    return pool


def test_it_goes_on_as_the_longest_known_key_did():
    pool = pool_of([1, 2, 3, 4], [9, 2, 3, 5])
    assert pool.go_on([1, 2, 3], 1) == [4]
    assert pool.go_on([9, 2, 3], 1) == [5]
    assert pool.go_on([7, 7, 3], 1) == [5], "the latest of equal keys"


def test_it_walks_on_through_its_own_guesses_and_stops_where_it_knows_no_more():
    assert pool_of([1, 2, 3, 4]).go_on([1], 9) == [2, 3, 4]
    assert pool_of([1, 2, 1]).go_on([1], 5) == [2, 1, 2, 1, 2]
    assert NgramPool().go_on([1], 5) == []


def test_a_rejected_draft_teaches_what_the_model_said_after_each_of_its_tokens():
    pool = NgramPool(max_key=2)
    pool.learn_rejected([1, 2], [7, 8], [20, 21])  # 7 stood where 2 came to stand
    assert pool.go_on([1, 7], 1) == [20]
    assert pool.go_on([7, 8], 1) == [21]
    assert pool.go_on([2], 1) == []


def test_a_rejected_draft_never_takes_the_place_of_text_but_text_takes_its():
    pool = pool_of([1, 2], max_key=1)
    pool.learn_rejected([5], [1], [9])
    assert pool.go_on([1], 1) == [2]
    pool.learn_rejected([5], [3], [9])
    assert pool.go_on([3], 1) == [9]
    pool.learn_rejected([5], [3], [8])
    assert pool.go_on([3], 1) == [8], "the latest of two guesses"
    pool.learn([3, 7], 1)
    assert pool.go_on([3], 1) == [7]


@properties
@given(
    texts=st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=20),
    max_entries=st.integers(1, 12),
    max_key=st.integers(1, 4),
)
def test_it_never_holds_more_entries_than_it_may(texts, max_entries, max_key):
    pool = NgramPool(max_entries=max_entries, max_key=max_key)
    for text in texts:
        pool.learn(text, 1)
        pool.learn_rejected(text[:3], text, text)
        assert len(pool) <= max_entries
        assert len(pool.go_on(text, 5)) <= 5


def test_the_least_recently_used_entry_goes_first():
    pool = pool_of([1, 11], [2, 12], [3, 13], max_entries=3, max_key=1)
    assert pool.go_on([1], 1) == [11], "used again"
    pool.learn([4, 14], 1)
    assert [pool.go_on([key], 1) for key in (1, 2, 3, 4)] == [[11], [], [13], [14]]


def test_a_proposer_learns_across_the_border_of_two_commits():
    pool = NgramPool()
    proposer = PoolProposer(pool, [1, 2])
    proposer.accept([3])
    proposer.accept([4, 5])
    assert pool.go_on([1, 2, 3], 2) == [4, 5]
    assert pool.go_on([1], 1) == [], "the prompt is no text of the model's"
    assert proposer.propose(3, [2]) == [3, 4, 5]


@pytest.mark.parametrize("bound", ["max_entries", "max_key"])
def test_a_bound_below_one_is_refused(bound):
    with pytest.raises(OptionError, match=f"{bound} must be an integer of at least 1, got 0"):
        NgramPool(**{bound: 0})
