"""Continuous batching: requests wait in a bounded queue, enter free slots at any forward, and leave when they end.

Policy alone: lists, no tensors, no threads. One ``step`` is one forward of the engine for every slot: ``schedule`` says
what it runs, and ``update`` takes what it gave. A slot that is still in prefill feeds a chunk of it, all of it
committed, beside slots that decode. What a slot does not use of the block is dead rows, as a rejected draft's are.
Slots see nothing of each other, so what a request gives does not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from cllm_export.bundle.contract import Batch, check_block_size
from cllm_export.checks import require_at_least
from cllm_export.errors import QueueFullError
from cllm_export.runtime.decoding.block_size.chooser import DraftRecord, PinnedSize, SizePolicy
from cllm_export.runtime.decoding.draft_model import Drafter
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.slot import Slot, engine_failure, memory_of
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine, Forward


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward that is to run: which slots take part, and the rows of all B slots."""

    block_size: int
    """n of the slots that decode; 0 where none does."""
    prefilling: tuple[int, ...]
    """Slots that read their prompts."""
    decoding: tuple[int, ...]
    paused: tuple[int, ...]
    """Slots with a task that this forward passes over."""
    batch: Batch
    """The rows of all slots, [B, width]."""
    with_logits: bool
    reused_tokens: int
    """Of the prompts admitted for this step, tokens whose KV was kept from earlier texts."""
    started: float = field(repr=False)
    """When it was begun, by the clock; and the seconds spent in engines by then."""
    run_seconds: float = field(repr=False)

    @property
    def width(self) -> int:
        """Rows of each slot; more than ``block_size`` where a prompt's chunk is longer."""
        return len(self.batch.input_ids[0])

    @property
    def is_prefill(self) -> bool:
        """Whether no slot decodes, so that the head need not run."""
        return not self.decoding


