"""A draft model's lanes: which forwards they take, what stays in their KV, and which pairs of bundles are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.contract import FixedShapes
from cllm_export.bundle.manifest import TOKENIZER_NAME, TrainedWith
from cllm_export.errors import BundleError, EngineError, OptionError
from cllm_export.runtime.decoding.draft_model import DraftModel, check_pair, num_shared
from cllm_export.runtime.decoding.drafts.sources import DraftRequest
from cllm_export.runtime.load import load
from cllm_export.runtime.service import Service
from tests.fakes import (
    FakeEngine,
    HashModel,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    fill_bundle,
    greedy,
    make_geometry,
    make_model,
    properties,
    with_manifest,
    write_bundle,
)

VOCABULARY = 24
CLLM = TrainedWith(block_size=4, proposer="pad", loop="sliding")
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return with_manifest(write_bundle(tmp_path_factory.mktemp("draft") / "bundle"), eos_token_ids=())


def make(
    language_model=None, *, num_slots=1, trained_with=None, fixed_shapes=None, max_length=64, engine_type=FakeEngine
):
    engine = engine_type(
        language_model or HashModel(vocab_size=VOCABULARY),
        make_geometry(vocab_size=300, max_length=max_length),
        num_slots=num_slots,
        fixed_shapes=fixed_shapes,
    )
    return DraftModel(engine, max_length=max_length, pad_token_id=0, trained_with=trained_with), engine


def ask(drafter, tokens, count, lane=0):
    request_draft = DraftRequest(list(tokens), count)
    drafter.draft({lane: request_draft})
    return request_draft.found


def kinds_of(engine):
    return [call.kind for call in engine.calls]


def test_a_draft_takes_a_forward_for_each_of_its_tokens():
    model = HashModel(vocab_size=VOCABULARY)
    drafter, engine = make(model)
    assert ask(drafter, PROMPT, 5) == greedy(model, PROMPT, 5)
    assert kinds_of(engine) == ["forward"] * 5, "the prompt is read in the first of them"


def test_accepted_tokens_stay_and_rejected_ones_are_overwritten():
    model = HashModel(vocab_size=VOCABULARY)
    drafter, engine = make(model)
    draft = ask(drafter, PROMPT, 5)
    engine.calls.clear()
    text = [*PROMPT, *draft[:2], 99]
    assert ask(drafter, text, 5) == greedy(model, text, 5)
    assert engine.calls[0].input_ids == [[99]], "nothing before it is computed again"
    assert [call.write_index[0] for call in engine.calls] == [6, 7, 8, 9, 10]


def test_after_full_acceptance_one_forward_takes_the_last_draft_token_and_the_bonus():
    model = HashModel(vocab_size=VOCABULARY)
    drafter, engine = make(model)
    draft = ask(drafter, PROMPT, 3)
    engine.calls.clear()
    text = [*PROMPT, *draft, 99]
    assert ask(drafter, text, 3) == greedy(model, text, 3)
    assert engine.calls[0].input_ids == [[draft[-1], 99]]
    assert len(engine.calls) == 3


def test_a_cllm_drafts_several_tokens_a_forward_and_keeps_what_it_said_beyond_the_wish():
    model = HashModel(vocab_size=VOCABULARY, window=0)  # every draft is right at the second forward
    drafter, engine = make(model, trained_with=CLLM)
    found = ask(drafter, PROMPT, 4)
    assert found == greedy(model, PROMPT, 4)
    assert len(engine.calls) == 2
    ahead = greedy(model, PROMPT, 5)
    assert ask(drafter, ahead_text := [*PROMPT, *ahead[:4]], 1) == greedy(model, ahead_text, 1)
    assert len(engine.calls) == 2, "it had said so already"


@properties
@given(
    steps=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 6)), max_size=12),
    prompt=st.lists(st.integers(0, 23), min_size=1, max_size=40),
    window=st.sampled_from([0, 1, None]),
    trained_with=st.sampled_from([None, CLLM]),
)
def test_whatever_is_accepted_a_draft_is_the_models_own_greedy_text(steps, prompt, window, trained_with):
    model = HashModel(vocab_size=VOCABULARY, window=window)
    drafter, _ = make(model, trained_with=trained_with)
    text = list(prompt)
    for kept, is_other, count in steps:
        found = ask(drafter, text, count)
        assert found == greedy(model, text, min(count, max(0, 64 - len(text))))
        text += [*found[:kept], *([23 - text[-1]] if is_other else [])]


@properties
@given(
    data=st.data(),
    texts=st.lists(st.lists(st.integers(0, 23), min_size=1, max_size=40), min_size=3, max_size=3),
    trained_with=st.sampled_from([None, CLLM]),
    fixed=st.booleans(),
)
def test_lanes_do_not_see_each_other(data, texts, trained_with, fixed):
    model = HashModel(vocab_size=VOCABULARY)
    shapes = FixedShapes(batch_size=3, block_size=4, kv_length=79) if fixed else None
    drafter, _ = make(model, num_slots=3, trained_with=trained_with, fixed_shapes=shapes)
    for _ in range(4):
        requests = {
            lane: DraftRequest(texts[lane], data.draw(st.integers(0, 6)))
            for lane in data.draw(st.sets(st.integers(0, 2)))
        }
        drafter.draft(requests)
        for lane, request_draft in requests.items():
            assert request_draft.found == greedy(model, texts[lane], min(request_draft.count, 64 - len(texts[lane])))
            texts[lane] = [*texts[lane], *request_draft.found[: data.draw(st.integers(0, 6))], 1][:60]


def test_lanes_draft_together():
    drafter, engine = make(num_slots=3)
    drafter.draft({lane: DraftRequest([*PROMPT, lane], 4) for lane in range(3)})
    assert len(engine.calls) == 4, "a forward for each token, and not for each lane"


def test_a_long_text_is_read_in_chunks_without_the_head():
    drafter, engine = make(HashModel(vocab_size=VOCABULARY))
    ask(drafter, [*range(20)] * 2, 2)
    assert kinds_of(engine) == ["prefill", "prefill", "forward", "forward"]


def test_a_text_at_the_end_of_what_it_holds_is_drafted_no_further():
    model = HashModel(vocab_size=VOCABULARY)
    drafter, engine = make(model, trained_with=CLLM)
    text = [*range(20)] * 3
    assert ask(drafter, text, 9) == greedy(model, text, 4)
    engine.calls.clear()
    assert ask(drafter, [*text, *range(6)], 3) == []
    assert not engine.calls


def test_a_lane_that_ran_ahead_of_what_it_holds_lies_idle_within_the_cache():
    model = HashModel(vocab_size=VOCABULARY, window=0)
    drafter, engine = make(model, num_slots=2, trained_with=TrainedWith(block_size=8, proposer="pad", loop="sliding"))
    text = [*range(20)] * 3
    ask(drafter, text, 4)
    assert ask(drafter, [*range(20)] * 2, 2, lane=1) == greedy(model, [*range(20)] * 2, 2)
    assert max(len(call.input_ids[0]) for call in engine.calls) == 16, "as wide as a forward may be"
    assert ask(drafter, text, 4) == greedy(model, text, 4)


def test_a_failure_leaves_a_lane_idle_until_it_is_asked_again():
    class FailsOnce(FakeEngine):
        has_failed = False

        def forward(self, *arguments, **options):
            if not self.has_failed:
                self.has_failed = True
                raise EngineError("out of memory")
            return super().forward(*arguments, **options)

    model = HashModel(vocab_size=VOCABULARY)
    drafter, engine = make(model, num_slots=2, engine_type=FailsOnce)
    with pytest.raises(EngineError, match="out of memory"):
        ask(drafter, PROMPT, 3)
    assert ask(drafter, PROMPT[:2], 3, lane=1) == greedy(model, PROMPT[:2], 3)
    assert all(call.num_committed[0] == 0 for call in engine.calls)
    assert ask(drafter, PROMPT, 3) == greedy(model, PROMPT, 3)


def test_an_engine_that_accepts_nothing_is_an_error_and_not_an_endless_loop():
    class Broken(FakeEngine):
        def forward(self, *arguments, **options):
            return super().forward(*arguments, **options)._replace(num_accepted=[0])

    drafter, _ = make(engine_type=Broken)
    with pytest.raises(EngineError, match="draft model's engine accepted nothing"):
        ask(drafter, PROMPT, 2)


def test_a_service_drafts_for_all_slots_in_the_forwards_of_one(bundle):
    """The draft model is the model itself: every draft is right, so all slots stay in step."""
    language_model = HashModel(vocab_size=VOCABULARY)
    drafter, engine = make(language_model, num_slots=3)
    model = make_model(bundle, language_model, num_slots=3, draft_model=drafter)
    with Service(model, block_size=5) as service:
        generations = service.generate([[5], [6], [7]], method="speculative", proposer="model", max_new_tokens=20)
    assert [len(found.forwards) for found in generations] == [4, 4, 4]
    forwards = len([call for call in model.engine.calls if call.kind == "forward"])
    assert len(engine.calls) <= 4 * forwards
    assert forwards < 12


def test_a_draft_model_that_fails_ends_what_it_drafts_for_and_nothing_else(bundle):
    class Failing(FakeEngine):
        def forward(self, *arguments, **options):
            raise RuntimeError("out of memory")

    drafter, _ = make(num_slots=2, engine_type=Failing)
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY), num_slots=2, draft_model=drafter)
    with Service(model, block_size=4) as service:
        bad = service.submit(PROMPT, method="speculative", max_new_tokens=20)
        good = service.submit(PROMPT, max_new_tokens=20)
        assert list(good.result().token_ids) == greedy(HashModel(vocab_size=VOCABULARY), PROMPT, 20)
        with pytest.raises(EngineError, match="out of memory"):
            bad.result()
    with pytest.raises(EngineError, match="out of memory"):
        model.generate(PROMPT, method="speculative")


def test_a_draft_model_needs_a_lane_for_each_slot(bundle):
    drafter, _ = make(num_slots=1)
    with pytest.raises(OptionError, match="a draft model for 2 slots has 1 lanes"):
        make_model(bundle, HashModel(vocab_size=VOCABULARY), num_slots=2, draft_model=drafter)


def test_what_two_texts_share():
    assert num_shared([1, 2, 3], [1, 2, 4]) == 2
    assert num_shared([1, 2], [1, 2, 4]) == num_shared([1, 2, 3], [1, 2]) == 2
    assert num_shared([], [1]) == num_shared([2], [1]) == 0


def test_a_pair_with_the_same_tokenizer_fits_whatever_its_trainer_left_in_it(tmp_path):
    ours, theirs = write_bundle(tmp_path / "ours"), write_bundle(tmp_path / "theirs")
    check_pair(ours, theirs)
    path = theirs.path / TOKENIZER_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    path.write_text(json.dumps(content), encoding="utf-8")
    check_pair(ours, theirs)


def test_a_pair_that_does_not_fit_is_refused_with_what_differs(tmp_path):
    ours = write_bundle(tmp_path / "ours")
    with pytest.raises(OptionError, match="theirs has 270 tokens and the model 286"):
        check_pair(ours, write_bundle(tmp_path / "theirs", tokenizer=byte_fallback_tokenizer()))
    geometry = make_geometry(vocab_size=byte_level_tokenizer().get_vocab_size())
    other = write_bundle(tmp_path / "other", tokenizer=byte_fallback_tokenizer(), geometry=geometry)
    with pytest.raises(
        OptionError, match=r"another tokenizer \(tokenizer\.json differs in decoder, model, pre_tokenizer"
    ):
        check_pair(ours, other)
    with pytest.raises(OptionError, match="holds 32 tokens and the model 64: build it with max_length=64"):
        check_pair(ours, write_bundle(tmp_path / "short", max_length=32))


def test_a_draft_model_that_is_no_bundle_is_refused_at_load(tmp_path):
    write_bundle(tmp_path / "ours")
    with pytest.raises(BundleError, match="nowhere"):
        load(tmp_path / "ours", draft_model=tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    fill_bundle(damaged)
    size = (damaged / TOKENIZER_NAME).stat().st_size
    (damaged / TOKENIZER_NAME).write_bytes(b" " * size)
    with pytest.raises(BundleError, match="cannot be read"):
        load(tmp_path / "ours", draft_model=damaged)
