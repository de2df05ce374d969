"""The KV cache: its KV lengths hold what is needed and are few; its buffers have the contract's shape and no NaN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.runtime.engines.kv_cache import allocate, kv_length_bucket
from tests.fakes import make_geometry, properties

CACHE_LENGTH = 8000


@given(needed=st.integers(1, CACHE_LENGTH), cache_length=st.integers(1, CACHE_LENGTH))
@properties
def test_a_kv_length_holds_what_is_needed_and_never_leaves_the_cache(needed, cache_length):
    kv_length = kv_length_bucket(min(needed, cache_length), cache_length)
    assert min(needed, cache_length) <= kv_length <= cache_length


def test_kv_lengths_never_shrink_as_a_request_grows():
    kv_lengths = [kv_length_bucket(needed, CACHE_LENGTH) for needed in range(1, CACHE_LENGTH + 1)]
    assert kv_lengths == sorted(kv_lengths)


@given(needed=st.integers(128, CACHE_LENGTH // 2))
@properties
def test_a_kv_length_is_at_most_an_eighth_above_what_is_needed(needed):
    assert kv_length_bucket(needed, CACHE_LENGTH) <= needed * 9 / 8


def test_kv_lengths_are_few():
    assert len({kv_length_bucket(needed, CACHE_LENGTH) for needed in range(129, CACHE_LENGTH + 1)}) <= 8 * 6


def test_the_last_kv_length_is_the_cache_itself():
    assert kv_length_bucket(75, 79) == 79


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_buffers_have_the_shape_of_the_contract_and_hold_zeros(precision, dtype):
    cache = allocate(make_geometry(max_length=20, max_block_size=4), precision, 3, np.zeros)
    assert list(cache) == ["past_key.0", "past_value.0", "past_key.1", "past_value.1"]
    assert all(array.shape == (3, 2, 23, 8) and array.dtype == dtype for array in cache.values())
    assert not any(array.any() for array in cache.values())


def test_no_two_buffers_share_memory():
    key, value, *_ = allocate(make_geometry(), "fp32", 1, np.zeros).values()
    assert not np.shares_memory(key, value)
