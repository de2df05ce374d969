"""Every method with every draft source and chain, over a fake engine: no source changes a token, greedy or sampled."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.draft_model import DraftModel
from cllm_export.runtime.decoding.drafts.sources import ALWAYS_KNOW, PadProposer, StatelessProposer
from cllm_export.runtime.decoding.jacobi import Block, Speculative
from cllm_export.runtime.decoding.request import METHODS
from cllm_export.runtime.options import GenerateOptions, resolve
from cllm_export.runtime.service import Service
from tests.fakes import (
    FakeEngine,
    HashModel,
    ScriptModel,
    decode,
    greedy,
    make_geometry,
    make_model,
    properties,
    with_manifest,
    write_bundle,
)

VOCABULARY = 24
PROMPT = [5, 6, 7]
DRAFTING = [method for method in METHODS if method != "autoregressive"]
CLLM = TrainedWith(block_size=5, proposer="pad", loop="sliding")

chains = st.builds(
    lambda unsure, last: "+".join([*unsure, *last]),
    st.permutations(["lookup", "pool", "model"]).flatmap(lambda names: st.integers(0, 3).map(lambda n: names[:n])),
    st.lists(st.sampled_from(ALWAYS_KNOW), min_size=1, max_size=1),
)
language_models = st.builds(
    HashModel, vocab_size=st.integers(2, VOCABULARY), window=st.sampled_from([0, 1, 2, None]), seed=st.integers(0, 99)
)
prompts = st.lists(st.integers(0, 31), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return with_manifest(write_bundle(tmp_path_factory.mktemp("sources") / "bundle"), eos_token_ids=())


def make_drafter(language_model, bundle, *, num_slots=1, trained_with=None):
    """A draft model of the bundle's size over a fake engine, which it is returned with."""
    engine = FakeEngine(language_model, bundle.manifest.geometry, num_slots=num_slots)
    return DraftModel(engine, max_length=64, pad_token_id=0, trained_with=trained_with), engine


@properties
@given(
    model=language_models,
    draft=language_models,
    trained_with=st.sampled_from([None, CLLM]),
    prompt=prompts,
    method=st.sampled_from(DRAFTING),
    proposer=chains,
    block_size=st.integers(1, 9),
    count=st.integers(1, 50),
)
def test_no_method_and_no_chain_of_sources_changes_a_greedy_token(
    bundle, model, draft, trained_with, prompt, method, proposer, block_size, count
):
    drafter, _ = make_drafter(draft, bundle, trained_with=trained_with)
    loaded = make_model(bundle, model, draft_model=drafter)
    for _ in range(2):  # again, with a pool that knows the answer and a lane that holds it
        generated = loaded.generate(
            prompt, method=method, proposer=proposer, block_size=block_size, max_new_tokens=count
        )
        assert list(generated.token_ids) == greedy(model, prompt, count)


@properties
@given(
    draft=language_models,
    method=st.sampled_from(["jacobi", "jacobi-block", "speculative"]),
    proposer=chains,
    block_size=st.integers(2, 8),
    sampling=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 1.0, 2.5]),
            "top_k": st.sampled_from([0, 3]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "seed": st.integers(0, 2**63 - 1),
        }
    ),
)
def test_a_sampled_request_gives_the_tokens_of_sampled_autoregressive_decoding(
    bundle, draft, method, proposer, block_size, sampling
):
    drafter, _ = make_drafter(draft, bundle)
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY, window=1), draft_model=drafter)
    options = {"max_new_tokens": 24, "logprobs": 2, "block_size": block_size, **sampling}
    found = model.generate(PROMPT, method=method, proposer=proposer, **options)
    plain = model.generate(PROMPT, method="autoregressive", **options)
    assert found.token_ids == plain.token_ids
    assert found.logprobs == plain.logprobs


def test_a_pool_that_two_requests_share_changes_forwards_and_no_token(bundle):
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY))
    for proposer in ("pool", "pool+lookup"):
        model.pool.clear()
        first, again = (
            model.generate(PROMPT, method="speculative", proposer=proposer, block_size=6, max_new_tokens=40)
            for _ in range(2)
        )
        assert first.token_ids == again.token_ids == tuple(greedy(HashModel(vocab_size=VOCABULARY), PROMPT, 40))
        assert again.statistics.forwards < first.statistics.forwards / 2


def test_a_request_that_does_not_name_the_pool_neither_feeds_it_nor_draws_from_it(bundle):
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY))
    model.generate(PROMPT, method="jacobi", proposer="lookup", max_new_tokens=20)
    assert len(model.pool) == 0


def test_lookup_alone_recites_a_text_that_repeats_itself(bundle):
    script = [8, 9, 10, 11] * 8
    model = make_model(bundle, ScriptModel(prompt_length=3, script=script))
    found = model.generate(PROMPT, method="speculative", proposer="lookup", block_size=6, max_new_tokens=30)
    assert list(found.token_ids) == script[:30]
    assert found.statistics.forwards < 12


def test_speculative_decoding_looks_things_up_unless_it_has_a_draft_model(bundle):
    plain = make_model(bundle, HashModel(vocab_size=VOCABULARY))
    drafter, engine = make_drafter(HashModel(vocab_size=VOCABULARY), bundle)
    drafted = make_model(bundle, HashModel(vocab_size=VOCABULARY), draft_model=drafter)
    speculative = GenerateOptions(method="speculative")
    assert resolve(speculative, plain.limits, PROMPT).proposer == "lookup"
    assert resolve(speculative, drafted.limits, PROMPT).proposer == "model"
    assert resolve(GenerateOptions(method="jacobi"), drafted.limits, PROMPT).proposer == "pad"
    assert not engine.calls


