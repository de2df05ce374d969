"""One running request: its tokens, its text, its status and its result."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import monotonic

from cllm_export.errors import EngineError
from cllm_export.runtime.decoding.constraint import GrammarCompiler
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool
from cllm_export.runtime.decoding.drafts.sources import make_proposer
from cllm_export.runtime.decoding.jacobi import Decoder
from cllm_export.runtime.decoding.lookahead.policy import Lookahead
from cllm_export.runtime.decoding.request import Decode, FinishReason, RequestStatus, StopCut, make_decoder
from cllm_export.runtime.decoding.sampling import MAX_SEED, Logprob, Sampler
from cllm_export.runtime.decoding.slot import engine_failure
from cllm_export.runtime.decoding.statistics import ForwardRecord, Statistics
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.decoding.text import TextCodec, TextStream
from cllm_export.runtime.lease import Lease
from cllm_export.runtime.loops import Loop, LoopMaker
from cllm_export.runtime.options import GenerateOptions, ModelLimits, ResolvedRequest, resolve


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of one request."""

    text: str
    """Decoded text without special tokens, cut before a stop string."""
    token_ids: tuple[int, ...]
    """New tokens, including the end-of-sequence token if one was reached."""
    finish_reason: FinishReason
    """``eos``, ``length``, ``stop`` for a stop string, ``deadline`` or ``cancelled``."""
    statistics: Statistics
    seed: int
    """The seed of the sampler. The same request with this seed and the same n gives the same tokens."""
    logprobs: tuple[Logprob, ...] | None = field(repr=False)
    """One for each of ``token_ids``; None if the request did not ask for them."""
    forwards: tuple[ForwardRecord, ...] = field(repr=False)
    """Every decode forward: its block, its predictions and its new tokens."""


Clock = Callable[[], float]
"""Gives seconds, from any start."""


