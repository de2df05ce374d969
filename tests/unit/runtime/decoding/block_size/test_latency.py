"""T(n) learned from forwards of a machine that others share, and the file that a bundle keeps it in."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.errors import OutputError
from cllm_export.runtime.decoding.block_size.latency import ForwardTimes
from cllm_export.runtime.decoding.block_size.latency_file import LATENCY_NAME, read_latency, write_latency
from cllm_export.runtime.decoding.block_size.measured_times import monotone, settle_times
from cllm_export.runtime.decoding.block_size.time_forwards import time_forwards, time_in_turn
from tests.fakes import PAD, FakeEngine, HashModel, make_geometry, write_bundle


def ratio(times, size, to=1):
    return times.relative(size) / times.relative(to)


def test_the_ratio_of_two_sizes_is_found_though_the_machine_slows_down_between_them():
    """Each spell is slower than the one before, so that times of different spells cannot be compared by themselves."""
    times, speed = ForwardTimes(), 1.0
    for spell in range(20):
        for _ in range(30):
            speed *= 1.005
            size = 8 if spell % 2 else 1
            times.observe(size, speed * (2.5 if size == 8 else 1))
    assert ratio(times, 8) == pytest.approx(2.5, rel=0.1)


def test_a_few_forwards_that_were_interrupted_change_nothing():
    times, numbers = ForwardTimes({1: 1.0, 8: 2.5}), random.Random(0)
    for spell in range(20):
        for _ in range(20):
            size = 8 if spell % 2 else 1
            times.observe(size, (2.5 if size == 8 else 1) * (30 if numbers.random() < 0.1 else 1))
    assert ratio(times, 8) == pytest.approx(2.5, rel=0.1)


def test_known_times_are_corrected_by_forwards():
    times = ForwardTimes({1: 1.0, 8: 2.0})
    for spell in range(20):
        for _ in range(20):
            times.observe(8 if spell % 2 else 1, 4.0 if spell % 2 else 1.0)
    assert ratio(times, 8) == pytest.approx(4, rel=0.05)


def test_a_size_that_was_not_tried_lies_between_its_neighbours_and_never_falls():
    times = ForwardTimes({1: 1.0, 8: 2.4, 16: 2.2})
    assert ratio(times, 4) == pytest.approx(1.6)
    assert times.relative(12) >= times.relative(8)
    assert times.relative(32) > times.relative(16)


def test_no_size_takes_longer_than_a_larger_one():
    times = ForwardTimes({1: 9.0, 8: 2.4, 16: 4.0})
    assert times.relative(1) == times.relative(4) == times.relative(8) == 2.4


def test_times_are_taken_against_those_at_one():
    times = ForwardTimes({1: 1.0, 2: 1.2, 16: 40.0})
    for size in (16, 1, 16):
        for _ in range(8):
            times.observe(size, 3.0 if size == 16 else 1.0)
    assert times.relative(16) == pytest.approx(3)
    assert times.relative(2) == 1.2


def test_where_one_size_was_seen_a_row_is_assumed_to_take_as_long_as_each_of_its():
    assert ForwardTimes().relative(4) == 4 * ForwardTimes().relative(1)
    times = ForwardTimes({16: 8.0})
    assert [times.relative(size) for size in (1, 16, 32)] == [0.5, 8, 16]


def test_a_size_whose_time_was_only_assumed_may_take_half_of_it():
    times = ForwardTimes({1: 1.0, 8: 2.0})
    assert times.least(8) == 1
    for size in (1, 8):
        for _ in range(8):
            times.observe(size, 3.0 if size == 8 else 1.0)
    assert 2.5 < times.least(8) < 3


def test_a_time_of_zero_is_none():
    times = ForwardTimes({1: 1.0, 2: 1.5})
    times.observe(2, 0.0)
    assert ratio(times, 2) == 1.5


def test_the_first_look_writes_rows_that_no_text_holds_and_stops_at_its_budget():
    engine = FakeEngine(HashModel(vocab_size=9), make_geometry(vocab_size=9, max_length=64), num_slots=2)
    seconds = time_forwards(engine, (1, 8, 4), pad_token_id=PAD, budget=60)
    assert list(seconds) == [1, 8, 4]
    assert min(seconds.values()) > 0
    assert all(start >= 64 - 1 for call in engine.calls for start in call.write_index)
    assert {count for call in engine.calls for count in call.num_committed} == {0}
    assert list(time_forwards(engine, (1, 8, 4), pad_token_id=PAD, budget=0)) == [1]


class CountedEngine(FakeEngine):
    """Its clock tells how long its forwards take: the given seconds, one for every second forward."""

    def __init__(self, *seconds: float) -> None:
        super().__init__(HashModel(vocab_size=9), make_geometry(vocab_size=9, max_length=64))
        self._seconds = seconds

    def clock(self) -> float:
        return sum(self._seconds[: len(self.calls) // 2])


class TimedEngine(FakeEngine):
    """Its forwards take what they are told to, in the order of ``seconds``."""

    def __init__(self, seconds: Callable[[int, int], float], *, max_block_size: int = 16) -> None:
        geometry = replace(make_geometry(vocab_size=9, max_length=64), max_block_size=max_block_size)
        super().__init__(HashModel(vocab_size=9), geometry)
        self._seconds = seconds

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Any:
        self.run_seconds += self._seconds(len(batch.input_ids[0]), len(self.calls))
        return super().forward(batch, with_logits=with_logits)


def test_forwards_that_take_turns_give_medians_of_each_engine_and_size():
    """Long ones are timed once in a round, past so many rows; one slow round changes no median."""
    plain = TimedEngine(lambda size, call: float(size) * (100 if call < 4 else 1))
    faster, narrow = TimedEngine(lambda size, _: size / 2), TimedEngine(lambda size, _: float(size), max_block_size=4)
    times = time_in_turn([plain, faster, narrow], (1, 8), past=20, rounds=3, min_seconds=0)
    assert [each.seconds for each in times] == [{1: 1.0, 8: 8.0}, {1: 0.5, 8: 4.0}, {1: 1.0}]
    assert [each.why_busy for each in times] == [None] * 3
    assert {index for call in plain.calls for index in call.write_index} == {20}
    assert len(plain.calls) == 2 * 2 * 3


def test_a_short_forward_is_timed_after_others_that_refill_the_caches():
    engine = TimedEngine(lambda _, call: 0.016 if call < 10 else 0.001)
    [times] = time_in_turn([engine], (2,), past=0, rounds=1, min_seconds=0)
    assert times.seconds == {2: pytest.approx(0.001)}


def test_sizes_take_turns_forwards_and_backwards():
    engine = TimedEngine(lambda size, _: float(size))
    time_in_turn([engine], (1, 4, 8), past=0, rounds=2, min_seconds=0)
    assert [len(call.input_ids[0]) for call in engine.calls[1::2]] == [1, 4, 8, 8, 4, 1]


def test_a_busy_machine_is_timed_longer_and_then_called_busy():
    """Its forwards of 8 tokens take now as long as one of a token, and now ten times as long."""
    clock = iter(range(0, 1000, 10))
    engine = TimedEngine(lambda size, call: 10.0 if size == 8 and call % 8 < 4 else 1.0)
    [times] = time_in_turn([engine], (1, 8), past=0, rounds=2, min_seconds=0, clock=lambda: float(next(clock)))
    assert len(engine.calls) == 3 * 4, "rounds until 30 seconds have passed"
    assert "T(8) / T(1)" in (times.why_busy or "")
    assert "too busy to tell" in (times.why_busy or "")


def test_a_machine_that_slows_down_as_a_whole_is_not_busy():
    """Each ratio is taken within a round, where both forwards are slow."""
    times = settle_times({1: [1.0, 4.0, 9.0], 8: [2.0, 8.0, 18.0]})
    assert (times.why_busy, times.relative(8), times.spread(8)) == (None, 2, 0)


def test_times_never_fall_with_the_number_of_tokens():
    """Four tokens were measured at half the time of one. Both then take their mean, and nothing gains from it."""
    times = settle_times({1: [1.0] * 5, 4: [0.5] * 5, 8: [2.0] * 5})
    assert times.seconds == {1: 0.75, 4: 0.75, 8: 2.0}
    assert times.relative(4) == 1


def test_neighbours_in_the_wrong_order_get_their_mean_whatever_the_order_of_the_sizes():
    measured = {16: 4.0, 1: 3.0, 2: 1.0, 4: 2.0, 8: 5.0, 32: 4.2, 64: 9.0}
    pooled = (5.0 + 4.0 + 4.2) / 3
    assert monotone(measured) == pytest.approx({16: pooled, 1: 2, 2: 2, 4: 2, 8: pooled, 32: pooled, 64: 9})
    assert list(monotone(measured)) == list(measured)


@pytest.mark.parametrize("seed", range(50))
def test_settled_times_are_the_best_of_all_that_rise(seed):
    """Isotonic regression by its definition: each value is the largest mean of a run that ends at or after it, over
    the least one of those that begin at or before it."""
    numbers = random.Random(seed)
    values = [numbers.uniform(1, 3) for _ in range(8)]

    def mean(first, last):
        return sum(values[first : last + 1]) / (last + 1 - first)

    expected = [max(min(mean(a, b) for b in range(i, 8)) for a in range(i + 1)) for i in range(8)]
    assert list(monotone(dict(enumerate(values))).values()) == pytest.approx(expected)


def test_the_first_look_lets_sizes_take_turns_and_trusts_the_least_time():
    """The forward of one token is slow when it is first looked at, and not when it is looked at again."""
    engine = CountedEngine(9, 2, 1, 3)
    assert time_forwards(engine, (1, 8), pad_token_id=PAD, budget=100, clock=engine.clock) == {1: 1, 8: 2}
    assert [len(call.input_ids[0]) for call in engine.calls] == [1, 1, 8, 8, 1, 1, 8, 8]


def test_the_first_look_gives_times_that_never_fall():
    engine = CountedEngine(4, 2, 4, 2)
    found = time_forwards(engine, (1, 8), pad_token_id=PAD, budget=100, clock=engine.clock)
    assert found == {1: 3, 8: 3}


def test_a_file_is_read_where_bundle_machine_and_slots_are_the_same(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    assert read_latency(bundle, num_slots=1, threads=2) is None
    write_latency(bundle, {1: 0.001, 16: 0.004}, num_slots=1, threads=2)
    assert read_latency(bundle, num_slots=1, threads=2) == {1: 0.001, 16: 0.004}
    write_latency(bundle, {1: 0.001, 4: 0.0005, 16: 0.004}, num_slots=1, threads=2)
    assert read_latency(bundle, num_slots=1, threads=2) == {1: 0.00075, 4: 0.00075, 16: 0.004}, "times never fall"
    assert read_latency(bundle, num_slots=8, threads=2) is None
    assert read_latency(bundle, num_slots=1, threads=1) is None


@pytest.mark.parametrize("key", ["bundle_fingerprint", "processor", "features", "onnxruntime", "session_options"])
def test_a_file_of_another_bundle_or_machine_is_left_alone_and_says_what_differs(tmp_path, caplog, key):
    bundle = write_bundle(tmp_path / "bundle")
    write_latency(bundle, {1: 0.001}, num_slots=1, threads=1)
    path = bundle.path / LATENCY_NAME
    report = json.loads(path.read_text())
    report["measured"][0]["conditions"][key] = "another"
    path.write_text(json.dumps(report))
    with caplog.at_level(logging.INFO):
        assert read_latency(bundle, num_slots=1, threads=1) is None
    assert f"measured with another {key}" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"measured": [{"conditions": {}}]}',
        '{"measured": [{"conditions": {}, "seconds": {}}]}',
        '{"measured": [{"conditions": {}, "seconds": {"1": -1}}]}',
        '{"measured": [{"conditions": {}, "seconds": {"1": NaN}}]}',
        '{"measured": [{"conditions": {}, "exact_sizes": {"equal": [8]}}]}',
        '{"measured": [{"conditions": {}, "exact_sizes": {"equal": ["8"], "different": []}}]}',
        '{"measured": [{"conditions": {}, "exact_sizes": {"equal": [8], "different": [8]}}]}',
    ],
)
def test_a_damaged_file_is_left_alone_with_a_warning(tmp_path, caplog, text):
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.path / LATENCY_NAME).write_text(text)
    assert read_latency(bundle, num_slots=1, threads=1) is None
    assert "cannot be read" in caplog.text


def test_two_writers_at_once_lose_nothing_of_each_other(tmp_path):
    """Each reads the file, adds its entry and writes it again: two servers that start on one bundle."""
    bundle, barrier = write_bundle(tmp_path / "bundle"), threading.Barrier(2)

    def write(sizes: range) -> None:
        barrier.wait(10)
        for num_slots in sizes:
            write_latency(bundle, {1: float(num_slots)}, num_slots=num_slots, threads=1)

    writers = [threading.Thread(target=write, args=(sizes,)) for sizes in (range(1, 13), range(13, 25))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    found = [read_latency(bundle, num_slots=num_slots, threads=1) for num_slots in range(1, 25)]
    assert found == [{1: float(num_slots)} for num_slots in range(1, 25)]


def test_a_bundle_that_cannot_be_written_to_is_named(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.path / LATENCY_NAME).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_latency(bundle, {1: 0.001}, num_slots=1, threads=1)
    assert sorted(path.name for path in bundle.path.iterdir() if path.name.startswith(".latency")) == []
