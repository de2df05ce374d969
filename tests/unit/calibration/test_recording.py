"""Recordings: the stage of every row, and replays that give what the decode gave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.calibration.record import RecordOptions, record
from cllm_export.calibration.recording import Recording, State, read_recordings, write_recordings
from cllm_export.calibration.replay import replay_states, replay_text
from cllm_export.calibration.search.flips import count_flips, predict
from cllm_export.prompts import Prompt
from tests.fakes import PAD, FakeEngine, HashModel, greedy, make_geometry, make_model, properties, write_bundle

PROMPT, NEW = (5, 6, 7), (8, 9, 10, 11)
OPTIONS = RecordOptions(loop="sliding", proposer="pad", block_size=4, max_new_tokens=24)


def recording(*states: State) -> Recording:
    return Recording(id="1", prompt=PROMPT, new=NEW, states=states)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    bundle = write_bundle(tmp_path_factory.mktemp("recording") / "bundle")
    vocabulary = bundle.manifest.geometry.vocab_size
    return make_model(bundle, HashModel(vocab_size=vocabulary, window=2, seed=3))


@pytest.mark.parametrize(
    ("tokens", "stages"),
    [
        ((7, 8, 9, 10), ["fixed", "fixed", "fixed", "fixed"]),
        ((7, 0, 0, 0), ["fixed", "guess", "guess", "guess"]),
        ((7, 8, 0, 0), ["fixed", "fixed", "partial", "partial"]),
        ((7, 0, 9, 0), ["fixed", "guess", "partial", "partial"]),
    ],
)
def test_a_row_has_the_stage_of_the_drafts_that_it_sees(tokens, stages):
    state = State(2, 1, tokens)
    assert recording().stages(state) == stages


def test_a_row_that_predicts_what_stands_after_the_end_is_dead():
    assert recording().stages(State(4, 1, (9, 10, 11, 0))) == ["fixed", "fixed", None, None]


def test_committed_tokens_are_no_drafts():
    assert recording().stages(State(2, 3, (7, 8, 9, 0))) == ["fixed", "fixed", "fixed", "guess"]


def test_recordings_are_read_as_they_were_written(tmp_path):
    written = [recording(State(2, 1, (7, 0)), State(3, 1, (8, 9))), recording()]
    write_recordings(tmp_path / "file", written)
    assert list(read_recordings(tmp_path / "file")) == written


@pytest.mark.parametrize("line", ["nonsense", "[1, 2]", '["1", 5, [], []]'])
def test_a_damaged_line_is_an_error(tmp_path, line):
    (tmp_path / "file").write_text(line + "\n")
    with pytest.raises((ValueError, TypeError)):
        list(read_recordings(tmp_path / "file"))


@pytest.mark.parametrize("loop", ["sliding", "block"])
@properties
@given(text=st.text(alphabet="thecatsonm ", min_size=3, max_size=20).filter(str.strip))
def test_a_replay_predicts_what_the_decode_predicted(model, loop, text):
    options = RecordOptions(loop=loop, proposer="repeat", block_size=4, max_new_tokens=12)
    (found,) = record(model, [Prompt(id="1", content=text)], options)
    generation = model.generate(
        list(found.prompt),
        method="jacobi" if loop == "sliding" else "jacobi-block",
        proposer="repeat",
        block_size=4,
        max_new_tokens=12,
    )
    assert found.new == generation.token_ids
    replayed = list(replay_states(model.engine, found, PAD))
    assert [entry.next_ids for entry in replayed] == [record.next_ids for record in generation.forwards]


def test_the_text_is_replayed_with_right_tokens_alone(model):
    (found,) = record(model, [Prompt(id="1", content="the cat")], OPTIONS)
    predicted = [token for entry in replay_text(model.engine, found, 4, PAD) for token in entry.next_ids]
    start = len(found.prompt) - 1
    assert tuple(predicted[start : start + len(found.new)]) == found.new


def test_prompts_that_cannot_be_decoded_are_left_out(model):
    prompts = [Prompt(id="1", content=""), Prompt(id="2", content="the cat"), Prompt(id="3", content="cat " * 99)]
    assert [entry.id for entry in record(model, prompts, OPTIONS)] == ["2"]


def test_each_prompt_has_a_seed_of_its_own_that_its_number_gives(model):
    options = RecordOptions(loop="sliding", proposer="prompt", block_size=4, max_new_tokens=12)
    prompts = [Prompt(id=str(number), content="the cat sat on the mat") for number in range(4)]
    whole = record(model, prompts, options)
    assert len({entry.states for entry in whole}) > 1
    assert record(model, prompts[2:], options, first=2) == whole[2:]


def test_an_engine_does_not_flip_against_itself_and_another_does(model):
    recordings = record(model, [Prompt(id="1", content="the cat"), Prompt(id="2", content="a mat")], OPTIONS)
    before = predict(model.engine, recordings, PAD)
    same = count_flips(recordings, before, before)
    live = sum(stage is not None for each in recordings for state in each.states for stage in each.stages(state))
    assert same.all.rows == live == sum(same.stages[stage].rows for stage in ("guess", "partial", "fixed"))
    assert same.all.flipped == 0
    geometry = make_geometry(vocab_size=model.engine.geometry.vocab_size)
    other = FakeEngine(HashModel(vocab_size=geometry.vocab_size, window=2, seed=4), geometry)
    flips = count_flips(recordings, before, predict(other, recordings, PAD))
    assert flips.all.flipped > live / 2
    assert flips.all.flipped >= flips.all.lost + flips.all.gained > 0


def test_right_predictions_on_fixed_rows_are_lost_where_they_flip(model):
    (found,) = record(model, [Prompt(id="1", content="the cat")], OPTIONS)
    before = predict(model.engine, [found], PAD)
    after = [[[token + 1 for token in row] for row in states] for states in before]
    fixed = count_flips([found], before, after).stages["fixed"]
    assert fixed.flipped == fixed.lost == fixed.rows > 0  # on clean context the model gives its own text
    assert fixed.rate == fixed.loss == 1


def test_the_recorded_text_is_the_models_own(model):
    (found,) = record(model, [Prompt(id="1", content="the cat")], OPTIONS)
    language_model = HashModel(vocab_size=model.engine.geometry.vocab_size, window=2, seed=3)
    assert list(found.new) == greedy(language_model, found.prompt, len(found.new))
