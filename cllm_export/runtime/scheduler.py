"""Continuous batching: requests wait in a bounded queue, enter free slots at any forward, and leave when they end.

Policy alone: lists, no tensors, no threads. One ``step`` is one forward of the engine for every slot. A slot that is
still reading its prompt feeds a chunk of it, all of it committed, beside slots that decode; what a slot does not use
of the block is dead rows, as a rejected draft's are. Slots see nothing of each other, so what a request gives does
not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.contract import require_at_least
from cllm_export.errors import CllmExportError, EngineError, QueueFullError
from cllm_export.runtime.draft import Wish
from cllm_export.runtime.draft_model import Drafter
from cllm_export.runtime.engine import Engine
from cllm_export.runtime.request import Decode

Taker = Callable[[list[int]], None]
"""Takes a task's new tokens after each of its decode forwards."""


class Task:
    """One request on its way through the scheduler: waiting, reading its prompt, decoding, ended.

    Args:
        prompt: token ids, at least one.
        decode: what decodes it once all but its last token is read.
        take: called with new tokens; what it raises ends this task alone.
        ended: called once when it ends, however it ends.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        decode: Decode,
        *,
        take: Taker | None = None,
        ended: Callable[[Task], None] | None = None,
    ) -> None:
        self.prompt = prompt
        self.decode = decode
        self.error: Exception | None = None
        """Why it ended, where it did not end by its own rules."""
        self.is_cancelled = False
        self.prefill_seconds = self.decode_seconds = self.engine_seconds = 0.0
        """Of the forwards it took part in, by the clock; the last is the decode's share inside the engine."""
        self._take = take
        self._ended = ended

    def give(self, tokens: list[int]) -> None:
        if self._take:
            self._take(tokens)

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        if self._ended:
            self._ended(self)


class StepReport(NamedTuple):
    """One forward, for whoever watches: shapes, load and time."""

    width: int
    """n of the forward."""
    num_reading: int
    num_decoding: int
    num_waiting: int
    new_tokens: int
    seconds: float
    """Of the whole step; ``engine_seconds`` of them inside the engine, and that of a draft model."""
    engine_seconds: float


