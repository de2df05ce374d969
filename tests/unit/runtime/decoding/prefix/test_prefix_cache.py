"""The prefix cache as policy and storage: what it finds, reads and drops, and that nothing is half there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.prefix.prefix_cache import CHUNK, PrefixCache
from tests.fakes import properties

ROW_BYTES = 2 * 1 * 2 * 8
PLENTY = 1 << 20


def rows_of(tokens):
    """Rows [2, 1, T, 2] that tell token and position, and everything before them."""
    digests = [hash(tuple(tokens[: index + 1])) for index in range(len(tokens))]
    return np.stack([np.array([tokens, digests], np.int64).T[None]] * 2)


class Text:
    """Tokens whose rows can be read, and what was read of them."""

    def __init__(self, tokens):
        self.tokens = list(tokens)
        self.reads = []

    def read(self, start, stop):
        self.reads.append((start, stop))
        return rows_of(self.tokens)[:, :, start:stop]


def insert(cache, tokens):
    text = Text(tokens)
    cache.insert(text.tokens, text.read)
    return text.reads


def found(cache, tokens):
    """The length of a match, after a check that its rows are those of its tokens."""
    length, pieces = cache.match(tokens)
    if length:
        assert np.array_equal(np.concatenate(pieces, axis=2), rows_of(list(tokens)[:length]))
    return length


def longest_common(tokens, texts):
    best = 0
    for text in texts:
        common = 0
        while common < min(len(tokens), len(text)) and tokens[common] == text[common]:
            common += 1
        best = max(best, common)
    return best


texts = st.lists(
    st.lists(st.integers(0, 1), max_size=12).flatmap(
        lambda head: st.lists(st.integers(0, 2), max_size=40).map(lambda tail: [7] * (3 * len(head)) + head + tail)
    ),
    min_size=1,
    max_size=12,
)


@properties
@given(inserted=texts, wanted=texts)
def test_a_match_is_the_longest_beginning_of_any_text_to_the_token(inserted, wanted):
    cache = PrefixCache(PLENTY)
    for tokens in inserted:
        insert(cache, tokens)
    for tokens in wanted + inserted:
        assert found(cache, tokens) == longest_common(tokens, inserted)


@properties
@given(inserted=texts)
def test_only_what_is_missing_is_read_and_by_one_call(inserted):
    cache = PrefixCache(PLENTY)
    for index, tokens in enumerate(inserted):
        common = longest_common(tokens, inserted[:index])
        assert insert(cache, tokens) == ([(common, len(tokens))] if common < len(tokens) else [])


@properties
@given(inserted=texts, wanted=texts, limit=st.integers(1, 90))
def test_its_bytes_stay_bounded_and_what_is_left_is_right(inserted, wanted, limit):
    cache = PrefixCache(limit * ROW_BYTES)
    for tokens, lookup in zip(inserted, wanted + inserted, strict=False):
        insert(cache, tokens)
        assert cache.statistics.bytes == cache.statistics.tokens * ROW_BYTES <= cache.max_bytes
        assert found(cache, lookup) <= longest_common(lookup, inserted)


def test_a_conversation_keeps_one_short_node_which_its_next_turn_replaces():
    cache = PrefixCache(PLENTY)
    turns = list(range(CHUNK * 3))
    for length in range(1, len(turns) + 1):
        assert insert(cache, turns[:length]) == [(length - 1, length)]
        assert cache.statistics.tokens == length


def test_the_least_recently_used_text_is_dropped_first():
    cache = PrefixCache(2 * CHUNK * ROW_BYTES)
    first, second, third = ([token] * CHUNK for token in (1, 2, 3))
    insert(cache, first)
    insert(cache, second)
    assert found(cache, first) == CHUNK
    insert(cache, third)
    assert [found(cache, text) for text in (first, second, third)] == [CHUNK, 0, CHUNK]
    assert cache.statistics.evictions == 1


def test_a_text_that_is_inserted_again_counts_as_used():
    cache = PrefixCache(2 * CHUNK * ROW_BYTES)
    first, second, third = ([token] * CHUNK for token in (1, 2, 3))
    for text in (first, second, first, third):
        insert(cache, text)
    assert [found(cache, text) for text in (first, second, third)] == [CHUNK, 0, CHUNK]


def test_leaves_are_dropped_before_what_they_stand_on():
    cache = PrefixCache(3 * CHUNK * ROW_BYTES)
    common = [1] * CHUNK
    for token in (2, 3, 4):
        insert(cache, common + [token] * CHUNK)
    assert [found(cache, common + [token] * CHUNK) for token in (2, 3, 4)] == [CHUNK, 2 * CHUNK, 2 * CHUNK]


def test_of_a_text_larger_than_the_cache_its_beginning_is_kept():
    cache = PrefixCache(2 * CHUNK * ROW_BYTES)
    tokens = list(range(5 * CHUNK))
    insert(cache, tokens)
    assert found(cache, tokens) == 2 * CHUNK


def test_a_read_that_fails_leaves_the_cache_as_it_was():
    cache = PrefixCache(PLENTY)
    short = list(range(20))
    insert(cache, short)

    def fail(start, stop):
        raise EngineError("out of memory")

    with pytest.raises(EngineError):
        cache.insert(list(range(40)), fail)
    assert found(cache, list(range(40))) == 20
    assert cache.statistics.tokens == 20


def test_rows_of_a_match_outlive_their_eviction():
    cache = PrefixCache(CHUNK * ROW_BYTES)
    tokens = [1] * CHUNK
    insert(cache, tokens)
    length, pieces = cache.match(tokens)
    insert(cache, [2] * CHUNK)
    assert np.array_equal(np.concatenate(pieces, axis=2), rows_of(tokens[:length]))


def test_what_is_kept_does_not_keep_the_array_that_was_read():
    cache = PrefixCache(PLENTY)
    tokens = list(range(2 * CHUNK))
    insert(cache, tokens)
    assert all(piece.base is None for piece in cache.match(tokens).pieces)


def test_statistics_count_lookups_hits_and_tokens():
    cache = PrefixCache(PLENTY)
    insert(cache, [1, 2, 3])
    for tokens in ([1, 2, 9], [5], [1, 2, 3, 4]):
        cache.match(tokens)
    assert cache.statistics == (3, 2, 5, 0, 3 * ROW_BYTES, 3)


def test_a_cleared_cache_finds_nothing_and_fills_again():
    cache = PrefixCache(PLENTY)
    insert(cache, [1, 2, 3])
    cache.clear()
    assert found(cache, [1, 2, 3]) == 0
    assert cache.statistics.bytes == 0
    insert(cache, [1, 2, 3])
    assert found(cache, [1, 2, 3]) == 3


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_bound_below_one_byte_is_refused(size):
    with pytest.raises(OptionError, match="prefix_cache_bytes must be an integer of at least 1"):
        PrefixCache(size)