class RequestRun:
    """One running request, for ``Model`` and ``Service`` alike.

    One thread runs its task, and another one may read its text. ``changed`` guards the state that they share.

    Args:
        request: the request to run.
        decoder: the policy that decodes it.
        codec: the model's tokenizer and chat template.
        sampler: draws the tokens; None takes the graph's argmax.
        ended: called once when the request ends, before its status changes.
        clock: the seconds that the deadline is judged by.
    """

    def __init__(
        self,
        request: ResolvedRequest,
        decoder: Decoder,
        *,
        codec: TextCodec,
        sampler: Sampler | None = None,
        ended: Callable[[], None] | None = None,
        clock: Clock = monotonic,
    ) -> None:
        self.request = request
        self.decoder = decoder
        self.status = RequestStatus.WAITING
        self.changed = threading.Condition()
        self.watchers: list[Callable[[], None]] = []
        """Called in the thread that runs the request, when there is something new to read."""
        self._codec = codec
        self._ended = ended
        self._clock = clock
        self._started: float | None = None
        self._new: list[int] = []
        self._text = TextStream(codec, request.stop)
        decode = Decode(
            decoder,
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=request.eos_token_ids,
            stop_cut=self._make_stop_cut() if request.stop else None,
            sampler=sampler,
            num_logprobs=request.logprobs,
        )
        self.task = Task(
            request.prompt, decode, drafts=request.draft_kind, begun=self._begin, take=self._take, ended=self._end
        )

    @property
    def has_news(self) -> bool:
        """Whether ``read`` would return something new. Hold ``changed`` when you ask."""
        return bool(self._new) or self.status.has_ended

    def start_clock(self) -> None:
        """Let the time of the deadline run. It does so from the first call on."""
        if self._started is None:
            self._started = self._clock()

    @property
    def is_due(self) -> bool:
        """Whether the deadline has passed."""
        deadline, started = self.request.deadline, self._started
        return deadline is not None and started is not None and self._clock() - started >= deadline

    def read(self) -> tuple[str, bool]:
        """The text since the last ``read``, and whether the request has ended, so that no more will come."""
        with self.changed:
            new, self._new = self._new, []
            has_ended = self.status.has_ended
        delta = self._text.push(self._without_eos(new))
        return (delta + self._text.flush(), True) if has_ended else (delta, False)

    def drive(self, loops: LoopMaker) -> Generator[None]:
        """Run the request on an otherwise idle engine, one forward per turn. Closing the generator cancels it.

        If its deadline passes, it ends before the next forward.

        Raises:
            CllmExportError: the error of the request; EngineError if the engine failed.
        """
        loop: Loop | None = None
        try:
            loop = loops.make(self.request, self.task, self.decoder)
            self.start_clock()
            self.task.begin()
            while not loop.is_idle:
                if self.is_due:
                    self.task.decode.cancel("deadline")
                    break
                loop.step()
                self.raise_failure()
                yield
        except Exception as error:
            self.task.end(engine_failure(error))
        finally:
            self._leave(loop)
        self.raise_failure()

    def _leave(self, loop: Loop | None) -> None:
        """Cancel what still runs of the request. It ends, even if the engine fails once more."""
        try:
            if loop is not None:
                loop.cancel(self.task)  # does nothing if the task has ended
        except Exception as error:
            self.task.end(engine_failure(error))  # an earlier failure stays the request's error
        self.task.end()

    def raise_failure(self) -> None:
        """Raise the error of the request, if it failed."""
        if self.task.error:
            raise self.task.error

    def result(self) -> Generation:
        """The result, once the request has ended.

        Raises:
            EngineError: the request never ran.
            CllmExportError: the error of the request.
        """
        self.raise_failure()
        decode = self.task.decode
        if decode.finish_reason is None:
            raise EngineError("this request never ran: its model was busy, or it was closed before its first forward")
        token_ids = tuple(self.task.token_ids)
        text = TextStream(self._codec, self.request.stop)
        text.push(self._without_eos(token_ids))
        text.flush()
        return Generation(
            text=text.text,
            token_ids=token_ids,
            finish_reason=decode.finish_reason,
            seed=self.request.seed,
            logprobs=None if self.request.logprobs is None else tuple(decode.logprobs),
            forwards=tuple(decode.records),
            statistics=self.task.statistics(),
        )

    def _begin(self) -> None:
        self.status = RequestStatus.RUNNING

    def _take(self, tokens: list[int]) -> None:
        with self.changed:
            self._new += tokens
            self._notify()

    def _end(self, task: Task) -> None:
        if self._ended:
            self._ended()
        with self.changed:
            if task.error:
                self.status = RequestStatus.FAILED
            else:
                self.status = RequestStatus.CANCELLED if task.is_cancelled else RequestStatus.FINISHED
            self._notify()

    def _notify(self) -> None:
        self.changed.notify_all()
        for watcher in self.watchers:
            watcher()

    def _make_stop_cut(self) -> StopCut:
        """A function that counts the new tokens up to the end of a stop string. It reads them one by one."""
        text = TextStream(self._codec, self.request.stop)

        def cut(new: list[int]) -> int | None:
            for index, token in enumerate(new):
                text.push(self._without_eos([token]))
                if text.stopped:
                    return index + 1
            return None

        return cut

    def _without_eos(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that are text: end-of-sequence tokens are not."""
        return [token for token in tokens if token not in self.request.eos_token_ids]


class Stream(Iterator[str]):
    """Text deltas of one request. The request starts when the first delta is read.

    Close it (or use it in a ``with``) to stop early. Leaving a ``for`` over it, or dropping it, closes it as well.
    ``result`` reads the rest and returns the whole generation, also after single deltas that ``next`` gave.
    """

    def __init__(self, run: RequestRun, loops: LoopMaker, lease: Lease) -> None:
        self._run = run
        self._deltas = _deltas(run, loops, lease)

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._deltas
        finally:
            self.close()

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
        """The whole generation. Runs the request to its end first.

        Raises:
            EngineError: the request never ran, because the model was busy or the stream was closed first.
            CllmExportError: the error of the request.
        """
        for _ in self._deltas:
            pass
        return self._run.result()


def _deltas(run: RequestRun, loops: LoopMaker, lease: Lease) -> Generator[str]:
    """Text deltas of a run that holds the engine. Closing the generator ends the run and releases the engine."""
    with lease.hold(), closing(run.drive(loops)) as forwards:
        for _ in forwards:
            if delta := run.read()[0]:
                yield delta
    if delta := run.read()[0]:
        yield delta


class RequestMaker:
    """Makes the runs of one model's requests, and keeps what they share: the n-gram pool and the grammar compiler.

    Args:
        limits: the model's limits.
        codec: the model's tokenizer and chat template.
        pool: n-grams that requests with the ``pool`` proposer share.
        clock: the seconds that deadlines are judged by.
    """

    def __init__(self, limits: ModelLimits, codec: TextCodec, pool: NgramPool, *, clock: Clock = monotonic) -> None:
        self._limits = limits
        self._codec = codec
        self._pool = pool
        self._clock = clock

    def make(
        self, prompt: list[int], options: GenerateOptions, *, ended: Callable[[], None] | None = None
    ) -> RequestRun:
        """A run that has not started yet. A sampled request without a seed gets a fresh one.

        Raises:
            OptionError: an option is out of range for the model, or a grammar does not compile.
            PromptError: the prompt and its new tokens do not fit.
            MissingExtraError: a grammar is given and its extra is not installed.
        """
        if options.seed is None and options.temperature:
            options = replace(options, seed=secrets.randbelow(MAX_SEED))
        request = resolve(options, self._limits, prompt)
        return RequestRun(
            request,
            self._make_decoder(request),
            codec=self._codec,
            sampler=self._make_sampler(request),
            ended=ended,
            clock=self._clock,
        )

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(
            self._codec, vocab_size=self._limits.vocab_size, eos_token_ids=self._limits.eos_token_ids
        )

    def _make_sampler(self, request: ResolvedRequest) -> Sampler | None:
        if not request.needs_sampler:
            return None
        return Sampler(
            request.sampling,
            prompt=request.prompt,
            vocab_size=self._limits.vocab_size,
            constraint=self._grammars.compile(*request.grammar) if request.grammar else None,
        )

    def _make_decoder(self, request: ResolvedRequest) -> Decoder:
        pad, seed = self._limits.pad_token_id, request.seed
        if request.lookahead:
            proposer = make_proposer(
                request.proposer, prompt=request.prompt, pad_token_id=pad, seed=seed, pool=self._pool
            )
            return Lookahead(prompt=request.prompt, shape=request.lookahead, proposer=proposer)
        return make_decoder(
            request.method, request.prompt, proposer=request.proposer, seed=seed, pad_token_id=pad, pool=self._pool
        )
