"""Runs one lookahead request on an engine, with no other request beside it.

The offsets and the mask of a forward's rows hold for every slot, so no other request can share the forward. Prefill
uses the greedy graph, over the same KV cache.
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
        task: its decode uses ``decoder``.
        decoder: gives the layout of each forward.
        block_size: the most rows that a forward may have.
        pad_token_id: fills chunks of the prompt if the engine has fixed shapes.
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
        """Whether the task has finished."""
        return self._task.decode.is_finished

    def step(self) -> None:
        """Run the whole prefill at the first call, and one decode forward at each later call.

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
        """Do nothing: the rows of the task in the KV cache are dead for the next request."""

    def _forward(self) -> tuple[list[int], int]:
        """Run the next block. Returns the prediction after every row, and the graph's number of accepted rows."""
        write_index, layout = self._task.decode.write_index, self._decoder.layout
        tokens, num_committed = self._task.decode.next_block(self._block_size)
        idle = [0] * (self._engine.num_slots - 1)
        batch = Batch([tokens] * self._engine.num_slots, [num_committed, *idle], [write_index, *idle])
        forward = self._engine.forward_rows(batch, layout.offsets, layout.mask)
        return forward.next_ids[0], forward.num_accepted[0]
