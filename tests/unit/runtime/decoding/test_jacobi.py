"""Both Jacobi loops against the model's own greedy tokens, over a fake engine whose rows are real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cllm_export.bundle.contract import Batch
from cllm_export.runtime.decoding.drafts.sources import (
    PadProposer,
    PromptProposer,
    RepeatProposer,
    StatelessProposer,
    make_proposer,
)
from cllm_export.runtime.decoding.jacobi import Block, BlockJacobi, SlidingJacobi
from cllm_export.runtime.engines.base import prefill
from tests.fakes import (
    EOS,
    PAD,
    FakeEngine,
    HashModel,
    ScriptModel,
    calls_of,
    decode,
    greedy,
    make_geometry,
    make_model,
    properties,
    tokens_of,
    with_manifest,
    write_bundle,
)

LOOPS = [SlidingJacobi, BlockJacobi]
METHODS = ["jacobi", "jacobi-block"]
PROPOSERS = ["pad", "repeat", "prompt"]
PROMPT = [5, 6, 7]
SCRIPT = list(range(8, 31))

models = st.builds(
    HashModel, vocab_size=st.integers(2, 24), window=st.sampled_from([0, 1, 2, None]), seed=st.integers(0, 999)
)
prompts = st.lists(st.integers(0, 31), min_size=1, max_size=12)
block_sizes = st.integers(1, 9)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("jacobi") / "bundle")


def run(loop, *, block_size, count, window=None, proposer=None, prompt=PROMPT, script=SCRIPT):
    """Records of a loop over an engine that recites ``script``, with a proposer that is never right by default."""
    engine = FakeEngine(ScriptModel(prompt_length=len(prompt), script=script, window=window), make_geometry())
    return decode(loop, engine, prompt, block_size=block_size, proposer=proposer or PadProposer(31), count=count)


class OracleProposer(StatelessProposer):
    """Guesses what the script says next, so that every draft is right."""

    def __init__(self) -> None:
        self._num_accepted = 0

    def accept(self, tokens: Sequence[int]) -> None:
        self._num_accepted += len(tokens)

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        first = self._num_accepted + len(draft)
        return (SCRIPT[first:] + [PAD] * count)[:count]


@pytest.mark.parametrize("loop", LOOPS)
@given(
    model=models,
    prompt=prompts,
    block_size=block_sizes,
    proposer=st.sampled_from(PROPOSERS),
    seed=st.integers(0, 99),
    count=st.integers(1, 40),
)
@properties
def test_a_loop_gives_the_greedy_tokens_of_any_model(loop, model, prompt, block_size, proposer, seed, count):
    engine = FakeEngine(model, make_geometry(max_length=80))
    source = make_proposer(proposer, prompt=prompt, pad_token_id=PAD, seed=seed)
    tokens = tokens_of(decode(loop, engine, prompt, block_size=block_size, proposer=source, count=count))
    assert len(tokens) >= count
    assert tokens == greedy(model, prompt, len(tokens))


@pytest.mark.parametrize("method", METHODS)
@given(
    model=models,
    prompt=prompts,
    options=st.fixed_dictionaries({"block_size": block_sizes, "proposer": st.sampled_from(PROPOSERS)}),
)
@example(model=HashModel(vocab_size=2, window=0), prompt=[0], options={"block_size": 9, "proposer": "pad"})
@properties
def test_a_request_ends_where_autoregressive_decoding_ends(bundle, method, model, prompt, options: dict[str, Any]):
    limit = 64 - len(prompt)
    generated = make_model(bundle, model).generate(prompt, method=method, **options)
    expected = greedy(model, prompt, limit, eos=[EOS])
    assert list(generated.token_ids) == expected
    assert generated.finish_reason == ("eos" if expected[-1] == EOS else "length")


@pytest.mark.parametrize("method", METHODS)
@given(model=models, prompt=prompts, block_size=block_sizes, limit=st.integers(1, 50))
@properties
def test_max_new_tokens_cuts_exactly(bundle, method, model, prompt, block_size, limit):
    endless = with_manifest(bundle, eos_token_ids=())
    generated = make_model(endless, model).generate(prompt, method=method, block_size=block_size, max_new_tokens=limit)
    assert list(generated.token_ids) == greedy(model, prompt, limit)
    assert generated.finish_reason == "length"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [0, 1, None])
def test_no_forward_of_a_request_that_fills_the_bundle_leaves_the_cache(bundle, method, window):
    endless = with_manifest(bundle, eos_token_ids=())
    model = make_model(endless, HashModel(vocab_size=9, window=window))
    generated = model.generate([2, 3], method=method, block_size=16)
    assert len(generated.token_ids) == 62
    largest = max(call.write_index[0] + len(call.input_ids[0]) for call in calls_of(model))
    assert largest <= model.engine.geometry.cache_length


@pytest.mark.parametrize("loop", LOOPS)
def test_eos_inside_a_block_ends_the_request_there(bundle, loop):
    method = dict(zip(LOOPS, METHODS, strict=True))[loop]
    script = [10, 11, EOS, 12, 13, 14]
    model = make_model(bundle, ScriptModel(prompt_length=3, script=script, window=0))
    generated = model.generate(PROMPT, method=method, block_size=6)
    assert generated.token_ids == (10, 11, EOS)
    assert generated.finish_reason == "eos"
    assert 12 in generated.forwards[-1].next_ids, "the block went on behind the end"


def test_a_rejected_draft_only_moves_the_write_index_past_the_committed_row():
    records = run(SlidingJacobi, block_size=4, count=2)
    assert [(record.write_index, record.num_accepted) for record in records] == [(2, 1), (3, 1)]


@pytest.mark.parametrize("loop", LOOPS)
def test_full_acceptance_keeps_the_bonus_and_gives_the_seed_token_once(loop):
    records = run(loop, block_size=4, count=12, proposer=OracleProposer())
    assert [record.new for record in records] == [SCRIPT[:4], SCRIPT[4:8], SCRIPT[8:12]]
    assert [record.block[0] for record in records] == [PROMPT[-1], SCRIPT[3], SCRIPT[7]]
    assert [record.write_index for record in records] == [2, 6, 10]


def test_after_full_acceptance_the_sliding_window_is_the_bonus_and_a_proposer():
    decoder = SlidingJacobi(last_token=1, write_index=0, proposer=RepeatProposer([1]))
    assert decoder.commit([7, 8, 9], 3).tokens == [7, 8, 9]
    assert decoder.next_block(3) == Block([9, 9, 9], 1)
    assert decoder.write_index == 3


def test_the_sliding_window_keeps_the_predictions_beyond_what_was_accepted():
    decoder = SlidingJacobi(last_token=1, write_index=10, proposer=PadProposer(0))
    assert decoder.commit([5, 6, 7, 8], 2).tokens == [5, 6]
    assert decoder.next_block(4) == Block([6, 7, 8, 0], 1)
    assert decoder.write_index == 12


def test_the_block_size_may_change_at_any_forward_of_the_sliding_loop():
    decoder = SlidingJacobi(last_token=5, write_index=10, proposer=PadProposer(0))
    assert decoder.next_block(1) == Block([5], 1)
    decoder.commit([6], 1)
    assert decoder.next_block(4) == Block([6, 0, 0, 0], 1)
    decoder.commit([7, 8, 9, 3], 1)
    assert decoder.next_block(2) == Block([7, 8], 1)
    assert decoder.write_index == 12


@given(
    sizes=st.lists(st.integers(1, 8), min_size=30, max_size=30),
    window=st.sampled_from([0, 1, 2, None]),
    seed=st.integers(0, 99),
)
@properties
def test_any_sequence_of_block_sizes_gives_the_greedy_tokens(sizes, window, seed):
    model = HashModel(vocab_size=11, window=window, seed=seed)
    engine = FakeEngine(model, make_geometry())
    prefill(engine, PROMPT[:-1], PAD)
    decoder = SlidingJacobi(last_token=PROMPT[-1], write_index=len(PROMPT) - 1, proposer=RepeatProposer(PROMPT))
    tokens = []
    for size in sizes:
        block = decoder.next_block(size).tokens
        forward = engine.forward(Batch([block], [1], [decoder.write_index]))
        assert len(block) == size
        tokens += decoder.commit(forward.next_ids[0], forward.num_accepted[0]).tokens
        if len(tokens) > 40:
            break
    assert tokens == greedy(model, PROMPT, len(tokens))


def test_a_block_stays_where_it_is_until_it_is_its_fixed_point():
    records = run(BlockJacobi, block_size=4, count=8, window=None)
    assert [record.write_index for record in records] == [2, 2, 2, 2, 6, 6, 6, 6]


def test_a_block_hands_tokens_out_as_soon_as_they_are_known():
    records = run(BlockJacobi, block_size=4, count=4, window=None)
    assert [record.new for record in records] == [[8], [9], [10], [11]]


def test_the_forward_that_confirms_a_block_gives_its_last_token():
    records = run(BlockJacobi, block_size=4, count=4, window=0)
    assert [record.new for record in records] == [[8], [9, 10, 11]]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_draft_of_a_model_that_looks_nowhere_is_right_at_the_second_forward(loop):
    assert [record.num_accepted for record in run(loop, block_size=8, count=9, window=0)[:2]] == [1, 8]


def test_sliding_takes_fewer_forwards_than_the_block_form():
    forwards = dict.fromkeys(LOOPS, 0)
    for loop in LOOPS:
        for seed in range(10):
            engine = FakeEngine(HashModel(vocab_size=3, window=1, seed=seed), make_geometry())
            forwards[loop] += len(decode(loop, engine, PROMPT, block_size=8, proposer=PadProposer(PAD), count=40))
    assert forwards[SlidingJacobi] < forwards[BlockJacobi] < 10 * 40


@pytest.mark.parametrize("loop", LOOPS)
@given(model=models, prompt=prompts)
@properties
def test_a_block_of_one_token_is_autoregressive_decoding(loop, model, prompt):
    records = decode(
        loop, FakeEngine(model, make_geometry()), prompt, block_size=1, proposer=PadProposer(PAD), count=20
    )
    assert tokens_of(records) == greedy(model, prompt, 20)
    assert [len(record.new) for record in records] == [1] * 20


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_with_a_seeded_proposer_can_be_repeated(loop):
    first, again = (run(loop, block_size=5, count=15, window=1, proposer=PromptProposer(PROMPT, 3)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("loop", LOOPS)
def test_another_seed_changes_drafts_but_no_token(loop):
    first, other = (run(loop, block_size=5, count=15, proposer=PromptProposer(PROMPT, seed)) for seed in (1, 2))
    assert [record.block for record in first] != [record.block for record in other]
    assert tokens_of(first) == tokens_of(other)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_forward_gives_less_than_one_token(loop):
    assert all(record.new for record in run(loop, block_size=7, count=20, window=2))
