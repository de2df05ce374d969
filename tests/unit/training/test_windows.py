"""Training windows move as the runtime's loops do: in the same states along a model's own answer, to the end of any."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.manifest import PROPOSERS, Loop, ProposerName
from cllm_export.runtime.decoding.drafts.sources import Proposer, make_proposer
from cllm_export.runtime.decoding.jacobi import BlockJacobi, SlidingJacobi
from cllm_export.training.data.samples import Sample
from cllm_export.training.data.windows import Window, advance, fresh_window, recorded_window
from tests.fakes import PAD, FakeEngine, HashModel, LanguageModel, Row, decode, greedy, make_geometry, properties

DECODERS: dict[Loop, type[SlidingJacobi] | type[BlockJacobi]] = {"sliding": SlidingJacobi, "block": BlockJacobi}

loops = st.sampled_from(list(DECODERS))
proposers = st.sampled_from(PROPOSERS)
block_sizes = st.integers(2, 16)
fake_models = st.builds(
    HashModel, vocab_size=st.integers(2, 6), window=st.sampled_from([None, 0, 1, 2, 4]), seed=st.integers(0, 99)
)
prompts = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def make_sample(prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    return Sample(id="s", tokens=(*prompt, *answer), num_prompt=len(prompt))


def proposer_for(name: ProposerName, sample: Sample) -> Proposer:
    return make_proposer(name, prompt=sample.prompt, pad_token_id=PAD, seed=7)


def predict(model: LanguageModel, sample: Sample, window: Window) -> list[int]:
    """The model's token after each guess, as one forward over the sample's own tokens and the window gives it."""
    tokens = [*sample.tokens[: window.start + 1], *window.guesses]
    rows = [Row(token, model.context(tokens[: index + 1])) for index, token in enumerate(tokens)]
    return [model.predict(rows[: window.start + 2 + index]) for index in range(len(window.guesses))]


def walk(model: LanguageModel, sample: Sample, block_size: int, loop: Loop, proposer: ProposerName) -> list[Window]:
    """Every state from where decoding starts to the end of the sample."""
    states: list[Window] = []
    seeded = proposer_for(
        "prompt", sample
    )  # goes on guessing, as in the runtime; the others start anew for each window
    window = fresh_window(
        sample, sample.first_start, block_size, seeded if proposer == "prompt" else proposer_for(proposer, sample)
    )
    while window:
        states.append(window)
        assert len(states) <= len(sample.tokens), "every forward makes a token known at least"
        filling = seeded if proposer == "prompt" else proposer_for(proposer, sample)
        window = advance(window, predict(model, sample, window), sample, loop, filling)
    return states


@properties
@given(fake_models, prompts, st.integers(2, 30), block_sizes, loops, proposers)
def test_along_its_own_answer_a_window_goes_through_the_states_of_the_runtime(
    model, prompt, count, block_size, loop, proposer
):
    """Windows are cut at the last row of the sample; as far as they reach they are the runtime's blocks."""
    sample = make_sample(prompt, greedy(model, prompt, count))
    engine = FakeEngine(model, make_geometry())
    records = decode(
        DECODERS[loop], engine, prompt, block_size=block_size, proposer=proposer_for(proposer, sample), count=count
    )
    states = walk(model, sample, block_size, loop, proposer)
    assert [state.start for state in states] == [record.write_index for record in records[: len(states)]]
    for state, record in zip(states, records, strict=False):
        assert state.guesses == tuple(record.block[1 : 1 + len(state.guesses)])
        assert len(state.guesses) == min(block_size - 1, sample.num_rows - 1 - state.start)
    for record in records[len(states) :]:
        assert record.write_index >= sample.num_rows - 1, "only the last row of all has nothing to guess after it"


@properties
@given(fake_models, prompts, st.lists(st.integers(0, 5), min_size=1, max_size=30), block_sizes, loops, proposers)
def test_along_any_answer_a_window_is_led_to_its_end(model, prompt, answer, block_size, loop, proposer):
    """The answer is another's: what the model would say never carries a window away from it."""
    sample = make_sample(prompt, answer)
    states = walk(model, sample, block_size, loop, proposer)
    progress = [(state.start, state.num_right(sample)) for state in states]
    assert progress == sorted(set(progress)), "every forward gets further"
    if states:
        assert states[-1].start + states[-1].num_right(sample) + 1 >= sample.num_rows - 1
    else:
        assert sample.num_rows - 1 - sample.first_start < 1


