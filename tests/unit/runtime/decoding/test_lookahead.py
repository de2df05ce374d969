"""Lookahead: the layout is the paper's, the pool is bounded, and the tokens are the model's own greedy ones."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.contract import Batch
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.drafts.sources import PromptProposer, make_proposer
from cllm_export.runtime.decoding.lookahead.layout import LookaheadShape, layout_of
from cllm_export.runtime.decoding.lookahead.policy import Lookahead
from cllm_export.runtime.decoding.lookahead.pool import LookaheadPool
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import EngineBase, prefill
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.fakes import (
    EOS,
    PAD,
    FakeEngine,
    HashModel,
    LanguageModel,
    ScriptModel,
    calls_of,
    greedy,
    make_geometry,
    make_model,
    properties,
    with_manifest,
    write_bundle,
)

MAX_ROWS = 64
models = st.builds(
    HashModel, vocab_size=st.integers(2, 24), window=st.sampled_from([0, 1, 2, None]), seed=st.integers(0, 999)
)
prompts = st.lists(st.integers(0, 31), min_size=1, max_size=12)
shapes = st.builds(LookaheadShape, window=st.integers(1, 6), ngram=st.integers(2, 5), guesses=st.integers(1, 4))
proposers = st.sampled_from(["pad", "repeat", "prompt", "lookup"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    bundle = write_bundle(tmp_path_factory.mktemp("lookahead") / "bundle")
    vocabulary = bundle.manifest.geometry.vocab_size
    return with_manifest(bundle, geometry=make_geometry(vocab_size=vocabulary, max_block_size=MAX_ROWS))


def run(
    language_model: LanguageModel, prompt: list[int], *, shape: LookaheadShape, count: int, proposer: str = "prompt"
) -> tuple[list[int], FakeEngine]:
    """At least ``count`` new tokens of the policy alone, with no rule that cuts."""
    engine = FakeEngine(language_model, make_geometry(max_length=128, max_block_size=MAX_ROWS))
    prefill(engine, prompt[:-1], PAD)
    decoder = Lookahead(
        prompt=prompt, shape=shape, proposer=make_proposer(proposer, prompt=prompt, pad_token_id=PAD, seed=len(prompt))
    )
    tokens: list[int] = []
    while len(tokens) < count:
        layout, write_index = decoder.layout, decoder.write_index
        block = decoder.next_block(MAX_ROWS)
        forward = engine.forward_rows(
            Batch([block.tokens], [block.num_committed], [write_index]), layout.offsets, layout.mask
        )
        tokens += decoder.commit(forward.next_ids[0], forward.num_accepted[0]).tokens
    return tokens, engine


@given(model=models, prompt=prompts, shape=shapes, proposer=proposers, count=st.integers(1, 40))
@properties
def test_the_tokens_are_the_models_own_whatever_window_ngram_guesses_and_proposer(
    model, prompt, shape, proposer, count
):
    tokens, _ = run(model, prompt, shape=shape, count=count, proposer=proposer)
    assert tokens == greedy(model, prompt, len(tokens))


@given(model=models, prompt=prompts, shape=shapes, count=st.integers(1, 30))
@properties
def test_the_cache_holds_the_rows_of_the_text_below_the_write_index(model, prompt, shape, count):
    tokens, engine = run(model, prompt, shape=shape, count=count)
    text = prompt + tokens
    written = engine.calls[-1].write_index[0]
    rows = engine.rows[0][:written]
    assert [row.token for row in rows] == text[:written]
    assert [row.context for row in rows] == [model.context(text[: index + 1]) for index in range(written)]


@given(shape=shapes, head=st.integers(1, 5))
@properties
def test_every_row_sees_one_row_of_the_block_at_each_position_up_to_its_own(shape, head):
    layout = layout_of(shape, head)
    assert layout.mask.shape == (shape.num_rows(head),) * 2
    for row, offset in enumerate(layout.offsets):
        assert layout.mask[row, row]
        assert sorted(layout.offsets[layout.mask[row]]) == list(range(offset + 1))


@given(shape=shapes, head=st.integers(1, 5))
@properties
def test_the_mask_is_the_papers(shape, head):
    """Told from the roles of two rows, not from their numbers."""
    layout = layout_of(shape, head)
    roles = {row: ("head", row, 0) for row in range(head)}
    roles |= {
        layout.window_row(level, column): ("window", level, column)
        for level in range(shape.num_levels)
        for column in range(shape.window)
        if (level, column) != (0, 0)
    }
    roles |= {
        layout.guess_row(guess, index): ("guess", guess, index)
        for guess in range(shape.guesses)
        for index in range(shape.num_levels)
    }
    assert sorted(roles) == list(range(shape.num_rows(head))), "every row has one role"
    for row, (kind, level, column) in roles.items():
        for other, (other_kind, other_level, other_column) in roles.items():
            if other_kind == "head":
                expected = kind != "head" or other <= row
            elif kind == other_kind == "window":
                on_level_0 = other_level == 0 and other_column <= column
                expected = on_level_0 or (other_column == column and 1 <= other_level <= level)
            else:
                expected = kind == other_kind == "guess" and other_level == level and other_column <= column
            assert layout.mask[row, other] == expected, f"{roles[row]} and {roles[other]}"


@pytest.mark.parametrize("head", [1, 2, 3])
def test_rows_sit_where_their_level_and_column_say(head):
    shape = LookaheadShape(window=3, ngram=3, guesses=2)
    current = head - 1
    window = [current + 1, current + 2, current + 1, current + 2, current + 3]
    guesses = [current + 1, current + 2] * 2
    assert layout_of(shape, head).offsets.tolist() == [*range(head), *window, *guesses]


def test_a_layout_cannot_be_written_to():
    layout = layout_of(LookaheadShape(), 1)
    for array in (layout.offsets, layout.mask):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_guess_of_the_pool_is_accepted_whole_and_fed_again():
    """A prompt that holds what follows: its n-grams are in the pool from the start."""
    script = [8, 9, 10, 11, 12, 13]
    prompt = [7, *script, 7]
    shape = LookaheadShape(window=1, ngram=4, guesses=1)
    model = ScriptModel(prompt_length=len(prompt), script=script)
    tokens, engine = run(model, prompt, shape=shape, count=4)
    assert tokens[:4] == script[:4]
    run_calls = [call for call in engine.calls if call.kind == "rows"]
    assert len(run_calls) == 1, "three tokens of the guess and the one after them, in one forward"
    tokens, engine = run(model, prompt, shape=shape, count=5)
    second = engine.calls[-1]
    assert second.input_ids[0][:4] == script[:4]
    assert second.num_committed == [4]


def test_a_window_that_is_right_is_accepted_without_being_fed_again():
    """Predictions that depend on the position alone make level 0 right as far as it is the model's and no proposer: in
    the second forward all of it, after which one column of it is left, in the fourth again."""
    model, prompt = HashModel(vocab_size=24, window=0), [5, 6]
    shape = LookaheadShape(window=5, ngram=2, guesses=1)
    engine_calls = run(model, prompt, shape=shape, count=11)[1].calls[1:]
    assert [call.num_committed for call in engine_calls] == [[1]] * len(engine_calls)
    assert [call.write_index[0] for call in engine_calls] == [1, 2, 7, 8]


@given(entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1)), max_size=60))
@properties
def test_a_pool_is_what_a_list_of_the_last_ones_used_would_be(entries):
    pool, expected = LookaheadPool(size=7), OrderedDict()
    for first, second, taken in entries:
        if taken:
            found = [entry for entry in reversed(expected) if entry[0] == first][:2]
            assert pool.take(first, 2) == [entry[1:] for entry in found]
            for entry in reversed(found):
                expected.move_to_end(entry)
        else:
            pool.add([first, second])
            expected[first, second] = None
            expected.move_to_end((first, second))
            while len(expected) > 7:
                expected.popitem(last=False)
        assert len(pool) == len(expected) <= 7


def test_equal_seeds_give_equal_blocks():
    shape, prompt = LookaheadShape(), list(range(5, 20))
    blocks = [
        Lookahead(prompt=prompt, shape=shape, proposer=PromptProposer(prompt, seed)).next_block(MAX_ROWS)
        for seed in (1, 1, 2)
    ]
    assert blocks[0] == blocks[1] != blocks[2]


@pytest.mark.parametrize("change", [{"window": 0}, {"ngram": 1}, {"guesses": 0}, {"window": True}])
def test_a_shape_out_of_range_is_refused_by_the_name_of_its_field(change):
    with pytest.raises(OptionError, match=next(iter(change))):
        LookaheadShape(**change)


def test_a_shape_says_how_many_rows_its_largest_forward_has():
    shape = LookaheadShape(window=5, ngram=4, guesses=3)
    assert [shape.num_rows(head) for head in (1, 4)] == [1 + 4 + 10 + 9, 4 + 4 + 10 + 9]
    shape.require_fitting(shape.max_rows)
    with pytest.raises(OptionError, match=f"up to {shape.max_rows} rows, and this model takes {shape.max_rows - 1}"):
        shape.require_fitting(shape.max_rows - 1)


@given(model=models, prompt=st.lists(st.integers(2, 31), min_size=1, max_size=9), limit=st.integers(1, 30))
@properties
def test_a_request_ends_where_an_autoregressive_one_ends(bundle, model, prompt, limit):
    served = make_model(bundle, model)
    expected = served.generate(prompt, method="autoregressive", max_new_tokens=limit)
    found = served.generate(prompt, method="lookahead", max_new_tokens=limit)
    assert found.token_ids == expected.token_ids == tuple(greedy(model, prompt, limit, eos=[EOS]))
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    assert found.statistics.new_tokens == len(expected.token_ids)
    assert sum(len(record.new) for record in found.forwards) == len(expected.token_ids)


def test_a_request_decodes_to_the_last_row_of_the_model(bundle):
    model = HashModel(vocab_size=200, window=1)
    served = make_model(bundle, model)
    expected = greedy(model, [5, 6], bundle.manifest.max_length - 2)
    assert served.generate([5, 6], method="lookahead", ignore_eos=True).token_ids == tuple(expected)


def test_a_stop_string_cuts_inside_a_forward(bundle):
    codec = TextCodec.of_bundle(bundle)
    prompt, text = codec.encode("the cat"), codec.encode("sat on the mat")
    served = make_model(bundle, ScriptModel(prompt_length=len(prompt), script=[*text, EOS]))
    found = served.generate(prompt, method="lookahead", stop=["on the"])
    assert (found.text, found.finish_reason) == ("sat ", "stop")


def test_a_stream_gives_the_text_of_the_whole(bundle):
    served = make_model(bundle, HashModel(vocab_size=200, window=1))
    whole = served.generate([5, 6], method="lookahead", max_new_tokens=20)
    assert "".join(served.stream([5, 6], method="lookahead", max_new_tokens=20)) == whole.text


def test_a_record_is_the_text_that_was_tried(bundle):
    """Its block follows the current token, so that its histogram counts right drafts and no committed tokens."""
    served = make_model(bundle, HashModel(vocab_size=200, window=0))
    found = served.generate([5, 6], method="lookahead", max_new_tokens=30, ignore_eos=True)
    text = [5, 6, *found.token_ids]
    at = 1
    for record in found.forwards[:-1]:
        assert record.write_index == at
        assert record.block[: record.num_accepted] == text[at : at + record.num_accepted]
        assert record.next_ids[: record.num_accepted] == record.new
        at += len(record.new)
    assert max(found.statistics.acceptance_histogram) > 0


def test_other_slots_are_idle_during_a_lookahead_request(bundle):
    model = HashModel(vocab_size=200)
    served = make_model(bundle, model, num_slots=3)
    assert list(served.generate([5, 6], method="lookahead", max_new_tokens=9).token_ids) == greedy(model, [5, 6], 9)
    rows = [call for call in calls_of(served) if call.kind == "rows"]
    assert rows
    assert all(call.num_committed[1:] == call.write_index[1:] == [0, 0] for call in rows)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"temperature": 0.5}, "sampling"),
        ({"repetition_penalty": 1.2}, "sampling"),
        ({"logprobs": 0}, "logprobs"),
        ({"block_size": 8}, "block_size"),
        ({"window": 60}, "window 60"),
        ({"ngram": 1}, "ngram"),
        ({"method": "jacobi", "guesses": 2}, "guesses is for the method lookahead"),
    ],
)
def test_what_lookahead_does_not_do_is_refused_by_name(bundle, options, what):
    served = make_model(bundle, HashModel(vocab_size=200))
    with pytest.raises(OptionError, match=what):
        served.generate([5, 6], **({"method": "lookahead"} | options))
    assert not calls_of(served)


def test_a_grammar_is_refused(bundle):
    pytest.importorskip("llguidance")
    with pytest.raises(OptionError, match="excludes a grammar"):
        make_model(bundle, HashModel(vocab_size=200)).generate([5, 6], method="lookahead", regex="[a-z]+")


def test_a_service_refuses_it_and_says_where_it_runs(bundle):
    with (
        Service(make_model(bundle, HashModel(vocab_size=200), num_slots=2)) as service,
        pytest.raises(OptionError, match=r"one request at a time, through Model\.generate"),
    ):
        service.submit([5, 6], method="lookahead")


class PlainEngine(EngineBase):
    """What a request is prepared against, of an engine that has blocks alone."""


def test_an_engine_that_has_blocks_alone_is_named(bundle):
    engine = PlainEngine(bundle.manifest.geometry, num_slots=1, prefill_chunk=8)
    model = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))
    with pytest.raises(OptionError, match="PlainEngine runs no lookahead graph"):
        model.generate([5, 6], method="lookahead")


def test_an_engine_that_fails_frees_the_model(bundle):
    class FailingOnce(FakeEngine):
        def forward_rows(self, *arguments):
            if not self.calls:
                self.prefill(Batch([[5]], [1], [0]))
                raise EngineError("out of memory")
            return super().forward_rows(*arguments)

    language_model = HashModel(vocab_size=200)
    engine = FailingOnce(language_model, bundle.manifest.geometry)
    model = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))
    with pytest.raises(EngineError, match="out of memory"):
        model.generate([5], method="lookahead")
    found = model.generate([5], method="lookahead", max_new_tokens=3)
    assert list(found.token_ids) == greedy(language_model, [5], 3)


def test_a_row_of_the_fake_engine_that_sees_no_text_predicts_otherwise():
    """The fake can tell a wrong mask or offset from a right one; else the tests above would prove little."""
    model, tokens = HashModel(vocab_size=2**31), [5, 6, 7]
    right, wrong = np.tri(3, dtype=bool), np.tri(3, dtype=bool)
    wrong[2, 1] = False
    offsets = np.arange(3)
    predicted = []
    for mask, places in ((right, offsets), (wrong, offsets), (right, np.array([0, 2, 3]))):
        engine = FakeEngine(model, make_geometry(vocab_size=2**31))
        predicted.append(engine.forward_rows(Batch([tokens], [3], [0]), places, mask).next_ids[0])
    assert (
        predicted[0]
        == FakeEngine(model, make_geometry(vocab_size=2**31)).forward(Batch([tokens], [3], [0])).next_ids[0]
    )
    assert predicted[0][2] not in (predicted[1][2], predicted[2][2])
    assert predicted[0][:2] == predicted[1][:2]
