"""Autoregressive decoding: one token a forward, whatever the shape of the forward."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.runtime.decoding.drafts.sources import PadProposer, PromptProposer
from cllm_export.runtime.decoding.jacobi import Autoregressive, Block
from cllm_export.runtime.decoding.statistics import summarize
from tests.fakes import FakeEngine, HashModel, decode, greedy, make_geometry, properties, tokens_of

PROMPT = [3, 4, 5]


def run(model, *, block_size, prompt=PROMPT, count=20):
    proposer = PromptProposer(prompt, seed=0)
    engine = FakeEngine(model, make_geometry())
    return decode(Autoregressive, engine, prompt, block_size=block_size, proposer=proposer, count=count)


@given(
    seed=st.integers(0, 999),
    window=st.sampled_from([0, 1, None]),
    block_size=st.integers(2, 9),
    prompt=st.lists(st.integers(0, 31), min_size=1, max_size=9),
)
@properties
def test_the_n_shaped_loop_gives_the_tokens_of_the_1_shaped_loop(seed, window, block_size, prompt):
    model = HashModel(vocab_size=11, window=window, seed=seed)
    wide = tokens_of(run(model, block_size=block_size, prompt=prompt))
    narrow = tokens_of(run(model, block_size=1, prompt=prompt))
    assert wide == narrow == greedy(model, prompt, 20)


@pytest.mark.parametrize("block_size", [1, 6])
def test_every_forward_gives_one_token_even_if_the_draft_is_right(block_size):
    records = run(HashModel(vocab_size=1), block_size=block_size, prompt=[0, 0])
    assert [record.new for record in records] == [[0]] * 20
    assert [record.write_index for record in records] == list(range(1, 21))


def test_the_histogram_of_autoregressive_decoding_knows_only_zero():
    records = run(HashModel(vocab_size=1), block_size=6, prompt=[0, 0])
    statistics = summarize(records, prompt_tokens=2, prefill_seconds=0, decode_seconds=0, engine_seconds=0)
    assert statistics.acceptance_histogram == {0: 20}
    assert statistics.tokens_per_forward == 1
    assert (statistics.fast_forwarded, statistics.stationary) == (0, 0)


def test_a_block_of_one_token_needs_no_proposer():
    def no_proposer(count: int, last: int) -> list[int]:
        raise AssertionError("the proposer was asked for tokens")

    decoder = Autoregressive(last_token=7, write_index=3, proposer=no_proposer)
    assert decoder.next_block(1) == Block([7], 1)


def test_the_block_is_the_last_token_and_a_proposer():
    decoder = Autoregressive(last_token=7, write_index=3, proposer=PadProposer(0))
    assert decoder.next_block(4) == Block([7, 0, 0, 0], 1)
    assert decoder.commit([9, 8, 8, 8], 1).tokens == [9]
    assert decoder.next_block(4) == Block([9, 0, 0, 0], 1)
    assert decoder.write_index == 4
