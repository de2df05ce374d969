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

from cllm_export.contract import require_at_least
from cllm_export.errors import CllmExportError, EngineError, QueueFullError
from cllm_export.runtime.acceptance import DraftRecord
from cllm_export.runtime.choose import PinnedSize, SizePolicy
from cllm_export.runtime.draft import Wish
from cllm_export.runtime.draft_model import Drafter
from cllm_export.runtime.engine import Engine, Forward, RowEngine
from cllm_export.runtime.jacobi import Block
from cllm_export.runtime.prefix_cache import PrefixCache
from cllm_export.runtime.request import Decode
from cllm_export.runtime.statistics import OnDevice, Statistics, summarize

Taker = Callable[[list[int]], None]
"""Takes a task's new tokens after each of its decode forwards."""


class Task:
    """One request on its way through the scheduler: waiting, reading its prompt, decoding, ended.

    Args:
        prompt: token ids, at least one.
        decode: what decodes it once all but its last token is read.
        drafts: what kind of drafts it decodes with, for whoever chooses n by what drafts of a kind are worth; None for
            none.
        take: called with new tokens; what it raises ends this task alone.
        ended: called once when it ends, however it ends.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        decode: Decode,
        *,
        drafts: str | None = None,
        take: Taker | None = None,
        ended: Callable[[Task], None] | None = None,
    ) -> None:
        self.prompt = prompt
        self.decode = decode
        self.drafts = DraftRecord(drafts, with_logits=decode.needs_logits)
        self.error: Exception | None = None
        """Why it ended, where it did not end by its own rules."""
        self.is_cancelled = False
        self.reused_tokens = 0
        """Of the prompt, those whose KV was kept from an earlier text."""
        self.prefill_seconds = self.decode_seconds = self.engine_seconds = 0.0
        """Of the steps since its admission, by the clock, those in which it was paused as well; the last is the
        decode's share inside the engine."""
        self.on_device: OnDevice | None = None
        """Where its loop stayed on the device, what that took."""
        self._take = take
        self._ended = ended

    def statistics(self) -> Statistics:
        """What it took so far."""
        return summarize(
            self.decode.records,
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            engine_seconds=self.engine_seconds,
            on_device=self.on_device,
        )

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
        if slot is None and task not in self._waiting:
            return False
        task.is_cancelled = True
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
        blocks, num_committed, write_index = zip(*rows, strict=True)
        if len(reading) == len(active):
            self._engine.prefill(blocks, num_committed, write_index)
            for slot in reading:
                slot.has_read()
            return 0
        with_logits = any(slot.needs_logits for slot in active)
        forward = self._engine.forward(blocks, num_committed, write_index, with_logits=with_logits)
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
        failure = _engine_failure(error)
        for slot in slots:
            task = slot.task
            slot.clear()
            if task:
                task.end(failure)


class SlotMemory:
    """What one slot of an engine takes from a prefix cache, and gives to it."""

    def __init__(self, engine: RowEngine, slot: int, cache: PrefixCache) -> None:
        self._engine = engine
        self._slot = slot
        self._cache = cache

    def restore(self, tokens: Sequence[int]) -> int:
        """Write the rows of the longest beginning that was kept; how many tokens it has."""
        match, start = self._cache.match(tokens), 0
        for rows in match.pieces:
            self._engine.write_rows(self._slot, start, start := start + rows.shape[2], rows)
        return match.length

    def keep(self, tokens: Sequence[int]) -> None:
        """Keep the rows of the tokens that the slot holds from position 0."""
        self._cache.insert(tokens, lambda start, stop: self._engine.read_rows(self._slot, start, stop))


