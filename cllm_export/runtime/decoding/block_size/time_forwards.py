"""T(n), the time of a forward of n tokens: a first look within a budget, or medians of forwards that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

from cllm_export.bundle.contract import Batch
from cllm_export.runtime.engines.base import Engine

BUDGET_SECONDS = 0.15
FORWARDS = 4
"""Of each size, the first one not counted: it sets up what later ones find in place."""
SHORT_SECONDS, REFILLS, SHORT_FORWARDS = 0.02, 8, 5
"""A shorter forward is repeated: some times to refill the caches that a wider one has emptied, then so many timed."""


def time_forwards(
    engine: Engine, sizes: Sequence[int], *, pad_token_id: int, budget: float = BUDGET_SECONDS
) -> dict[int, float]:
    """Seconds of a forward by block size, for the first of ``sizes`` at least, for as many as the budget allows.

    The forwards write rows that no text ever holds, so they may run between requests. What they give is corrected by
    every forward that follows; see ``latency.py``.

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
    """Median seconds inside each engine of a forward past so many rows, by block size.

    A round times every size in every engine once, so that a spell in which the machine is slow is shared. What the
    engines hold of texts is overwritten.

    Args:
        sizes: without those that an engine does not take, which are left out of what it gives.
        rounds: at least so many.
        min_seconds: goes on until so much time has passed.

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
    """Seconds inside the engine of one forward past so many rows, after one that sets up what it finds in place.

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
    """A block of zeros in every slot, past as many rows: for who times it by the engine's ``run_seconds``.

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
    last_rows = engine.geometry.cache_length - size  # beyond what a text of the max length fills
    batch = Batch([[pad_token_id] * size] * slots, [0] * slots, [last_rows] * slots)
    times: list[float] = []
    while len(times) < FORWARDS and (not times or perf_counter() < until):
        started = perf_counter()
        engine.forward(batch)
        times.append(perf_counter() - started)
    return min(times[1:] or times)
