"""Runs one lookahead request on an engine, which it has for itself.

The offsets and the mask of a forward's rows hold for every slot, so nobody else can decode beside it. The prompt is
read through the greedy graph, over the same KV cache.
"""

from __future__ import annotations

from time import perf_counter

from cllm_export.bundle.contract import Batch
from cllm_export.runtime.decoding.lookahead.policy import Lookahead
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine, prefill


class LookaheadLoop:
    """One task in slot 0; all other slots are idle. Not thread-safe.

    Args:
        task: its decode is one over ``decoder``.
        decoder: what says which rows a forward has.
        block_size: rows that a forward may have.
        pad_token_id: fills chunks of the prompt where an engine's shapes are fixed.
    """

    def __init__(self, engine: Engine, task: Task, decoder: Lookahead, *, block_size: int, pad_token_id: int) -> None:
        self._engine = engine
        self._task = task
        self._decoder = decoder
        self._block_size = block_size
        self._pad = pad_token_id
        self._has_read = False

    @property
    def is_idle(self) -> bool:
        """Nothing to do."""
        return self._task.decode.is_finished

    def step(self) -> None:
        """Read the prompt; from then on, one forward.

        Raises:
            EngineError: the engine failed.
        """
        started, engine_started = perf_counter(), self._engine.run_seconds
        task = self._task
        if not self._has_read:
            prefill(self._engine, task.prompt[:-1], self._pad)
            self._has_read = True
            task.prefill_seconds += perf_counter() - started
            return
        task.give(task.decode.take(*self._forward()))
        task.decode_seconds += perf_counter() - started
        task.engine_seconds += self._engine.run_seconds - engine_started

    def cancel(self, task: Task) -> None:
        """Nothing to undo: what the cache holds of it is dead rows to whoever comes next."""

    def _forward(self) -> tuple[list[int], int]:
        """The predictions after every row of the next block, and what the graph counted."""
        write_index, layout = self._task.decode.write_index, self._decoder.layout
        tokens, num_committed = self._task.decode.next_block(self._block_size)
        idle = [0] * (self._engine.num_slots - 1)
        batch = Batch([tokens] * self._engine.num_slots, [num_committed, *idle], [write_index, *idle])
        forward = self._engine.forward_rows(batch, layout.offsets, layout.mask)
        return forward.next_ids[0], forward.num_accepted[0]
