"""A service around one engine: requests from any thread or event loop, decoded together in the engine's slots.

One worker thread owns the scheduler and the engine. Callers share only queues with it, and the new tokens in each
handle. Readers never delay decoding: the tokens of a request wait in its handle, and its length limit bounds them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cllm_export.checks import names_options, require_at_least
from cllm_export.errors import EngineError, OptionError, PromptError, QueueFullError
from cllm_export.prompts import split_chat_arguments
from cllm_export.runtime.decoding.batch import MIN_PREFILL_WIDTH
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_target, write_snapshot
from cllm_export.runtime.decoding.prefix.prompt_state import require_prompt_state
from cllm_export.runtime.decoding.request import RequestStatus, require_shareable
from cllm_export.runtime.decoding.scheduler import Scheduler, StepReport
from cllm_export.runtime.decoding.text import Messages
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import PREFILL_ONLY, BlockSize, GenerateOptions, override, resolve_block_size
from cllm_export.runtime.request_run import Generation, RequestRun

log = logging.getLogger(__name__)

DEFAULT_QUEUE_SIZE = 256
T = TypeVar("T")
Watcher = Callable[[StepReport], None]


class Handle:
    """One submitted request. Iterate it (or use ``async for``) for text deltas, or wait for the whole ``result``.

    Iteration ends when the request ends or is cancelled. If the request failed, iteration raises its error. A handle
    is safe to use from any thread, but it can be iterated only once: each delta is returned once.

    A request that nobody waits for any more is cancelled. That is one whose handle was dropped, whose reader left the
    iteration early, or whose ``result`` or ``wait`` was given up.
    """

    def __init__(self, run: RequestRun, *, cancel: Callable[[], None], check_reader: Callable[[], None]) -> None:
        """A handle of a run. It must not be reachable from what the worker holds, or it is never dropped.

        Args:
            run: the request.
            cancel: stops the request. It takes no lock, since a garbage collection calls it in any thread.
            check_reader: raises EngineError where nobody may wait: in the service's worker, and after a fork.
        """
        weakref.finalize(self, cancel).atexit = False
        self._run = run
        self._cancel = cancel
        self._check_reader = check_reader
        self._is_read = False

    @property
    def status(self) -> RequestStatus:
        return self._run.status

    @property
    def done(self) -> bool:
        """Whether the request has ended: finished, failed or cancelled."""
        return self._run.status.has_ended

    def cancel(self) -> None:
        """Stop the request; its slot is free for the next forward. Tokens so far are kept. No effect after its end."""
        self._cancel()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end and return the whole generation. If it was cancelled, ``finish_reason`` is ``cancelled``.

        Whoever stops waiting gives the request up. To look without giving up, ask ``done``.

        Raises:
            TimeoutError: the request has not ended within ``timeout`` seconds, and is cancelled. A second ``result``
                has its tokens so far.
            EngineError: the engine failed, or a watcher called this before the request ended.
            CllmExportError: the error of the request.
        """
        self._require_reader()
        try:
            with self._run.changed:
                if not self._run.changed.wait_for(lambda: self.done, timeout):
                    raise TimeoutError(
                        f"the request has not ended within {timeout} seconds, so it was cancelled: call result() "
                        "again for its tokens so far, or give the request a deadline instead"
                    )
        finally:
            self.cancel()  # does nothing if the request has ended
        return self._run.result()

    async def wait(self) -> Generation:
        """Like ``result``, for an event loop. If the waiting task is cancelled, so is the request.

        Raises:
            EngineError, CllmExportError: as for ``result``.
        """
        self._require_reader()
        try:
            with self._woken(only_at_end=True) as event:
                while not self.done:
                    await event.wait()
        finally:
            self.cancel()
        return self._run.result()

    def __iter__(self) -> Iterator[str]:
        self._start_reading()
        try:
            has_ended = False
            while not has_ended:
                with self._run.changed:
                    self._run.changed.wait_for(lambda: self._run.has_news)
                delta, has_ended = self._run.read()
                if delta:
                    yield delta
        finally:
            self.cancel()  # does nothing if the request has ended
        self._run.raise_failure()

    async def __aiter__(self) -> AsyncIterator[str]:
        self._start_reading()
        try:
            with self._woken() as event:
                has_ended = False
                while not has_ended:
                    event.clear()  # before the read: text that arrives in between sets the event again
                    delta, has_ended = self._run.read()
                    if delta:
                        yield delta
                    if not has_ended:
                        await event.wait()
        finally:
            self.cancel()
        self._run.raise_failure()

    @contextmanager
    def _woken(self, *, only_at_end: bool = False) -> Iterator[asyncio.Event]:
        """An event of the running loop. It is set whenever there is news of the request, or only at its end."""
        run, loop, event = self._run, asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:  # the worker holds it, so it must not hold the handle
            if only_at_end and not run.status.has_ended:
                return
            with suppress(RuntimeError):  # the event loop was closed while a reader was still waiting
                loop.call_soon_threadsafe(event.set)

        with run.changed:
            run.watchers.append(wake)
        try:
            yield event
        finally:
            with run.changed:
                run.watchers.remove(wake)

    def _require_reader(self) -> None:
        if not self.done:
            self._check_reader()

    def _start_reading(self) -> None:
        self._require_reader()
        with self._run.changed:
            if self._is_read:
                raise OptionError("this handle has been iterated already: each delta is handed out once; use result()")
            self._is_read = True


