"""Continuous batching: requests wait in a queue, enter free slots at any forward, and leave when they end.

The scheduler is only policy: it uses lists, no tensors and no threads. One ``step`` is one forward of the engine for
all slots. ``schedule`` says what the forward runs, and ``update`` takes its outputs. A slot in prefill feeds a chunk of
its prompt, all of it committed, beside slots that decode. Rows that a slot does not use are dead, like the rows of a
rejected draft. Slots do not see each other, so the tokens of a request do not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from cllm_export.bundle.contract import Batch, check_block_size
from cllm_export.runtime.decoding.block_size.chooser import DraftRecord, PinnedSize, SizePolicy
from cllm_export.runtime.decoding.draft_model import Drafter
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.request import EarlyEnd
from cllm_export.runtime.decoding.slot import Slot, engine_failure, memory_of
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine, Forward


@dataclass(frozen=True, kw_only=True)
class Step:
    """The next forward: the slots that take part, and the rows of all B slots."""

    block_size: int
    """n of the slots that decode; 0 if none does."""
    prefilling: tuple[int, ...]
    """Slots in prefill."""
    decoding: tuple[int, ...]
    paused: tuple[int, ...]
    """Slots whose task this forward skips."""
    batch: Batch
    """The rows of all slots, [B, width]."""
    with_logits: bool
    reused_tokens: int
    """Prompt tokens of the tasks admitted for this step whose KV came from earlier texts."""
    started: float = field(repr=False)
    """``perf_counter`` at the start of the step."""
    run_seconds: float = field(repr=False)
    """Seconds spent inside the engines before the step."""

    @property
    def width(self) -> int:
        """Rows of each slot; more than ``block_size`` if a chunk of a prompt is longer."""
        return len(self.batch.input_ids[0])

    @property
    def is_prefill(self) -> bool:
        """Whether no slot decodes, so that nobody needs the outputs of the head."""
        return not self.decoding


class StepReport(NamedTuple):
    """Shapes, load and time of one forward, for monitoring."""

    width: int
    """Rows of each slot."""
    num_prefilling: int
    num_decoding: int
    num_waiting: int
    new_tokens: int
    reused_tokens: int
    """Prompt tokens of the tasks admitted in this step whose KV came from earlier texts."""
    seconds: float
    """Seconds of the whole step."""
    engine_seconds: float
    """The part of ``seconds`` spent inside the engine and inside the engine of a draft model."""


class Scheduler:
    """Runs tasks through the slots of one engine, first come, first served. Not thread-safe.

    Args:
        engine: its ``num_slots`` is B.
        block_size: n of every decode forward, or a policy that chooses n for each forward.
        pad_token_id: fills unused rows.
        prefill_width: if set, a forward is as wide as its prompts need, up to this width, and at least ``block_size``
            wide while a slot decodes. By default every forward is ``block_size`` wide. All forwards then round alike,
            and a request gives bit for bit what it gives alone. Ignored if the engine has fixed shapes.
        alternate_width: if set, prefill and decode alternate: a prefill-only forward of this width, then a decode-only
            forward of ``block_size``. For block sizes too small to prefill with. Results stay bit-identical. Ignored
            if the engine has fixed shapes.
        reading_widths: if set, ascending: a forward that reads prompts has one of these widths, or that of its blocks
            if this is larger. Results stay bit-identical if all these widths and all block sizes round alike. Ignored
            if the engine has fixed shapes.
        drafter: answers the draft requests of tasks, once before each forward. It has a lane for each slot.
        prefix_cache: keeps the KV of prompts and of their new tokens. The prefill of a later prompt starts after the
            longest prefix that the cache holds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        block_size: int | SizePolicy,
        pad_token_id: int,
        prefill_width: int | None = None,
        alternate_width: int | None = None,
        reading_widths: Sequence[int] = (),
        drafter: Drafter | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if isinstance(block_size, int):
            block_size = PinnedSize(check_block_size(block_size))
        self._engine = engine
        self._sizes = block_size
        self._prefill_width = None if engine.fixed_shapes else prefill_width
        self._alternate_width = None if engine.fixed_shapes else alternate_width
        self._reading_widths = () if engine.fixed_shapes else tuple(reading_widths)
        self._is_prefill_turn = False
        self._drafter = drafter
        self._slots = [Slot(pad_token_id, memory_of(engine, slot, prefix_cache)) for slot in range(engine.num_slots)]
        self._waiting: deque[Task] = deque()

    @property
    def num_running(self) -> int:
        return sum(not slot.is_idle for slot in self._slots)

    @property
    def is_idle(self) -> bool:
        """Whether no task waits or runs."""
        return not self._waiting and not self.num_running

    def submit(self, task: Task) -> None:
        """Put a task at the end of the queue."""
        self._waiting.append(task)

    def cancel(self, task: Task, reason: EarlyEnd = "cancelled") -> bool:
        """End a waiting or running task at once. Its slot is free for the next step. False if it had already ended."""
        slot = next((slot for slot in self._slots if slot.task is task), None)
        if slot is None and task not in self._waiting:
            return False
        task.decode.cancel(reason)
        if slot is not None:
            slot.leave()
        else:
            self._waiting.remove(task)
            task.end()
        return True

    def cancel_all(self) -> None:
        """Cancel all running and waiting tasks."""
        for task in [slot.task for slot in self._slots if slot.task] + list(self._waiting):
            self.cancel(task)

    def step(self) -> StepReport | None:
        """Run one forward: ``schedule``, the engine, ``update``. None if there was nothing to run, or it failed.

        If the taker of a task raises, that task ends with the error. If the engine fails, all running tasks end with
        its error. Neither error is raised here, and the slots are free again.
        """
        try:
            step = self.schedule()
            forward = self._run(step) if step else None
        except Exception as error:  # any error of an engine ends the running tasks, and nothing else
            self._fail(self._slots, error)
            return None
        return self.update(step, forward) if step else None

    def schedule(self) -> Step | None:
        """Admit waiting tasks to free slots, and say what the next forward runs. None if there is nothing to run.

        This also restores rows from the prefix cache and runs the draft model. Call ``update`` with the outputs of the
        forward before the next ``schedule``.
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
        """Hand the outputs of a step's forward to its tasks, and end those that have finished. None if that failed.

        ``forward`` is None for a prefill, which has no outputs.
        """
        running = [self._slots[index] for index in sorted((*step.prefilling, *step.decoding, *step.paused))]
        was_prefilling = [slot.is_prefilling for slot in running]
        try:
            new_tokens = self._take(step, forward)
        except Exception as error:  # handled as in ``step``
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
        """Hand out a forward's outputs. Returns the number of new tokens."""
        if forward is not None:
            return sum(slot.take(forward, index) for index, slot in enumerate(self._slots))
        for index in step.prefilling:
            self._slots[index].has_prefilled()
        return 0

    def _take_turns(self, running: Sequence[Slot]) -> None:
        """If prefill and decode alternate and both have slots, pause the slots of one kind."""
        kinds = {slot.is_prefilling for slot in running}
        takes_turns = self._alternate_width is not None and len(kinds) == 2
        self._is_prefill_turn = not self._is_prefill_turn if takes_turns else kinds == {True}
        for slot in running:
            slot.is_paused = takes_turns and slot.is_prefilling != self._is_prefill_turn

    def _drafts_of(self, slots: Sequence[int]) -> list[DraftRecord]:
        return [task.drafts for index in slots if (task := self._slots[index].task)]

    def _prefill_rows(self, prefilling: Sequence[int], block_size: int) -> int:
        """The width of a forward that the slots in prefill need."""
        if not prefilling:
            return 0
        if self._alternate_width is not None:
            return self._alternate_width
        most = max(self._slots[index].num_to_prefill for index in prefilling)
        if self._reading_widths:
            return next((width for width in self._reading_widths if width >= most), self._reading_widths[-1])
        if self._prefill_width is None:
            return block_size or self._sizes.choose(self._drafts_of(prefilling))
        return min(self._prefill_width, most)

    def _observe(self, step: Step, running: Sequence[Slot], seconds: float) -> None:
        """Report a forward to the policy that chooses n. A forward widened for prefill is no measure of T(n)."""
        accepted = [(slot.task.drafts, slot.num_new) for slot in running if slot.task and slot.num_new]
        self._sizes.observe(step.block_size, seconds if step.block_size == step.width else 0.0, accepted)

    @property
    def _run_seconds(self) -> float:
        return self._engine.run_seconds + (self._drafter.run_seconds if self._drafter else 0.0)

    def _draft(self, block_size: int) -> None:
        """Let the draft model answer all slots that decode, together. If it fails, their tasks end."""
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
        except Exception as error:  # handled as in ``step``, but only for the slots that asked
            self._fail([self._slots[index] for index in requests], error)

    def _admit(self) -> int:
        """Fill free slots. Returns the number of prompt tokens that need no prefill."""
        reused_tokens = 0
        for slot in self._slots:
            if slot.is_idle and self._waiting:
                task = self._waiting.popleft()
                try:
                    slot.admit(task)
                except Exception as error:  # the engine did not take the rows of the prefix cache
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
