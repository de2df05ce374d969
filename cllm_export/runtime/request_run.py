"""One request on its way: its tokens, its text, and what it gave."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cllm_export.errors import EngineError
from cllm_export.runtime.decoding.request import (
    FinishReason,
)
from cllm_export.runtime.decoding.sampling import Logprob
from cllm_export.runtime.decoding.statistics import ForwardRecord, Statistics
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.decoding.text import TextStream
from cllm_export.runtime.options import Prepared

if TYPE_CHECKING:
    from cllm_export.runtime.model import Model


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one request gave."""

    text: str
    """Decoded text, special tokens left out, cut before a stop string."""
    token_ids: tuple[int, ...]
    """New tokens, the end-of-sequence token included where one was reached."""
    finish_reason: FinishReason
    """``closed`` is that of a stream that was closed before its end."""
    statistics: Statistics
    seed: int
    """What it was drawn with; the same request with it and the same n gives the same tokens."""
    logprobs: tuple[Logprob, ...] | None = field(repr=False)
    """One for each of ``token_ids``, where they were asked for."""
    forwards: tuple[ForwardRecord, ...] = field(repr=False)
    """Every decode forward: its block, its predictions and what it made known."""


class Loop(Protocol):
    """Runs what it was given, a forward a step."""

    @property
    def is_idle(self) -> bool: ...

    def step(self) -> object: ...

    def cancel(self, task: Task) -> object:
        """End what runs, as where nobody reads on."""
        ...


class Stream(Iterator[str]):
    """Text deltas of one request, which starts with the first one read.

    Close it (or use it in a ``with``) to stop early; ``result`` reads what is left and gives the whole.
    """

    def __init__(self, model: Model, request: Prepared) -> None:
        self._run = RequestRun(model, request)
        self._deltas = self._iterate(model)

    def __next__(self) -> str:
        return next(self._deltas)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop here; the model is free for the next request."""
        self._deltas.close()

    def result(self) -> Generation:
        """The whole generation; runs what was not yet read.

        Raises:
            EngineError: the request never ran, because the model was busy or the stream was closed first.
        """
        for _ in self._deltas:
            pass
        return self._run.result()

    def _iterate(self, model: Model) -> Generator[str]:  # closing it unwinds the lock
        with model.in_use():
            for delta in self._run.text():
                if delta:
                    yield delta


class RequestRun:
    """One request on its way: a scheduler with nothing else to do, and the text of what it gives."""

    def __init__(self, model: Model, request: Prepared) -> None:
        self._model = model
        self._request = request
        self._eos = model.eos_of(request)
        self._stream = TextStream(model.codec, request.stop)
        self._num_read = 0
        self._delta = ""
        self._new: list[int] = []
        self._task: Task | None = None

    def text(self) -> Iterator[str]:
        """Text deltas, one for each forward."""
        for tokens in self.tokens():
            if not self._request.stop:
                self._read(tokens)
            delta, self._delta = self._delta, ""
            yield delta
        yield self._stream.flush()

    def tokens(self) -> Iterator[list[int]]:
        """New tokens, one list for each forward."""
        stop_cut = self._cut_at_stop if self._request.stop else None
        task, loop = self._model.make_loop(self._request, stop_cut=stop_cut, take=self._take)
        self._task = task
        try:
            while not loop.is_idle:
                loop.step()
                if task.error:
                    raise task.error
                if self._new:
                    new, self._new = self._new, []
                    yield new
        finally:
            loop.cancel(task)  # a stream that is closed early; nothing where it has ended

    def result(self) -> Generation:
        if self._task is None:
            raise EngineError("this request never ran: its model was busy, or it was closed before its first forward")
        decode = self._task.decode
        token_ids = [token for record in decode.records for token in record.new]
        self._read(token_ids[self._num_read :])
        self._stream.flush()
        return Generation(
            text=self._stream.text,
            token_ids=tuple(token_ids),
            finish_reason=decode.finish,
            seed=self._request.sampling.seed,
            logprobs=None if self._request.logprobs is None else tuple(decode.logprobs),
            forwards=tuple(decode.records),
            statistics=self._task.statistics(),
        )

    def _take(self, new: list[int]) -> None:
        self._new = new

    def _cut_at_stop(self, new: list[int]) -> int | None:
        for index in range(len(new)):
            self._read(new[index : index + 1])
            if self._stream.stopped:
                return index + 1
        return None

    def _read(self, tokens: list[int]) -> None:
        """Turn tokens into text; an end-of-sequence token is no text."""
        self._num_read += len(tokens)
        self._delta += self._stream.push([token for token in tokens if token not in self._eos])
