"""Many prompts through the slots of one engine: each decodes as it does alone, whatever its neighbours do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.contract import FixedShapes
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.batch import BatchRequest, decode_requests
from cllm_export.runtime.decoding.request import METHODS
from tests.fakes import (
    EOS,
    PAD,
    FakeEngine,
    HashModel,
    greedy,
    make_geometry,
    make_model,
    properties,
    tokens_of,
    write_bundle,
)

VOCABULARY = 200
PROMPTS = [[5], [6, 7, 8], list(range(2, 30)), [9] * 40, [3, 4], list(range(40, 57)), [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("batch") / "bundle")


def make_engine(num_slots, *, seed=0, window=None, fixed_shapes=None, vocab_size=VOCABULARY):
    model = HashModel(vocab_size=vocab_size, seed=seed, window=window)
    return FakeEngine(model, make_geometry(vocab_size=vocab_size), num_slots=num_slots, fixed_shapes=fixed_shapes)


def decode(engine, prompts, *, method="jacobi", block_size=4, proposer="pad", seed=0, max_new_tokens=20, eos=(EOS,)):
    """The forwards of each prompt."""
    requests = [BatchRequest(prompt=prompt, max_new_tokens=max_new_tokens, seed=seed) for prompt in prompts]
    decodes = decode_requests(
        engine, requests, method=method, block_size=block_size, proposer=proposer, eos_token_ids=eos, pad_token_id=PAD
    )
    return [tuple(decode.records) for decode in decodes]


@pytest.mark.parametrize("proposer", ["pad", "repeat", "prompt"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_slots", [1, 3, 16])
def test_every_prompt_decodes_as_it_does_alone(bundle, num_slots, method, proposer):
    engine = make_engine(num_slots, window=1)
    alone = make_model(bundle, HashModel(vocab_size=VOCABULARY, window=1))
    records = decode(engine, PROMPTS, method=method, proposer=proposer, seed=7)
    for prompt, found in zip(PROMPTS, records, strict=True):
        options = {"method": method, "block_size": 4, "proposer": proposer, "seed": 7, "max_new_tokens": 20}
        assert found == alone.generate(prompt, **options).forwards


@properties
@given(
    prompts=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=40), max_size=7),
    num_slots=st.integers(1, 4),
    method=st.sampled_from(METHODS),
    block_size=st.integers(1, 16),
    max_new_tokens=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_whatever_the_prompts_and_slots_the_tokens_are_the_models_own(
    prompts, num_slots, method, block_size, max_new_tokens, seed
):
    engine = make_engine(num_slots, seed=seed, window=2, vocab_size=9)
    records = decode(engine, prompts, method=method, block_size=block_size, max_new_tokens=max_new_tokens)
    model = HashModel(vocab_size=9, seed=seed, window=2)
    for prompt, found in zip(prompts, records, strict=True):
        tokens = [token for record in found for token in record.new]
        assert tokens == greedy(model, prompt, max_new_tokens, eos=(EOS,))


def test_a_slot_that_is_done_takes_the_next_prompt():
    engine = make_engine(2)
    prompts = [[5]] + [[6]] * 3
    requests = [
        BatchRequest(prompt=prompt, max_new_tokens=limit) for prompt, limit in zip(prompts, (12, 4, 4, 4), strict=True)
    ]
    decodes = decode_requests(
        engine, requests, method="autoregressive", block_size=1, proposer="pad", eos_token_ids=(), pad_token_id=PAD
    )
    assert len(engine.calls) == 12, "the three short ones run one after the other beside the long one"
    assert [len(decode.records) for decode in decodes] == [12, 4, 4, 4]
    assert {decode.finish_reason for decode in decodes} == {"length"}


def test_an_idle_slot_has_nothing_committed_at_write_index_0():
    engine = make_engine(3)
    decode(engine, [[5, 6, 7]])
    for call in engine.calls:
        assert call.num_committed[1:] == [0, 0]
        assert call.write_index[1:] == [0, 0]


def test_prompts_are_read_by_the_forwards_that_decode_the_others():
    engine = make_engine(2)
    decode(engine, [[5], list(range(2, 35))], block_size=4, eos=())
    assert {call.kind for call in engine.calls} == {"forward"}
    assert [call.num_committed for call in engine.calls[:3]] == [[1, 16], [1, 16], [1, 1]]
    assert [len(call.input_ids[0]) for call in engine.calls[:3]] == [16, 16, 4], (
        "n is wider only while a prompt is read"
    )


def test_prompts_may_have_limits_and_seeds_of_their_own():
    finished = []
    requests = [BatchRequest(prompt=[5, 6, 7, 8], max_new_tokens=limit, seed=limit) for limit in (3, 5)]
    decodes = decode_requests(
        make_engine(2, window=0),
        requests,
        method="jacobi",
        block_size=4,
        proposer="prompt",
        eos_token_ids=(),
        pad_token_id=PAD,
        finished=finished.append,
    )
    assert [sum(len(record.new) for record in decode.records) for decode in decodes] == [3, 5]
    assert decodes[0].records[0].block != decodes[1].records[0].block, "seeds differ, and so do the first guesses"
    assert finished[-1] == 2


def test_an_engine_with_fixed_shapes_reads_prompts_in_its_own_blocks():
    fixed = FixedShapes(batch_size=2, block_size=4, kv_length=79)
    engine = make_engine(1, fixed_shapes=fixed)
    records = decode(engine, PROMPTS[:3])
    model = HashModel(vocab_size=VOCABULARY)
    for prompt, found in zip(PROMPTS, records, strict=False):
        assert [token for record in found for token in record.new] == greedy(model, prompt, 20, eos=(EOS,))


def test_no_prompts_take_no_forward():
    engine = make_engine(2)
    assert decode(engine, []) == []
    assert engine.calls == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[5], []], {}, "at least one token"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens must be"),
        ([[5]], {"block_size": 0}, "block_size must be"),
        ([[5]], {"proposer": "zeros"}, "proposer must be one of"),
    ],
)
def test_what_cannot_be_decoded_is_refused(prompts, options, message):
    with pytest.raises(OptionError, match=message):
        decode(make_engine(2), prompts, **options)


def test_prompts_are_read_in_forwards_that_an_engine_of_small_blocks_takes_beside_slots_that_decode():
    language_model = HashModel(vocab_size=VOCABULARY)
    engine = FakeEngine(language_model, make_geometry(vocab_size=VOCABULARY, max_block_size=4), num_slots=2)
    prompts = [[5], [6, 7], [8] * 30]
    records = decode(engine, prompts, eos=())
    assert [tokens_of(found) for found in records] == [greedy(language_model, prompt, 20) for prompt in prompts]


def test_what_does_not_fit_the_cache_is_refused_by_the_engine():
    with pytest.raises(EngineError, match="cache rows"):
        decode(make_engine(2), [[5] * 70], max_new_tokens=40, eos=())


def test_an_engine_that_accepts_nothing_ends_with_an_error():
    class Stuck(FakeEngine):
        def forward(self, batch, **options):
            return super().forward(batch, **options)._replace(num_accepted=[0])

    engine = Stuck(HashModel(vocab_size=VOCABULARY), make_geometry(vocab_size=VOCABULARY))
    with pytest.raises(EngineError, match="makes no token known"):
        decode(engine, [[5, 6]])
