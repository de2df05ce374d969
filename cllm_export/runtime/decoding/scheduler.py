"""Continuous batching: requests wait in a bounded queue, enter free slots at any forward, and leave when they end.

Policy alone: lists, no tensors, no threads. One ``step`` is one forward of the engine for every slot. A slot that is
still reading its prompt feeds a chunk of it, all of it committed, beside slots that decode; what a slot does not use
of the block is dead rows, as a rejected draft's are. Slots see nothing of each other, so what a request gives does
not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

from cllm_export.bundle.contract import Batch
from cllm_export.checks import require_at_least
from cllm_export.errors import QueueFullError
from cllm_export.runtime.decoding.block_size.chooser import PinnedSize, SizePolicy
from cllm_export.runtime.decoding.draft_model import Drafter
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.slot import Slot, engine_failure, memory_of
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine


class StepReport(NamedTuple):
    """One forward, for whoever watches: shapes, load and time."""

    width: int
    """n of the forward."""
    num_reading: int
    num_decoding: int
    num_waiting: int
    new_tokens: int
    reused_tokens: int
    """Of the prompts admitted in this step, tokens whose KV was kept from earlier texts."""
    seconds: float
    """Of the whole step; ``engine_seconds`` of them inside the engine, and that of a draft model."""
    engine_seconds: float


class Scheduler:
    """Runs tasks through the slots of one engine, first come, first served. Not thread-safe.

    Args:
        engine: its ``num_slots`` is B.
        block_size: n of every decode forward, or who chooses it, forward by forward.
        pad_token_id: fills rows that nobody uses.
        reading_width: tokens of a prompt that a forward may take, where the engine lets n vary; a forward is then as
            wide as its prompts need, and as ``block_size`` while some slot decodes. By default every forward is
            ``block_size`` wide, which makes all of them round alike: a request then gives bit for bit what it gives
            alone.
        turn_width: instead, tokens of a prompt that a forward takes in which no slot decodes, in turn with forwards in
            which none reads: for a ``block_size`` too small to read prompts with, and round alike they still do.
        queue_size: tasks that may wait; None for any number.
        drafter: answers what tasks wish for, once before each forward; with a lane for each slot.
        prefix_cache: keeps the KV of prompts and what they gave, so that a prompt that begins alike is read from where
            they part.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        block_size: int | SizePolicy,
        pad_token_id: int,
        reading_width: int | None = None,
        turn_width: int | None = None,
        queue_size: int | None = None,
        drafter: Drafter | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if isinstance(block_size, int):
            require_at_least("block_size", block_size, 1)
            block_size = PinnedSize(block_size)
        if queue_size is not None:
            require_at_least("queue_size", queue_size, 1)
        self._engine = engine
        self._sizes = block_size
        self._reading_width = None if engine.fixed_shapes else reading_width
        self._turn_width = None if engine.fixed_shapes else turn_width
        self._is_reading_turn = False
        self._queue_size = queue_size
        self._drafter = drafter
        self._slots = [Slot(pad_token_id, memory_of(engine, slot, prefix_cache)) for slot in range(engine.num_slots)]
        self._size = self._width = 0
        self._waiting: deque[Task] = deque()

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
        if slot is None and task not in self._waiting:
            return False
        if slot is not None:
            slot.leave()
        else:
            self._waiting.remove(task)
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
        reused_tokens = self._admit()
        running = [slot for slot in self._slots if slot.task]
        if not running:
            return None
        self._take_turns(running)
        active = [slot for slot in running if not slot.is_paused]
        reading = [slot for slot in active if slot.is_reading]
        was_reading = [slot.is_reading for slot in running]
        try:
            new_tokens = self._forward(active, reading)
        except Exception as error:  # whatever an engine raises ends what it ran, and nothing else
            self._fail(running, error)
            return None
        engine_seconds = self._run_seconds - engine_started
        seconds = perf_counter() - started
        if self._size:
            self._tell(running, seconds if self._size == self._width else 0.0)
        for slot, was in zip(running, was_reading, strict=True):
            slot.settle(was, seconds, engine_seconds)
        return StepReport(
            width=self._width,
            num_reading=len(reading),
            num_decoding=len(active) - len(reading),
            num_waiting=len(self._waiting),
            new_tokens=new_tokens,
            reused_tokens=reused_tokens,
            seconds=perf_counter() - started,
            engine_seconds=engine_seconds,
        )

    def _take_turns(self, running: Sequence[Slot]) -> None:
        """Where forwards either read or decode, and there is something of both, pause the slots of one kind."""
        kinds = {slot.is_reading for slot in running}
        takes_turns = self._turn_width is not None and len(kinds) == 2
        self._is_reading_turn = not self._is_reading_turn if takes_turns else kinds == {True}
        for slot in running:
            slot.is_paused = takes_turns and slot.is_reading != self._is_reading_turn

    def _forward(self, active: Sequence[Slot], reading: Sequence[Slot]) -> int:
        """One forward, without the head where all active slots read their prompts; the new tokens it made."""
        decoding = [slot.task.drafts for slot in active if slot.task and not slot.is_reading]
        self._size = self._sizes.choose(decoding) if decoding else 0
        self._draft()
        widest = max(1, *(slot.draft(self._size) for slot in self._slots)) if decoding else 0
        self._width = width = max(widest, self._reading_rows(reading))
        rows = [slot.next_rows(width) for slot in self._slots]
        batch = Batch(*zip(*rows, strict=True))
        if len(reading) == len(active):
            self._engine.prefill(batch)
            for slot in reading:
                slot.has_read()
            return 0
        with_logits = any(slot.needs_logits for slot in active)
        forward = self._engine.forward(batch, with_logits=with_logits)
        return sum(slot.take(forward, index) for index, slot in enumerate(self._slots))

    def _reading_rows(self, reading: Sequence[Slot]) -> int:
        """Rows that the slots which read their prompts want of a forward."""
        if not reading:
            return 0
        if self._turn_width is not None:
            return self._turn_width
        if self._reading_width is None:
            return self._size or self._sizes.choose([slot.task.drafts for slot in reading if slot.task])
        return min(self._reading_width, max(slot.num_to_read for slot in reading))

    def _tell(self, running: Sequence[Slot], seconds: float) -> None:
        """Let the policy hear of a forward; one that was wider, for a prompt's sake, tells nothing of T(n)."""
        accepted = [(slot.task.drafts, slot.num_new) for slot in running if slot.task and slot.num_new]
        self._sizes.observe(self._size, seconds, accepted)

    @property
    def _num_free(self) -> int:
        return len(self._slots) - self.num_running

    @property
    def _run_seconds(self) -> float:
        return self._engine.run_seconds + (self._drafter.run_seconds if self._drafter else 0.0)

    def _draft(self) -> None:
        """Have the draft model answer all slots that decode, together; where it fails, their tasks end."""
        if not self._drafter:
            return
        wishes = {index: wish for index, slot in enumerate(self._slots) if (wish := slot.wish(self._size))}
        if not wishes:
            return
        try:
            self._drafter.draft(wishes)
        except Exception as error:  # likewise
            self._fail([self._slots[index] for index in wishes], error)

    def _admit(self) -> int:
        """Fill free slots; how many tokens of the prompts need not be read."""
        reused_tokens = 0
        for slot in self._slots:
            if slot.is_idle and self._waiting:
                task = self._waiting.popleft()
                try:
                    slot.admit(task)
                except Exception as error:  # the engine did not take the rows that were kept
                    self._fail([slot], error)
                reused_tokens += task.reused_tokens
        return reused_tokens

    def _fail(self, slots: Sequence[Slot], error: Exception) -> None:
        failure = engine_failure(error)
        for slot in slots:
            task = slot.task
            slot.clear()
            if task:
                task.end(failure)
