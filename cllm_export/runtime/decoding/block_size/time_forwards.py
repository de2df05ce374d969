"""Measures T(n), the time of a forward of n tokens: either quickly within a budget, or as medians of several rounds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

from cllm_export.bundle.contract import Batch
from cllm_export.runtime.engines.base import Engine

BUDGET_SECONDS = 0.15
FORWARDS = 4
"""Forwards of each size. The first one does not count, because it sets up what the others reuse."""
SHORT_SECONDS, REFILLS, SHORT_FORWARDS = 0.02, 8, 5
"""A forward of at most ``SHORT_SECONDS`` is repeated. ``REFILLS`` forwards refill the caches that a wider one emptied,
then ``SHORT_FORWARDS`` are timed."""


def time_forwards(
    engine: Engine, sizes: Sequence[int], *, pad_token_id: int, budget: float = BUDGET_SECONDS
) -> dict[int, float]:
    """Seconds of a forward by block size: always for the first of ``sizes``, for the others as the budget allows.

    The forwards write KV rows that no text uses, so they may run between requests. Later forwards correct these times;
    see ``latency.py``.

    Raises:
        EngineError: the engine failed.
    """
    started, seconds = perf_counter(), dict[int, float]()
    for size in sizes:
        if seconds and perf_counter() - started > budget:
            break
        seconds[size] = _time_size(engine, size, pad_token_id, until=started + budget)
    return seconds


def time_in_turn(
    engines: Sequence[Engine],
    sizes: Sequence[int],
    *,
    past: int,
    rounds: int = 3,
    min_seconds: float = 5.0,
) -> list[dict[int, float]]:
    """Median seconds inside each engine of a forward after ``past`` KV rows, by block size.

    A round times every size once in every engine, so a slow period of the machine affects all of them. The forwards
    overwrite KV rows that the engines hold.

    Args:
        sizes: block sizes. An engine's result has only those that the engine takes.
        past: KV rows before the block.
        rounds: the least number of rounds.
        min_seconds: rounds continue until this time has passed.

    Raises:
        EngineError: an engine failed.
    """
    times: list[dict[int, list[float]]] = [
        {size: [] for size in sizes if size <= engine.geometry.max_block_size} for engine in engines
    ]
    started, num_rounds = perf_counter(), 0
    while num_rounds < rounds or perf_counter() - started < min_seconds:
        for size in sizes:
            for engine, found in zip(engines, times, strict=True):
                if size in found:
                    found[size].append(time_forward(engine, size, past))
        num_rounds += 1
    return [{size: median(seconds) for size, seconds in found.items()} for found in times]


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


def _time_size(engine: Engine, size: int, pad_token_id: int, *, until: float) -> float:
    slots = engine.num_slots
    last_rows = engine.geometry.cache_length - size  # after the rows that a text of the maximum length fills
    batch = Batch([[pad_token_id] * size] * slots, [0] * slots, [last_rows] * slots)
    times: list[float] = []
    while len(times) < FORWARDS and (not times or perf_counter() < until):
        started = perf_counter()
        engine.forward(batch)
        times.append(perf_counter() - started)
    return min(times[1:] or times)