@pytest.mark.parametrize(
    ("proposer", "said"),
    [
        ("model", "proposer 'model' needs a draft model: give draft_model"),
        ("lookup+model+pad", "needs a draft model"),
        ("pool+pool", "proposer names pool twice"),
        ("pad+pool", "pad always knows"),
        ("pool,pad", "proposer must be one of pad, repeat, prompt, lookup, pool, model, or several joined by"),
        (["pool"], "proposer must be one of"),
    ],
)
def test_a_proposer_that_cannot_be_is_refused_before_it_is_queued(bundle, proposer, said):
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY))
    with pytest.raises(OptionError, match=said):
        model.generate(PROMPT, proposer=proposer)
    with Service(model, block_size=4) as service, pytest.raises(OptionError, match=said):
        service.submit(PROMPT, proposer=proposer)


def test_speculative_keeps_nothing_that_the_model_predicted_beyond_what_was_accepted():
    decoder = Speculative(last_token=1, write_index=10, proposer=PadProposer(0))
    assert decoder.next_block(4) == Block([1, 0, 0, 0], 1)
    assert decoder.commit([5, 6, 7, 8], 2).tokens == [5, 6]
    assert decoder.next_block(4) == Block([6, 0, 0, 0], 1)
    assert decoder.write_index == 12


def test_the_block_size_of_speculative_decoding_may_change_at_any_forward():
    decoder = Speculative(last_token=5, write_index=10, proposer=PadProposer(0))
    assert decoder.next_block(4) == Block([5, 0, 0, 0], 1)
    assert decoder.next_block(2) == Block([5, 0], 1)
    assert decoder.next_block(3) == Block([5, 0, 0], 1)
    decoder.commit([6, 7, 8], 1)
    assert decoder.next_block(1) == Block([6], 1)


class Notebook(StatelessProposer):
    """Notes what it is told, and guesses one token."""

    def __init__(self):
        self.told = []

    def accept(self, tokens):
        self.told.append(("accept", list(tokens)))

    def reject(self, draft, predictions):
        self.told.append(("reject", list(draft), list(predictions)))

    def propose(self, count, draft):
        return [31] * count


def test_a_source_is_told_what_was_accepted_and_then_what_was_rejected_with_the_models_own_predictions():
    proposer = Notebook()
    engine = FakeEngine(ScriptModel(prompt_length=3, script=[8, 9, 10], window=0), make_geometry())
    decode(Speculative, engine, PROMPT, block_size=3, proposer=proposer, count=1)
    assert proposer.told == [("accept", [8]), ("reject", [31, 31], [9, 10])]


@pytest.mark.parametrize("trained_with", [None, CLLM], ids=["plain", "cllm"])
def test_ragged_slots_with_every_source_give_what_each_request_gives_alone(bundle, trained_with):
    """Arrivals, lengths, prompts, methods, sources and cancels at random: a short soak."""
    generator = random.Random(3)
    language_model = HashModel(vocab_size=VOCABULARY, window=2)
    drafter, _ = make_drafter(
        HashModel(vocab_size=VOCABULARY, window=1), bundle, num_slots=3, trained_with=trained_with
    )
    model = make_model(bundle, language_model, num_slots=3, draft_model=drafter)
    proposers = ["pad", "lookup", "pool", "model", "pool+lookup+repeat", "lookup+model+prompt", "pool+model"]
    handles = []
    with Service(model, block_size=5) as service:
        for _ in range(120):
            prompt = [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 40))]
            count = generator.randint(1, 20)
            options = {"method": generator.choice(DRAFTING), "proposer": generator.choice(proposers)}
            handles.append((prompt, count, service.submit(prompt, max_new_tokens=count, **options)))
            if generator.random() < 0.15:
                handles[-1][2].cancel()
        for prompt, count, handle in handles:
            found, expected = list(handle.result().token_ids), greedy(language_model, prompt, count)
            assert found == expected[: len(found)]
            assert len(found) == count or handle.result().finish_reason == "cancelled"
    assert sum(handle.result().finish_reason == "length" for _, _, handle in handles) > 80


@pytest.mark.parametrize("method", ["jacobi", "speculative"])
def test_a_block_size_that_is_chosen_forward_by_forward_changes_no_token(bundle, method):
    language_model = HashModel(vocab_size=VOCABULARY, window=1)
    drafter, engine = make_drafter(language_model, bundle)
    trained = with_manifest(bundle, trained_with=CLLM)  # which is what it begins with: an ordinary model begins with 1
    model = make_model(trained, language_model, draft_model=drafter)
    for proposer in ("model", "pool+model"):
        found = model.generate(PROMPT, method=method, proposer=proposer, block_size="auto", max_new_tokens=40)
        assert list(found.token_ids) == greedy(language_model, PROMPT, 40)
    assert engine.calls


def test_speculative_decoding_has_the_models_own_block_size_unless_told_otherwise(bundle):
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY))
    assert resolve(GenerateOptions(method="speculative"), model.limits, PROMPT).block_size == model.facts.block_size
