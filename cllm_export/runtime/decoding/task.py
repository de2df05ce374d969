"""One request on its way through a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cllm_export.runtime.decoding.block_size.chooser import DraftRecord
from cllm_export.runtime.decoding.request import Decode
from cllm_export.runtime.decoding.statistics import OnDevice, Statistics, summarize

Taker = Callable[[list[int]], None]
"""Takes a task's new tokens after each of its decode forwards."""


class Task:
    """One request on its way through the scheduler: waiting, in prefill, decoding, ended.

    Args:
        prompt: token ids, at least one.
        decode: what decodes it once all but its last token is read.
        drafts: what kind of drafts it decodes with, for whoever chooses n by what drafts of a kind are worth; None for
            none.
        begun: called when it gets a slot.
        take: called with new tokens; what it raises ends this task alone.
        ended: called once when it ends, however it ends.
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
        """What made it fail."""
        self.reused_tokens = 0
        """Of the prompt, those whose KV was kept from an earlier text."""
        self.prefill_seconds = self.decode_seconds = self.engine_seconds = 0.0
        """Of the steps since its admission, by the clock, those in which it was paused as well; the last is the
        decode's share inside the engine."""
        self.on_device: OnDevice | None = None
        """Where its loop stayed on the device, what that took."""
        self._begun = begun
        self._take = take
        self._ended = ended
        self._has_ended = False

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

    @property
    def token_ids(self) -> list[int]:
        """What it gave so far."""
        return [token for record in self.decode.records for token in record.new]

    @property
    def is_cancelled(self) -> bool:
        return self.decode.finish_reason == "cancelled"

    def begin(self) -> None:
        if self._begun:
            self._begun()

    def give(self, tokens: list[int]) -> None:
        if self._take:
            self._take(tokens)

    def end(self, error: Exception | None = None) -> None:
        """It failed with this error, has ended by its rules, or else is cancelled. Nothing if it has ended before."""
        if self._has_ended:
            return
        self._has_ended = True
        self.error = error
        if error is None:
            self.decode.cancel()
        if self._ended:
            self._ended(self)