class Slot:
    """One row of the batch: idle, reading its prompt, or decoding. What it held before is dead rows."""

    def __init__(self, pad_token_id: int, memory: SlotMemory | None) -> None:
        self._pad = pad_token_id
        self._memory = memory
        self.task: Task | None = None
        self._block = Block([], 0)
        self._num_read = self._num_reading = 0
        self.num_new = 0
        """Tokens that the last forward made known."""
        self.is_paused = False
        """Whether the next forward passes it over."""

    @property
    def is_idle(self) -> bool:
        return self.task is None

    @property
    def num_to_read(self) -> int:
        """Tokens of the prompt whose KV is not written yet, the last one never counted: it is the first block's."""
        return 0 if self.task is None else len(self.task.prompt) - 1 - self._num_read

    @property
    def is_reading(self) -> bool:
        return self.num_to_read > 0

    @property
    def needs_logits(self) -> bool:
        """Whether the next forward must fetch logits for it."""
        return self.task is not None and not self.is_reading and self.task.decode.needs_logits

    def admit(self, task: Task) -> None:
        """Begin a task: its prompt is read from where nothing of it was kept, its last token never counted."""
        self.task, self._num_read, self.is_paused = task, 0, False
        if self._memory:
            self._num_read = task.reused_tokens = self._memory.restore(task.prompt[:-1])

    def clear(self) -> None:
        self.task = None

    def wish(self, block_size: int) -> Wish | None:
        """What a draft model must answer before the next forward. A task that fails to say it ends alone."""
        task = self.task
        if task is None or self.is_reading or self.is_paused:
            return None
        try:
            return task.decode.wish(block_size)
        except Exception as error:  # as of its block
            self.leave(error)
            return None

    def draft(self, block_size: int) -> int:
        """Make up the block of a slot that decodes, ``block_size`` tokens or as many as it is bound to; its length.

        A task that fails to say its block (a grammar's failure, say) ends alone.
        """
        if self.task is None or self.is_reading or self.is_paused:
            return 0
        try:
            self._block = self.task.decode.next_block(block_size)
        except Exception as error:
            self.leave(error)
            return 0
        return len(self._block.tokens)

    def leave(self, error: Exception | None = None) -> None:
        """End the task, and keep what it read and gave, as far as its KV is written."""
        task = self.task
        if task is None:
            return
        try:
            self._keep(task)
        except Exception as failure:  # an engine that cannot give its rows has failed
            error = error or _engine_failure(failure)
        self.task = None
        task.end(error)

    def next_rows(self, width: int) -> tuple[list[int], int, int]:
        """The slot's rows [width], its committed tokens and its write index; an idle slot's are pad, 0 and 0.

        A slot that decodes fills as many of them as its block has, one that reads its prompt as many as it can; one
        that is paused is idle above the rows it holds.
        """
        task = self.task
        if task is None:
            return [self._pad] * width, 0, 0
        if self.is_paused:
            return [self._pad] * width, 0, self._num_rows(task)
        if to_read := self.num_to_read:
            self._num_reading = min(width, to_read)
            chunk = list(task.prompt[self._num_read : self._num_read + self._num_reading])
            return self._padded(chunk, width), self._num_reading, self._num_read
        tokens, num_committed = self._block
        return self._padded(tokens, width), num_committed, task.decode.write_index

    def has_read(self) -> None:
        """The chunk of the prompt has its KV."""
        self._num_read += self._num_reading
        if self.task and not self.is_reading:
            self._keep(self.task)  # for those that come while this one still decodes

    def take(self, forward: Forward, index: int) -> int:
        """Take the outputs for the slot, row ``index`` of the batch; how many tokens they made known."""
        self.num_new, task = 0, self.task
        if task is None or self.is_paused:
            return 0
        if self.is_reading:
            self.has_read()
            return 0
        size, logits = len(self._block.tokens), forward.logits
        try:
            new = task.decode.take(
                forward.next_ids[index][:size],
                min(forward.num_accepted[index], size),
                None if logits is None else logits[index, :size],
            )
            task.give(new)
        except Exception as error:  # whatever a taker or a stop rule raises is its own task's end alone
            self.leave(error)
            return 0
        self.num_new = len(new)
        return self.num_new

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
            self.leave()

    def _keep(self, task: Task) -> None:
        if self._memory is None:
            return
        text = [*task.prompt, *(token for record in task.decode.records for token in record.new)]
        self._memory.keep(text[: self._num_rows(task)])

    def _num_rows(self, task: Task) -> int:
        """KV rows that it holds of the task's text."""
        return self._num_read if self.is_reading else task.decode.num_rows

    def _padded(self, tokens: list[int], width: int) -> list[int]:
        return tokens if len(tokens) == width else [*tokens, *[self._pad] * (width - len(tokens))]


def memory_of(engine: Engine, slot: int, cache: PrefixCache | None) -> SlotMemory | None:
    """What a slot takes and gives; None without a cache.

    Raises:
        EngineError: the engine cannot hand out its rows.
    """
    if cache is None:
        return None
    if not isinstance(engine, RowEngine):
        raise EngineError(f"{type(engine).__name__} cannot hand out its rows: run it without a prefix cache")
    return SlotMemory(engine, slot, cache)


def _engine_failure(error: Exception) -> CllmExportError:
    return error if isinstance(error, CllmExportError) else EngineError(f"the engine failed: {error!r}")
