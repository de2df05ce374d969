"""A first look at T(n) where no bundle tells it: a few forwards of each size, within a budget.

They write rows that no text ever holds, so they may run between requests. What they give is corrected by every forward
that follows; see ``latency.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from cllm_export.bundle.contract import Batch
from cllm_export.runtime.engines.base import Engine

BUDGET_SECONDS = 0.15
FORWARDS = 4
"""Of each size, the first one not counted: it sets up what later ones find in place."""


def time_forwards(
    engine: Engine, sizes: Sequence[int], *, pad_token_id: int, budget: float = BUDGET_SECONDS
) -> dict[int, float]:
    """Seconds of a forward by block size, for the first of ``sizes`` at least, for as many as the budget allows.

    Raises:
        EngineError: the engine failed.
    """
    started, seconds = perf_counter(), dict[int, float]()
    for size in sizes:
        if seconds and perf_counter() - started > budget:
            break
        seconds[size] = _time_size(engine, size, pad_token_id, until=started + budget)
    return seconds


def run_forward(engine: Engine, block_size: int, past: int) -> None:
    """A block of zeros in every slot, past as many rows: for who times it by the engine's ``run_seconds``.

    Raises:
        EngineError: the engine failed.
    """
    slots = engine.num_slots
    engine.forward(Batch([[0] * block_size] * slots, [1] * slots, [past] * slots))


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
