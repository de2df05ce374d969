"""Continuous batching as policy: admission, order, cancelling, failure, and that neighbours change nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.contract import FixedShapes
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.request import METHODS, Decode, make_decoder
from cllm_export.runtime.decoding.scheduler import Scheduler
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Forward
from tests.fakes import EOS, PAD, FakeEngine, HashModel, greedy, make_geometry, properties

VOCABULARY = 9


def make_engine(num_slots, *, seed=0, fixed_shapes=None):
    model = HashModel(vocab_size=VOCABULARY, seed=seed, window=2)
    return FakeEngine(model, make_geometry(vocab_size=VOCABULARY), num_slots=num_slots, fixed_shapes=fixed_shapes)


def make_task(prompt, *, count=8, method="jacobi", eos=(), **callbacks):
    decoder = make_decoder(method, prompt, proposer="pad", seed=0, pad_token_id=PAD)
    return Task(prompt, Decode(decoder, max_new_tokens=count, eos_token_ids=eos), **callbacks)


def tokens_of(task):
    return [token for record in task.decode.records for token in record.new]


def run(scheduler):
    reports = []
    while not scheduler.is_idle:
        reports.append(scheduler.step())
    return reports


class FailingEngine(FakeEngine):
    """Fails at one of its forwards."""

    fails_at = -1
    error: Exception = EngineError("out of memory")

    def forward(self, batch, **options):
        if len(self.calls) == self.fails_at:
            self.fails_at = -1
            raise self.error
        return super().forward(batch, **options)


@properties
@given(
    data=st.lists(
        st.tuples(
            st.lists(st.integers(0, 8), min_size=1, max_size=20),
            st.integers(1, 12),
            st.sampled_from(METHODS),
            st.integers(0, 6),
        ),
        max_size=8,
    ),
    num_slots=st.integers(1, 4),
    block_size=st.integers(1, 8),
    cancelled=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 20)), max_size=4),
    alternate_width=st.sampled_from([None, 6]),
)
def test_whatever_arrives_beside_it_and_is_cancelled_a_task_gives_the_models_own_tokens(
    data, num_slots, block_size, cancelled, alternate_width
):
    """Tasks arrive at any step; some are cancelled at any step."""
    engine = make_engine(num_slots)
    scheduler = Scheduler(engine, block_size=block_size, pad_token_id=PAD, alternate_width=alternate_width)
    tasks = [make_task(prompt, count=count, method=method, eos=(EOS,)) for prompt, count, method, _ in data]
    model = HashModel(vocab_size=VOCABULARY, seed=0, window=2)
    step, cut_short = 0, set()
    while step <= 6 or not scheduler.is_idle:
        for task, (_, _, _, arrival) in zip(tasks, data, strict=True):
            if arrival == step:
                scheduler.submit(task)
        for index, when in cancelled:
            if when == step and index < len(tasks) and scheduler.cancel(tasks[index]):
                cut_short.add(index)
        scheduler.step()
        step += 1
    for index, (task, (prompt, count, _, _)) in enumerate(zip(tasks, data, strict=True)):
        expected = greedy(model, prompt, count, eos=(EOS,))
        found = tokens_of(task)
        assert found == (expected[: len(found)] if index in cut_short else expected)


def test_tasks_enter_slots_in_the_order_they_came():
    scheduler = Scheduler(make_engine(2), block_size=1, pad_token_id=PAD)
    ended = []
    for name in "abcd":
        scheduler.submit(make_task([5], count=3, method="autoregressive", ended=lambda _, n=name: ended.append(n)))
    run(scheduler)
    assert ended == ["a", "b", "c", "d"]


def test_a_slot_is_filled_at_the_very_next_forward():
    engine = make_engine(1)
    scheduler = Scheduler(engine, block_size=1, pad_token_id=PAD)
    for _ in range(3):
        scheduler.submit(make_task([5], count=2, method="autoregressive"))
    run(scheduler)
    assert len(engine.calls) == 6


def test_a_step_tells_how_many_tasks_wait():
    scheduler = Scheduler(make_engine(1), block_size=1, pad_token_id=PAD)
    for _ in range(3):
        scheduler.submit(make_task([5]))
    report = scheduler.step()
    assert report is not None and report.num_waiting == 2


def test_a_cancelled_task_leaves_its_slot_to_the_next():
    scheduler = Scheduler(make_engine(1), block_size=1, pad_token_id=PAD)
    first, second = make_task([5], count=50), make_task([6], count=2)
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.step()
    assert scheduler.cancel(first)
    assert not scheduler.cancel(first), "it has ended"
    run(scheduler)
    assert 0 < len(tokens_of(first)) < 50
    assert len(tokens_of(second)) == 2


def test_a_task_that_waits_can_be_cancelled():
    scheduler = Scheduler(make_engine(1), block_size=1, pad_token_id=PAD)
    first, second = make_task([5], count=3), make_task([6])
    scheduler.submit(first)
    scheduler.submit(second)
    assert scheduler.cancel(second)
    run(scheduler)
    assert tokens_of(second) == []


def test_what_a_taker_raises_ends_its_task_alone():
    def refuse(tokens):
        raise ValueError("no")

    scheduler = Scheduler(make_engine(2), block_size=4, pad_token_id=PAD)
    bad, good = make_task([5], take=refuse), make_task([6])
    scheduler.submit(bad)
    scheduler.submit(good)
    run(scheduler)
    assert isinstance(bad.error, ValueError)
    assert good.error is None
    assert len(tokens_of(good)) == 8


@pytest.mark.parametrize("error", [EngineError("out of memory"), RuntimeError("out of memory")])
def test_an_engine_that_fails_ends_what_it_ran_and_nothing_that_waits(error):
    model = HashModel(vocab_size=VOCABULARY, window=2)
    engine = FailingEngine(model, make_geometry(vocab_size=VOCABULARY), num_slots=2)
    engine.fails_at, engine.error = 1, error
    scheduler = Scheduler(engine, block_size=4, pad_token_id=PAD)
    tasks = [make_task([token]) for token in (3, 4, 5)]
    for task in tasks:
        scheduler.submit(task)
    while not scheduler.is_idle:
        scheduler.step()
    assert [task.error is None for task in tasks] == [False, False, True]
    assert isinstance(tasks[0].error, EngineError)
    assert "out of memory" in str(tasks[0].error)
    assert tokens_of(tasks[2]) == greedy(model, [5], 8)


def test_every_forward_has_one_shape_unless_told_otherwise():
    engine = make_engine(2)
    scheduler = Scheduler(engine, block_size=4, pad_token_id=PAD)
    scheduler.submit(make_task(list(range(8)) * 2))
    scheduler.submit(make_task([5]))
    run(scheduler)
    assert {len(row) for call in engine.calls for row in call.input_ids} == {4}


def test_where_reading_takes_turns_every_forward_has_one_of_two_shapes_and_neither_kind_starves():
    engine = make_engine(2)
    scheduler = Scheduler(engine, block_size=1, pad_token_id=PAD, alternate_width=8)
    scheduler.submit(make_task([5, 6], count=6, method="autoregressive"))
    scheduler.submit(make_task(list(range(8)) * 4, count=3, method="autoregressive"))
    scheduler.step()
    reports = run(scheduler)
    assert [(call.kind, len(call.input_ids[0])) for call in engine.calls[1:]] == [
        *[("forward", 1), ("prefill", 8)] * 3,
        *[("forward", 1)] * 3,
    ]
    assert [(report.num_prefilling, report.num_decoding) for report in reports[:3]] == [(0, 1), (1, 0), (0, 1)]


def test_a_paused_slot_keeps_its_rows_whatever_its_neighbours_read():
    engine = make_engine(2)
    scheduler = Scheduler(engine, block_size=4, pad_token_id=PAD, alternate_width=8)
    first = make_task([5, 6], count=30, method="jacobi-block")
    scheduler.submit(first)
    scheduler.step()
    for _ in range(6):
        scheduler.submit(make_task(list(range(8)) * 2, count=1))
        others_are_left = True
        while others_are_left:
            held, before = first.decode.num_rows, list(engine.rows[0])
            report = scheduler.step()
            others_are_left = report.num_waiting > 0 or scheduler.num_running > 1
            if engine.calls[-1].kind == "prefill":
                assert engine.calls[-1].num_committed[0] == 0
                assert engine.rows[0][:held] == before[:held]
    assert held > 6 and sum(call.kind == "prefill" for call in engine.calls) > 6


def test_prompts_are_read_in_wider_forwards_where_that_is_asked_for():
    engine = make_engine(1)
    scheduler = Scheduler(engine, block_size=1, pad_token_id=PAD, prefill_width=8)
    scheduler.submit(make_task(list(range(8)) * 2, count=3, method="autoregressive"))
    reports = run(scheduler)
    assert [report.width for report in reports] == [8, 7, 1, 1, 1]
    assert [report.num_prefilling for report in reports] == [1, 1, 0, 0, 0]


def test_fixed_shapes_keep_their_block():
    engine = make_engine(2, fixed_shapes=FixedShapes(batch_size=2, block_size=4, kv_length=79))
    scheduler = Scheduler(engine, block_size=4, pad_token_id=PAD, prefill_width=8)
    scheduler.submit(make_task(list(range(8)) * 2))
    assert {report.width for report in run(scheduler)} == {4}


def test_nobody_starves_while_others_keep_coming():
    scheduler = Scheduler(make_engine(2), block_size=4, pad_token_id=PAD)
    generator = random.Random(0)
    first = make_task([5], count=5)
    for _ in range(6):
        scheduler.submit(make_task([generator.randrange(8)], count=5))
    scheduler.submit(first)
    for _ in range(40):
        scheduler.submit(make_task([generator.randrange(8)], count=5))
        scheduler.step()
    assert first.decode.finish_reason == "length"


def test_a_size_below_one_is_refused():
    with pytest.raises(OptionError, match="must be an integer of at least 1, got 0"):
        Scheduler(make_engine(1), pad_token_id=PAD, block_size=0)


# A step, said before it runs


def test_a_schedule_says_who_reads_who_decodes_and_the_rows():
    engine = make_engine(3)
    scheduler = Scheduler(engine, block_size=4, pad_token_id=PAD)
    scheduler.submit(make_task([5]))
    scheduler.submit(make_task([1, 2, 3, 4, 5, 6, 7]))
    step = scheduler.schedule()
    assert (step.decoding, step.prefilling, step.paused) == ((0,), (1,), ())
    assert [*step.batch.input_ids] == [[5, PAD, PAD, PAD], [1, 2, 3, 4], [PAD, PAD, PAD, PAD]]
    assert ([*step.batch.num_committed], [*step.batch.write_index]) == ([1, 4, 0], [0, 0, 0])
    assert (step.block_size, step.width, step.is_prefill) == (4, 4, False)
    assert "started" not in repr(step)
    assert engine.calls == []


def test_a_step_in_which_nobody_decodes_is_a_prefill():
    scheduler = Scheduler(make_engine(1), block_size=4, pad_token_id=PAD)
    assert scheduler.schedule() is None
    scheduler.submit(make_task([1, 2, 3]))
    step = scheduler.schedule()
    assert step.is_prefill
    assert step.block_size == 0
    assert scheduler.update(step, None).new_tokens == 0
    assert scheduler.schedule().decoding == (0,)


def test_an_update_hands_out_what_the_forward_gave_and_ends_who_has_ended():
    scheduler = Scheduler(make_engine(1), block_size=3, pad_token_id=PAD)
    task = make_task([5], count=2)
    scheduler.submit(task)
    step = scheduler.schedule()
    report = scheduler.update(step, Forward([[PAD, 8, 9]], [2]))
    assert report.new_tokens == 2
    assert tokens_of(task) == [PAD, 8]
    assert task.decode.finish_reason == "length"
    assert scheduler.is_idle


def test_slots_of_the_other_kind_are_paused_where_forwards_take_turns():
    scheduler = Scheduler(make_engine(2), block_size=1, pad_token_id=PAD, alternate_width=4)
    scheduler.submit(make_task([5]))
    scheduler.submit(make_task([1, 2, 3, 4, 5, 6, 7]))
    first = scheduler.schedule()
    assert (first.prefilling, first.decoding, first.paused) == ((1,), (), (0,))
    scheduler.update(first, None)
    second = scheduler.schedule()
    assert (second.prefilling, second.decoding, second.paused) == ((), (0,), (1,))
