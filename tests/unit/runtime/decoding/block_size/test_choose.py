"""Which n is chosen: against simulated machines and models, without a clock, and the time it takes in all."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.runtime.decoding.block_size.chooser import DraftRecord, DraftTable, PinnedSize, SizeChooser
from cllm_export.runtime.decoding.block_size.latency import SPELL
from cllm_export.runtime.decoding.request import METHODS, Decode, make_decoder
from cllm_export.runtime.decoding.scheduler import Scheduler
from cllm_export.runtime.decoding.task import Task
from tests.fakes import EOS, PAD, FakeEngine, HashModel, greedy, make_geometry, properties

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32)

STEEP = {1: 0.31, 2: 0.36, 4: 0.47, 6: 0.63, 8: 0.79, 12: 1.1, 16: 1.4, 24: 2.1, 32: 2.8}
"""T(n) of a small model on one thread: it computes more than it reads."""
MIDDLE = {size: 0.31 * (1 + 0.087 * (size - 1)) for size in SIZES}
FLAT = {size: 100 * (1 + 0.01 * (size - 1)) for size in SIZES}
"""T(n) of a large model: it waits for its weights."""
MACHINES = {"steep": STEEP, "middle": MIDDLE, "flat": FLAT}

TUNED = {1: 0.0, 2: 0.46, 4: 1.36, 6: 2.11, 8: 2.92, 12: 3.93, 16: 5.24, 24: 6.07, 32: 6.38}
"""Draft tokens accepted in a forward, of a model tuned with n = 16."""
ORDINARY = {size: 0.0 if size == 1 else 0.04 for size in SIZES}
UNTUNED_BUT_EASY = {size: min(size - 1, 3) * 0.3 for size in SIZES}


class Simulation:
    """Requests of so many tokens through so many slots; ``run`` gives the seconds that they take under a policy."""

    def __init__(self, times, *, num_slots=1, noise=0.15, interrupted=0.02, drift=0.0, seed=0):
        self._times = {size: times[1] + (seconds - times[1]) * num_slots for size, seconds in times.items()}
        self._num_slots = num_slots
        self._noise = noise
        self._interrupted = interrupted
        self._drift = drift
        self._speed = 1.0
        self._random = random.Random(seed)
        self.sizes = Counter()
        self.seconds = 0.0

    @property
    def times(self):
        return self._times

    def run(self, policy, requests, *, tokens=33):
        """``requests`` are tables of draft tokens accepted by size, one for each request."""
        waiting, slots, started = list(reversed(requests)), [], self.seconds
        while waiting or slots:
            while waiting and len(slots) < self._num_slots:
                slots.append([waiting.pop(), tokens, DraftRecord("drafts")])
            size = policy.choose([slot[2] for slot in slots])
            self.sizes[size] += 1
            self.seconds += self._times[size]
            accepted = []
            for slot in slots:
                new = min(slot[1], 1 + self._draw(slot[0][size], size))
                slot[1] -= new
                accepted.append((slot[2], new))
            policy.observe(size, self._observed(size), accepted)
            slots = [slot for slot in slots if slot[1]]
        return self.seconds - started

    def _draw(self, mean, size):
        if not mean:
            return 0
        drawn = self._random.betavariate(1, (size - 1) / mean - 1) * (size - 1)
        return int(drawn) + (self._random.random() < drawn % 1)

    def _observed(self, size):
        """Forwards are slowed a little, and a few of them much: somebody else had the processor."""
        self._speed *= 1 + self._drift * self._random.uniform(-1, 1)
        slow = 5 if self._random.random() < self._interrupted else 1
        return self._times[size] * (1 + self._random.expovariate(1 / self._noise)) * slow / self._speed


def seconds_of(policy, requests, times, **options):
    return Simulation(times, **options).run(policy, requests)


def chooser(times, *, first=1, num_slots=1):
    return SizeChooser(SIZES, first=first, known_times=Simulation(times, num_slots=num_slots).times)


SEEDS = range(5)
"""Few forwards of noisy times tell two sizes apart only on average, so costs are summed over some runs."""


def cost_of_choosing(requests, times, first=1, num_slots=1, fixed_sizes=SIZES, wrong=None, **noise):
    """Seconds with n chosen, over those with the best of the fixed sizes; ``wrong``: factors of the known times."""
    chosen = best = 0.0
    for seed in SEEDS:
        options = {"num_slots": num_slots, "seed": seed, **noise}
        known = {size: seconds * (wrong or {}).get(size, 1) for size, seconds in times.items()}
        policy = chooser(known, first=first, num_slots=num_slots)
        chosen += seconds_of(policy, requests, times, **options)
        best += min(seconds_of(PinnedSize(size), requests, times, **options) for size in fixed_sizes)
    return chosen / best


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("num_slots", [1, 8])
def test_an_ordinary_model_loses_next_to_nothing_to_decoding_without_drafts(machine, num_slots):
    requests = [ORDINARY] * 400
    assert cost_of_choosing(requests, MACHINES[machine], num_slots=num_slots, fixed_sizes=(1,)) < 1.02


@pytest.mark.parametrize("machine", MACHINES)
def test_a_tuned_model_does_nearly_as_well_as_with_the_best_fixed_size(machine):
    assert cost_of_choosing([TUNED] * 200, MACHINES[machine], first=16) < 1.05


@pytest.mark.parametrize("machine", MACHINES)
def test_a_tuned_model_that_nobody_called_so_finds_its_size(machine):
    assert cost_of_choosing([TUNED] * 800, MACHINES[machine]) < 1.06


def test_drafts_do_not_pay_where_eight_slots_fill_the_machine():
    """The trained size is run for the spells that every model begins with, and not again."""
    simulation = Simulation(STEEP, num_slots=8)
    simulation.run(chooser(STEEP, first=16, num_slots=8), [TUNED] * 100)
    assert simulation.sizes.pop(16) == 2 * SPELL
    assert simulation.sizes[1] > 0.98 * simulation.sizes.total()


def test_first_times_that_were_wrong_are_corrected():
    """The sizes 1 and 16 were timed while others had the processor: 16 seems not to pay, and 1 not to cost less."""
    assert cost_of_choosing([TUNED] * 200, MIDDLE, first=16, wrong={16: 20}) < 1.05
    assert cost_of_choosing([ORDINARY] * 400, MIDDLE, wrong={1: 3}, fixed_sizes=(1,)) < 1.02
    assert cost_of_choosing([ORDINARY] * 400, MIDDLE, wrong={2: 0.5}, fixed_sizes=(1,)) < 1.02


def test_forwards_with_logits_have_times_of_their_own():
    """Where the logits of a row cost a forward, requests that need them run at 1, in turn with others at 16."""
    policy, sizes = chooser(FLAT, first=16), {True: Counter(), False: Counter()}
    for with_logits in [True, False] * 40:
        record = DraftRecord(f"drafts, {with_logits}", with_logits=with_logits)
        for _ in range(20):
            size = policy.choose([record])
            sizes[with_logits][size] += 1
            policy.observe(size, 100.0 * size if with_logits else FLAT[size], [(record, 1 + (size - 1) // 2)])
    assert sizes[True][1] > 0.8 * sizes[True].total()
    assert sizes[False][1] <= SPELL


def test_a_busy_machine_changes_little():
    """Every second forward is interrupted, and the machine becomes faster and slower by up to 2 % a forward."""
    busy = {"interrupted": 0.5, "drift": 0.02}
    assert cost_of_choosing([TUNED] * 200, MIDDLE, first=16, **busy) < 1.06
    assert cost_of_choosing([ORDINARY] * 400, MIDDLE, fixed_sizes=(1,), **busy) < 1.02


def test_slots_with_drafts_of_two_kinds_share_the_size_that_is_best_for_all():
    """Four hopeless requests and four easy ones in one batch, for which 32 is best: 34 tokens in the time of n = 1
    where the hopeless ones alone made 8, and 24 makes 32."""
    times, policy = Simulation(FLAT, num_slots=8).times, chooser(FLAT, num_slots=8)
    records = [DraftRecord("hopeless")] * 4 + [DraftRecord("easy")] * 4
    made = taken = 0.0
    for _ in range(2000):
        size = policy.choose(records)
        tokens = [1] * 4 + [1 + round(0.9 * (size - 1))] * 4
        policy.observe(size, times[size], list(zip(records, tokens, strict=True)))
        made, taken = made + sum(tokens), taken + times[size]
    assert made / taken > 0.9 * (4 + 4 * 29) / times[32]


def test_requests_that_differ_get_sizes_that_differ():
    """Half of them are hopeless at any size, half are easy: no size is good for both."""
    times = {size: 1 + 0.12 * (size - 1) for size in SIZES}
    easy = {size: 0.9 * (size - 1) for size in SIZES}
    requests = [easy if index % 2 else ORDINARY for index in range(300)]
    fixed = min(Simulation(times).run(PinnedSize(size), requests, tokens=120) for size in SIZES)
    assert Simulation(times).run(chooser(times, first=16), requests, tokens=120) < 0.9 * fixed


def test_a_model_whose_drafts_stop_being_right_is_soon_decoded_without():
    policy, simulation = chooser(MIDDLE, first=16), Simulation(MIDDLE)
    simulation.run(policy, [TUNED] * 200)
    simulation.run(policy, [ORDINARY] * 60)
    plain = seconds_of(PinnedSize(1), [ORDINARY] * 100, MIDDLE)
    assert simulation.run(policy, [ORDINARY] * 100) < 1.02 * plain


def test_a_model_whose_drafts_begin_to_be_right_is_found_out():
    policy, simulation = chooser(MIDDLE), Simulation(MIDDLE)
    simulation.run(policy, [ORDINARY] * 200)
    simulation.run(policy, [TUNED] * 600)
    late = simulation.run(policy, [TUNED] * 200)
    assert late < 0.6 * seconds_of(PinnedSize(1), [TUNED] * 200, MIDDLE)


def test_a_machine_whose_times_are_not_known_is_learned_from_its_forwards():
    policy = SizeChooser(SIZES)
    plain = seconds_of(PinnedSize(1), [ORDINARY] * 400, STEEP)
    assert seconds_of(policy, [ORDINARY] * 400, STEEP) < 1.02 * plain


def test_the_same_observations_give_the_same_choices():
    runs = []
    for _ in range(2):
        simulation = Simulation(MIDDLE)
        simulation.run(chooser(MIDDLE, first=16), [TUNED, UNTUNED_BUT_EASY] * 60)
        runs.append((simulation.sizes, simulation.seconds))
    assert runs[0] == runs[1]


def test_requests_without_drafts_run_at_one():
    policy = chooser(FLAT, first=16)
    assert [policy.choose([DraftRecord(None), DraftRecord(None)]) for _ in range(40)] == [1] * 40


def test_a_size_between_two_that_were_seen_is_bounded_by_both():
    table = DraftTable(SIZES)
    for _ in range(100):
        table.observe(4, 1, 1.0)
        table.observe(16, 5, 1.0)
    proven, hoped = table.bounds()[8]
    assert table.mean(4) == pytest.approx(1)
    assert proven == pytest.approx(5 * 7 / 15, rel=0.05)
    assert hoped == pytest.approx(7 / 3, rel=0.05)
    assert table.mean(1) == table.mean(8) == 0


def test_what_is_known_of_a_small_size_bounds_the_larger_ones():
    """Further rows are no better than the first ones: a size of 2 that accepts nothing rules the others out."""
    table = DraftTable(SIZES)
    assert table.bounds()[16] == (0, 15)
    for _ in range(200):
        table.observe(2, 0, 1.0)
    proven, hoped = table.bounds()[16]
    assert proven == 0
    assert hoped < 1.5


def test_what_was_seen_is_forgotten():
    table = DraftTable(SIZES)
    for _ in range(200):
        table.observe(2, 0, 1.0)
    for _ in range(2000):
        table.observe(1, 0, 1.0)
    assert table.bounds()[2][1] > 0.8


@properties
@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 8), min_size=1, max_size=20), st.integers(1, 12), st.sampled_from(METHODS)),
        min_size=1,
        max_size=6,
    ),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    num_slots=st.integers(1, 3),
    prefill_width=st.sampled_from([None, 16]),
)
def test_any_sequence_of_sizes_gives_the_models_own_tokens(prompts, sizes, num_slots, prefill_width):
    class Sequence:
        """Sizes in this order, again and again."""

        def __init__(self):
            self._num_chosen = 0

        def choose(self, records):
            self._num_chosen += 1
            return sizes[self._num_chosen % len(sizes)]

        def observe(self, size, seconds, accepted):
            assert all(1 <= count <= 12 for _, count in accepted)

    model = HashModel(vocab_size=9, window=2)
    engine = FakeEngine(model, make_geometry(vocab_size=9), num_slots=num_slots)
    scheduler = Scheduler(engine, block_size=Sequence(), pad_token_id=PAD, prefill_width=prefill_width)
    tasks = []
    for prompt, count, method in prompts:
        decoder = make_decoder(method, prompt, proposer="pad", seed=0, pad_token_id=PAD)
        tasks.append(Task(prompt, Decode(decoder, max_new_tokens=count, eos_token_ids=(EOS,))))
        scheduler.submit(tasks[-1])
    while not scheduler.is_idle:
        scheduler.step()
    for task, (prompt, count, _) in zip(tasks, prompts, strict=True):
        assert task.error is None
        found = [token for record in task.decode.records for token in record.new]
        assert found == greedy(model, prompt, count, eos=(EOS,))


def test_a_forward_that_reads_a_prompt_as_well_tells_nothing_of_the_time_at_a_size():
    class Watching(PinnedSize):
        def __init__(self, size):
            super().__init__(size)
            self.seen = []

        def observe(self, size, seconds, accepted):
            self.seen.append((size, seconds > 0, len(accepted)))

    policy = Watching(2)
    engine = FakeEngine(HashModel(vocab_size=9, window=2), make_geometry(vocab_size=9), num_slots=2)
    scheduler = Scheduler(engine, block_size=policy, pad_token_id=PAD, prefill_width=16)
    for prompt in ([5], [3] * 12):
        decoder = make_decoder("jacobi", prompt, proposer="pad", seed=0, pad_token_id=PAD)
        scheduler.submit(Task(prompt, Decode(decoder, max_new_tokens=4, eos_token_ids=()), drafts="drafts"))
    scheduler.step()
    scheduler.step()
    assert policy.seen == [(2, False, 1), (2, True, 2)]
