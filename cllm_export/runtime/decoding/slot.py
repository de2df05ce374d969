"""One slot of an engine: idle, in prefill, or decoding."""

from __future__ import annotations

from collections.abc import Sequence

from cllm_export.errors import CllmExportError, EngineError
from cllm_export.runtime.decoding.drafts.sources import DraftRequest
from cllm_export.runtime.decoding.jacobi import Block
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine, Forward


class SlotMemory:
    """Moves KV rows between one slot of an engine and a prefix cache."""

    def __init__(self, engine: Engine, slot: int, cache: PrefixCache) -> None:
        self._engine = engine
        self._slot = slot
        self._cache = cache

    def restore(self, tokens: Sequence[int]) -> int:
        """Write the rows of the longest cached prefix into the slot. Returns the number of its tokens."""
        match, start = self._cache.match(tokens), 0
        for rows in match.pieces:
            self._engine.write_rows(self._slot, start, start := start + rows.shape[2], rows)
        return match.length

    def keep(self, tokens: Sequence[int]) -> None:
        """Put the rows of these tokens into the cache. The slot holds them from position 0."""
        self._cache.insert(tokens, lambda start, stop: self._engine.read_rows(self._slot, start, stop))


class Slot:
    """One row of the batch: idle, in prefill, or decoding. The rows of its earlier tasks are dead."""

    def __init__(self, pad_token_id: int, memory: SlotMemory | None) -> None:
        self._pad = pad_token_id
        self._memory = memory
        self.task: Task | None = None
        self._block = Block([], 0)
        self._num_read = self._num_prefilling = 0
        self.num_new = 0
        """Tokens that the last forward made known."""
        self.is_paused = False
        """Whether the next forward skips this slot."""

    @property
    def is_idle(self) -> bool:
        return self.task is None

    @property
    def num_to_prefill(self) -> int:
        """Prompt tokens whose KV is not written yet, without the last one: the first block begins with that."""
        return 0 if self.task is None else len(self.task.prompt) - 1 - self._num_read

    @property
    def is_prefilling(self) -> bool:
        return self.num_to_prefill > 0

    @property
    def needs_logits(self) -> bool:
        """Whether the next forward must fetch logits for this slot."""
        return self.task is not None and not self.is_prefilling and self.task.decode.needs_logits

    def admit(self, task: Task) -> None:
        """Begin a task. Its prefill starts after the longest cached prefix of the prompt without its last token."""
        self.task, self._num_read, self.is_paused = task, 0, False
        task.begin()
        if self._memory:
            self._num_read = task.reused_tokens = self._memory.restore(task.prompt[:-1])

    def clear(self) -> None:
        self.task = None

    def request_draft(self, block_size: int) -> DraftRequest | None:
        """The request that a draft model must answer before the next forward, or None.

        If the task fails to make the request, only this task ends.
        """
        task = self.task
        if task is None or self.is_prefilling or self.is_paused:
            return None
        try:
            return task.decode.request_draft(block_size)
        except Exception as error:  # handled as in ``draft``
            self.leave(error)
            return None

    def draft(self, block_size: int) -> int:
        """Make the block of a slot that decodes, and return its length; 0 for all other slots.

        The length is ``block_size``, unless the task's policy keeps another one. If the task fails to make its block,
        for example because its grammar fails, only this task ends.
        """
        if self.task is None or self.is_prefilling or self.is_paused:
            return 0
        try:
            self._block = self.task.decode.next_block(block_size)
        except Exception as error:
            self.leave(error)
            return 0
        return len(self._block.tokens)

    def leave(self, error: Exception | None = None) -> None:
        """End the task. The tokens of its text whose KV is written go into the prefix cache."""
        task = self.task
        if task is None:
            return
        try:
            self._keep(task)
        except Exception as failure:  # if an engine cannot give its rows, it has failed
            error = error or engine_failure(failure)
        self.task = None
        task.end(error)

    def next_rows(self, width: int) -> tuple[list[int], int, int]:
        """The slot's tokens [width], the number of committed ones, and its write index; pads, 0 and 0 if idle.

        A slot that decodes gives its block, and a slot in prefill the next chunk of its prompt. Both are padded to
        ``width``. A paused slot gives pads, with its write index above the rows that it holds.
        """
        task = self.task
        if task is None:
            return [self._pad] * width, 0, 0
        if self.is_paused:
            return [self._pad] * width, 0, self._num_rows(task)
        if to_read := self.num_to_prefill:
            self._num_prefilling = min(width, to_read)
            chunk = list(task.prompt[self._num_read : self._num_read + self._num_prefilling])
            return self._padded(chunk, width), self._num_prefilling, self._num_read
        tokens, num_committed = self._block
        return self._padded(tokens, width), num_committed, task.decode.write_index

    def has_prefilled(self) -> None:
        """Note that the KV of the last chunk is written. At the end of prefill, the prompt goes into the cache."""
        self._num_read += self._num_prefilling
        if self.task and not self.is_prefilling:
            self._keep(self.task)  # requests that arrive while this one decodes can reuse it

    def take(self, forward: Forward, index: int) -> int:
        """Take the slot's outputs, at row ``index`` of the batch. Returns the number of new tokens."""
        self.num_new, task = 0, self.task
        if task is None or self.is_paused:
            return 0
        if self.is_prefilling:
            self.has_prefilled()
            return 0
        size, logits = len(self._block.tokens), forward.logits
        try:
            new = task.decode.take(
                forward.next_ids[index][:size],
                min(forward.num_accepted[index], size),
                None if logits is None else logits[index, :size],
            )
            task.give(new)
        except Exception as error:  # if a taker or a stop rule raises, only its own task ends
            self.leave(error)
            return 0
        self.num_new = len(new)
        return self.num_new

    def settle(self, was_prefilling: bool, seconds: float, engine_seconds: float) -> None:
        """Add the step's time to the task, and end the task if its decode has finished."""
        task = self.task
        if task is None:
            return
        if was_prefilling:
            task.prefill_seconds += seconds
            return
        task.decode_seconds += seconds
        task.engine_seconds += engine_seconds
        if task.decode.is_finished:
            self.leave()

    def _keep(self, task: Task) -> None:
        if self._memory is None:
            return
        self._memory.keep([*task.prompt, *task.token_ids][: self._num_rows(task)])

    def _num_rows(self, task: Task) -> int:
        """KV rows of the task's text that the slot holds."""
        return self._num_read if self.is_prefilling else task.decode.num_rows

    def _padded(self, tokens: list[int], width: int) -> list[int]:
        return tokens if len(tokens) == width else [*tokens, *[self._pad] * (width - len(tokens))]


def memory_of(engine: Engine, slot: int, cache: PrefixCache | None) -> SlotMemory | None:
    """The memory of a slot; None if there is no prefix cache.

    Raises:
        EngineError: the engine cannot hand out its rows.
    """
    if cache is None:
        return None
    if not engine.can_copy_rows:
        raise EngineError(f"{type(engine).__name__} cannot hand out its rows: run it without a prefix cache")
    return SlotMemory(engine, slot, cache)


def engine_failure(error: Exception) -> CllmExportError:
    return error if isinstance(error, CllmExportError) else EngineError(f"the engine failed: {error!r}")
