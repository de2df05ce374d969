"""What is observed: the drawn rows alone, each with its stage, and never one that is dead or of an idle slot."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cllm_export.calibration.edited_engine import _rows_of_slot
from cllm_export.calibration.linear_inputs import LinearInput
from cllm_export.calibration.observe import CLEAN, Offsets, Statistics, add_all, observe
from cllm_export.calibration.record import RecordOptions, record
from cllm_export.calibration.selection import Selection, count_rows
from cllm_export.errors import CalibrationError
from cllm_export.prompts import Prompt
from tests.fakes import PAD, FakeEngine, HashModel, make_model, write_bundle

VALUE = "x"
INPUT = LinearInput(rows=(VALUE,), tensors=("layer.weight",), width=2)


class ShowingEngine(FakeEngine):
    """Shows of each row its token and its position."""

    def values(self):
        call = self.calls[-1]
        assert call.kind == "forward"
        rows = [(token, call.write_index[0] + row) for row, token in enumerate(call.input_ids[0])]
        return {VALUE: np.asarray(rows, np.float32)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    bundle = write_bundle(tmp_path_factory.mktemp("observe") / "bundle")
    language_model = HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=2, seed=3)
    prompts = [Prompt(id=str(number), content=f"the cat {number}") for number in range(3)]
    options = RecordOptions(loop="sliding", proposer="pad", block_size=4, max_new_tokens=10)
    recordings = record(make_model(bundle, language_model), prompts, options)
    return recordings, ShowingEngine(language_model, bundle.manifest.geometry, num_slots=2)


def select(recordings, states=None, clean=None):
    """Rows by number; all of them where none are given."""
    counts = [count_rows(recording) for recording in recordings]
    every = [np.arange(sum(numbers), dtype=np.int64) for numbers in zip(*counts, strict=True)]
    chosen = [
        rows if given is None else np.asarray(given, np.int64)
        for rows, given in zip(every, (states, clean), strict=True)
    ]
    return Selection(states=chosen[0], clean=chosen[1])


def see(recorded, selection, first=0):
    recordings, engine = recorded
    before = [count_rows(recording) for recording in recordings[:first]]
    offsets = Offsets(states=sum(each.states for each in before), clean=sum(each.clean for each in before))
    return list(observe(engine, recordings[first:], selection, offsets, chunk=4, pad=PAD))


def test_every_live_row_is_seen_once_and_no_dead_one(recorded):
    recordings, _ = recorded
    seen = see(recorded, select(recordings))
    kinds = Counter(kind for rows in seen for kind in rows.kinds)
    expected = Counter(stage for each in recordings for state in each.states for stage in each.stages(state) if stage)
    expected[CLEAN] = sum(len(each.text) - 1 for each in recordings)
    assert kinds == expected
    for recording in recordings:
        last = len(recording.text) - 2
        positions = [
            value[VALUE][:, 1].max() for value in (rows.values for rows in seen if rows.recording == recording.id)
        ]
        assert max(positions) == last


def test_clean_rows_are_the_text_in_order(recorded):
    recordings, _ = recorded
    seen = see(recorded, select(recordings, states=[]))
    for recording in recordings:
        rows = np.concatenate([each.values[VALUE] for each in seen if each.recording == recording.id])
        assert rows[:, 0].tolist() == list(recording.text[:-1])
        assert rows[:, 1].tolist() == list(range(len(recording.text) - 1))


def test_a_later_shard_sees_its_own_rows_of_the_draw(recorded):
    recordings, _ = recorded
    drawn = select(recordings, states=[1, 5, 30], clean=[0, 40])
    whole, parts = see(recorded, drawn), see(recorded, drawn, first=1)
    later = [each for each in whole if each.recording != recordings[0].id]
    assert len(later) < len(whole)
    for first, second in zip(later, parts, strict=True):
        assert first.kinds == second.kinds and np.array_equal(first.values[VALUE], second.values[VALUE])


def test_a_prompt_without_a_drawn_row_is_not_run(recorded):
    recordings, engine = recorded
    before = len(engine.calls)
    assert see(recorded, select(recordings, states=[], clean=[])) == []
    assert len(engine.calls) == before


def test_statistics_are_read_as_they_were_written(recorded, tmp_path):
    recordings, _ = recorded
    statistics = Statistics.empty([INPUT], 3)
    add_all(see(recorded, select(recordings)), [INPUT], statistics)
    statistics.write(tmp_path / "part.npz")
    found = Statistics.read(tmp_path / "part.npz", [INPUT], 3)
    assert found.kinds == statistics.kinds
    assert np.array_equal(found.inputs["layer.weight"].amax, statistics.inputs["layer.weight"].amax)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"PK\x03\x04cut"])
def test_damaged_statistics_are_refused_by_name(tmp_path, data):
    (tmp_path / "part.npz").write_bytes(data)
    with pytest.raises(CalibrationError, match=r"part\.npz is damaged"):
        Statistics.read(tmp_path / "part.npz", [INPUT], 3)


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_a_value_that_is_not_finite_is_refused_with_its_prompt(recorded, monkeypatch, bad, what):
    monkeypatch.setattr(ShowingEngine, "values", lambda self: {VALUE: np.full((4, 2), bad, np.float32)})
    with pytest.raises(CalibrationError, match=f"the value x is {what} in prompt 0"):
        see(recorded, select(recorded[0]))


@pytest.mark.parametrize("shape", [(2, 3, 5), (6, 5)])
def test_the_rows_of_slot_0_are_told_from_those_of_idle_slots(shape):
    values = np.arange(30, dtype=np.float32).reshape(shape)
    assert _rows_of_slot(values, 2).tolist() == np.arange(15, dtype=np.float32).reshape(3, 5).tolist()
