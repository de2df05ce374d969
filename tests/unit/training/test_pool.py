"""The pool: every sample once an epoch, in batches of similar length, repeatable, and itself again after a restore."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from cllm_export.bundle.manifest import PROPOSERS
from cllm_export.training.data.samples import Sample
from cllm_export.training.data.windows import Window
from cllm_export.training.pool import Entry, Pool, PoolOptions
from tests.fakes import PAD


def make_samples(count: int, *, longest: int = 40, seed: int = 0) -> list[Sample]:
    generator = random.Random(seed)
    return [
        Sample(
            id=str(index),
            tokens=tuple(generator.randrange(2, 30) for _ in range(num_prompt + generator.randint(2, longest))),
            num_prompt=num_prompt,
        )
        for index, num_prompt in enumerate(generator.choices(range(1, 12), k=count))
    ]


def make_options(**changes: Any) -> PoolOptions:
    settled: dict[str, Any] = {"num_windows": 3, "block_sizes": (8,), "loop": "sliding", "proposer": "pad", "size": 24}
    return PoolOptions(**settled | changes)


def make_pool(samples: Sequence[Sample], options: PoolOptions | None = None, **place: int) -> Pool:
    return Pool(samples, options or make_options(), pad_token_id=PAD, **{"seed": 1, **place})


def step(pool: Pool, batch_size: int) -> list[Entry]:
    """One batch, whose windows move by made-up predictions that follow from them."""
    drawn = pool.draw(batch_size)
    seen = [Entry(**vars(entry)) for entry in drawn]
    pool.update(drawn, [[[(g * 7 + 3) % 30 for g in window.guesses] for window in e.windows] for e in drawn])
    return seen


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("loop", ["sliding", "block"])
def test_equal_seeds_draw_alike_and_others_do_not(loop, proposer):
    samples, options = make_samples(30), make_options(loop=loop, proposer=proposer, block_sizes=(8, 4))
    one, two, other = (make_pool(samples, options, seed=seed) for seed in (1, 1, 2))
    runs = [[step(pool, 4) for _ in range(20)] for pool in (one, two, other)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_pool_restored_from_its_state_as_json_draws_what_it_would_have_drawn(proposer):
    samples, options = make_samples(30), make_options(proposer=proposer, keep_previous=True, block_sizes=(8, 4, 16))
    pool = make_pool(samples, options)
    for _ in range(15):
        step(pool, 4)
    saved = json.dumps(pool.state())
    restored = make_pool(samples, options, seed=9)
    restored.restore(json.loads(saved))
    assert json.dumps(restored.state()) == saved
    for _ in range(40):  # beyond the end of an epoch
        assert step(pool, 4) == step(restored, 4)
    assert pool.epoch == restored.epoch > 0


def test_every_sample_enters_once_an_epoch():
    samples = make_samples(37)
    pool = make_pool(samples, make_options(visits=1, size=1))
    drawn = [pool.draw(1)[0].index for _ in range(37 * 3)]
    for epoch in range(3):
        assert sorted(drawn[37 * epoch : 37 * (epoch + 1)]) == list(range(37))
    assert drawn[:37] != drawn[37:74], "in another order"


def test_processes_see_samples_of_their_own():
    samples = make_samples(20)
    seen = []
    for rank in range(3):
        pool = make_pool(samples, rank=rank, num_ranks=3)
        seen.append({entry.index for _ in range(60) for entry in step(pool, 4)})
    assert set.union(*seen) == set(range(20))
    assert sum(map(len, seen)) == 20, "and none that is another's"


def test_a_process_without_a_sample_is_a_defect_of_the_caller():
    with pytest.raises(AssertionError, match="every process"):
        make_pool(make_samples(2), rank=2, num_ranks=3)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_fewer_samples_than_a_batch_are_drawn_again(count):
    pool = make_pool(make_samples(count))
    for _ in range(20):
        assert len(step(pool, 8)) == 8
    assert pool.epoch > 1


def test_a_batch_may_be_larger_than_the_pool():
    pool = make_pool(make_samples(50), make_options(size=4))
    assert len({entry.index for entry in step(pool, 30)}) == 30


def test_a_batch_is_of_similar_length():
    samples = make_samples(400, longest=100)
    pool = make_pool(samples, make_options(size=256, num_windows=0))
    spreads = []
    for _ in range(50):
        lengths = [samples[entry.index].num_rows for entry in step(pool, 16)]
        spreads.append(max(lengths) - min(lengths))
    everything = [sample.num_rows for sample in samples]
    assert sum(spreads) / len(spreads) < 0.2 * (max(everything) - min(everything))


def test_the_longest_and_the_shortest_are_drawn_as_often_as_the_others():
    """A batch anywhere in the order by length would hardly ever reach the two ends of it."""
    samples = sorted(make_samples(100, longest=200), key=lambda sample: sample.num_rows)
    pool = make_pool(samples, make_options(size=64, num_windows=0, visits=1))
    seen = Counter(entry.index for _ in range(1000) for entry in step(pool, 10))
    mean = sum(seen.values()) / len(samples)
    assert all(0.7 * mean < seen[index] < 1.3 * mean for index in (0, 1, 50, 98, 99)), seen


def test_a_sample_stays_for_its_visits_and_its_windows_move_on():
    pool = make_pool(make_samples(1, longest=40), make_options(size=1, visits=4, num_windows=1))
    starts = [step(pool, 1)[0].windows[0].start for _ in range(4)]
    assert starts == sorted(set(starts)), "each forward moves it"
    assert step(pool, 1)[0].visits == 0, "then it is a new one"


def test_the_state_before_is_carried_only_where_it_is_compared():
    samples = make_samples(10)
    for keep in (False, True):
        pool = make_pool(samples, make_options(keep_previous=keep))
        windows = [w for _ in range(30) for entry in step(pool, 4) for w in entry.windows]
        assert any(w.previous for w in windows) is keep


def test_other_block_sizes_get_as_many_windows_as_have_about_as_many_guesses():
    samples = [Sample(id="long", tokens=tuple(range(2, 202)), num_prompt=2)]
    pool = make_pool(samples, make_options(num_windows=6, block_sizes=(16, 8, 32)))
    counts = {entry.block_size: len(entry.windows) for _ in range(20) for entry in step(pool, 4)}
    assert counts == {16: 6, 8: 13, 32: 3}


def test_without_windows_there_are_none():
    pool = make_pool(make_samples(10), make_options(num_windows=0))
    assert not any(entry.windows for _ in range(10) for entry in step(pool, 4))


def test_a_sample_too_short_for_any_window_is_drawn_without_one():
    pool = make_pool([Sample(id="s", tokens=(5, 6), num_prompt=1)])
    for _ in range(5):
        assert all(entry.windows == [] for entry in step(pool, 2))


def recorded_sample() -> Sample:
    states = ((1, (3, 9, 9, 9)), (2, (4, 5, 9, 9)), (4, (6, 8, 9, 9)), (5, (7, 8, 9, 10)))
    return Sample(id="r", tokens=tuple(range(2, 13)), num_prompt=2, states=states)


def test_recorded_states_are_drawn_instead_of_new_ones():
    wrong = {(1, (9, 9, 9)), (2, (5, 9, 9)), (4, (8, 9, 9))}
    pool = make_pool([recorded_sample()], make_options(num_windows=1, size=1))
    drawn = [step(pool, 1)[0].windows for _ in range(40)]
    assert {(w.start, w.guesses) for windows in drawn for w in windows} == wrong, "the last state has nothing wrong"
    assert all(len(windows) == 1 and windows[0].previous is None for windows in drawn)


def test_a_recorded_state_comes_with_the_one_before_it_where_they_are_compared():
    pool = make_pool([recorded_sample()], make_options(num_windows=4, size=1, keep_previous=True))
    (entry,) = step(pool, 1)
    pairs = {(w.previous.start if w.previous else None, w.start) for w in entry.windows}
    assert pairs == {(1, 2), (2, 4)}
    assert all(isinstance(w.previous, Window) and w.previous.previous is None for w in entry.windows)