class Service:
    """Decodes many requests at once on a loaded model. A request's result does not depend on the other requests.

    By default all forwards have one n. A request's result is then bit-identical to its result alone in this service.
    With ``auto``, n is chosen for the batch before each forward, for the most tokens per second, among sizes that are
    bit-equal to n = 1 on this engine. Forwards that read prompts have these sizes too. So a request's result is that of
    n = 1, whatever runs beside it.

    Use it in a ``with`` or an ``async with``, or ``close`` it. While it is open, ``Model.generate`` is refused. Make it
    after a fork: its worker does not run in a child process, where every call is refused.

    Args:
        model: a model with as many slots as requests should run at once (``load(path, num_slots=8)``).
        block_size: n of every forward, or ``auto``. By default it is the model's own n.
        queue_size: number of requests that may wait for a slot.
        watch: called in the worker thread after each forward, for metrics. It must be quick and must not raise.

    Raises:
        OptionError: an option is out of range for the model.
        EngineError: the model is in use.
    """

    @names_options
    def __init__(
        self,
        model: Model,
        *,
        block_size: BlockSize | None = None,
        queue_size: int = DEFAULT_QUEUE_SIZE,
        watch: Watcher | None = None,
    ) -> None:
        require_at_least("queue_size", queue_size, 1)
        if not isinstance(model, Model):
            raise OptionError(f"model must be a Model, got {type(model).__name__}: load a bundle first, with num_slots")
        if watch is not None and not callable(watch):
            raise OptionError(f"watch must be a function of a StepReport, got {watch!r}")
        self.model = model
        self.codec = model.codec
        self.block_size = resolve_block_size(block_size, model.limits, deterministic=block_size is None)
        self._queue_size = queue_size
        self._watch = watch
        self._inbox: deque[RequestRun] = deque()
        self._cancelled: deque[RequestRun] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        lock = threading.Lock()
        self._work, self._room = threading.Condition(lock), threading.Condition(lock)
        self._num_open = 0
        self._pid = os.getpid()
        self._timed: list[RequestRun] = []
        """The open requests that have a deadline. Only the worker uses it."""
        self._capacity = model.engine.num_slots + queue_size
        self._is_closed = False
        with ExitStack() as stack:
            stack.enter_context(model.lease.hold())
            self._scheduler = _make_scheduler(model, self.block_size)
            self._closing = stack.pop_all()
        self._worker = threading.Thread(target=self._run, name="cllm-export service", daemon=True)
        self._worker.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Service:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)  # which waits for the forward that runs

    @property
    def num_open(self) -> int:
        """Number of requests that were submitted and have not ended."""
        return self._num_open

    def submit(
        self, prompt: str | Sequence[int] | Messages, options: GenerateOptions | None = None, **overrides: Any
    ) -> Handle:
        """Queue a request and return at once.

        Options and overrides are those of ``Model.generate``, except ``block_size`` and ``deterministic``: the service
        has one n for all requests. Safe from any thread. Keep the handle: a request without one is cancelled.

        Raises:
            PromptError, OptionError: the request is refused before it is queued.
            QueueFullError: the queue is full.
            EngineError: the service is closed, or was made before this process was forked.
        """
        arguments, overrides = split_chat_arguments(overrides)
        self._require_own_process()
        run = self._make_run(prompt, self._override(options, overrides), arguments)
        with self._work:
            self._require_open()
            if self._num_open >= self._capacity:
                raise QueueFullError(self._queue_size)
            self._put(run)
        return self._handle_of(run)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Messages],
        options: GenerateOptions | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Decode prompts together and wait for all of them. Results come in the order of the prompts.

        If the queue is full, it waits for room. Options and overrides are those of ``submit``, and hold for all
        prompts.

        Raises:
            PromptError, OptionError: a request is refused. In this case none was queued.
            EngineError: the engine failed, the service is closed, or a watcher called this.
        """
        self._require_caller()
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise PromptError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
        arguments, overrides = split_chat_arguments(overrides)
        given = self._override(options, overrides)
        runs = [self._make_run(prompt, given, arguments) for prompt in prompts]
        handles = [self._handle_of(run) for run in runs]
        try:
            for run in runs:
                with self._work:
                    self._room.wait_for(lambda: self._num_open < self._capacity or self._is_closed)
                    self._require_open()
                    self._put(run)
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()  # does nothing if it has ended

    def warm_up(self) -> None:
        """Run a forward of the service's shape, so that the first request does not pay for one-time work of the engine.

        Raises:
            EngineError: the engine failed.
        """
        self._require_caller()
        self.submit([self.model.limits.pad_token_id], method="jacobi", max_new_tokens=1, ignore_eos=True).result()

    def save_prefix(self, path: str | Path, prompt: str | Sequence[int] | Messages) -> int:
        """Like ``Model.save_prefix``, while other requests run: the prompt is prefilled as a request of its own.

        Safe from any thread but the worker, in which watchers run.

        Raises:
            PromptError, OptionError, OutputError: as in ``Model.save_prefix``.
            QueueFullError: the queue is full.
            EngineError: the engine failed, or the service is closed.
        """
        self._require_caller()
        state = require_prompt_state(self.model.prompt_state)
        check_target(path)
        tokens = self.model.encode(prompt)
        self.submit(tokens, PREFILL_ONLY).result()
        write_snapshot(path, self._call(lambda: state.snapshot(tokens)))
        return len(tokens)

    def load_prefix(self, path: str | Path) -> int:
        """Like ``Model.load_prefix``, but between two forwards of the running requests.

        Safe from any thread but the worker, in which watchers run.

        Raises:
            SnapshotError, OptionError: as in ``Model.load_prefix``.
            EngineError: the service is closed.
        """
        state = require_prompt_state(self.model.prompt_state)
        snapshot = state.read(path)
        self._call(lambda: state.keep(snapshot))
        return len(snapshot.tokens)

    def close(self) -> None:
        """Cancel all running and waiting requests, stop the worker, and release the model. Safe to call again.

        In a process that was forked after the service was made, it does nothing: the parent has them all.
        """
        if self._is_forked:
            return
        with self._work:
            self._is_closed = True
            self._work.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()
            self._closing.close()

    def _override(self, options: GenerateOptions | None, overrides: Mapping[str, Any]) -> GenerateOptions:
        """The options of a request, with the service's n."""
        given = override(options, overrides)
        for name, is_given in (("block_size", given.block_size is not None), ("deterministic", given.deterministic)):
            if is_given:
                raise OptionError(
                    f"{name} is the service's, one for all its requests: Service(model, block_size=...)", fields=(name,)
                )
        require_shareable(given.method, given.forwards_per_sync)
        return replace(given, block_size=self.block_size)

    def _make_run(
        self, prompt: str | Sequence[int] | Messages, options: GenerateOptions, arguments: Mapping[str, Any]
    ) -> RequestRun:
        run = self.model.requests.make(self.model.encode(prompt, **arguments), options, ended=self._has_ended)
        run.start_clock()
        return run

    def _handle_of(self, run: RequestRun) -> Handle:
        return Handle(run, cancel=partial(self._cancel, run), check_reader=self._require_caller)

    def _put(self, run: RequestRun) -> None:
        self._inbox.append(run)
        self._num_open += 1
        self._work.notify_all()

    def _call(self, function: Callable[[], T]) -> T:
        """Let the worker run a function between two forwards, and return its result."""
        self._require_caller()
        future: Future[T] = Future()
        with self._work:
            self._require_open()
            self._calls.append((function, future))
            self._work.notify_all()
        return future.result()

    def _require_caller(self) -> None:
        """Refuse to wait where it would be forever: in the worker thread for itself, in a forked process for it."""
        self._require_own_process()
        if threading.current_thread() is self._worker:
            raise EngineError("a watcher must not wait for the service whose worker it runs in: ask in another thread")

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._pid

    def _require_own_process(self) -> None:
        """Refuse a forked process before any lock is taken: the parent's worker may have held it at the fork."""
        if self._is_forked:
            raise EngineError(
                "this service was made before the process was forked, and its worker runs only in the parent: load "
                "the model and make the Service after the fork"
            )

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError("the service is closed")

    def _cancel(self, run: RequestRun) -> None:
        """Let the worker cancel a request. It takes no lock, since a dropped handle may call it in any thread.

        The worker need not be woken: it does not sleep while a request is open.
        """
        if not run.status.has_ended:
            self._cancelled.append(run)

    def _has_ended(self) -> None:
        with self._work:
            self._num_open -= 1
            self._room.notify_all()

    def _run(self) -> None:
        """Body of the worker thread, the only one that uses the scheduler and the engine."""
        while self._collect():
            report = self._scheduler.step()
            if report and self._watch:
                self._tell(report)

    def _tell(self, report: StepReport) -> None:
        try:
            if self._watch:
                self._watch(report)
        except Exception:
            log.exception("the service's watcher failed, and is not called again")
            self._watch = None

    def _collect(self) -> bool:
        """Wait for work and hand it to the scheduler. Returns False once the service is closed."""
        with self._work:
            self._work.wait_for(lambda: self._is_closed or self._inbox or self._calls or not self._scheduler.is_idle)
            arrived, calls = list(self._inbox), list(self._calls)
            for queue in (self._inbox, self._calls):
                queue.clear()
            is_closed = self._is_closed
        for run in arrived:
            self._scheduler.submit(run.task)
        self._timed += [run for run in arrived if run.request.deadline is not None]
        self._end_early()
        for function, future in calls:
            _run_call(function, future)
        if is_closed:
            self._scheduler.cancel_all()
        return not is_closed

    def _end_early(self) -> None:
        """Cancel the requests that were given up, and end those whose deadline has passed."""
        while self._cancelled:
            self._scheduler.cancel(self._cancelled.popleft().task)
        for run in self._timed:
            if run.is_due:
                self._scheduler.cancel(run.task, "deadline")
        self._timed = [run for run in self._timed if not run.status.has_ended]


def _run_call(function: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # it is raised in the caller's thread
        future.set_exception(error)


def _make_scheduler(model: Model, block_size: BlockSize) -> Scheduler:
    """A scheduler whose reading forwards follow from n.

    A fixed n prefills in chunks of n. If n is at most half of MIN_PREFILL_WIDTH, wider prefill-only forwards alternate
    with decode-only forwards. The same holds where ``auto`` means one n. Where it chooses among several, a chunk has
    one of these sizes, up to MIN_PREFILL_WIDTH: they are bit-equal to n = 1, and other widths were not compared. The
    model's largest n is an upper limit of this width.
    """
    wide = min(MIN_PREFILL_WIDTH, model.limits.max_block_size)
    sizes = (block_size,) if isinstance(block_size, int) else model.loops.settle_auto().sizes
    if len(sizes) > 1:
        widest = min(wide, model.engine.prefill_chunk)
        return model.loops.make_scheduler(
            block_size, reading_widths=[size for size in sorted({1, *sizes}) if size <= widest]
        )
    return model.loops.make_scheduler(block_size, alternate_width=wide if sizes[0] <= wide // 2 else None)