class Scheduler:
    """Runs tasks through the slots of one engine, first come, first served. Not thread-safe.

    Args:
        engine: its ``num_slots`` is B.
        block_size: n of every decode forward.
        pad_token_id: fills rows that nobody uses.
        reading_width: n of a forward in which some slot reads its prompt, where the engine lets n vary and this is
            larger than ``block_size``. At ``block_size`` every forward has one shape, which makes all of them round
            alike: a request then gives bit for bit what it gives alone.
        queue_size: tasks that may wait; None for any number.
        drafter: answers what tasks wish for, once before each forward; with a lane for each slot.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        block_size: int,
        pad_token_id: int,
        reading_width: int | None = None,
        queue_size: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        require_at_least("block_size", block_size, 1)
        if queue_size is not None:
            require_at_least("queue_size", queue_size, 1)
        self._engine = engine
        self._block_size = block_size
        largest = block_size if engine.fixed_shapes else engine.geometry.max_block_size
        self._reading_width = max(block_size, min(reading_width or block_size, largest))
        self._queue_size = queue_size
        self._drafter = drafter
        self._slots = [Slot(block_size, pad_token_id) for _ in range(engine.num_slots)]
        self._waiting: deque[Task] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(not slot.is_idle for slot in self._slots)

    @property
    def is_idle(self) -> bool:
        """Nothing to do."""
        return not self._waiting and not self.num_running

    def submit(self, task: Task) -> None:
        """Put a task at the end of the queue.

        Raises:
            QueueFullError: as many wait already as may.
        """
        if self._queue_size is not None and len(self._waiting) >= self._queue_size + self._num_free:
            raise QueueFullError(self._queue_size)
        self._waiting.append(task)

    def cancel(self, task: Task) -> bool:
        """End a task at once, wherever it is; False where it had ended already. The slot is free for the next step."""
        slot = next((slot for slot in self._slots if slot.task is task), None)
        if slot is not None:
            slot.clear()
        elif task in self._waiting:
            self._waiting.remove(task)
        else:
            return False
        task.is_cancelled = True
        task.end()
        return True

    def cancel_all(self) -> None:
        """End whatever runs and waits."""
        for task in [slot.task for slot in self._slots if slot.task] + list(self._waiting):
            self.cancel(task)

    def step(self) -> StepReport | None:
        """Admit what fits, run one forward, hand out its tokens; None where there was nothing to run.

        A task whose taker raises ends with that error, and so do all running tasks where the engine fails; neither
        is raised here, and the slots are free again.
        """
        started, engine_started = perf_counter(), self._run_seconds
        self._admit()
        self._draft()
        running = [slot for slot in self._slots if slot.task]
        if not running:
            return None
        reading = [slot for slot in running if slot.is_reading]
        width = self._reading_width if reading else self._block_size
        blocks, num_committed, write_index = zip(*(slot.next_rows(width) for slot in self._slots), strict=True)
        try:
            needs_logits = any(slot.needs_logits for slot in running)
            forward = self._engine.forward(blocks, num_committed, write_index, with_logits=needs_logits)
        except Exception as error:  # whatever an engine raises ends what it ran, and nothing else
            self._fail(running, error)
            return None
        engine_seconds = self._run_seconds - engine_started
        new_tokens = sum(
            slot.take(next_ids, accepted, None if forward.logits is None else forward.logits[index])
            for index, (slot, next_ids, accepted) in enumerate(
                zip(self._slots, forward.next_ids, forward.num_accepted, strict=True)
            )
        )
        seconds = perf_counter() - started
        for slot in running:
            slot.settle(slot in reading, seconds, engine_seconds)
        return StepReport(
            width=width,
            num_reading=len(reading),
            num_decoding=len(running) - len(reading),
            num_waiting=len(self._waiting),
            new_tokens=new_tokens,
            seconds=seconds,
            engine_seconds=engine_seconds,
        )

    @property
    def _num_free(self) -> int:
        return len(self._slots) - self.num_running

    @property
    def _run_seconds(self) -> float:
        return self._engine.run_seconds + (self._drafter.run_seconds if self._drafter else 0.0)

    def _draft(self) -> None:
        """Have the draft model answer all slots that decode, together; where it fails, their tasks end."""
        wishes = {index: wish for index, slot in enumerate(self._slots) if (wish := slot.wish())}
        if not wishes or not self._drafter:
            return
        try:
            self._drafter.draft(wishes)
        except Exception as error:  # likewise
            self._fail([self._slots[index] for index in wishes], error)

    def _admit(self) -> None:
        for slot in self._slots:
            if slot.is_idle and self._waiting:
                slot.admit(self._waiting.popleft())

    def _fail(self, slots: Sequence[Slot], error: Exception) -> None:
        failure = error if isinstance(error, CllmExportError) else EngineError(f"the engine failed: {error!r}")
        for slot in slots:
            task = slot.task
            slot.clear()
            if task:
                task.end(failure)


class Slot:
    """One row of the batch: idle, reading its prompt, or decoding. What it held before is dead rows."""

    def __init__(self, block_size: int, pad_token_id: int) -> None:
        self._block_size = block_size
        self._pad = pad_token_id
        self.task: Task | None = None
        self._num_read = self._num_reading = 0

    @property
    def is_idle(self) -> bool:
        return self.task is None

    @property
    def is_reading(self) -> bool:
        return self.task is not None and self._num_read < len(self.task.prompt) - 1

    @property
    def needs_logits(self) -> bool:
        """Whether the next forward must fetch logits for it."""
        return self.task is not None and not self.is_reading and self.task.decode.needs_logits

    def admit(self, task: Task) -> None:
        self.task, self._num_read = task, 0

    def clear(self) -> None:
        self.task = None

    def wish(self) -> Wish | None:
        """What a draft model must answer before the next forward."""
        return None if self.task is None or self.is_reading else self.task.decode.wish(self._block_size)

    def next_rows(self, width: int) -> tuple[list[int], int, int]:
        """The slot's block [width], its committed tokens and its write index; an idle slot's are pad, 0 and 0."""
        task = self.task
        if task is None:
            return [self._pad] * width, 0, 0
        if self.is_reading:
            chunk = list(task.prompt[self._num_read : min(self._num_read + width, len(task.prompt) - 1)])
            self._num_reading = len(chunk)
            return self._padded(chunk, width), len(chunk), self._num_read
        tokens, num_committed = task.decode.next_block(self._block_size)
        return self._padded(tokens, width), num_committed, task.decode.write_index

    def take(self, next_ids: list[int], num_accepted: int, logits: NDArray[np.float32] | None) -> int:
        """Take the outputs for the slot; how many tokens they made known."""
        task = self.task
        if task is None:
            return 0
        if self.is_reading:
            self._num_read += self._num_reading
            return 0
        try:
            size = self._block_size
            new = task.decode.take(next_ids[:size], min(num_accepted, size), None if logits is None else logits[:size])
            task.give(new)
        except Exception as error:  # whatever a taker or a stop rule raises is its own task's end alone
            self.task = None
            task.end(error)
            return 0
        return len(new)

    def settle(self, was_reading: bool, seconds: float, engine_seconds: float) -> None:
        """Account for the step's time, and end the task where it has ended."""
        task = self.task
        if task is None:
            return
        if was_reading:
            task.prefill_seconds += seconds
            return
        task.decode_seconds += seconds
        task.engine_seconds += engine_seconds
        if task.decode.finish != "closed":
            self.task = None
            task.end()

    def _padded(self, tokens: Sequence[int], width: int) -> list[int]:
        return [*tokens, *[self._pad] * (width - len(tokens))]