@pytest.mark.parametrize("loop", DECODERS)
def test_the_state_before_is_remembered_and_no_further_back(loop):
    sample = make_sample([1, 2], [3, 4, 5, 6, 7])
    first = Window(block_size=4, start=1, guesses=(3, 9, 9))
    second = advance(first, [8, 8, 8], sample, loop, proposer_for("pad", sample))
    assert second is not None
    assert second.previous == first
    third = advance(second, [8] * len(second.guesses), sample, loop, proposer_for("pad", sample))
    assert third is not None
    assert third.previous == Window(block_size=4, start=second.start, guesses=second.guesses)


def test_the_sliding_window_keeps_predictions_and_fills_up():
    sample = make_sample([1, 2], list(range(10, 30)))
    window = Window(block_size=5, start=1, guesses=(10, 11, 77, 78))
    after = advance(window, [11, 12, 50, 51], sample, "sliding", proposer_for("pad", sample))
    assert after is not None
    assert (after.start, after.guesses) == (4, (50, 51, PAD, PAD)), "12 is the bonus; what follows 77 and 78 is kept"


def test_the_block_window_keeps_its_place_until_it_is_a_fixed_point():
    sample = make_sample([1, 2], list(range(10, 30)))
    window = Window(block_size=5, start=1, guesses=(10, 11, 77, 78))
    after = advance(window, [11, 60, 50, 51], sample, "block", proposer_for("pad", sample))
    assert after is not None
    assert (after.start, after.guesses) == (1, (10, 11, 12, 50)), "the sample's own token leads it back"
    fixed = Window(block_size=5, start=1, guesses=(10, 11, 12, 13))
    following = advance(fixed, [11, 12, 13, 14], sample, "block", proposer_for("pad", sample))
    assert following is not None
    assert (following.start, following.guesses, following.previous) == (6, (PAD,) * 4, None)


def test_a_fresh_window_is_cut_at_the_last_row_and_is_none_beyond():
    sample = make_sample([1, 2, 3], [4, 5, 6, 7])
    lengths = {start: fresh_window(sample, start, 4, proposer_for("pad", sample)) for start in range(2, 8)}
    assert [len(window.guesses) if window else 0 for window in lengths.values()] == [3, 2, 1, 0, 0, 0]


def test_a_recorded_window_is_what_of_the_block_lies_in_the_sample_and_is_wrong_somewhere():
    sample = make_sample([1, 2], [10, 11, 12, 13])
    assert recorded_window(sample, 1, [2, 9, 9, 9]) == Window(block_size=4, start=1, guesses=(9, 9, 9))
    assert recorded_window(sample, 3, [11, 9, 9, 9]) == Window(block_size=4, start=3, guesses=(9,))
    assert recorded_window(sample, 1, [2, 10, 11, 12]) is None, "nothing is wrong in it"
    assert recorded_window(sample, 3, [11, 12, 9, 9]) is None, "what is wrong lies beyond the end"
    assert recorded_window(sample, 4, [12, 9, 9, 9]) is None, "nothing is left to guess"
    assert recorded_window(sample, 5, [13, 9, 9, 9]) is None


def test_the_blocks_of_a_decode_are_its_recorded_windows():
    model, generator = HashModel(vocab_size=3, window=2, seed=5), random.Random(0)
    for _ in range(20):
        prompt = [generator.randrange(3) for _ in range(3)]
        sample = make_sample(prompt, greedy(model, prompt, 20))
        proposer = proposer_for("pad", sample)
        records = decode(
            SlidingJacobi, FakeEngine(model, make_geometry()), prompt, block_size=6, proposer=proposer, count=20
        )
        recorded = [recorded_window(sample, record.write_index, record.block) for record in records]
        wrong = [
            state for state in walk(model, sample, 6, "sliding", "pad") if state.num_right(sample) < len(state.guesses)
        ]
        assert [(w.start, w.guesses) for w in recorded if w] == [(w.start, w.guesses) for w in wrong]
