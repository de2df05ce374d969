"""One request in a loop, with its callbacks and its times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from cllm_export.runtime.decoding.block_size.chooser import DraftRecord
from cllm_export.runtime.decoding.request import Decode, EarlyEnd
from cllm_export.runtime.decoding.statistics import OnDevice, Statistics, summarize

Taker = Callable[[list[int]], None]
"""Takes a task's new tokens after each of its decode forwards."""


class Task:
    """One request in the scheduler: it waits, is in prefill, decodes, and ends.

    Args:
        prompt: token ids, at least one.
        decode: decodes the request after prefill, which reads all but the last token of the prompt.
        drafts: the kind of its drafts. The policy that chooses n learns the acceptance of each kind. None for no kind.
        begun: called when the task gets a slot.
        take: called with new tokens. If it raises, only this task ends.
        ended: called once, whatever ends the task.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        decode: Decode,
        *,
        drafts: str | None = None,
        begun: Callable[[], None] | None = None,
        take: Taker | None = None,
        ended: Callable[[Task], None] | None = None,
    ) -> None:
        self.prompt = prompt
        self.decode = decode
        self.drafts = DraftRecord(drafts, with_logits=decode.needs_logits)
        self.error: Exception | None = None
        """The error that made the task fail, or None."""
        self.reused_tokens = 0
        """Prompt tokens whose KV came from an earlier text."""
        self.prefill_seconds = self.decode_seconds = self.engine_seconds = 0.0
        """Wall-clock seconds since admission, including steps in which the slot was paused. ``engine_seconds`` is the
        part of decode spent inside the engine."""
        self.on_device: OnDevice | None = None
        """Measures of a loop that stayed on the device, otherwise None."""
        self._begun = begun
        self._take = take
        self._ended = ended
        self._has_ended = False

    def statistics(self) -> Statistics:
        """Statistics of the request so far."""
        return summarize(
            self.decode.records,
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            engine_seconds=self.engine_seconds,
            on_device=self.on_device,
        )

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far."""
        return [token for record in self.decode.records for token in record.new]

    @property
    def is_cancelled(self) -> bool:
        """Whether it ended early, without an error."""
        return self.decode.finish_reason in get_args(EarlyEnd)

    def begin(self) -> None:
        if self._begun:
            self._begun()

    def give(self, tokens: list[int]) -> None:
        if self._take:
            self._take(tokens)

    def end(self, error: Exception | None = None) -> None:
        """End the task. With an error it has failed; without one it is cancelled, unless its decode has finished.

        A second call does nothing.
        """
        if self._has_ended:
            return
        self._has_ended = True
        self.error = error
        if error is None:
            self.decode.cancel()
        if self._ended:
            self._ended(self)