class StepReport(NamedTuple):
    """One forward, for whoever watches: shapes, load and time."""

    width: int
    """n of the forward."""
    num_prefilling: int
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
        drafter: answers the draft requests of tasks, once before each forward; with a lane for each slot.
        prefix_cache: keeps the KV of prompts and what they gave, so that a prompt that begins alike is read from where
            they part.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        block_size: int | SizePolicy,
        pad_token_id: int,
        prefill_width: int | None = None,
        alternate_width: int | None = None,
        queue_size: int | None = None,
        drafter: Drafter | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if isinstance(block_size, int):
            block_size = PinnedSize(check_block_size(block_size))
        if queue_size is not None:
            require_at_least("queue_size", queue_size, 1)
        self._engine = engine
        self._sizes = block_size
        self._prefill_width = None if engine.fixed_shapes else prefill_width
        self._alternate_width = None if engine.fixed_shapes else alternate_width
        self._is_prefill_turn = False
        self._queue_size = queue_size
        self._drafter = drafter
        self._slots = [Slot(pad_token_id, memory_of(engine, slot, prefix_cache)) for slot in range(engine.num_slots)]
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
        task.decode.cancel()
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
        """Run one forward: ``schedule``, the engine, ``update``; None where there was nothing to run.

        A task whose taker raises ends with that error, and so do all running tasks where the engine fails; neither
        is raised here, and the slots are free again.
        """
        try:
            step = self.schedule()
            forward = self._run(step) if step else None
        except Exception as error:  # whatever an engine raises ends what it ran, and nothing else
            self._fail(self._slots, error)
            return None
        return self.update(step, forward) if step else None

    def schedule(self) -> Step | None:
        """Admit what fits, and say what the next forward runs; None where there is nothing to run.

        What no choice is about is done here as well: rows that were kept are restored, and the draft model answers.
        Call ``update`` with what the forward gives before the next ``schedule``.
        """
        started, run_seconds = perf_counter(), self._run_seconds
        reused_tokens = self._admit()
        running = [index for index, slot in enumerate(self._slots) if slot.task]
        if not running:
            return None
        self._take_turns([self._slots[index] for index in running])
        active = [index for index in running if not self._slots[index].is_paused]
        prefilling = tuple(index for index in active if self._slots[index].is_prefilling)
        decoding = tuple(index for index in active if index not in prefilling)
        block_size = self._sizes.choose(self._drafts_of(decoding)) if decoding else 0
        self._draft(block_size)
        widest = max(1, *(slot.draft(block_size) for slot in self._slots)) if decoding else 0
        width = max(widest, self._prefill_rows(prefilling, block_size))
        return Step(
            block_size=block_size,
            prefilling=prefilling,
            decoding=decoding,
            paused=tuple(index for index in running if self._slots[index].is_paused),
            batch=Batch(*zip(*(slot.next_rows(width) for slot in self._slots), strict=True)),
            with_logits=any(self._slots[index].needs_logits for index in active),
            reused_tokens=reused_tokens,
            started=started,
            run_seconds=run_seconds,
        )

    def update(self, step: Step, forward: Forward | None) -> StepReport | None:
        """Hand out what a step's forward gave, and end the tasks that have ended; None where that failed.

        ``forward`` is None for a prefill, which gives nothing.
        """
        running = [self._slots[index] for index in sorted((*step.prefilling, *step.decoding, *step.paused))]
        was_prefilling = [slot.is_prefilling for slot in running]
        try:
            new_tokens = self._take(step, forward)
        except Exception as error:  # as in a step
            self._fail(running, error)
            return None
        engine_seconds = self._run_seconds - step.run_seconds
        seconds = perf_counter() - step.started
        if step.block_size:
            self._observe(step, running, seconds)
        for slot, was in zip(running, was_prefilling, strict=True):
            slot.settle(was, seconds, engine_seconds)
        return StepReport(
            width=step.width,
            num_prefilling=len(step.prefilling),
            num_decoding=len(step.decoding),
            num_waiting=len(self._waiting),
            new_tokens=new_tokens,
            reused_tokens=step.reused_tokens,
            seconds=perf_counter() - step.started,
            engine_seconds=engine_seconds,
        )

    def _run(self, step: Step) -> Forward | None:
        if step.is_prefill:
            self._engine.prefill(step.batch)
            return None
        return self._engine.forward(step.batch, with_logits=step.with_logits)

    def _take(self, step: Step, forward: Forward | None) -> int:
        """Hand out a forward's outputs; how many tokens they made known."""
        if forward is not None:
            return sum(slot.take(forward, index) for index, slot in enumerate(self._slots))
        for index in step.prefilling:
            self._slots[index].has_prefilled()
        return 0

    def _take_turns(self, running: Sequence[Slot]) -> None:
        """Where forwards either read or decode, and there is something of both, pause the slots of one kind."""
        kinds = {slot.is_prefilling for slot in running}
        takes_turns = self._alternate_width is not None and len(kinds) == 2
        self._is_prefill_turn = not self._is_prefill_turn if takes_turns else kinds == {True}
        for slot in running:
            slot.is_paused = takes_turns and slot.is_prefilling != self._is_prefill_turn

    def _drafts_of(self, slots: Sequence[int]) -> list[DraftRecord]:
        return [task.drafts for index in slots if (task := self._slots[index].task)]

    def _prefill_rows(self, prefilling: Sequence[int], block_size: int) -> int:
        """Rows that the slots which read their prompts want of a forward."""
        if not prefilling:
            return 0
        if self._alternate_width is not None:
            return self._alternate_width
        if self._prefill_width is None:
            return block_size or self._sizes.choose(self._drafts_of(prefilling))
        return min(self._prefill_width, max(self._slots[index].num_to_prefill for index in prefilling))

    def _observe(self, step: Step, running: Sequence[Slot], seconds: float) -> None:
        """Let the policy hear of a forward; one that was wider, for a prompt's sake, tells nothing of T(n)."""
        accepted = [(slot.task.drafts, slot.num_new) for slot in running if slot.task and slot.num_new]
        self._sizes.observe(step.block_size, seconds if step.block_size == step.width else 0.0, accepted)

    @property
    def _num_free(self) -> int:
        return len(self._slots) - self.num_running

    @property
    def _run_seconds(self) -> float:
        return self._engine.run_seconds + (self._drafter.run_seconds if self._drafter else 0.0)

    def _draft(self, block_size: int) -> None:
        """Have the draft model answer all slots that decode, together; where it fails, their tasks end."""
        if not self._drafter:
            return
        requests = {
            index: request_draft
            for index, slot in enumerate(self._slots)
            if (request_draft := slot.request_draft(block_size))
        }
        if not requests:
            return
        try:
            self._drafter.draft(requests)
        except Exception as error:  # likewise
            self._fail([self._slots[index] for index in requests], error)

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
