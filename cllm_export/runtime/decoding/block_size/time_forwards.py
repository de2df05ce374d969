"""Measures T(n), the time of a forward of n tokens: either quickly within a budget, or over many rounds.

Both let the sizes take turns, so that a slow moment of the machine does not fall on one size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from cllm_export.bundle.contract import Batch
from cllm_export.progress import Progress
from cllm_export.runtime.decoding.block_size.measured_times import MeasuredTimes, monotone, settle_times
from cllm_export.runtime.engines.base import Engine

BUDGET_SECONDS = 0.15
TURNS = 2
"""Turns of each size within the budget. In a turn the first forward does not count: it sets up what the next reuses."""
MAX_SECONDS = 30.0
"""Rounds end after this time even if the machine is still too busy to tell."""
SHORT_SECONDS, REFILLS, SHORT_FORWARDS = 0.02, 8, 5
"""A forward of at most ``SHORT_SECONDS`` is repeated. ``REFILLS`` forwards refill the caches that a wider one emptied,
then ``SHORT_FORWARDS`` are timed."""


def time_forwards(
    engine: Engine,
    sizes: Sequence[int],
    *,
    pad_token_id: int,
    budget: float = BUDGET_SECONDS,
    clock: Callable[[], float] = perf_counter,
) -> dict[int, float]:
    """Seconds of a forward by block size: always for the first of ``sizes``, for the others as the budget allows.

    Each is the least of a few, and they never fall with n. The forwards write KV rows that no text uses, so they may
    run between requests. Later forwards correct these times; see ``latency.py``.

    Raises:
        EngineError: the engine failed.
    """
    until, seconds = clock() + budget, dict[int, float]()
    for turn in range(TURNS):
        for size in sizes:
            if seconds and (clock() > until or (turn and size not in seconds)):
                break
            found = _time_size(engine, size, pad_token_id, clock)
            seconds[size] = min(found, seconds.get(size, found))
    return monotone(seconds)


def time_in_turn(
    engines: Sequence[Engine],
    sizes: Sequence[int],
    *,
    past: int,
    rounds: int = 5,
    min_seconds: float = 5.0,
    clock: Callable[[], float] = perf_counter,
    progress: Progress = lambda *_: None,
) -> list[MeasuredTimes]:
    """T(n) inside each engine after ``past`` KV rows.

    A round times every size once in every engine, so a slow period of the machine affects all of them. Every other
    round takes the sizes backwards. The forwards overwrite KV rows that the engines hold.

    Args:
        sizes: block sizes. An engine's result has only those that the engine takes.
        past: KV rows before the block.
        rounds: the least number of rounds.
        min_seconds: rounds continue until this time has passed, and up to ``MAX_SECONDS`` while the machine is too busy
            to tell.
        clock: seconds from any start.

    Raises:
        EngineError: an engine failed.
    """
    samples: list[dict[int, list[float]]] = [
        {size: [] for size in sizes if size in (engine.block_sizes or range(1, engine.geometry.max_block_size + 1))}
        for engine in engines
    ]
    started, num_rounds = clock(), 0
    while True:
        progress("timing forwards", 0, 1, f"round {num_rounds + 1}, of at least {rounds}")
        for size in sizes[:: -1 if num_rounds % 2 else 1]:
            for engine, found in zip(engines, samples, strict=True):
                if size in found:
                    found[size].append(time_forward(engine, size, past))
        num_rounds += 1
        passed = clock() - started
        if num_rounds >= rounds and passed >= min_seconds:
            times = [settle_times(found) for found in samples]
            if passed >= MAX_SECONDS or not any(each.why_busy for each in times):
                return times


def time_forward(engine: Engine, block_size: int, past: int) -> float:
    """Seconds inside the engine of one forward after ``past`` KV rows. An untimed forward runs first, for the setup.

    Raises:
        EngineError: the engine failed.
    """
    run_forward(engine, block_size, past)
    seconds = _mean_seconds(engine, block_size, past, 1)
    if seconds > SHORT_SECONDS:
        return seconds
    for _ in range(REFILLS):
        run_forward(engine, block_size, past)
    return _mean_seconds(engine, block_size, past, SHORT_FORWARDS)


def run_forward(engine: Engine, block_size: int, past: int) -> None:
    """Run a block of zeros in every slot, after ``past`` KV rows. ``run_seconds`` of the engine gives its time.

    Raises:
        EngineError: the engine failed.
    """
    slots = engine.num_slots
    engine.forward(Batch([[0] * block_size] * slots, [1] * slots, [past] * slots))


def _mean_seconds(engine: Engine, block_size: int, past: int, count: int) -> float:
    started = engine.run_seconds
    for _ in range(count):
        run_forward(engine, block_size, past)
    return (engine.run_seconds - started) / count


def _time_size(engine: Engine, size: int, pad_token_id: int, clock: Callable[[], float]) -> float:
    slots = engine.num_slots
    geometry = engine.geometry
    last_rows = geometry.cache_length - geometry.max_block_size  # where the last block of a text of full length lies
    batch = Batch([[pad_token_id] * size] * slots, [0] * slots, [last_rows] * slots)
    engine.forward(batch)
    started = clock()
    engine.forward(batch)
    return clock() - started
